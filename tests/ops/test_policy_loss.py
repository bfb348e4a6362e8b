import functools
import math

import pytest
import torch

from grpo_fast import Objective, records, reference
from grpo_fast.loss import grpo_loss, policy_loss
from grpo_fast.metrics import METRICS, STATISTICS, metrics_from
from grpo_fast.ops import logprob
from grpo_fast.ops.policy_loss import token_statistics
from grpo_fast.ops.top_entropy import top_entropy_mask
from grpo_fast.records import Outputs
from grpo_fast.testing import assert_as_accurate
from tests.support.cases import batch, in_double, loss_and_grad
from tests.support.objectives import OBJECTIVES, by_objective
from tests.support.properties import given, settings, st

# The loss of a token depends on that token alone. Not "k3_unbiased": its KL term takes the ratio, unweighted.
BY_TOKEN = [x for x in OBJECTIVES.values() if x.by_token and x.kl != "k3_unbiased"]


def case(B, T, device, drift=0.3, garbage=True):
    _, _, arguments = batch(B, T, 3, device, drift=drift, garbage=garbage)
    logps = -torch.rand(B, T).to(device) * 3
    mask = arguments["mask"]
    for name in ("old_logps", "ref_logps"):
        arguments[name] = logps + drift * torch.randn(B, T).to(device)
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
    if objective.needs_entropy:
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


@pytest.mark.parametrize("layout", ["per token", "per sequence", "default"])
def test_topr_goes_by_the_score(layout, backend, device):
    """A score of a sequence that its advantage contradicts decides which weight its tokens have."""
    logps = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]], device=device)
    old = torch.tensor([[-2.0, -0.5], [-2.0, -0.5]], device=device)
    advantages = torch.tensor([0.5, 0.25], device=device)
    scores = torch.tensor([-1.0, 1.0], device=device)
    objective = Objective(
        surrogate="topr", topr_weight_pos=3.0, topr_weight_neg=2.0, reduction="sequence_sum"
    )
    arguments = {"advantages": advantages, "old_logps": old, "objective": objective}
    if layout != "default":
        arguments["scores"] = scores if layout == "per sequence" else scores[:, None].expand(2, 2)
    grad = loss_and_grad(policy_loss, logps, **arguments)[1]
    low = 2.0 * torch.tensor([1.0, torch.tensor(-0.5).exp()], device=device)
    high = torch.full((2,), 3.0, device=device)
    first = high if layout == "default" else low
    want = -torch.stack([0.5 * first, 0.25 * high]) / 2
    torch.testing.assert_close(grad, want)


def test_rewards_are_the_scores_of_topr(backend, device):
    """A group of failures: its best has a positive advantage, but a negative score."""
    logits, ids, arguments = batch(4, 3, 50, device)
    del arguments["advantages"]
    arguments["rewards"] = torch.tensor([-1.0, -0.5, 0.5, 1.0], device=device)
    arguments |= {"group_size": 2, "objective": Objective(surrogate="topr", topr_weight_pos=2.0)}
    loss, grad = loss_and_grad(grpo_loss, logits, ids, **arguments)
    want = loss_and_grad(reference.grpo_loss, logits.double(), ids, **in_double(arguments))
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), want[1], rtol=1e-4, atol=1e-6)
    other = {**arguments, "scores": -arguments["rewards"]}
    changed = (loss_and_grad(grpo_loss, logits, ids, **other)[1] - grad).abs()
    assert changed.max() > 0.1 * grad.abs().max()


def test_a_weight_of_zero_leaves_out_an_infinite_ratio(backend, device):
    """A mask on the mismatch is for such a token, whose ratio overflows."""
    logps = torch.tensor([[-1.0, -1.0]], device=device)
    arguments = {
        "old_logps": torch.tensor([[-200.0, -1.0]], device=device),
        "advantages": torch.tensor([-1.0], device=device),
        "importance_weights": torch.tensor([[0.0, 1.0]], device=device),
    }
    loss, grad = loss_and_grad(policy_loss, logps, **arguments)
    torch.testing.assert_close(loss.cpu(), torch.tensor(0.5))
    torch.testing.assert_close(grad.cpu(), torch.tensor([[0.0, 0.5]]))


def check_without_the_first_token(logps, arguments):
    """Loss and gradients are finite and equal the reference, whose first gradient may be NaN."""
    loss, grad = loss_and_grad(policy_loss, logps, **arguments)
    want = loss_and_grad(reference.policy_loss, logps.double(), **in_double(arguments))
    assert want[0].isfinite()
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-6, atol=1e-6)
    assert grad.isfinite().all()
    torch.testing.assert_close(grad[0, 1:].double(), want[1][0, 1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", ["importance_weights", "token_weights"])
@pytest.mark.parametrize(
    "objective", BY_TOKEN, ids=lambda x: f"{x.variant}-{x.kl}-{x.beta}-{x.entropy_coef}"
)
def test_a_weight_of_zero_leaves_out_a_missing_number(objective, weights, backend, device):
    """An old log-prob of NaN beside a weight of 0 reaches neither the loss nor a gradient."""
    logps = torch.tensor([[-1.0, -1.0, -2.0]], device=device)
    arguments = {
        "old_logps": torch.tensor([[torch.nan, -1.2, -1.9]], device=device),
        "ref_logps": logps - 0.1,
        "advantages": torch.tensor([-1.0], device=device),
        weights: torch.tensor([[0.0, 1.0, 0.5]], device=device),
    }
    if objective.needs_entropy:
        arguments["entropy"] = torch.ones_like(logps)
    check_without_the_first_token(logps, {**arguments, "objective": objective})


@pytest.mark.parametrize(
    "objective",
    [
        Objective(surrogate="dppo_tv", dppo_value="ratio"),
        Objective(surrogate="dppo_kl", dppo_value="ratio"),
        Objective(surrogate="ipo", epsilon_low=0.5, epsilon_high=0.5),
        Objective(surrogate="dro"),
    ],
    ids=lambda x: x.variant,
)
def test_a_quadratic_coefficient_of_0_takes_no_infinite_log_ratio(objective, backend, device):
    """A token of probability 0 has an infinite log-ratio, and 0 * inf is NaN."""
    logps = torch.tensor([[-math.inf, -1.0]], device=device)
    arguments = {
        "old_logps": torch.tensor([[-0.1, -1.1]], device=device),
        "advantages": torch.tensor([-1.0], device=device),
    }
    if objective.surrogate == "dro":  # -A logp is infinite itself: it is the old one that is
        logps, arguments["old_logps"] = arguments["old_logps"], logps
    check_without_the_first_token(logps, {**arguments, "objective": objective})


@pytest.mark.parametrize("N", [1, 2, 7, 100])
@pytest.mark.parametrize("quantile", [0.0, 0.01, 0.2, 0.5, 1 / 3, 0.999])
def test_top_entropy_is_the_quantile_of_the_live_tokens(N, quantile, device):
    entropy = torch.rand(N, device=device)
    live = torch.rand(N, device=device) > 0.3
    entropy[~live] = torch.nan
    kept = top_entropy_mask(entropy, live, quantile)
    assert not kept[~live].any()
    if live.any():
        threshold = entropy[live].quantile(1 - quantile)
        torch.testing.assert_close(kept, live & (entropy >= threshold), rtol=0, atol=0)
        assert kept.any()


def test_a_top_entropy_quantile_of_0_is_the_highest(backend, device):
    """Only the surrogate of this token counts, in the mean over all tokens, and only its entropy."""
    entropy = torch.tensor([[1.0, 3.0, 2.0], [0.5, 9.0, 0.1]], device=device)
    chosen = Objective(
        top_entropy_quantile=0.0,
        reduction="token_mean",
        entropy_coef=0.5,
        entropy_reduction="token_mean",
    )
    arguments = {
        "advantages": torch.tensor([2.0, 1.0], device=device),
        "mask": torch.tensor([[1, 1, 1], [1, 0, 1]], device=device),
        "entropy": entropy,
        "objective": chosen,
    }
    logps = torch.full((2, 3), -1.0, device=device)
    loss, grad = loss_and_grad(policy_loss, logps, **arguments)
    assert loss.item() == pytest.approx(-2 / 5 - 0.5 * 3)
    torch.testing.assert_close(grad.cpu(), torch.tensor([[0, -0.4, 0], [0, 0, 0]]))
    want = reference.policy_loss(logps.double(), **arguments | {"entropy": entropy.double()})
    assert want.item() == pytest.approx(loss.item())


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
    outputs = Outputs(real["loss"], real["logp"], real["entropy"], real["kl"], clip)
    got, metrics, total = token_statistics(outputs, mask, None, real["old"], weights)
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
    check_metrics(got, metrics, total)


def check_metrics(statistics, metrics, total):
    """That the kernel's metrics are those of `metrics_from`, in their order, to the last digit."""
    want = metrics_from(statistics)
    assert list(want) == list(METRICS)
    for name, value in zip(METRICS, metrics, strict=True):
        torch.testing.assert_close(value, want[name], rtol=2e-7, atol=0, equal_nan=True, msg=name)
    torch.testing.assert_close(total, statistics[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "case",
    ["none live", "weighed", "weighed below 1", "nan", "no importance", "rho of 0", "rho of inf"],
)
@pytest.mark.parametrize("N", [7, 2500])
def test_metrics_at_the_edges(N, case, backend, device):
    new = functools.partial(torch.randn, N, device=device)
    logp, importance, share, mask = new(), new().abs(), None, new() > 0
    if case == "none live":
        mask = torch.zeros_like(mask)
    if case.startswith("weighed"):
        share = torch.where(mask, new().abs(), 0) * (1e-5 if "below" in case else 1)
    if case == "nan":
        logp = torch.where(
            torch.arange(N, device=device) == int(mask.nonzero()[0]), torch.nan, logp
        )
    if case == "rho of 0":
        importance = torch.zeros_like(logp)
    if case == "rho of inf":
        logp = logp + 200
    if case == "no importance":
        importance = None
    clip = torch.randint(0, 8, (N,), dtype=torch.int8, device=device)
    entropy = None if case == "weighed" else new()
    outputs = Outputs(loss=new(), logp=logp, entropy=entropy, kl=new(), clip=clip)
    old = torch.zeros_like(logp)
    statistics, metrics, total = token_statistics(outputs, mask, share, old, importance)
    check_metrics(statistics, metrics, total)
    if case != "nan":
        assert metrics.isfinite().all() or case == "rho of inf"


def test_annotations_of_records_are_read_once(monkeypatch):
    """Reading them in each call took a fifth of the time of the host."""
    given = {"advantages": torch.ones(2)}
    policy_loss(torch.zeros(2, 3), **given)
    monkeypatch.setattr(records, "get_type_hints", None)
    policy_loss(torch.zeros(2, 3), **given)
