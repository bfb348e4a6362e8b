"""OpenRLHF's actors get our loss in their own processes: on a stand-in laid out as 0.11.2."""

import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_fast.integrations import openrlhf

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = {
    "__init__": "",
    "trainer/__init__": "",
    "trainer/ray/__init__": "",
    "trainer/ray/ppo_actor": """
class PolicyLoss:
    def __init__(self, **options):
        pass

class ActorPPOTrainer:
    def __init__(self, strategy, actor=None):
        self.args = strategy.args
        self.actor_loss_fn = PolicyLoss(clip_eps_low=self.args.actor.eps_clip_low_high[0])
""",
    "cli/__init__": "",
    "cli/train_ppo_ray": """
import sys
from openrlhf.trainer.ray import ppo_actor
print(__name__, sys.argv[1:], ppo_actor.ActorPPOTrainer.loss_of_grpo_fast.__module__)
""",
}
METADATA = "openrlhf-0.11.2.dist-info/METADATA"
ARGS = SimpleNamespace(
    actor=SimpleNamespace(
        eps_clip_low_high=[0.1, 0.3],
        dual_clip=3.0,
        loss_agg_mode="seq-mean",
        policy_loss_type="ppo",
    ),
    algo=SimpleNamespace(
        advantage=SimpleNamespace(
            is_correction_level="token",
            is_correction_mode="clip",
            is_correction_gating="ratio",
            is_correction_threshold=[0.8, 1.2],
        )
    ),
)


@pytest.fixture
def host(tmp_path, monkeypatch):
    """The folder of the stand-in, importable here."""
    for name in [name for name in sys.modules if name.split(".")[0] == "openrlhf"]:
        monkeypatch.delitem(sys.modules, name)
    for name, text in STAND_IN.items():
        write(tmp_path / "openrlhf" / f"{name}.py", text)
    write(tmp_path / METADATA, "Name: openrlhf\nVersion: 0.11.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "openrlhf"]:
        del sys.modules[name]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_trainer_has_our_loss_with_its_options(host):
    home = importlib.import_module(openrlhf.ACTOR)
    theirs = home.ActorPPOTrainer
    openrlhf.patch()
    openrlhf.patch()  # once
    assert home.ActorPPOTrainer.__bases__ == (theirs,)
    loss = home.ActorPPOTrainer(SimpleNamespace(args=ARGS), actor=None).actor_loss_fn
    assert type(loss) is openrlhf.PolicyLoss
    assert loss.options == {"epsilon_low": 0.1, "epsilon_high": 0.3, "dual_clip": 3.0}
    assert not loss.token_level_loss
    assert (loss.is_correction_level, loss.is_correction_mode) == ("token", "clip")
    assert (loss.is_correction_gating, loss.is_correction_threshold) == ("ratio", [0.8, 1.2])


def test_the_choices_are_openrlhfs():
    default = openrlhf.PolicyLoss()
    named = openrlhf.PolicyLoss(is_correction_level="off", is_correction_mode="mask")
    assert default.is_correction_level == named.is_correction_level == "off"


def test_it_travels_by_value(host):
    """Ray sends what cannot be imported by its name as it is, where the others are imported anew."""
    home = importlib.import_module(openrlhf.ACTOR)
    openrlhf.patch()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(home.ActorPPOTrainer)


def test_another_openrlhf_is_refused(host):
    write(host / METADATA, "Name: openrlhf\nVersion: 0.12.0\n")
    with pytest.raises(ImportError, match=r"openrlhf >= 0\.11\.2, < 0\.12; openrlhf 0\.12\.0"):
        openrlhf.patch()


def test_the_command_line_is_openrlhfs(host):
    out = subprocess.run(
        [sys.executable, "-m", "grpo_fast.integrations.openrlhf", "--actor.dual_clip", "3"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{host}"},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    want = "__main__ ['--actor.dual_clip', '3'] grpo_fast.integrations.openrlhf\n"
    assert out.stdout == want
