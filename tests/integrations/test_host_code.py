"""The adapters beside the loss functions of their hosts' own code, where that is at hand."""

import re
import sys
from pathlib import Path

import pytest

from grpo_fast.integrations import areal
from tests.support import host_cases, host_matrix, host_sources

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    f"{source.host} {source.release}": source
    for host in host_sources.HOSTS
    for source in host_sources.sources(host)
}
ABSENT = [host for host in host_sources.HOSTS if not host_sources.sources(host)]


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    """Other tests compare the two backends."""
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")


@pytest.mark.filterwarnings("ignore")  # of the hosts
@pytest.mark.parametrize("name", SOURCES)
def test_losses_gradients_and_metrics_are_the_hosts(name):
    happened = host_cases.run_all(SOURCES[name])
    wrong = {case: what for case, what in happened.items() if host_cases.is_wrong(what)}
    assert not wrong, "\n".join(f"{case}: {what}" for case, what in wrong.items())
    assert sum(not what for what in happened.values()) > 0.9 * len(happened)
    host = host_sources.HOSTS[SOURCES[name].host]
    left = [x for x in sys.modules if x.split(".")[0] in {host.package, "ray", "megatron"}]
    assert not left, "other tests would import these"


@pytest.mark.parametrize("host", ABSENT)
def test_where_the_code_of_a_host_comes_from(host):
    if host_sources.HOSTS[host].wheel:
        pytest.skip(f"no wheel of {host} in {host_sources.BESIDE} (make setup)")
    pytest.skip(f"no wheel has {host}'s loss: {host_sources.FOLDERS} names a folder of checkouts")


def rows():
    """(trainer, release, code, cases) of each line of the page's table."""
    part = host_matrix.PAGE.read_text().split(host_matrix.BEGIN)[1].split(host_matrix.END)[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")][2:]  # a heading, TRL
    return [[cell.strip() for cell in line.split("|")[1:5]] for line in lines]


def test_the_table_of_the_page_is_of_these_cases():
    found = {host: [] for host in host_matrix.NAMES}
    for trainer, release, how, cases in rows():
        host = next(key for key, name in host_matrix.NAMES.items() if name == trainer)
        found[host].append((release, how))
        again = f"{host} has other cases: python -m tests.support.host_matrix --save"
        assert int(re.findall(r"\d+", cases)[-1]) == len(host_cases.CASES[host]), again
    assert all(found.values()), found
    assert found.keys() == host_sources.HOSTS.keys() == host_cases.CASES.keys()
    pins = (ROOT / "constraints.txt").read_text()
    for host, releases in found.items():
        wheels = [release for release, how in releases if how == host_matrix.HOW["wheel"]]
        assert len(wheels) == host_sources.HOSTS[host].wheel
        for release in wheels:
            assert f"\n{host_sources.HOSTS[host].package}=={release}\n" in pins


def test_a_wrong_loss_is_noticed(monkeypatch):
    """The comparison can fail: with a loss that is a thousandth too large, or a metric."""

    class Home:
        """Stands for AReaL's functions: ours, slightly wrong."""

        factor, extra = 1.0, 0.0

        @classmethod
        def ppo_actor_loss_fn(cls, **options):
            loss, stat = areal.ppo_actor_loss_fn(**options)
            return cls.factor * loss, stat | {"approx_kl": stat["approx_kl"] + cls.extra}

    def run():
        host_cases.CASES["areal"]["ppo, token"]({"areal.utils.functional.functional": Home})

    run()
    for name, value in (("factor", 1.001), ("extra", 0.001)):
        with monkeypatch.context() as patch:
            patch.setattr(Home, name, value)
            with pytest.raises(AssertionError):
                run()
