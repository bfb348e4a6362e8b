"""The weight of each token in a loss, against the specification in float64."""

import math

import numpy as np
import pytest
import torch

from grpo_fast import Objective, metrics_from, reference, sequences
from grpo_fast.loss import grpo_loss, linear_grpo_loss, policy_loss
from grpo_fast.ops import grpo as grpo_ops
from grpo_fast.ops import reduction_weights
from grpo_fast.ops.reduction_weights import weights_of
from grpo_fast.records import Weighing
from grpo_fast.testing import assert_as_accurate
from tests.support.cases import batch, in_double, loss_and_grad, packed
from tests.support.objectives import OBJECTIVES

REDUCTIONS = {"sequence_mean": None, "token_mean": None, "sequence_sum": None, "fixed_length": 7}
by_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
MASKS = ["none", "bool", "floating", "half"]


def objective_of(reduction, **options):
    return Objective(reduction=reduction, max_length=REDUCTIONS[reduction], **options)


def some_mask(kind, shape, device):
    """(what a caller gives, as bools or None, the floating one or None); row 1 is empty."""
    if kind == "none":
        return torch.ones(shape, dtype=torch.bool, device=device), None, None
    weights = torch.rand(shape, device=device) * (torch.rand(shape, device=device) > 0.4)
    weights[1] = 0
    if kind == "bool":
        return weights != 0, (weights != 0).flatten(), None
    weights = weights.half() if kind == "half" else weights
    return weights, (weights != 0).flatten(), weights.flatten()


def of_double(objective, mask, extra, num_items, scale, boundaries=None):
    """(weight, weight by tokens) in float64."""
    weighs = mask.double() if mask.is_floating_point() else mask
    factor = extra.double().view(mask.shape) * scale
    weight = reference.reduction_weights(weighs, objective, num_items, boundaries, torch.float64)
    by_tokens = weighs * factor / reference.total_of(weighs, torch.float64)
    return (weight * factor).flatten(), by_tokens.flatten()


@pytest.mark.parametrize(
    ("reduction", "num_items"),
    [*((name, None) for name in REDUCTIONS), ("token_mean", 0.25), ("token_mean", 40.0)],
)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(3, 5), (3, 2100), (4, 1)], ids=str)
def test_weights(shape, mask, reduction, num_items, backend, device):
    given, live, floating = some_mask(mask, shape, device)
    extra = torch.randn(given.numel(), device=device)
    objective = objective_of(reduction, entropy_coef=0.1, entropy_reduction="token_mean")
    items = None if num_items is None else torch.tensor(num_items, device=device)
    scale = torch.tensor(-2.5, dtype=torch.float64)
    got = weights_of(given, Weighing(live, floating, extra, None, items, scale), objective)
    want = of_double(objective, given, extra, num_items and torch.tensor(num_items), -2.5)
    for mine, truth in zip((got.weight, got.entropy_weight), want, strict=True):
        torch.testing.assert_close(mine, truth.float(), rtol=5e-7, atol=0)
    assert got.sequence is None
    assert (got.share is None) == (floating is None)
    if floating is not None:
        torch.testing.assert_close(got.share, floating.float(), rtol=0, atol=0)


@by_reduction
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_weights_of_packed_sequences(dtype, mask, reduction, backend, device):
    """Empty ones as well; without boundaries all tokens are one sequence."""
    boundaries = torch.tensor([0, 0, 5, 2800, 2800, 2811], dtype=dtype, device=device)
    given, live, floating = (
        x if x is None else x.flatten() for x in some_mask(mask, (3, 937), device)
    )
    objective = objective_of(reduction)
    extra = torch.ones(2811, device=device)
    for cu_seqlens in (boundaries, None):
        got = weights_of(given, Weighing(live, floating, None, cu_seqlens, None, None), objective)
        want = of_double(objective, given, extra, None, 1.0, cu_seqlens)[0]
        torch.testing.assert_close(got.weight, want.float(), rtol=5e-7, atol=0)
        if cu_seqlens is not None:
            index = sequences.sequence_of_token(cu_seqlens, 2811)
            torch.testing.assert_close(got.sequence, index)


def test_boundaries_that_are_wrong_make_weights_nan(device, monkeypatch):
    """Nobody looks at them on a GPU: tokens that they leave out must not keep old memory."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    monkeypatch.setenv("GRPO_FAST_BACKEND", "triton")
    tokens = torch.zeros(9, device=device)
    boundaries = torch.tensor([2, 4, 7], device=device)
    weight = weights_of(
        tokens, Weighing(None, None, None, boundaries, None, None), Objective()
    ).weight
    assert weight.isnan().tolist() == [True] * 2 + [False] * 5 + [True] * 2
    beyond = torch.tensor([-5, 4, 700], device=device)
    weight = weights_of(tokens, Weighing(None, None, None, beyond, None, None), Objective()).weight
    assert weight.isfinite().all()


def test_an_integer_from_the_cpu_is_launched_as_a_number():
    elsewhere = torch.empty(0, device="meta")
    found = reduction_weights._number(torch.tensor(1), elsewhere)
    assert (type(found), found) == (float, 1.0)


def test_a_negative_mask_and_a_weight_of_zero(backend, device):
    floating = torch.tensor([[1.0, -1.0, 0.0, 2.0]], device=device)
    live = (floating != 0).flatten()
    extra = torch.tensor([0.0, 1.0, math.nan, 1.0], device=device)
    scale = torch.tensor(math.inf, device=device)
    objective = Objective(reduction="sequence_sum")
    got = weights_of(
        floating, Weighing(live, floating.flatten(), extra, None, None, scale), objective
    )
    want = torch.tensor([0.0, math.nan, 0.0, math.inf], device=device)
    torch.testing.assert_close(got.weight, want, equal_nan=True)


def test_counts_are_exact_beyond_what_float32_counts(backend, device):
    """2^24 + 1 in steps of one is 2^24 in float32: weights of 2^-24 and 1 show it, too."""
    N = (1 << 13) + 3
    floating = torch.full((N,), 2.0**-24, device=device)
    floating[0] = 1
    objective = Objective(reduction="token_mean")
    got = weights_of(floating, Weighing(floating != 0, floating, None, None, None, None), objective)
    want = (floating.double() / floating.double().sum()).float()
    torch.testing.assert_close(got.weight, want, rtol=2e-7, atol=0)


FUNCTIONS = {
    "grpo_loss": grpo_loss,
    "policy_loss": policy_loss,
    "linear_grpo_loss": linear_grpo_loss,
}


def scaled(scale, fn, *args, **kwargs):
    """Loss and gradient, both multiplied by `scale` afterwards."""
    return tuple(scale * x for x in loss_and_grad(fn, *args, **kwargs))


def call_of(name, device, mask="bool", layout="padded", **options):
    """(function, its reference, first argument, the rest, arguments)."""
    objective = Objective(**{"beta": 0.04, "entropy_coef": 0.1, **options})
    logits, ids, given = batch(3, 4, 20, device, garbage=False)
    if mask == "floating":
        given["mask"] = given["mask"] * (torch.rand(3, 4) + 0.1).to(device)
    names = ["old_logps", "ref_logps"]
    if layout == "packed":
        live = given["mask"] != 0
        given["cu_seqlens"], _, logits, ids, given["mask"], *rest = packed(
            live, logits, ids, given["mask"], *(given[x] for x in names)
        )
        given |= dict(zip(names, rest, strict=True))
    given["objective"] = objective
    if name == "grpo_loss":
        return grpo_loss, reference.grpo_loss, logits, (ids,), given
    if name == "linear_grpo_loss":
        weight = 0.2 * torch.randn(20, 20, device=device)
        return linear_grpo_loss, reference.linear_grpo, logits, (weight, ids), given
    given["entropy"] = reference.entropy(logits)
    return policy_loss, reference.policy_loss, reference.logprob(logits, ids), (), given


@pytest.mark.parametrize("name", FUNCTIONS)
@by_reduction
@pytest.mark.parametrize(("layout", "mask"), [("padded", "bool"), ("packed", "floating")])
def test_loss_scale_is_a_factor_on_the_loss(layout, mask, reduction, name, backend, device):
    """It multiplies surrogate, KL and entropy bonus. The other statistics and the metrics do not change."""
    if backend == "triton" and name == "linear_grpo_loss" and reduction != "token_mean":
        pytest.skip("its kernels are those of grpo_loss")
    options = {"reduction": reduction, "max_length": REDUCTIONS[reduction]}
    if mask == "floating":
        options["entropy_reduction"] = "token_mean"
    fn, spec, x, rest, given = call_of(name, device, mask, layout, **options)
    whole = [a.double() if a.is_floating_point() else a for a in rest]
    truth = scaled(-2.5, spec, x.double(), *whole, **in_double(given))
    plain = scaled(-2.5, spec, x, *rest, **given)
    for scale in (-2.5, torch.tensor(-2.5, device=device)):
        got = loss_and_grad(fn, x, *rest, loss_scale=scale, **given)
        for what, a, b, t in zip(("loss", "gradient"), got, plain, truth, strict=True):
            assert_as_accurate(a, b, t, name=what)
        of_spec = loss_and_grad(spec, x.double(), *whole, loss_scale=scale, **in_double(given))
        torch.testing.assert_close(of_spec, truth)
    one, other = fn(x, *rest, **given), fn(x, *rest, **given, loss_scale=-2.5)
    torch.testing.assert_close(other.statistics[1], other.loss)
    torch.testing.assert_close(other.statistics[1], -2.5 * one.statistics[1])
    torch.testing.assert_close(other.statistics[2:], one.statistics[2:], rtol=0, atol=0)
    torch.testing.assert_close(other.metrics, one.metrics, rtol=0, atol=0)
    want = metrics_from(one.statistics)["ratio_mean"]
    torch.testing.assert_close(other.metrics["ratio_mean"], want)


SOME = ["gspo", "gmpo", "vespo", "entropy by tokens", "top entropy"]


@pytest.mark.parametrize("name", [x for x in SOME if x in OBJECTIVES])
@pytest.mark.parametrize("old", [True, False], ids=["off policy", "on policy"])
def test_loss_scale_of_other_objectives(old, name, backend, device):
    logits, ids, given = batch(3, 3, 20, device)
    given |= {"objective": OBJECTIVES[name], "old_logps": given["old_logps"] if old else None}
    want = scaled(3, grpo_loss, logits, ids, **given)
    got = loss_and_grad(grpo_loss, logits, ids, loss_scale=3, **given)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("inplace", [True, False])
def test_loss_scale_takes_no_second_pass_over_the_logits(inplace, backend, device, monkeypatch):
    """The rows' factor of the backward is 1, which leaves them; and no second rounding is made."""
    logits, ids, given = batch(3, 4, 40, device, dtype=torch.float16)
    factors = []
    scale_rows_ = grpo_ops.scale_rows_
    monkeypatch.setattr(
        grpo_ops, "scale_rows_", lambda x, factor: (factors.append(factor), scale_rows_(x, factor))
    )

    def gradient(**options):
        x = logits.clone().requires_grad_()
        y = x.clone() if inplace else x
        out = grpo_loss(y, ids, **given, **options, inplace=inplace)
        return out.loss, *torch.autograd.grad(out.loss, x)

    got = gradient(loss_scale=0.3)
    assert [bool((x == 1).all()) for x in factors] == [True]
    want = gradient(token_weights=torch.full(ids.shape, 0.3, device=device))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_loss_scale_keeps_float16_from_underflow(backend, device):
    """It reaches the gradient before that is rounded: a factor on the loss comes too late."""
    logits, ids, given = batch(3, 4, 60, device, dtype=torch.float16, garbage=False)
    given |= {"token_weights": torch.full(ids.shape, 1e-7, device=device)}
    scale = 2.0**20
    late = loss_and_grad(grpo_loss, logits, ids, upstream=scale, **given)[1]
    early = loss_and_grad(grpo_loss, logits, ids, loss_scale=scale, **given)[1]
    truth = loss_and_grad(
        reference.grpo_loss, logits.double(), ids, upstream=scale, **in_double(given)
    )[1]
    assert_as_accurate(early, truth.half(), truth)
    assert (late - truth).abs().max() > 100 * (early - truth).abs().max()
    hidden, weight = logits[..., :8].contiguous(), torch.randn(60, 8, device=device).half()
    got, want = (
        loss_and_grad(linear_grpo_loss, hidden, weight, ids, **given, **x)[1]
        for x in ({"loss_scale": scale}, {"upstream": scale})
    )
    torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("scale", "error", "match"),
    [
        (math.nan, ValueError, "loss_scale: want a finite number that float32 can hold, got nan"),
        (-math.inf, ValueError, "loss_scale: .*got -inf"),
        (1e39, ValueError, "loss_scale: .*got 1e"),
        (1e-39, ValueError, "loss_scale: .*got 1e-39"),
        (True, TypeError, "loss_scale: want a number or a 0-dim tensor, got True"),
        ("2", TypeError, "loss_scale: want a number or a 0-dim tensor, got '2'"),
        (torch.tensor(math.nan), ValueError, "loss_scale: .*got nan"),
        (
            torch.tensor(True),
            TypeError,
            "loss_scale: want a real number, got a tensor of torch.bool",
        ),
        (torch.ones(1), ValueError, r"loss_scale: want a number or a 0-dim tensor, got \(1,\)"),
        (torch.ones((), requires_grad=True), ValueError, "loss_scale requires grad"),
        (torch.ones((), device="meta"), ValueError, "loss_scale is on meta, which holds no values"),
        (np.float32(2), TypeError, r"loss_scale: want .*; pass float\(loss_scale\)"),
    ],
    ids=str,
)
def test_loss_scales_that_are_refused(scale, error, match, name, device):
    fn, _, x, rest, given = call_of(name, device)
    with pytest.raises(error, match=f"{name}: {match}"):
        fn(x, *rest, **given, loss_scale=scale)


def test_integers_negative_numbers_and_zero(backend, device):
    fn, _, x, rest, given = call_of("grpo_loss", device)
    loss, grad = loss_and_grad(fn, x, *rest, **given)
    for scale in (2, -1, torch.tensor(2), torch.tensor(4, dtype=torch.int32, device=device)):
        got = loss_and_grad(fn, x, *rest, **given, loss_scale=scale)
        factor = float(scale)
        torch.testing.assert_close(got, (factor * loss, factor * grad), rtol=1e-5, atol=1e-8)
    given["advantages"] = torch.full_like(given["advantages"], torch.nan)
    for found in loss_and_grad(fn, x, *rest, **given, loss_scale=0):
        assert (found == 0).all()  # as with a token weight of 0, whatever the loss is


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_loss_may_be_divided_in_place(name, backend, device):
    """It is a tensor of its own: no view that autograd refuses to change, nor the statistics' entry."""
    fn, _, x, rest, given = call_of(name, device)
    want = scaled(0.25, fn, x, *rest, **given)
    x = x.clone().requires_grad_()
    out = fn(x, *rest, **given)
    before = out.statistics.clone()
    loss = out.loss
    loss /= 4
    torch.testing.assert_close((loss, *torch.autograd.grad(loss, x)), want)
    torch.testing.assert_close(out.statistics, before, rtol=0, atol=0)
