import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.loss import grpo_loss, policy_loss
from grpo_fast.ops import logprob
from grpo_fast.ops.policy_loss import STATISTICS, token_statistics
from grpo_fast.testing import assert_as_accurate
from tests.cases import batch, in_double, loss_and_grad
from tests.properties import given, settings, st
from tests.test_grpo import by_objective


def case(B, T, device, drift=0.3, garbage=True):
    _, _, arguments = batch(B, T, 3, device, drift=drift, garbage=garbage)
    logps = -torch.rand(B, T, device=device) * 3
    mask = arguments["mask"]
    for name in ("old_logps", "ref_logps"):
        arguments[name] = logps + drift * torch.randn(B, T, device=device)
        if garbage:
            arguments[name] = torch.where(mask, arguments[name], torch.nan)
    return torch.where(mask, logps, torch.nan) if garbage else logps, arguments


def check(logps, arguments, upstream=1.0):
    actual = loss_and_grad(policy_loss, logps, upstream=upstream, **arguments)
    baseline = loss_and_grad(reference.policy_loss, logps, upstream=upstream, **arguments)
    truth = loss_and_grad(
        reference.policy_loss, logps.double(), upstream=upstream, **in_double(arguments)
    )
    for name, a, b, t in zip(("loss", "dlogps"), actual, baseline, truth, strict=True):
        assert_as_accurate(a, b, t, name=name)


@by_objective
@pytest.mark.parametrize("drift", [0.1, 2.0])
def test_every_objective(objective, drift, backend, device):
    logps, arguments = case(5, 300, device, drift)
    if objective.entropy_coef:
        arguments["entropy"] = torch.rand(5, 300, device=device)
    check(logps, {**arguments, "objective": objective}, upstream=-2.5)


@settings(max_examples=25)
@given(
    B=st.integers(1, 6),
    T=st.integers(1, 700),
    drift=st.floats(0, 3),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_any_shape(B, T, drift, low, high, seed, backend, device):
    torch.manual_seed(seed)
    logps, arguments = case(B, T, device, drift)
    objective = Objective(epsilon_low=low, epsilon_high=high, beta=0.1, dual_clip=1.7)
    check(logps, {**arguments, "objective": objective})


def test_equals_grpo_loss_on_its_own_log_probs(backend, device):
    logits, ids, arguments = batch(4, 5, 300, device)
    for objective in (Objective(beta=0.1), Objective(beta=0.1, entropy_coef=0.1)):
        arguments["objective"] = objective
        fused, grad = loss_and_grad(grpo_loss, logits, ids, **arguments)

        def composed(x, arguments=arguments):
            logp, entropy = logprob(x, ids, mask=arguments["mask"], return_entropy=True)
            return policy_loss(logp, entropy=entropy, **arguments)

        loss, dlogits = loss_and_grad(composed, logits)
        torch.testing.assert_close(loss, fused, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(dlogits, grad, rtol=1e-4, atol=1e-7)


def test_gradient_in_the_entropy(backend, device):
    logps, arguments = case(3, 4, device)
    mask = arguments["mask"]
    entropy = torch.where(mask, 1.0, torch.nan).requires_grad_()
    arguments["objective"] = Objective(entropy_coef=0.5, reduction="token_mean")
    policy_loss(logps, entropy=entropy, **arguments).loss.backward()
    torch.testing.assert_close(entropy.grad, torch.where(mask, -0.5 / mask.sum(), 0.0))


def test_half_precision_log_probs_are_taken_as_they_are(backend, device):
    logps, arguments = case(3, 4, device, garbage=False)
    rounded = logps.bfloat16()
    want = policy_loss(rounded.float(), **arguments)
    x = rounded.requires_grad_()
    out = policy_loss(x, **arguments)
    out.loss.backward()
    torch.testing.assert_close(out.loss, want.loss, rtol=0, atol=0)
    assert x.grad.dtype == torch.bfloat16


def test_clip_flags_say_which_side(backend, device):
    old = torch.zeros(1, 6, device=device)
    logps = torch.tensor([[-1.0, -1.0, 0.0, 0.0, 1.0, 1.0]], device=device)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0]], device=device)
    out = policy_loss(
        logps, advantages=advantages, old_logps=old, objective=Objective(dual_clip=2.0)
    )
    metrics = {k: v.item() for k, v in out.metrics.items()}
    assert metrics["clip_fraction_low"] == pytest.approx(1 / 6)  # ratio < 0.8, A < 0
    assert metrics["clip_fraction_high"] == pytest.approx(1 / 6)  # ratio > 1.2, A > 0
    assert metrics["clip_fraction_dual"] == pytest.approx(1 / 6)  # ratio e > 2, A < 0


@pytest.mark.parametrize("N", [1, 1000, 1024, 5000, 70_000])
def test_statistics_match_float64(N, backend, device):
    """Many programs fold into one vector; checked entry by entry against sums in float64."""
    mask = torch.rand(N, device=device) > 0.3
    mask[0] = True
    real = {
        name: torch.where(mask, torch.randn(N, device=device), torch.nan)
        for name in ("loss", "logp", "old", "kl", "entropy")
    }
    weights = torch.where(mask, torch.rand(N, device=device) * 3, torch.nan)
    clip = torch.randint(0, 8, (N,), dtype=torch.int8, device=device)
    got = token_statistics(
        mask, real["loss"], real["logp"], real["old"], weights, real["kl"], real["entropy"], clip
    )
    x = {name: value[mask].double() for name, value in real.items()}
    w, flags = weights[mask].double(), clip[mask]
    d = x["logp"] - x["old"]
    want = {
        "tokens": mask.sum(),
        "loss": x["loss"].sum(),
        "ratio": d.exp().sum(),
        "k1": -d.sum(),
        "k3": (d.exp() - 1 - d).sum(),
        "clip_low": (flags & 1 != 0).sum(),
        "clip_high": (flags & 2 != 0).sum(),
        "clip_dual": (flags & 4 != 0).sum(),
        "kl": x["kl"].sum(),
        "entropy": x["entropy"].sum(),
        "importance": w.sum(),
        "importance_outside": ((w < 0.5) | (w > 2)).sum(),
        "rho": (d.exp() * w).sum(),
        "rho_squared": (d.exp() * w).square().sum(),
        "ratio_min": d.exp().min(),
        "ratio_max": d.exp().max(),
    }
    for name, value in zip(STATISTICS, got.double(), strict=True):
        torch.testing.assert_close(value, want[name].double(), rtol=3e-5, atol=3e-3, msg=name)
