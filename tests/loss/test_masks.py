"""Masks as weights: sum m l / sum m, in every reduction, mean over a sequence, and metric."""

import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.diagnostics import token_diagnostics
from grpo_fast.loss import grpo_loss, linear_grpo_loss, policy_loss
from grpo_fast.ops import logprob
from grpo_fast.testing import assert_as_accurate
from grpo_fast.weights import importance_weights
from tests.support.cases import batch, in_double, loss_and_grad, packed
from tests.support.objectives import OBJECTIVES, by_objective

# On the kernels, what tells them apart; the losses on log-probs run all objectives there, too.
SOME = ["default", "entropy by tokens", "gspo", "gmpo", "vespo", "everything"]
PAIRS = {f"torch-{name}": ("torch", x) for name, x in OBJECTIVES.items()}
PAIRS |= {f"triton-{name}": ("triton", OBJECTIVES[name]) for name in SOME}
by_backend_and_objective = pytest.mark.parametrize(
    ("backend", "objective"), PAIRS.values(), ids=PAIRS, indirect=["backend"]
)


def weighed(B, T, V, device):
    """The tests' batch with weights in the place of ones, one sequence of which weighs less than 1."""
    logits, ids, arguments = batch(B, T, V, device)
    weights = torch.rand(B, T).to(device) + 0.1
    weights[0] *= 0.1
    arguments["mask"] = torch.where(arguments["mask"], weights, 0)
    return logits, ids, arguments


def of_objective(objective, arguments):
    if not objective.beta:
        arguments = {name: x for name, x in arguments.items() if name != "ref_logps"}
    return {**arguments, "objective": objective}


def compare(function, x, *rest, **arguments):
    ours = loss_and_grad(function, x, *rest, upstream=-1.5, **arguments)
    name = function.__name__
    twin = getattr(reference, name)
    baseline, truth = (
        loss_and_grad(twin, y, *rest, upstream=-1.5, **a)
        for y, a in ((x, arguments), (x.double(), in_double(arguments)))
    )
    for what, a, b, t in zip(("loss", "gradient"), ours, baseline, truth, strict=True):
        assert_as_accurate(a, b, t, name=what)


def loss_metrics_and_grad(function, x, *rest, **arguments):
    x = x.detach().clone().requires_grad_()
    out = function(x, *rest, **arguments)
    (grad,) = torch.autograd.grad(out.loss, x)
    return out.loss.detach(), out.metrics, grad


@by_backend_and_objective
def test_losses_on_logits(objective, backend, device):
    logits, ids, arguments = weighed(5, 6, 60, device)
    compare(grpo_loss, logits, ids, **of_objective(objective, arguments))


@by_objective
def test_losses_on_log_probs(objective, backend, device):
    logits, ids, arguments = weighed(5, 6, 60, device)
    live = arguments["mask"] != 0
    clean = torch.where(live[..., None], logits, 0)
    logps = reference.logprob(clean, torch.where(live, ids, 0))
    given = of_objective(objective, arguments)
    if objective.needs_entropy:
        given["entropy"] = reference.entropy(clean)
    compare(policy_loss, torch.where(live, logps, torch.nan), **given)


@by_objective
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("backend", ["torch"], indirect=True)  # the kernels are those of logits
def test_losses_on_hidden_states(compact, objective, backend, device):
    _, ids, arguments = weighed(5, 6, 60, device)
    live = arguments["mask"] != 0
    hidden, weight = torch.randn(5, 6, 8, device=device), torch.randn(60, 8, device=device)
    given = of_objective(objective, arguments)
    want = loss_and_grad(lambda x, **a: grpo_loss(x @ weight.T, ids, **a), hidden, **given)
    hidden = torch.where(live[..., None], hidden, torch.nan)
    got = loss_and_grad(linear_grpo_loss, hidden, weight, ids, compact=compact, **given)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got[1], want[1].nan_to_num(), rtol=1e-4, atol=1e-6)


def test_top_entropy_of_the_tokens_that_take_part(device):
    """Their shares are those of the rows that the head reads, not of all rows."""
    objective = Objective(
        top_entropy_quantile=0.5, entropy_coef=0.02, entropy_reduction="token_mean"
    )
    test_losses_on_hidden_states(True, objective, None, device)


@by_backend_and_objective
def test_packed_is_padded(objective, backend, device):
    _, _, arguments = weighed(5, 6, 60, device)
    weights, live = arguments["mask"], arguments["mask"] != 0
    logps = -torch.rand(5, 6, device=device) - 0.1
    entropy = torch.rand(5, 6, device=device)
    given = of_objective(objective, arguments)
    if objective.needs_entropy:
        given["entropy"] = entropy
    names = [name for name, x in given.items() if getattr(x, "ndim", 0) == 2 and name != "mask"]
    *want, grad = loss_metrics_and_grad(policy_loss, logps, **given)
    boundaries, _, flat, share, grad, *rest = packed(
        live, logps, weights, grad, *(given[name] for name in names)
    )
    given |= {"mask": share, "cu_seqlens": boundaries, **dict(zip(names, rest, strict=True))}
    got = loss_metrics_and_grad(policy_loss, flat, **given)
    torch.testing.assert_close(got, (*want, grad), rtol=1e-5, atol=1e-6)


@by_backend_and_objective
@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8], ids=str)
def test_ones_and_integers_are_bools(dtype, objective, backend, device):
    logits, ids, arguments = batch(4, 5, 30, device)
    given = of_objective(objective, arguments)
    want = loss_metrics_and_grad(grpo_loss, logits, ids, **given)
    factor = 1 if dtype.is_floating_point else 3
    given["mask"] = factor * arguments["mask"].to(dtype)
    got = loss_metrics_and_grad(grpo_loss, logits, ids, **given)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_metrics_are_weighted_means(backend, device):
    logps, old = (-torch.rand(3, 4, device=device) for _ in range(2))
    weights = torch.tensor([[0.5, 0, 2, 1], [0, 0, 0, 0], [0.1, 0.1, 0, 0]], device=device)
    A = torch.tensor([1.0, -1.0, -1.0], device=device)
    objective = Objective(epsilon_low=0.05, epsilon_high=0.05, beta=0.1, kl="k2")
    given = {"advantages": A, "old_logps": old, "ref_logps": old - 0.2, "mask": weights}
    out = policy_loss(logps, objective=objective, **given)
    d, m = (logps - old).double(), weights.double()
    ratio, n = d.exp(), m.sum()
    want = {
        "tokens": n,
        "ratio_mean": (m * ratio).sum() / n,
        "ratio_max": ratio[m > 0].max(),
        "clip_fraction_low": (m * ((ratio < 0.95) & (A[:, None] < 0))).sum() / n,
        "clip_fraction_high": (m * ((ratio > 1.05) & (A[:, None] > 0))).sum() / n,
        "approx_kl_k1": (m * -d).sum() / n,
        "approx_kl_k3": (m * (ratio - 1 - d)).sum() / n,
        "kl": (m * (old - 0.2 - logps).double().square() / 2).sum() / n,
        "effective_sample_size": (m * ratio).sum() ** 2 / (n * (m * ratio**2).sum()),
    }
    for name, value in want.items():
        torch.testing.assert_close(out.metrics[name].double(), value, rtol=1e-5, atol=1e-6)


def test_weights_of_sequences_and_diagnostics(device):
    old, new = (-torch.rand(3, 4, device=device) for _ in range(2))
    m = torch.rand(3, 4, device=device)
    d = old - new
    rho = importance_weights(old, new, mask=m, level="geometric")
    torch.testing.assert_close(rho, ((m * d).sum(1) / m.sum(1)).exp()[:, None])
    rho = importance_weights(old, new, mask=m, level="sequence")
    torch.testing.assert_close(rho, (m * d).sum(1).exp()[:, None])
    objective = Objective(ratio="sequence")
    found = token_diagnostics(old, new, torch.ones_like(d), mask=m, objective=objective)
    want = ((m * d).sum(1) / m.sum(1))[:, None].expand(3, 4)
    torch.testing.assert_close(found.log_ratio, want)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (-0.5, r"mask: -0\.5 at \(1, 2\).*>= 0$"),
        (torch.nan, r"mask: nan at \(1, 2\).*>= 0$"),
        (torch.inf, r"mask: inf at \(1, 2\).*>= 0$"),
        (-torch.inf, r"mask: -inf at \(1, 2\).*additive"),
        (torch.finfo(torch.float32).min, r"mask: -3\.4.*additive"),
    ],
)
def test_values_that_cannot_weigh_are_refused(value, match, backend, device, monkeypatch):
    monkeypatch.setenv("GRPO_FAST_VALIDATE", "1")
    logits, ids, arguments = batch(3, 4, 20, device, garbage=False)
    mask = torch.zeros(3, 4, device=device)
    mask[1, 2] = value
    arguments["mask"] = mask
    hidden, weight = torch.randn(3, 4, 5, device=device), torch.randn(20, 5, device=device)
    calls = [
        lambda: grpo_loss(logits, ids, **arguments),
        lambda: linear_grpo_loss(hidden, weight, ids, **arguments),
        lambda: policy_loss(arguments["old_logps"], **arguments),
        lambda: logprob(logits, ids, mask=mask),
        lambda: importance_weights(arguments["old_logps"], arguments["ref_logps"], mask=mask),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=match):
            call()
