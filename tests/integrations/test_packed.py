"""The adapters of prime-rl, AReaL, xtuner: calling conventions, and the hosts' formulas in float64.

The formulas are written out from the sources of the release that docs/integrations.md names.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.integrations import areal, prime_rl, xtuner
from tests.support.hosts import agrees, clipped, host_batch, mean, parameters, sequence_mean


@pytest.fixture
def batch(device):
    return host_batch(device)


@dataclass
class LossInputs:
    """As prime-rl's: tensors (n,) of one sequence."""

    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = field(default=None)


@dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict[str, Any]


def row(b, i=0):
    return SimpleNamespace(**{name: x[i] for name, x in vars(b).items()})


def prime_inputs(x, b, weights=None):
    weights = None if weights is None else weights.to(x.dtype)
    return LossInputs(x, b.rollout, b.old, b.A, b.mask, weights)


def prime_formula(keep, kl_tau, adv_tau, weights=None):
    def formula(x, b):
        d = x - b.rollout
        moved = x.detach().exp() - b.rollout.exp()
        loss = -adv_tau * b.A * d.exp() * keep(moved, b.A) + kl_tau * d**2
        return (loss * b.mask * (1 if weights is None else weights.to(x.dtype))).sum()

    return formula


@pytest.mark.parametrize("weighted", [False, True])
def test_prime_rl_ipo(weighted, batch, backend):
    b = row(batch)
    weights = torch.rand(6, device=b.A.device) if weighted else None

    def ours(x, b):
        inputs = prime_inputs(x, b, weights)
        out = prime_rl.ipo_loss(inputs, ipo_threshold=0.15, adv_tau=0.7, kl_tau=0.02)
        assert type(out) is LossOutputs
        return out.loss, out.metrics

    formula = prime_formula(lambda moved, A: moved.abs() <= 0.15, 0.02, 0.7, weights)
    (metrics,) = agrees(ours, formula, b)
    moved = b.logp.exp() - b.rollout.exp()
    d = b.logp - b.rollout
    assert metrics["is_masked"].item() == pytest.approx(mean(moved.abs() > 0.15, b.mask))
    kept = b.mask & (moved.abs() <= 0.15)
    want = mean(d.exp() - d - 1, kept)
    assert metrics["unmasked_mismatch_kl"].item() == pytest.approx(want, rel=1e-5)


def test_prime_rl_default(batch, backend):
    b = SimpleNamespace(**{name: x.reshape(-1) for name, x in vars(batch).items()})

    def ours(x, b):
        out = prime_rl.default_loss(
            prime_inputs(x, b), dppo_mask_low=0.05, dppo_mask_high=0.1, adv_tau=0.7, kl_tau=0.02
        )
        return out.loss, out.metrics

    def keep(moved, A):
        return torch.where(A > 0, moved <= 0.1, moved >= -0.05)

    (metrics,) = agrees(ours, prime_formula(keep, 0.02, 0.7), b)
    moved = b.logp.exp() - b.rollout.exp()
    dropped = ~keep(moved, b.A)
    for name, x, mask in (
        ("is_masked", dropped, b.mask),
        ("is_masked_high", (b.A > 0) & (moved > 0.1), b.mask),
        ("is_masked_low", (b.A < 0) & (moved < -0.05), b.mask),
        ("masked_advantage_positive", b.A > 0, b.mask & dropped),
    ):
        assert metrics[name].item() == pytest.approx(mean(x, mask))
    assert metrics["is_masked"] > 0


def test_prime_rl_any_objective(batch):
    """A preset by name, summed; the ratio is to the sampler, the KL to the reference."""
    b = row(batch)
    options = {"beta": 0.1, "kl": "k2", "epsilon_high": 0.3}

    def formula(x, b):
        loss = clipped(x - b.rollout, 2 * b.A, 0.2, 0.3) + 0.1 * (x - b.old) ** 2 / 2
        return (loss * b.mask).sum()

    def ours(x, b):
        return prime_rl.loss(prime_inputs(x, b), preset="bnpo", adv_tau=2.0, **options).loss

    agrees(ours, formula, b)
    with pytest.raises(ValueError, match="'nothing' is unknown"):
        prime_rl.loss(prime_inputs(b.logp, b), preset="nothing")
    assert parameters(prime_rl.ipo_loss)[0] == parameters(prime_rl.loss)[0] == "inputs"


XTUNER = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.28}


@pytest.mark.parametrize(
    "changes", [{}, {"clip_ratio_c": 1.5}, {"log_prob_diff_min": -1.0, "log_prob_diff_max": 1.0}]
)
def test_xtuner(changes, batch, backend):
    config = XTUNER | changes
    share = torch.where(batch.mask, torch.rand_like(batch.A), 0)
    high = config.get("log_prob_diff_max", 20.0)

    def flat(x):
        return x.reshape(1, -1)

    def formula(x, b):
        d = (x - b.old).clamp(-high, high)
        loss = clipped(d, b.A, 0.2, 0.28, config.get("clip_ratio_c", 3.0))
        return (loss * share.to(x.dtype)).sum()

    def ours(x, b):
        return xtuner.policy_loss(*map(flat, (x, b.old, b.A, share)), config)

    agrees(ours, formula, batch)
    assert xtuner.policy_loss(*map(flat, (batch.logp, batch.old, batch.A, share)), config).ndim == 0


def test_xtuner_conventions(batch):
    assert parameters(xtuner.policy_loss) == [
        "log_prob",
        "old_log_prob",
        "advantages",
        "loss_weights",
        "policy_loss_cfg",
    ]
    tensors = (batch.logp, batch.old, batch.A, batch.mask.float())
    with pytest.raises(ValueError, match="'cliprange_high' is missing"):
        xtuner.policy_loss(*tensors, {"cliprange_low": 0.2})
    inf = torch.inf
    for low, high in (
        (-3.0, 20.0),
        (-20.0, inf),
        (inf, inf),
        (-inf, -inf),
        (-inf, -1.0),
        (0.0, 0.0),
    ):
        clamp = {"log_prob_diff_min": low, "log_prob_diff_max": high}
        with pytest.raises(
            ValueError, match=f"log_prob_diff_min={low}, log_prob_diff_max={high}: want"
        ):
            xtuner.policy_loss(*tensors, XTUNER | clamp)
    above = XTUNER | {"log_prob_diff_min": -inf}
    torch.testing.assert_close(
        xtuner.policy_loss(*tensors, above), xtuner.policy_loss(*tensors, XTUNER)
    )
    with pytest.raises(
        ValueError, match=r"dual_clip: .*0\.5 \(xtuner/vanilla: dual_clip is clip_ratio_c"
    ):
        xtuner.policy_loss(*tensors, XTUNER | {"clip_ratio_c": 0.5})


@pytest.mark.parametrize("bounds", [(-torch.inf, torch.inf), (None, torch.inf), (-torch.inf, 25.0)])
def test_an_xtuner_clamp_without_a_bound(bounds, batch):
    """No clamp at all, or one from above: ratios far below e^-20 and above e^20 are what they are."""
    low, high = bounds
    config = XTUNER | {"log_prob_diff_min": low, "log_prob_diff_max": high, "clip_ratio_c": 1e12}
    batch.old[0, 0], batch.old[3, 0] = batch.logp[0, 0] - 23, batch.logp[3, 0] + 23
    batch.A[0, 0], batch.A[3, 0] = -0.5, 1.0
    weights = batch.mask.float()

    def formula(x, b):
        d = (x - b.old).clamp(-torch.inf, torch.inf if high is None else high)
        return (clipped(d, b.A, 0.2, 0.28, 1e12) * b.mask).sum()

    agrees(lambda x, b: xtuner.policy_loss(x, b.old, b.A, weights, config), formula, batch)


def areal_terms(x, old, b, level):
    """(log-ratio, advantages) of AReaL's level."""
    if level == "token":
        return x - old, b.A
    return sequence_mean(x - old, b.mask), sequence_mean(b.A, b.mask)


def packed(b):
    """The live tokens of the rows end to end, and their boundaries."""
    lengths = b.mask.sum(1).cumsum(0)
    cu_seqlens = torch.nn.functional.pad(lengths, (1, 0)).int()
    return SimpleNamespace(**{k: x[b.mask] for k, x in vars(b).items()}), cu_seqlens


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("c_clip", [None, 2.0])
def test_areal_ppo(level, c_clip, batch, backend):
    def formula(x, b):
        d, A = areal_terms(x, b.old, b, level)
        return (clipped(d, A, 0.2, 0.28, c_clip) * b.mask).sum() / b.mask.sum()

    def ours(x, b):
        return areal.ppo_actor_loss_fn(
            logprobs=x,
            proximal_logprobs=b.old,
            old_logprobs=b.rollout,
            advantages=b.A,
            eps_clip=0.2,
            eps_clip_higher=0.28,
            c_clip=c_clip,
            loss_mask=b.mask,
            importance_sampling_level=level,
        )

    (stat,) = agrees(ours, formula, batch)
    d, A = areal_terms(batch.logp, batch.old, batch, level)
    loss = clipped(d, A, 0.2, 0.28, c_clip).expand_as(batch.A)
    torch.testing.assert_close(stat["loss"][batch.mask], loss[batch.mask])
    ratio = d.exp().expand_as(batch.A)
    torch.testing.assert_close(stat["importance_weight"][batch.mask], ratio[batch.mask])
    assert (stat["importance_weight"][~batch.mask] == 0).all()
    outside = ((ratio > 1.28) & (A > 0)) | ((ratio < 0.8) & (A < 0))
    assert (stat["clip_mask"] == (outside & batch.mask)).all()
    counts = {"n_total_tokens": 30.0, "n_valid_tokens": 15.0, "n_masked_tokens": 15.0}
    for name, value in (counts | {"masked_token_ratio": 0.5}).items():
        assert stat[name] == value
        assert type(stat[name]) is float
    dual = (ratio > (c_clip or torch.inf)) & (A < 0) & batch.mask
    assert (stat["dual_clip_mask"] == dual).all()

    # Packed, the same: the loss, and each statistic's live tokens.
    flat, cu_seqlens = packed(batch)
    loss, stat_packed = areal.ppo_actor_loss_fn(
        flat.logp,
        flat.old,
        flat.rollout,
        flat.A,
        0.2,
        flat.mask,
        0.28,
        c_clip,
        None,
        level,
        cu_seqlens,
    )
    torch.testing.assert_close(loss, ours(batch.logp, batch)[0])
    torch.testing.assert_close(stat_packed["loss"], stat["loss"][batch.mask])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_areal_sapo(level, batch, backend):
    def formula(x, b):
        d, A = areal_terms(x, b.old, b, level)
        tau = torch.where(A > 0, 1.0, 1.05)
        loss = -A * (4 / tau) * (tau * (d.exp() - 1)).sigmoid()
        return (loss * b.mask).sum() / b.mask.sum()

    def ours(x, b):
        return areal.sapo_loss_fn(x, b.old, b.A, 1.0, 1.05, b.mask, level)

    (stat,) = agrees(ours, formula, batch)
    d, A = areal_terms(batch.logp, batch.old, batch, level)
    gate = 4 * (d.exp() - 1).sigmoid().expand_as(batch.A)
    torch.testing.assert_close(stat["sapo_scaled_gate_pos"][batch.mask], gate[batch.mask])
    want = (-stat["sapo_soft_gate"] * A)[batch.mask]
    torch.testing.assert_close(stat["loss"][batch.mask], want)


def test_areal_cispo(batch, backend):
    def formula(x, b):
        r = (x - b.old).exp().clamp(0.0, 2.5).detach()
        return (-r * b.A * x * b.mask).sum() / b.mask.sum()

    def ours(x, b):
        return areal.cispo_loss_fn(x, b.old, b.A, 1.0, b.mask, 1.5)

    (stat,) = agrees(ours, formula, batch)
    r = (batch.logp - batch.old).exp()
    assert (stat["clip_mask"] == ((r > 2.5) & batch.mask)).all()
    assert stat["clip_mask"].any()
    loss = -r.clamp(0, 2.5) * batch.A * batch.logp
    torch.testing.assert_close(stat["loss"][batch.mask], loss[batch.mask])
    assert "n_valid_tokens" not in stat  # AReaL counts them for PPO alone
    with pytest.raises(ValueError, match="eps_clip_higher: want a positive number, got None"):
        areal.cispo_loss_fn(batch.logp, batch.old, batch.A, 0.2, batch.mask)


def test_areal_rejects_with_its_own_code(batch, monkeypatch):
    """Tokens that are rejected leave the sum and not the mean; the others are weighed."""
    home = "areal.utils.functional.functional"
    for i in range(home.count(".") + 1):
        name = ".".join(home.split(".")[: i + 1])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    keep = batch.mask & (batch.old > batch.rollout)

    def apply_rejection_sampling(proximal_logprobs, old_logprobs, loss_mask, cu_seqlens, config):
        assert config == "options"
        weight = (proximal_logprobs - old_logprobs).exp()
        return SimpleNamespace(loss_mask=keep, behave_imp_weight=weight, filtered_fraction=0.25)

    sys.modules[home].apply_rejection_sampling = apply_rejection_sampling

    def formula(x, b):
        loss = clipped(x - b.old, b.A, 0.2, 0.2) * (b.old - b.rollout).exp()
        return torch.where(keep, loss, 0).sum() / b.mask.sum()

    def ours(x, b):
        return areal.ppo_actor_loss_fn(
            x, b.old, b.rollout, b.A, 0.2, b.mask, rejection_sampling="options"
        )

    (stat,) = agrees(ours, formula, batch)
    assert stat["filtered_fraction"] == 0.25
    # Of the tokens that count before any is rejected, as AReaL's actor averages them.
    r, A = (batch.logp - batch.old).exp(), batch.A
    torch.testing.assert_close(stat["importance_weight"], torch.where(batch.mask, r, 0))
    outside = ((r > 1.2) & (A > 0)) | ((r < 0.8) & (A < 0))
    assert (stat["clip_mask"] == (outside & batch.mask)).all()
    assert (stat["clip_mask"] & ~keep).any()
    assert stat["n_valid_tokens"] == batch.mask.sum()
    assert (stat["behave_mask"] == keep).all()
    gap = (batch.old - batch.rollout)[keep]
    torch.testing.assert_close(stat["behave_approx_kl"][keep], gap)

    def cispo(x, b):
        options = {"old_logprobs": b.rollout, "rejection_sampling": "options"}
        return areal.cispo_loss_fn(x, b.old, b.A, 1.0, b.mask, 1.5, **options)[0]

    def weighed(x, b):
        r = (x - b.old).exp().clamp(0.0, 2.5).detach() * (b.old - b.rollout).exp()
        return torch.where(keep, -r * b.A * x, 0).sum() / b.mask.sum()

    agrees(cispo, weighed, batch)


def test_areal_conventions(batch, monkeypatch):
    assert parameters(areal.ppo_actor_loss_fn) == [
        "logprobs",
        "proximal_logprobs",
        "old_logprobs",
        "advantages",
        "eps_clip",
        "loss_mask",
        "eps_clip_higher",
        "c_clip",
        "rejection_sampling",
        "importance_sampling_level",
        "cu_seqlens",
    ]
    with pytest.raises(ValueError, match="'sentence' is unknown"):
        areal.sapo_loss_fn(batch.logp, batch.old, batch.A, 1.0, 1.0, batch.mask, "sentence")
    flat, _ = packed(batch)
    with pytest.raises(ValueError, match="cu_seqlens: needed"):
        areal.sapo_loss_fn(flat.logp, flat.old, flat.A, 1.0, 1.0, flat.mask, "sequence")
    with pytest.raises(ImportError, match=r"AReaL >= 1\.0"):
        areal.patch()
    for i in range(areal.ACTOR.count(".") + 1):
        name = ".".join(areal.ACTOR.split(".")[: i + 1])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    actor = sys.modules[areal.ACTOR]
    actor.ppo_actor_loss_fn = actor.sapo_loss_fn = None
    areal.patch()
    assert not hasattr(actor, "cispo_loss_fn")
    actor.cispo_loss_fn = None
    areal.patch()
    assert actor.cispo_loss_fn is areal.cispo_loss_fn
    assert actor.ppo_actor_loss_fn is areal.ppo_actor_loss_fn
    assert actor.sapo_loss_fn is areal.sapo_loss_fn


def test_areal_workers_start_with_our_losses(tmp_path):
    """On a stand-in for AReaL: the server has its arguments, and the actor our functions."""
    server = (
        "import sys\nfrom areal.trainer.ppo import actor\n"
        "print(__name__, sys.argv[1:], actor.ppo_actor_loss_fn.__module__, actor.sapo_loss_fn.__module__)"
    )
    for name, text in (
        ("trainer/ppo/actor", "ppo_actor_loss_fn = sapo_loss_fn = None"),
        ("infra/rpc/rpc_server", server),
    ):
        path = tmp_path / "areal" / f"{name}.py"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    root = Path(areal.__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-m", "grpo_fast.integrations.areal", "--role", "actor"],
        env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
    )
    ours = "grpo_fast.integrations.areal"
    assert out.stdout == f"__main__ ['--role', 'actor'] {ours} {ours}\n", out.stderr


def test_presets_are_what_the_adapters_compute(batch):
    """The same names in `Objective.preset`: no adapter has options of its own."""
    loss = reference.policy_loss(
        batch.logp,
        advantages=batch.A,
        mask=batch.mask,
        old_logps=batch.old,
        objective=Objective.preset("areal/grpo"),
    )
    ours, _ = areal.ppo_actor_loss_fn(
        batch.logp, batch.old, batch.rollout, batch.A, 0.2, batch.mask
    )
    torch.testing.assert_close(ours, loss)
