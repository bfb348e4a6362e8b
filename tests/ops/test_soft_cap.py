"""Soft caps far from where the tanh is usual: nearly reached, or so high that they change little."""

import pytest
import torch

from grpo_fast import Objective, linear_grpo_loss, linear_logprob, reference
from grpo_fast.testing import assert_as_accurate
from tests.support.compiling import compile_every_call

R, V = 7, 611  # as in test_compiled_rows.py: code for it is compiled once


@pytest.fixture(params=["torch", "compiled", "triton"])
def path(request, monkeypatch, device):
    """The kernels, and both forms of their twin."""
    if request.param == "compiled":
        compile_every_call(monkeypatch, device)
        return
    if request.param == "triton":
        pytest.importorskip("triton", reason="the kernels need Triton")
    monkeypatch.setenv("GRPO_FAST_BACKEND", request.param)


def batch(x, softcap, logit_scale, device):
    """(logits for which the tanh is taken of x, ids, upstream gradients, options of the head)."""
    z = (x * softcap / logit_scale).to(device)
    head = {"softcap": softcap, "logit_scale": logit_scale}
    return z, torch.arange(R, device=device) % V, torch.linspace(0.5, 2, R, device=device), head


def graded(function, z, ids, upstream, head):
    """Return log-probs, and the gradient of logits: those of a head whose weight is the identity."""
    leaf = z.clone().requires_grad_()
    eye = torch.eye(V, dtype=z.dtype, device=z.device)
    logp = function(leaf, eye, ids, **head)
    return logp.detach(), *torch.autograd.grad((logp * upstream).sum(), leaf)


def levels():
    """Values of which row i has magnitudes from 0.97 (3 + i) to 3 + i, with random signs."""
    x = torch.arange(3.0, 3.0 + R)[:, None] * torch.linspace(0.97, 1.0, V)
    return x.copysign(torch.randn(R, V))


def derivative(z, ids, upstream, head):
    """Return the true gradient of the logits, in float64; 1 - tanh(x)^2 = 1 / cosh(x)^2."""
    x = z.double() * head["logit_scale"] / head["softcap"]
    p = (head["softcap"] * x.tanh()).softmax(1)
    chosen = torch.nn.functional.one_hot(ids, V)
    return upstream.double()[:, None] * (chosen - p) * head["logit_scale"] / x.cosh() ** 2


def test_the_gradient_under_a_cap_that_is_nearly_reached(path, device):
    """Each entry has all digits of float32, where 1 - tanh^2 has a few or none."""
    z, ids, upstream, head = batch(levels(), 5.0, 0.5, device)
    want = derivative(z, ids, upstream, head)
    _, got = graded(linear_logprob, z, ids, upstream, head)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=0)


def test_the_loss_under_a_cap_that_is_nearly_reached(backend, device):
    """The loss and its gradient are computed together, where the logits are."""
    z, ids, advantages, head = batch(levels(), 5.0, 0.5, device)
    want = derivative(z, ids, -advantages / R, head)
    leaf = z.clone().requires_grad_()
    eye = torch.eye(V, device=device)
    given = {"advantages": advantages, "objective": Objective(reduction="token_mean")}
    given["cu_seqlens"] = torch.tensor([0, 3, R], device=device)
    out = linear_grpo_loss(leaf, eye, ids, **given, **head)
    (got,) = torch.autograd.grad(out.loss, leaf)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=0)


@pytest.mark.parametrize("softcap", [65.0, 1e4, 1e9])
def test_a_cap_far_above_the_logits(softcap, path, device):
    """It leaves the logits the digits that they have without it."""
    z, ids, upstream, head = batch(4 * torch.randn(R, V) / softcap, softcap, 0.5, device)
    got = graded(linear_logprob, z, ids, upstream, head)
    usual = graded(reference.linear_logprob, z, ids, upstream, head)
    truth = graded(reference.linear_logprob, z.double(), ids, upstream, head)
    for mine, theirs, exact in zip(got, usual, truth, strict=True):
        assert_as_accurate(mine, theirs, exact, floor=1e-6)


def test_capped_logits_on_both_sides_of_the_series(backend, device):
    """A high cap, and logits of its order."""
    z, ids, upstream, head = batch(torch.linspace(-1.5, 1.5, R * V).view(R, V), 1e3, 2.0, device)
    got = graded(linear_logprob, z, ids, upstream, head)[0]
    truth = graded(reference.linear_logprob, z.double(), ids, upstream.double(), head)[0]
    torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=1e-4)
