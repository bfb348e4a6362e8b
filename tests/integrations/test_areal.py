"""AReaL's adapter: its calling convention, and its formulas in float64, from its sources."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.integrations import areal
from tests.support.hosts import (
    agrees,
    clipped,
    fractional_batch,
    parameters,
    sequence_mean,
    with_fractions,
)


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
        *(flat.logp, flat.old, flat.rollout, flat.A, 0.2, flat.mask),
        eps_clip_higher=0.28,
        c_clip=c_clip,
        importance_sampling_level=level,
        cu_seqlens=cu_seqlens,
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
    """The server of a stand-in for AReaL has its arguments, and the actor has our functions."""
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
    """`Objective.preset` has the same names: no adapter has options of its own."""
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


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_mask_of_fractions_weighs(level, device):
    """AReaL's own functions take bools. Here a floating mask is one of weights."""
    batch = fractional_batch(device)

    def formula(x, b):
        d, A, w = x - b.old, b.A, b.mask
        if level == "sequence":
            count = w.sum(1, keepdim=True).clamp(min=1e-9)
            d, A = ((y * w).sum(1, keepdim=True) / count for y in (d, A))
        return (clipped(d, A, 0.2, 0.2) * w).sum() / w.sum()

    def ours(x, b):
        options = {"importance_sampling_level": level}
        return areal.ppo_actor_loss_fn(x, b.old, b.rollout, b.A, 0.2, batch.weights, **options)

    (stat,) = agrees(ours, with_fractions(formula), batch)
    assert stat["n_valid_tokens"] == batch.mask.sum()
    flat, cu_seqlens = packed(batch)
    loss, _ = areal.ppo_actor_loss_fn(
        flat.logp,
        flat.old,
        flat.rollout,
        flat.A,
        0.2,
        flat.weights,
        importance_sampling_level=level,
        cu_seqlens=cu_seqlens,
    )
    torch.testing.assert_close(loss, ours(batch.logp, batch)[0])
