"""Steps that all backwards share: a second derivative must raise."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple]


class _Constant(torch.autograd.Function):
    """Return x unchanged; a backward through it, on the way to one of the `sources`, raises."""

    @staticmethod
    def forward(ctx: Any, op: str, x: Tensor, *sources: Tensor) -> Tensor:
        ctx.op = op
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple:
        raise RuntimeError(
            f"{ctx.op}: second derivatives are not supported: a kernel computed the gradient, which has no "
            "graph. grpo_fast.reference has the same functions in PyTorch's operators"
        )


class _Anchored(torch.autograd.Function):
    """Return y unchanged, and connect its upstream gradient with the anchors."""

    @staticmethod
    def forward(ctx: Any, op: str, y: Tensor, *anchors: Tensor) -> Tensor:
        ctx.op = op
        ctx.save_for_backward(*anchors)
        return y.detach()  # not a view, so that a loss may be divided in place

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        anchors = ctx.saved_tensors
        if torch.is_grad_enabled():
            dy = _Constant.apply(ctx.op, dy, *anchors)
        return None, dy, *(None,) * len(anchors)


def anchors_of(*inputs: Tensor | None) -> list[Tensor]:
    """Return anchors of an operator's inputs for `once_differentiable`.

    Call this before the operator overwrites an input.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return []
    wanted = [x if x.ndim else x[None] for x in inputs if x is not None and x.requires_grad]
    # Without elements: they have the graph of an input and do not keep its memory.
    return [x[:0].clone() for x in wanted]


def once_differentiable(op: str, y: Tensor, anchors: list[Tensor]) -> Tensor:
    """Return y, an output of `op`, such that second derivatives with respect to the inputs raise.

    `torch.autograd.function.once_differentiable` raises only where the upstream gradient has a
    graph. Without one, `create_graph=True` returns a constant, and the next derivative silently
    lacks a part.
    """
    return _Anchored.apply(op, y, *anchors) if anchors and y.requires_grad else y


class _SumOf(torch.autograd.Function):
    """Return `total`, the sum of x that is known already, and connect its gradient with the anchors."""

    @staticmethod
    def forward(ctx: Any, op: str, x: Tensor, total: Tensor, *anchors: Tensor) -> Tensor:
        ctx.op, ctx.shape = op, x.shape
        ctx.save_for_backward(*anchors)
        return total.detach()

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple:
        anchors = ctx.saved_tensors
        dx = dtotal.expand(ctx.shape)
        if anchors and torch.is_grad_enabled():
            dx = _Constant.apply(ctx.op, dx, *anchors)
        return None, dx, None, *(None,) * len(anchors)


def sum_once_differentiable(op: str, x: Tensor, total: Tensor, anchors: Sequence[Tensor]) -> Tensor:
    """Return `total`, the sum of x, an output of `op`, with the gradient of a sum.

    Second derivatives with respect to the inputs raise, as in `once_differentiable`.
    """
    return _SumOf.apply(op, x, total, *anchors) if x.requires_grad else total


class _WithGradient(torch.autograd.Function):
    """Return y with the gradient dx in x; second derivatives raise as in `once_differentiable`."""

    @staticmethod
    def forward(
        ctx: Any, op: str, x: Tensor, anchor: list[Tensor], y: Tensor, dx: Tensor
    ) -> Tensor:
        # In a list, the anchor is no input: the engine would go on to it, without a gradient.
        ctx.op, ctx.dtype, ctx.anchor = op, x.dtype, anchor
        ctx.save_for_backward(dx)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        (dx,) = ctx.saved_tensors
        with torch.no_grad():
            found = (dy * dx).to(ctx.dtype)
        if torch.is_grad_enabled():
            found = _Constant.apply(ctx.op, found, dy, *ctx.anchor)
        return None, found, None, None, None


def with_gradient(op: str, x: Tensor, y: Tensor, dx: Tensor) -> Tensor:
    """Return y (), a function of x whose gradient dx is known, as an output of `op` that has a graph.

    x has as many elements as dx, so that it may be kept, which is less work than `anchors_of`.
    """
    graph = x.requires_grad and torch.is_grad_enabled()
    return _WithGradient.apply(op, x, [x], y, dx) if graph else y


def without_graph(op: str) -> Callable[[Backward], Backward]:
    """Return a decorator that marks the results of the backward of `op` as not differentiable."""

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def wrapped(ctx: Any, *upstream: Tensor | None) -> tuple:
            sources = [x for x in upstream if x is not None and x.requires_grad]
            with torch.no_grad():
                found = backward(ctx, *upstream)
            if not (sources and torch.is_grad_enabled()):
                return found
            return tuple(x if x is None else _Constant.apply(op, x, *sources) for x in found)

        return wrapped

    return decorate
