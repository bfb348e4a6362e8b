"""The KL terms where their parts cancel or overflow, against arithmetic with 120 digits."""

import math

import mpmath
import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.diagnostics import kl_estimate
from grpo_fast.loss import policy_loss
from tests.support.cases import loss_and_grad

GAPS = [
    0.0,
    1e-7,
    -1e-6,
    1e-5,
    -1e-4,
    1e-3,
    -0.03,
    0.3,
    -0.9,
    1.1,
    1.9,
    -1.9,
    -3,
    7.9,
    8.1,
    18,
    30,
    60,
    80,
    -90,
]
EVERY_RATIO = [
    {},
    {"ratio": "sequence"},
    {"ratio": "sequence_token"},
    {"surrogate": "gmpo"},
    {"log_ratio_clip": 0.05},
    {"ratio": "sequence", "log_ratio_max": 0.01},
    {"kl_gap_clip": 20.0},
    {"kl_value_clip": 10.0},
    {"ratio": "sequence", "kl_gap_clip": 20.0, "kl_value_clip": 1000.0},
]


def objective_of(options, **more):
    options = {"kl": "k3_unbiased", "beta": 0.1, "reduction": "sequence_sum", **options, **more}
    return Objective(**options)


def exact(value):
    """A float32 number as it is."""
    return mpmath.mpf(float(value))


def kl_loss(logps, old, refs, advantages, objective):
    """beta times the sum of r (e^q - q - 1) over one sequence; numbers of 120 digits."""
    own = [x - y for x, y in zip(logps, old, strict=True)]
    if objective.surrogate == "gmpo":
        low, high = objective.epsilon_low, objective.epsilon_high
        bounded = [
            min(x, high) if a > 0 else max(x, -low) for x, a in zip(own, advantages, strict=True)
        ]
        own = [sum(bounded) / len(bounded)] * len(own)
    elif objective.ratio != "token":
        own = [sum(own) / len(own)] * len(own)
    low, high = objective.log_ratio_bounds
    total = mpmath.mpf(0)
    for d, x, ref in zip(own, logps, refs, strict=True):
        d = d if high is None else min(d, exact(high))
        d = d if low is None else max(d, exact(low))
        q = ref - x
        if objective.kl_gap_clip is not None:
            q = max(min(q, objective.kl_gap_clip), -objective.kl_gap_clip)
        k3 = mpmath.expm1(q) - q
        if objective.kl_value_clip is not None:
            k3 = min(k3, objective.kl_value_clip)
        total += mpmath.exp(d) * k3
    return mpmath.mpf(objective.beta) * total


def slopes(logps, old, refs, advantages, objective):
    """The derivative of `kl_loss` in each log-prob, by differences of 1e-40."""
    found, h = [], mpmath.mpf(10) ** -40
    for t in range(len(logps)):
        if objective.ratio == "sequence_token":  # the mean has the slope of its own token alone
            mean = sum(x - y for x, y in zip(logps, old, strict=True)) / len(logps)
            one = objective_of({"beta": objective.beta})
            ends = [
                kl_loss([logps[t] + e], [logps[t] - mean], [refs[t]], [1], one) for e in (-h, h)
            ]
        else:
            ends = [
                kl_loss(
                    [x + e * (s == t) for s, x in enumerate(logps)],
                    old,
                    refs,
                    advantages,
                    objective,
                )
                for e in (-h, h)
            ]
        found.append((ends[1] - ends[0]) / (2 * h))
    return found


def sequence(gaps, drift):
    """(log-probs, old ones, references), (1, T) float32, near 0 so that their differences are exact."""
    logps = torch.tensor([[-0.5, -0.25, -1.0, -0.125, -2.0][: len(gaps)]])
    old = logps - torch.tensor([drift[: len(gaps)]])
    return logps, old, logps + torch.tensor([gaps])


def kl_and_grad(fn, logps, old, refs, objective, advantages):
    """Loss and gradient of the KL alone: an importance weight of 0 leaves the surrogate out."""
    arguments = {
        "advantages": advantages,
        "old_logps": old,
        "ref_logps": refs,
        "importance_weights": torch.zeros_like(advantages),
        "objective": objective,
    }
    loss, grad = loss_and_grad(fn, logps, **arguments)
    return loss.double().cpu(), grad.double().cpu()


def assert_close(got, want, rounding):
    for x, y in zip(got.flatten().tolist(), want, strict=True):
        assert abs(x - y) <= rounding * abs(y) + 1e-30, (x, float(y))


@pytest.fixture(params=["torch", "triton", "reference"])
def implementation(request, monkeypatch):
    """The loss on each set of kernels and that of the specification, with the dtype of its numbers."""
    if request.param == "reference":
        return reference.policy_loss, torch.float64
    monkeypatch.setenv("GRPO_FAST_BACKEND", request.param)
    if request.param == "triton":
        pytest.importorskip("triton", reason="the kernels need Triton")
    return policy_loss, torch.float32


@pytest.mark.parametrize("options", EVERY_RATIO, ids=str)
def test_unbiased_k3_of_single_tokens(options, implementation, device):
    """Sequences of one token: whatever the ratio is of, the gradient is -r q, at every gap."""
    objective = objective_of(options)
    fn, dtype = implementation
    rounding = 1e-5 if dtype == torch.float32 else 1e-9
    for gap in GAPS:
        for drift in (0.0, 0.03125, -0.125):
            x = [y.to(device, dtype) for y in sequence([gap], [drift])]
            advantages = torch.ones(1, 1, device=device, dtype=dtype)
            loss, grad = kl_and_grad(fn, *x, objective, advantages)
            digits = [[exact(z) for z in y[0]] for y in x]
            with mpmath.workdps(120):
                assert_close(loss, [kl_loss(*digits, [1], objective)], rounding)
                assert_close(grad, slopes(*digits, [1], objective), rounding)


@pytest.mark.parametrize("options", EVERY_RATIO, ids=str)
@pytest.mark.parametrize(
    "gaps", [[18.0, 0.5], [0.25, -0.5, 30.0, 29.5, 1.0], [1e-4, 2e-4, -1e-3]], ids=str
)
def test_unbiased_k3_of_sequences(options, gaps, implementation, device):
    """The parts through the token and through the mean of its sequence go different ways."""
    objective = objective_of(options)
    fn, dtype = implementation
    rounding = 1e-5 if dtype == torch.float32 else 1e-9
    x = [y.to(device, dtype) for y in sequence(gaps, [0.03125, -0.125, 0.0, 0.5, -0.5])]
    advantages = torch.ones(1, len(gaps), device=device, dtype=dtype)
    loss, grad = kl_and_grad(fn, *x, objective, advantages)
    digits = [[exact(z) for z in y[0]] for y in x]
    with mpmath.workdps(120):
        weights = [1] * len(gaps)
        assert_close(loss, [kl_loss(*digits, weights, objective)], rounding)
        assert_close(grad, slopes(*digits, weights, objective), rounding)


@pytest.mark.parametrize("packed", [False, True])
def test_a_gap_whose_exponential_overflows(packed, backend, device):
    """Far from the reference the loss is infinite in float32; the gradient of a lone token is not."""
    for ratio in ("token", "sequence", "sequence_token"):
        for gap in (95.0, 200.0, 1e4):
            x = [y.to(device) for y in sequence([gap], [0.0])]
            arguments = {"advantages": torch.ones(1, device=device)}
            if packed:
                x = [y[0] for y in x]
                arguments["cu_seqlens"] = torch.tensor([0, 1], device=device)
            arguments |= {"old_logps": x[1], "ref_logps": x[2]}
            objective = objective_of({"ratio": ratio})
            loss, grad = loss_and_grad(policy_loss, x[0], **arguments, objective=objective)
            assert loss.item() == math.inf
            assert grad.item() == pytest.approx(-0.1 * gap - 1)


def test_a_ratio_that_underflows_where_the_gap_overflows(backend, device):
    """r = e^-110 is 0 and e^110 is inf, their product 1."""
    x = [y.to(device) for y in sequence([110.0], [-110.0])]
    loss, grad = kl_and_grad(policy_loss, *x, objective_of({}), torch.ones(1, 1, device=device))
    assert loss.item() == pytest.approx(0.1)
    assert grad.item() == pytest.approx(0, abs=1e-30)
    deep = [y.double() for y in x]
    loss, grad = kl_and_grad(
        reference.policy_loss, *deep, objective_of({}), torch.ones_like(deep[0])
    )
    assert loss.item() == pytest.approx(0.1)


def test_infinite_tokens_beside_finite_ones(backend, device):
    """The mean of a sequence has infinite gradients of the right sign, and no NaN."""
    x = [y.to(device) for y in sequence([95.0, 0.5], [0.0, 0.0])]
    loss, grad = kl_and_grad(
        policy_loss, *x, objective_of({"ratio": "sequence"}), torch.ones(1, 2, device=device)
    )
    assert loss.item() == math.inf
    assert grad.tolist() == [[-math.inf, math.inf]]


def test_k3_of_small_gaps(implementation, device):
    """The value is q^2 / 2, the gradient -q, however small q is."""
    fn, dtype = implementation
    for gap in GAPS:
        logps, old, refs = (y.to(device, dtype) for y in sequence([gap], [0.0]))
        q = exact(refs.item()) - exact(logps.item())
        objective = objective_of({"kl": "k3"})
        loss, grad = kl_and_grad(fn, logps, old, refs, objective, torch.ones_like(logps))
        with mpmath.workdps(120):
            beta = mpmath.mpf(0.1)
            assert_close(loss, [beta * (mpmath.expm1(q) - q)], 2e-6)
            assert_close(grad, [-beta * mpmath.expm1(q)], 2e-6)
            if fn is policy_loss:
                value = kl_estimate(logps, refs)
                assert_close(value, [mpmath.expm1(q) - q], 2e-6)


@pytest.mark.parametrize("d", [0.0, 2.0**-20, -(2.0**-13), 2.0**-7, -0.5, 3.0])
def test_the_metric_of_small_log_ratios(d, backend, device):
    logps = torch.full((2, 3), -0.5, device=device)
    out = policy_loss(logps, advantages=torch.ones(2, device=device), old_logps=logps - d)
    want = mpmath.expm1(d) - d
    assert out.metrics["approx_kl_k3"].item() == pytest.approx(float(want), rel=2e-6)


def test_packed_sequences_of_one_token_are_those_of_their_own(backend, device):
    """Among others: what comes through a mean stays in its sequence."""
    gaps = torch.tensor([18.0, 0.5, 30.0, -2.0, 7.0], device=device)
    logps = torch.full((5,), -1.0, device=device)
    arguments = {"old_logps": logps - 0.125, "ref_logps": logps + gaps}
    arguments |= {"advantages": torch.zeros(4, device=device)}
    arguments["cu_seqlens"] = torch.tensor([0, 1, 3, 4, 5], device=device)
    objective = objective_of({"ratio": "sequence"})
    _, grad = loss_and_grad(policy_loss, logps, **arguments, objective=objective)
    want = -0.1 * math.exp(0.125) * gaps / 4
    for t in (0, 3, 4):
        assert grad[t].item() == pytest.approx(want[t].item(), rel=2e-6)
