"""The time of calls on the host: kernels are compiled and launched, by a driver that runs none."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

from benchmarks.report import experiments

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C compiler")


def run(*command):
    """What a module of the benchmarks prints, run as by a user: nothing is interpreted."""
    mine = ("TRITON_INTERPRET", "GRPO_FAST_")
    settings = {name: x for name, x in os.environ.items() if not name.startswith(mine)}
    found = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=settings, capture_output=True, text=True
    )
    assert not found.returncode, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """What a run wrote."""
    out = tmp_path_factory.mktemp("host_time") / "host.json"
    only = ("--only", "policy_loss", "--only", "logprob")
    run("benchmarks.host_time", "--rounds", "5", "--out", str(out), *only)
    return json.loads(out.read_text())


def test_every_kernel_is_launched(document):
    """The weights of tokens, the loss and the statistics; log-probs and their gradient."""
    rows = {row["call"]: row for row in document["rows"]}
    kernels = {name: row["kernels"] for name, row in rows.items()}
    assert kernels == {"policy_loss": 3, "policy_loss, GSPO": 3, "logprob": 2}
    for row in rows.values():
        assert 0 < row["min"] <= row["median"] < 1
        assert row["rounds"] == 5
    assert 0 < rows["logprob"]["until_logits_are_read"] < rows["logprob"]["median"]
    assert "until_logits_are_read" not in rows["policy_loss"]


def test_the_report_shows_the_rows(document):
    text = "".join(experiments.section([document], []))
    assert "#### Time on the host" in text
    assert "#### Experiments" not in text
    assert "**time on the host**" in text
    assert "until logits are read" in text
    assert "| policy_loss, GSPO |" in text


def test_launches_of_all_sizes_compile():
    """Of one kernel here; the program compiles them all."""
    lines = run("benchmarks.run.bounds", "--compile", "token_statistics").splitlines()
    assert int(lines[-1].removesuffix(" launches")) == len(lines) - 1 > 2
