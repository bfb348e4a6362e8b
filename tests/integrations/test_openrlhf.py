"""OpenRLHF's adapter: its formulas in float64, from its sources, and the way into its actors.

The actors are those of a stand-in for the package, laid out as 0.11.2.
"""

import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grpo_fast.integrations import openrlhf
from tests.support.hosts import (
    CORRECTIONS,
    agrees,
    clipped,
    fractional_batch,
    mean,
    parameters,
    sequence_mean,
    with_fractions,
)


def openrlhf_statistic(options, b):
    """Return the values that are compared with the thresholds, per token or (B, 1)."""
    by_ratio = options.get("is_correction_gating", "ratio") == "ratio"
    statistic = b.old - b.rollout
    if not by_ratio:
        p, q = (y.exp().clamp(1e-6, 1 - 1e-6) for y in (b.rollout, b.old))
        statistic = (p - q).abs()
        if options["is_correction_gating"] == "binary_kl":
            statistic = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    if options["is_correction_level"] == "seq":
        statistic = sequence_mean(statistic, b.mask)
    return statistic.exp() if by_ratio else statistic


def openrlhf_formula(options, batch_info):
    kind = options.get("policy_loss_type", "ppo")
    level = options.get("is_correction_level", "off")
    low, high = options.get("is_correction_threshold", (0.5, 5.0))

    def weights(b):
        if level == "off" or kind == "gspo":
            return 1.0
        d, statistic = b.old - b.rollout, openrlhf_statistic(options, b)
        if options.get("is_correction_mode") == "clip":
            return statistic.clamp(low, high)
        return torch.where((statistic >= low) & (statistic <= high), d.exp(), 0)

    def formula(x, b):
        d = (x - b.old).clamp(-20, 20)
        if kind == "gspo":
            d = sequence_mean(x - (b.old if level == "off" else b.rollout), b.mask)
        loss = clipped(d, b.A, 0.2, 0.28, options.get("dual_clip")) * weights(b) * b.mask
        dp = batch_info.get("dp_size", 1)
        if kind == "ppo" and options.get("token_level_loss", True):
            tokens = batch_info.get("batch_num_tokens")
            return loss.sum() / (b.mask.sum() if tokens is None else tokens / dp)
        by_sequence = loss.sum(1) / b.mask.sum(1).clamp(min=1)
        sequences = batch_info.get("global_batch_size")
        return by_sequence.sum() / (b.mask.any(1).sum() if sequences is None else sequences / dp)

    return formula


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize(
    "info", [{}, {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 7}]
)
def test_openrlhf(kind, correction, info, batch):
    for extra in ({}, {"dual_clip": 3.0}, {"token_level_loss": False}):
        options = {"policy_loss_type": kind, "clip_eps_high": 0.28, **correction, **extra}
        loss = openrlhf.PolicyLoss(**options)
        clip, kl, rollout_kl, dropped = agrees(
            lambda x, b, loss=loss: loss(x, b.old, b.A, b.mask, b.rollout, **info),
            openrlhf_formula(options, info),
            batch,
        )
        corrected = kind == "ppo" and correction.get("is_correction_level", "off") != "off"
        assert (rollout_kl is not None) == (dropped is not None) == corrected
        assert kl.item() == pytest.approx(mean(batch.old - batch.logp, batch.mask), rel=1e-5)
        if corrected:
            want = mean(batch.rollout - batch.old, batch.mask)
            assert rollout_kl.item() == pytest.approx(want, rel=1e-5)
        assert 0 < clip < 1


@pytest.mark.parametrize(
    "correction", CORRECTIONS[1:], ids=lambda c: "-".join(map(str, c.values()))
)
@pytest.mark.parametrize(
    "field, value", [("rollout", torch.nan), ("rollout", -torch.inf), ("old", 1.0)]
)
def test_openrlhf_rejects_what_it_cannot_measure(correction, field, value, batch):
    """A statistic that is NaN is within no bounds: the token, or its sequence, is dropped."""
    options = {"clip_eps_high": 0.28, **correction}
    loss = openrlhf.PolicyLoss(**options)
    getattr(batch, field)[3, 1] = value
    x = batch.logp.clone().requires_grad_()
    got, *_, share = loss(x, batch.old, batch.A, batch.mask, batch.rollout)
    if correction.get("is_correction_mode") == "clip" and field == "rollout" and value != value:
        assert got.isnan()  # a clamp keeps it
        assert share == openrlhf_share(options, batch)
        return
    want = openrlhf_formula(options, {})(x, batch)
    torch.testing.assert_close(got, want)
    if want.isfinite():  # a divergence may keep a token whose ratio is infinite
        for a, b in zip(*(torch.autograd.grad(y, x)[0] for y in (got, want)), strict=True):
            torch.testing.assert_close(a, b)
    assert share.item() == pytest.approx(openrlhf_share(options, batch).item())


def openrlhf_share(options, b):
    """Return the share that OpenRLHF reports as filtered; a sequence without a live token counts as kept."""
    low, high = options.get("is_correction_threshold", (0.5, 5.0))
    statistic = openrlhf_statistic(options, b)
    outside = ~((statistic >= low) & (statistic <= high))
    if options.get("is_correction_mode") == "clip":
        outside = (statistic < low) | (statistic > high)
    if options["is_correction_level"] == "seq":
        return outside.float().mean()
    return (outside * b.mask).sum() / b.mask.sum()


def test_openrlhf_metrics(batch):
    loss = openrlhf.PolicyLoss(is_correction_level="token", is_correction_threshold=(0.8, 1.3))
    _, clip, _, _, dropped = loss(batch.logp, batch.old, batch.A, batch.mask, batch.rollout)
    r, rho = (batch.logp - batch.old).exp(), (batch.old - batch.rollout).exp()
    outside = ((r > 1.2) & (batch.A > 0)) | ((r < 0.8) & (batch.A < 0))
    assert clip.item() == pytest.approx(mean(outside, batch.mask))
    assert dropped.item() == pytest.approx(mean((rho < 0.8) | (rho > 1.3), batch.mask))


def test_openrlhf_conventions(batch):
    assert parameters(openrlhf.PolicyLoss)[:6] == [
        "clip_eps_low",
        "clip_eps_high",
        "dual_clip",
        "token_level_loss",
        "policy_loss_type",
        "is_correction_level",
    ]
    assert parameters(openrlhf.PolicyLoss.forward)[1:] == [
        "log_probs",
        "old_log_probs",
        "advantages",
        "action_mask",
        "rollout_log_probs",
        "dp_size",
        "batch_num_tokens",
        "global_batch_size",
    ]
    for options, message in (
        ({"policy_loss_type": "grpo"}, "policy_loss_type='grpo'"),
        ({"dual_clip": 0.5}, "dual_clip"),
        ({"clip_eps_low": -0.1}, "epsilon_low: .*-0.1 .*epsilon_low is clip_eps_low"),
        (
            {"is_correction_level": "token", "is_correction_threshold": (2.0, 0.5)},
            r"is_correction_threshold: want \(low, high\).*\(2\.0, 0\.5\)",
        ),
        ({"is_correction_mode": "clip", "is_correction_level": "seq"}, "needs is_correction_level"),
        ({"is_correction_gating": "tv", "is_correction_level": "seq"}, "bounded from above"),
    ):
        with pytest.raises(ValueError, match=message):
            openrlhf.PolicyLoss(**options)
    openrlhf.PolicyLoss(is_correction_gating="tv", is_correction_threshold=None)  # off
    with pytest.raises(TypeError, match=r"enable_vllm_is_correction.*openrlhf >= 0\.11\.2"):
        openrlhf.PolicyLoss(enable_vllm_is_correction=False)  # what 0.11.0 passes
    with pytest.raises(ValueError, match="rollout_log_probs: needed"):
        openrlhf.PolicyLoss(is_correction_level="token")(batch.logp, batch.old, batch.A, batch.mask)


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


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("token_level", [True, False])
def test_a_mask_of_fractions_weighs(correction, token_level, device):
    batch = fractional_batch(device)
    options = {"clip_eps_high": 0.28, "token_level_loss": token_level, **correction}
    loss = openrlhf.PolicyLoss(**options)
    clip, kl, _, share = agrees(
        lambda x, b: loss(x, b.old, b.A, batch.weights, b.rollout),
        with_fractions(openrlhf_formula(options, {})),
        batch,
    )
    r, A, w = (batch.logp - batch.old).exp(), batch.A, batch.weights
    outside = ((r > 1.28) & (A > 0)) | ((r < 0.8) & (A < 0))
    assert clip.item() == pytest.approx(((outside * w).sum() / w.sum()).item())
    gap = batch.old - batch.logp
    assert kl.item() == pytest.approx(((gap * w).sum() / w.sum()).item(), rel=1e-5)
    if share is not None:
        b = SimpleNamespace(**vars(batch) | {"mask": w})
        assert share.item() == pytest.approx(openrlhf_share(options, b).item())
