"""The GRPO loss of logits and its gradient in one pass, as operators."""

from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from grpo_fast.notices import logged, noting
from grpo_fast.objective import Objective
from grpo_fast.operands import Terms
from grpo_fast.ops.autograd import without_graph
from grpo_fast.ops.backend import grpo_kernel, note_schedule, run
from grpo_fast.ops.operator import operator
from grpo_fast.ops.scaling import scale_rows_
from grpo_fast.overwritten import DESTROYED, mark_again
from grpo_fast.records import Outputs, Rewards, SoftCap, Targets, Tokens
from grpo_fast.torch_kernels.rows import new_gradient

USED_TWICE = (
    "grpo_loss: backward ran a second time. The gradient with respect to the logits is computed once, in "
    "the forward, and handed over by the first backward; compute the loss again for a second one."
)


class Arguments(NamedTuple):
    """The arguments of the operators after the logits."""

    targets: Targets
    tokens: Tokens
    rewards: Rewards
    with_entropy: bool  # needed where the objective has a bonus
    terms: Terms


KINDS = {"logits": Tensor, **get_type_hints(Arguments)}


def new_outputs(a: Arguments, empty: bool = False) -> Outputs:
    """Return zeros of the right shapes; with `empty`, memory for a kernel to write."""
    N = a.tokens.weight.shape[0]  # len() would fix the length in a compiled graph
    new = a.tokens.weight.new_empty if empty else a.tokens.weight.new_zeros
    return Outputs(
        new(N),
        new(N),
        new(N if a.with_entropy else 0),
        new(N if a.tokens.ref_logp is not None else 0),
        new(N, dtype=torch.int8),
    )


def fill(
    logits: Tensor,
    a: Arguments,
    dlogits: Tensor,
    softcap: SoftCap | None = None,
    out: Outputs | None = None,
    arrived: Tensor | None = None,
) -> Outputs:
    """Write the gradient into `dlogits`, (B, T, V), which may be `logits`; return the other results.

    Args:
        out: the vectors to write; None: they are made here.
        arrived: (N,) int32 zeros, in which the programs of a row count themselves; None: made where
            needed.
    """
    targets = a.targets._replace(inv_temperature=a.targets.inv_temperature.item())
    out = new_outputs(a, empty=True) if out is None else out
    written = out._replace(
        entropy=out.entropy if a.with_entropy else None,
        kl=None if a.tokens.ref_logp is None else out.kl,
    )
    # The kernel on the chip takes no soft cap.
    more: dict[str, Any] = {"softcap": softcap} if softcap else {}
    kernel = grpo_kernel(logits, dlogits, softcap)
    run(
        kernel,
        logits,
        *(logits, targets, a.tokens, a.rewards, a.with_entropy),
        objective=Objective.from_terms(*a.terms),
        dlogits=dlogits,
        out=written,
        arrived=arrived,
        **more,
    )
    if noting():
        function = f"{kernel.partition('.')[0]}.schedule_of"
        note_schedule(function, logits, logits, dlogits, softcap, written)
    return out


@logged("operator grpo", inner=True)
def _grpo(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return `Outputs`, then dlogits: the gradient of the sum of the losses."""
    dlogits = new_gradient(logits)
    return (*fill(logits, Arguments(*arguments), dlogits), dlogits)


@logged("operator grpo_", inner=True)
def _grpo_(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return `Outputs`; write the gradient over the logits."""
    return tuple(fill(logits, Arguments(*arguments), logits))


def _fake_(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(new_outputs(Arguments(*arguments)))


five, six = (f"({', '.join(['Tensor'] * n)})" for n in (5, 6))
grpo_ = operator("grpo_", _grpo_, KINDS, five, fake=_fake_, mutates=True)


def _fake(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return (*new_outputs(Arguments(*arguments)), new_gradient(logits))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    # It is kept outside save_for_backward, so that the backward can give the only reference away.
    # The engine then uses the buffer as the gradient instead of copying it.
    ctx.dlogits = output[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _hand_over(ctx: Any, dloss: Tensor) -> Tensor:
    """Return the gradient of the logits for the upstream gradient `dloss` (N,); it works once."""
    dlogits, ctx.dlogits = ctx.dlogits, None
    if dlogits is None:
        raise RuntimeError(USED_TWICE)
    scale_rows_(dlogits, dloss)
    return dlogits


@without_graph("grpo_loss")
def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple:
    return (None if dloss is None else _hand_over(ctx, dloss),)


grpo = operator(
    "grpo",
    _grpo,
    KINDS,
    six,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


class _Overwrite(torch.autograd.Function):
    """Call `grpo_` as a differentiable function.

    A custom operator that mutates its input cannot have a gradient of its own.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        ctx.dlogits = logits.detach()
        outputs = grpo_(ctx.dlogits, *arguments)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @without_graph("grpo_loss")
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple:
        if dloss is None:
            return None, None
        dlogits = _hand_over(ctx, dloss)
        mark_again(dlogits)
        return dlogits, None


class _Destroyed(torch.autograd.Function):
    """Mark overwritten logits such that a gradient through them raises.

    This is a Function of its own, because a Function that changes a view may not return anything
    else.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        raise RuntimeError(f"grpo_loss: {DESTROYED}")


def grpo_inplace(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Call `grpo` with the gradient in the place of the logits; it is differentiable in them, once."""
    outputs = _Overwrite.apply(logits, arguments)
    _Destroyed.apply(logits)
    return outputs
