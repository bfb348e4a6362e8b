"""The weight of each token in the loss, as an operator: one launch for mask, reduction, weights and scale."""

import functools
from typing import Any

import torch
from torch import Tensor

from grpo_fast.objective import Objective
from grpo_fast.ops.backend import run
from grpo_fast.ops.operator import operator
from grpo_fast.records import SymInt, Weighing, Weights

ARGUMENTS = {
    "like": Tensor,
    "weighing": Weighing,
    "reduction": str,
    "max_length": SymInt,
    "by_tokens": bool,
}


def _reduction_weights(like: Tensor, weighing: Weighing, *how: Any) -> tuple[Tensor | None, ...]:
    """Return the fields of `Weights`."""
    weighing = weighing._replace(
        num_items=_number(weighing.num_items, like), loss_scale=_number(weighing.loss_scale, like)
    )
    by_pytorch = like.dtype == torch.float64 or not like.numel()
    found: tuple[Tensor | None, ...] = run(
        "reduction_weights.reduction_weights_fwd", like, like, weighing, *how, by_pytorch=by_pytorch
    )
    return found


def _number(x: Tensor | None, like: Tensor) -> Any:
    """Return a 0-dim tensor as a kernel takes it: a tensor on the device of `like`, or a number.

    Nobody waits for a value on the CPU. For a value on another GPU the host waits.
    """
    if x is None or (x.device == like.device and not (x.is_cpu and x.dtype == torch.float64)):
        return x
    return float(x.item())  # Triton would compile another kernel for an int


def _fake(
    like: Tensor, weighing: Weighing, reduction: str, max_length: int, by_tokens: bool
) -> tuple[Tensor | None, ...]:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    new = functools.partial(torch.empty, like.numel(), device=like.device)
    return (
        new(dtype=dtype),
        None if weighing.floating is None else new(dtype=dtype),
        new(dtype=dtype) if by_tokens else None,
        None if weighing.boundaries is None else new(dtype=torch.int64),
    )


reduction_weights_op = operator(
    "reduction_weights",
    _reduction_weights,
    ARGUMENTS,
    "(Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
)


def weights_of(like: Tensor, weighing: Weighing, objective: Objective) -> Weights:
    """Compute the weights of tokens under an objective.

    Args:
        like: has the shape of the tokens, (B, T), or packed (N,). The weights are float64 where it
            is, else float32.
    """
    by_tokens = objective.entropy_reduction == "token_mean"
    weight, share, entropy_weight, sequence = reduction_weights_op(
        like, weighing, objective.reduction, objective.max_length or 0, by_tokens
    )
    return Weights(
        weight,
        None if weighing.floating is None else share,
        entropy_weight if by_tokens else None,
        None if weighing.boundaries is None else sequence,
    )
