"""What a token weighs in the loss, in one launch (kernel: `grpo_fast.kernels.reduction_weights`)."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast import reference
from grpo_fast.objective import Objective
from grpo_fast.ops._arguments import share_of
from grpo_fast.ops._backend import launch, use_triton


class Weights(NamedTuple):
    """What each of (N,) tokens weighs."""

    weight: Tensor  # in the loss
    share: Tensor | None  # what a floating mask weighs a token with; None: 1
    by_tokens: Tensor | None  # in a mean over all live tokens, where that is wanted
    sequence: Tensor | None  # of each packed token


@torch.library.custom_op("grpo_fast::reduction_weights", mutates_args=())
def reduction_weights_fwd(
    like: Tensor,
    mask: Tensor | None,
    floating: Tensor | None,
    token_weights: Tensor | None,
    boundaries: Tensor | None,
    num_items: Tensor | None,
    loss_scale: Tensor | None,
    reduction: str,
    max_length: int,
    by_tokens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Weights`, (0,) where they are None.

    Args:
        like: of the tokens' shape: (B, T), or packed (N,).
        mask: (N,) bool. floating: (N,), the mask where it is floating. token_weights: (N,) fp32.
        boundaries: (num_sequences + 1,); without it, packed tokens are one sequence.
        num_items, loss_scale: 0-dim, on the device of `like` or on the CPU.
        max_length: 0 where the reduction has none.
    """
    if use_triton(like) and like.numel():
        from grpo_fast.kernels import reduction_weights as kernels

        found = launch(
            kernels.reduction_weights_fwd,
            like,
            *(like, mask, floating, token_weights, boundaries),
            *(_number(x, like) for x in (num_items, loss_scale)),
            *(reduction, max_length, by_tokens),
        )
        new = functools.partial(torch.empty, 0, device=like.device)
        dtypes = (*[torch.float32] * 3, torch.int64)
        weight, *rest = (
            new(dtype=dtype) if x is None else x for x, dtype in zip(found, dtypes, strict=True)
        )
        return weight, *rest  # type: ignore[return-value]
    N, device = like.numel(), like.device
    live = torch.ones(N, dtype=torch.bool, device=device) if mask is None else mask
    share = None if floating is None else share_of(floating)
    weighs = live if share is None else share
    rows = like[None] if like.ndim == 1 and boundaries is None else like
    weight = reference.reduction_weights(
        weighs.view(rows.shape), _objective(reduction, max_length), num_items, boundaries
    ).reshape(-1)
    token_weight = weighs.float()
    if token_weights is not None:
        extra = torch.where(live, token_weights, 0)
    else:
        extra = torch.ones_like(token_weight)
    if loss_scale is not None:
        # Select, not multiply: a token without weight has none, whatever the scale is.
        extra = torch.where(extra == 0, 0, extra * loss_scale.to(device, torch.float32))
    weight, nothing = weight * extra, weight.new_empty(0)
    entropy_weight = nothing.clone()
    if by_tokens:
        entropy_weight = token_weight * extra / reference.total_of(weighs, torch.float32)
    sequence = torch.empty(0, dtype=torch.int64, device=device)
    if boundaries is not None:
        sequence = reference.sequence_of_token(boundaries, N)
    return weight, nothing if share is None else share, entropy_weight, sequence


@reduction_weights_fwd.register_fake
def _(
    like: Tensor,
    mask: Tensor | None,
    floating: Tensor | None,
    token_weights: Tensor | None,
    boundaries: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    N = like.numel()
    new = functools.partial(torch.empty, device=like.device)
    return (
        new(N, dtype=torch.float32),
        new(0 if floating is None else N, dtype=torch.float32),
        new(N if rest[-1] else 0, dtype=torch.float32),
        new(0 if boundaries is None else N, dtype=torch.int64),
    )


def weights_of(
    like: Tensor,
    mask: Tensor | None,
    floating: Tensor | None,
    token_weights: Tensor | None,
    boundaries: Tensor | None,
    num_items: Tensor | None,
    loss_scale: Tensor | None,
    objective: Objective,
) -> Weights:
    """What the tokens weigh under an objective; arguments as `reduction_weights_fwd` takes them."""
    by_tokens = objective.entropy_reduction == "token_mean"
    weight, share, entropy_weight, sequence = reduction_weights_fwd(
        *(like, mask, floating, token_weights, boundaries, num_items, loss_scale),
        *(objective.reduction, objective.max_length or 0, by_tokens),
    )
    return Weights(
        weight,
        None if floating is None else share,
        entropy_weight if by_tokens else None,
        None if boundaries is None else sequence,
    )


def _number(x: Tensor | None, like: Tensor) -> float | Tensor | None:
    """A number as the launcher takes it: on the device of `like` it stays a tensor, else its value.

    Nobody waits for a value on the CPU; for one on another GPU the host does.
    """
    if x is None or (x.device == like.device and not (x.is_cpu and x.dtype == torch.float64)):
        return x
    return float(x.item())  # of integers Triton would compile a kernel for each kind


@functools.lru_cache(maxsize=64)
def _objective(reduction: str, max_length: int) -> Objective:
    return Objective(reduction=reduction, max_length=max_length or None)  # type: ignore[arg-type]
