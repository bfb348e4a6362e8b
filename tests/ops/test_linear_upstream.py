"""The upstream gradient of `linear_grpo_loss`, which comes after its own gradients are computed."""

import dataclasses

import pytest
import torch

from grpo_fast import reference
from grpo_fast.loss import grpo_loss, linear_grpo_loss
from grpo_fast.testing import assert_as_accurate
from tests.support.cases import in_double
from tests.support.heads import call, graded
from tests.support.hidden_cases import batch, loss_and_grads
from tests.support.objectives import OBJECTIVES

UNDERFLOWING = {
    "token": ("default", ()),
    "aligned": ("gspo", ()),
    "two phases": ("entropy", ()),
    "late": ("gspo", ("weight",)),
}


@pytest.mark.parametrize("logits_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("way", UNDERFLOWING)
def test_a_loss_scale_keeps_float16_from_underflow(way, logits_dtype, backend, device):
    """Gradients of 1e-8 a token, which float16 has not: they wait for the factor of 65536 in float32."""
    name, frozen = UNDERFLOWING[way]
    tensors, options, ids, arguments = batch(4, 6, 90, device, dtype=torch.float16)
    weights = 1e-8 * (0.5 + torch.rand(4, 6, device=device))
    objective = dataclasses.replace(OBJECTIVES[name], reduction="token_mean")
    arguments |= {"objective": objective, "token_weights": weights, "num_items": 1}
    tensors["hidden"] = torch.where(arguments["mask"][..., None], tensors["hidden"], 0)
    sizes = {"chunk_size": 12, "logits_dtype": logits_dtype}
    rest = (2.0**16, frozen)

    def plain(hidden, weight, ids, **given):
        """Compute the loss as trainers do: a head in half precision, and its logits in float32 or above."""
        logits = hidden @ weight.T
        if logits.dtype == torch.float16:
            logits = logits.float()
        return reference.grpo_loss(logits, ids, **given)

    got = loss_and_grads(linear_grpo_loss, tensors, options, ids, arguments, *rest, **sizes)
    baseline = loss_and_grads(plain, tensors, options, ids, arguments, *rest)
    doubled = {k: x.double() for k, x in tensors.items()}
    truth = loss_and_grads(plain, doubled, options, ids, in_double(arguments), *rest)
    assert got["dhidden"].dtype == torch.float16
    for key in truth:
        assert_as_accurate(got[key], baseline[key], truth[key], name=key)
    assert truth["dhidden"].abs().max() < 1e-2


def test_second_backward_raises(backend, device):
    tensors, options, ids, arguments = batch(4, 5, 60, device)
    loss = call(linear_grpo_loss, graded(tensors), options, ids, **arguments).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("upstream", [1.0, 0.25])
def test_dw_out_takes_the_gradient_of_the_weight(dtype, upstream, backend, device):
    tensors, options, ids, arguments = batch(4, 5, 60, device, dtype=dtype)
    want = loss_and_grads(linear_grpo_loss, tensors, options, ids, arguments, upstream)["dweight"]
    leaves = graded(tensors)
    main = torch.ones_like(leaves["weight"], dtype=torch.float32)
    for _ in range(2):
        out = call(linear_grpo_loss, leaves, options, ids, **arguments, dw_out=main)
        before = main.clone()
        (upstream * out.loss).backward()
    assert leaves["weight"].grad is None
    assert leaves["hidden"].grad is not None
    rounding = 1e-6 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(main - before, want.float(), rtol=rounding, atol=1e-5)
    torch.testing.assert_close(main, 1 + 2 * want.float(), rtol=rounding, atol=1e-5)


def test_two_losses_share_a_main_gradient_in_one_backward(backend, device):
    """The first addition to `dw_out` is not a modification that the second backward must not see."""
    tensors, options, ids, arguments = batch(4, 5, 60, device)
    want = loss_and_grads(linear_grpo_loss, tensors, options, ids, arguments)["dweight"]
    leaves = graded(tensors)
    main = torch.zeros_like(leaves["weight"])
    losses = [
        call(linear_grpo_loss, leaves, options, ids, **arguments, dw_out=main).loss
        for _ in range(2)
    ]
    (losses[0] + 2 * losses[1]).backward()
    torch.testing.assert_close(main, 3 * want)


@pytest.mark.parametrize("upstream", [0.0, float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("spoilt", [False, True])
def test_dw_out_takes_what_autograd_would(upstream, spoilt, backend, device):
    """After an overflow of the forward or of the factor, 0 times inf is NaN, as by the chain rule."""
    tensors, options, ids, arguments = batch(4, 5, 60, device)
    if spoilt:
        tensors["hidden"][2, 0] = torch.inf
    leaves = graded(tensors)
    loss = call(linear_grpo_loss, leaves, options, ids, **arguments).loss
    (want,) = torch.autograd.grad(loss, leaves["weight"], torch.full_like(loss, upstream))
    main = torch.zeros_like(want)
    leaves = graded(tensors)
    out = call(linear_grpo_loss, leaves, options, ids, **arguments, dw_out=main)
    out.loss.backward(torch.full_like(out.loss, upstream))
    torch.testing.assert_close(main, want, rtol=0, atol=0, equal_nan=True)
    if upstream == 0:
        assert want.isnan().any() == spoilt
        live = torch.where(arguments["mask"][..., None], tensors["hidden"], 0)
        plain = tensors["weight"].clone().requires_grad_()
        loss = grpo_loss(live @ plain.T, ids, **arguments).loss
        (plain,) = torch.autograd.grad(0 * loss, plain)
        assert plain.isnan().any() == spoilt


def test_a_weight_without_gradient_has_none_under_an_infinite_factor(backend, device):
    """A vocabulary entry behind `vocab_size`: 0 times inf would put NaN into the main gradient."""
    tensors, options, ids, arguments = batch(4, 5, 60, device, {"vocab_size": 50})
    main = torch.zeros_like(tensors["weight"])
    out = call(linear_grpo_loss, graded(tensors), options, ids, **arguments, dw_out=main)
    (float("inf") * out.loss).backward()
    assert main[50:].eq(0).all()
    assert not main[:50].isfinite().all()
