"""Derivatives that the functions do not have raise an error; they are never silently 0."""

import pytest
import torch

from grpo_fast import Objective
from grpo_fast.loss import grpo_loss, linear_grpo_loss, policy_loss
from grpo_fast.ops import linear_logprob, logprob

V, D = 17, 8


def cases(device):
    """name: (the argument, a function of it)."""
    new = torch.Generator().manual_seed(0)
    ids = torch.randint(V, (4, 3), generator=new).to(device)
    A, logits, logps, entropy, hidden, weight = (
        torch.randn(shape, generator=new).to(device)
        for shape in ((4,), (4, 3, V), (4, 3), (4, 3), (4, 3, D), (V, D))
    )
    gspo, bonus = Objective(ratio="sequence"), Objective(entropy_coef=0.1)
    given = {"advantages": A, "old_logps": logps - 0.1}

    def of_entropy(x):
        return policy_loss(logps, entropy=x, objective=bonus, **given).loss

    return {
        "grpo": (logits, lambda x: grpo_loss(x, ids, **given).loss),
        "grpo in place": (logits, lambda x: grpo_loss(x * 1, ids, inplace=True, **given).loss),
        "grpo by sequence": (logits, lambda x: grpo_loss(x, ids, objective=gspo, **given).loss),
        "policy": (logps, lambda x: policy_loss(x, **given).loss),
        "policy by sequence": (logps, lambda x: policy_loss(x, objective=gspo, **given).loss),
        "policy of entropy": (entropy, of_entropy),
        "linear": (hidden, lambda x: linear_grpo_loss(x, weight, ids, **given).loss),
        "linear weight": (weight, lambda x: linear_grpo_loss(hidden, x, ids, **given).loss),
        "logprob": (logits, lambda x: logprob(x, ids).sum()),
        "entropy": (logits, lambda x: logprob(x, ids, return_entropy=True)[1].sum()),
        "linear logprob": (hidden, lambda x: linear_logprob(x, weight, ids).sum()),
        "linear logprob weight": (weight, lambda x: linear_logprob(hidden, x, ids).sum()),
    }


NAMES = list(cases("cpu"))
by_name = pytest.mark.parametrize("name", NAMES)


@by_name
@pytest.mark.parametrize("upstream", ["constant", "graph"])
def test_second_derivatives_raise(name, upstream, backend, device):
    x, function = cases(device)[name]
    x.requires_grad_()
    loss = function(x * 1) * (x.sum() if upstream == "graph" else 3)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    first = torch.autograd.grad(function(x * 1) * loss.new_tensor(3.0), x)[0]
    if upstream == "constant":
        torch.testing.assert_close(grad, first)
    with pytest.raises(RuntimeError, match=r"second derivatives|overwritten"):
        # Beside another loss, from which the missing part would not be told.
        torch.autograd.grad(grad.square().sum() + loss, x, allow_unused=True)


@by_name
def test_hessian_products_raise(name, backend, device):
    x, function = cases(device)[name]
    with pytest.raises(RuntimeError, match=r"second derivatives|overwritten"):
        torch.autograd.functional.hvp(function, x, torch.ones_like(x))


@by_name
@pytest.mark.filterwarnings("ignore")  # of PyTorch, about its own implementation
def test_forward_mode_is_refused(name, backend, device):
    x, function = cases(device)[name]
    with pytest.raises(NotImplementedError, match=r"tangent|torch\.func"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="tangent"):
            function(dual)


@by_name
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev], ids=["grad", "jacrev"])
def test_functional_transforms_are_refused_by_name(name, transform, backend, device):
    x, function = cases(device)[name]
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        transform(function)(x)


class Cut(torch.autograd.Function):
    """x, which passes no gradient back: not zeros, none."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@by_name
def test_no_upstream_gradient_is_none(name, backend, device):
    x, function = cases(device)[name]
    x.requires_grad_()
    (2 * Cut.apply(function(x))).backward()
    assert x.grad is None or x.grad.eq(0).all()


@pytest.mark.parametrize("name", ["advantages", "importance_weights", "token_weights"])
def test_a_constant_with_a_tangent_is_refused(name, backend, device):
    logps = torch.randn(4, 3, device=device)
    given = {"advantages": torch.ones(4, 3, device=device)}

    def function(x):
        return policy_loss(logps, **{**given, name: x}).loss

    x = torch.ones(4, 3, device=device)
    with pytest.raises(NotImplementedError, match=name):
        torch.func.jvp(function, (x,), (x,))
