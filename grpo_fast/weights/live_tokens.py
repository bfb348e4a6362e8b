"""What `grpo_fast.weights` is made of: tokens as flat tensors, sums over sequences, ranks."""

import torch
from torch import Tensor

from grpo_fast import checks


def live_tokens(op: str, mask: Tensor | None, **given: Tensor) -> tuple[Tensor, ...]:
    """(which tokens count, the tensors in float32 with 0 elsewhere), all (N,)."""
    name, like = next(iter(given.items()))
    checks.check_tensor(op, name, like)
    if like.ndim not in (1, 2):
        raise ValueError(f"{op}: {name}: want (B, T) or (N,), got {checks.shape_of(like)}")
    live = checks.check_mask(op, mask, like)
    if live is None:
        live = torch.ones(like.numel(), dtype=torch.bool, device=like.device)
    flat = []
    for name, x in given.items():
        values = checks.per_token(op, name, x, like)
        assert values is not None
        flat.append(torch.where(live, values, 0))
    return live, *flat


def mask_weights(mask: Tensor | None, live: Tensor) -> Tensor:
    """(N,) what a mask weighs each token with: a floating one its values, others 1 or 0."""
    share = checks.mask_share(mask, live)
    return live if share is None else share


def gap_of(old: Tensor, sampling: Tensor) -> Tensor:
    """`old - sampling`, 0 where one is missing, finite everywhere."""
    return torch.nan_to_num(old - sampling, nan=0.0)


def rank_of(order: Tensor) -> Tensor:
    """The place of each element in an order: the inverse of argsort."""
    position = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter(0, order, position)


def share_of(live: Tensor, fraction: float) -> Tensor:
    """How many tokens a fraction of the live ones, or of their weights, is: at least 1."""
    return (live.sum().double() * fraction).long().clamp(min=1)
