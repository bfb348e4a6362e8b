"""prime-rl's adapter: its calling convention, and its formulas in float64, from its sources."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_fast.integrations import prime_rl
from tests.support.hosts import agrees, clipped, fractional_batch, mean, parameters, with_fractions


@dataclass
class LossInputs:
    """The inputs of prime-rl's losses: tensors (n,) of one sequence."""

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


def test_a_mask_of_fractions_weighs(device):
    """prime-rl's masks are bools, and its weights are another argument: both are weights here."""
    batch = fractional_batch(device)
    b = row(batch)
    weights = 2 * torch.rand(6, device=b.A.device)

    def ours(x, given):
        inputs = prime_inputs(x, given, weights)
        inputs.loss_mask = b.weights
        out = prime_rl.default_loss(inputs, dppo_mask_low=0.05, dppo_mask_high=0.1, kl_tau=0.02)
        return out.loss, out.metrics

    def formula(x, b):
        d = x - b.rollout
        moved = x.detach().exp() - b.rollout.exp()
        keep = torch.where(b.A > 0, moved <= 0.1, moved >= -0.05)
        return ((-b.A * d.exp() * keep + 0.02 * d**2) * b.mask * weights.to(x.dtype)).sum()

    (metrics,) = agrees(ours, with_fractions(formula), b)
    moved = b.logp.exp() - b.rollout.exp()
    dropped = torch.where(b.A > 0, moved > 0.1, moved < -0.05)
    want = (dropped * b.weights).sum() / b.weights.sum()
    assert metrics["is_masked"].item() == pytest.approx(want.item())
