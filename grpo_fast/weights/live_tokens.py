"""Steps that the functions of `grpo_fast.weights` share: tokens as flat tensors, masks, ranks."""

import torch
from torch import Tensor

from grpo_fast import checks


def live_tokens(op: str, mask: Tensor | None, **given: Tensor) -> tuple[Tensor, ...]:
    """Return the tokens that count, (N,) bool, and the given tensors as float32 (N,), 0 elsewhere."""
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
    """Return the weight (N,) that a mask gives each token: the values of a floating mask, else 1 or 0."""
    share = checks.mask_share(mask, live)
    return live if share is None else share


def gap_of(old: Tensor, sampling: Tensor) -> Tensor:
    """Return `old - sampling`, finite, and 0 where one of them is missing (NaN)."""
    return torch.nan_to_num(old - sampling, nan=0.0)


def rank_of(order: Tensor) -> Tensor:
    """Return the place of each element in an order: the inverse of argsort."""
    position = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter(0, order, position)


def count_of(live: Tensor, fraction: float) -> Tensor:
    """Return how many tokens a fraction of the tokens that count is, or of their weights: at least 1."""
    return (live.sum().double() * fraction).long().clamp(min=1)
