"""What `grpo_fast.weights` is made of: tokens as flat tensors, sums over sequences, ranks."""

import math

import torch
from torch import Tensor

from grpo_fast import reference
from grpo_fast._operands import hint
from grpo_fast.ops import _arguments


def check_number(
    op: str, name: str, value: float, minimum: float = 0.0, high: float = math.inf
) -> None:
    """Refuse what is not a finite number within the bounds, both included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name}: want a number, got {value!r}{hint(name, value)}")
    if not (minimum <= value <= high and value < math.inf):
        wanted = f">= {minimum}" if high == math.inf else f"in [{minimum}, {high}]"
        raise ValueError(f"{op}: {name}: want a finite number {wanted}, got {value}")


def live_tokens(op: str, mask: Tensor | None, **given: Tensor) -> tuple[Tensor, ...]:
    """(which tokens count, the tensors in float32 with 0 elsewhere), all (N,)."""
    name, like = next(iter(given.items()))
    _arguments.check_tensor(op, name, like)
    if like.ndim not in (1, 2):
        raise ValueError(f"{op}: {name}: want (B, T) or (N,), got {_arguments.shape_of(like)}")
    live = _arguments.check_mask(op, mask, like)
    if live is None:
        live = torch.ones(like.numel(), dtype=torch.bool, device=like.device)
    flat = []
    for name, x in given.items():
        values = _arguments.per_token(op, name, x, like)
        assert values is not None
        flat.append(torch.where(live, values, 0))
    return live, *flat


def mask_weights(mask: Tensor | None, live: Tensor) -> Tensor:
    """(N,) what a mask weighs each token with: a floating one its values, others 1 or 0."""
    share = _arguments.mask_share(mask, live)
    return live if share is None else share


def gap_of(old: Tensor, sampling: Tensor) -> Tensor:
    """`old - sampling`, 0 where one is missing, finite everywhere."""
    return torch.nan_to_num(old - sampling, nan=0.0)


def per_sequence(x: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Float64 sums of (N,) over the sequences of `like`: (B, 1), or (num_seqs,) if they are packed."""
    x = x.double()
    if cu_seqlens is None:
        return x.view(like.shape).sum(-1, keepdim=True)
    index = reference.sequence_of_token(cu_seqlens, len(x))
    return x.new_zeros(len(cu_seqlens) - 1).index_add(0, index, x)


def per_token_advantages(
    op: str, advantages: Tensor, logps: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """Advantages per token, of the shape of `logps`."""
    _arguments.check_tensor(op, "logps", logps)
    if logps.ndim not in (1, 2):
        raise ValueError(f"{op}: logps: want (B, T) or (N,), got {_arguments.shape_of(logps)}")
    if cu_seqlens is not None:
        _arguments.check_cu_seqlens(op, cu_seqlens, logps)
    return _arguments.spread(op, "advantages", advantages, logps, cu_seqlens)


def rank_of(order: Tensor) -> Tensor:
    """The place of each element in an order: the inverse of argsort."""
    position = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter(0, order, position)


def share_of(live: Tensor, fraction: float) -> Tensor:
    """How many tokens a fraction of the live ones, or of their weights, is: at least 1."""
    return (live.sum().double() * fraction).long().clamp(min=1)


def top_entropy_mask(
    entropy: Tensor,
    live: Tensor,
    fraction: float | Tensor,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """(N,) bool: live tokens whose entropy is at least the (1 - fraction) quantile of all live ones, or NaN.

    The quantile is that of `torch.quantile`, without its limit of 2^24 values; over the tokens of all
    processes where there is a `group`. No host sync.
    """
    if not len(entropy) and group is None:
        return live
    ascending = torch.where(live, entropy, math.inf).sort().values
    n = live.sum()
    if group is not None:
        torch.distributed.all_reduce(n, group=group)
    # In float32 the rank is torch.quantile's own, to the bit; beyond 2^24 float32 cannot count.
    quantile = torch.ones((), dtype=torch.float64, device=entropy.device) - fraction
    rank = torch.where(n <= 2**24, quantile.float() * (n - 1).float(), quantile * (n - 1))
    rank = rank.clamp(min=0)
    ranks = torch.stack([rank.floor(), rank.ceil()]).long()
    below, above = order_statistics(ascending, ranks, group).unbind()
    threshold = torch.lerp(below, above, (rank - rank.floor()).float())
    return live & ~(entropy < threshold)


def order_statistics(
    ascending: Tensor, ranks: Tensor, group: "torch.distributed.ProcessGroup | None"
) -> Tensor:
    """The values that have these ranks (from 0) among the sorted ones of all processes of `group`.

    Over several processes, the bits of the values are found 8 at a time by counting, so that no tokens are
    sent and the processes need not have equally many.
    """
    if group is None:
        return ascending[ranks.clamp(max=len(ascending) - 1)]
    # Integers in the order of the floats; + 0.0 makes 0 of -0.
    bits = (ascending + 0.0).view(torch.int32).long()
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    found = torch.full_like(ranks, -(2**31))
    steps = torch.arange(1, 257, device=ranks.device)
    for shift in (24, 16, 8, 0):
        last = found[:, None] + (steps << shift) - 1  # of each of 256 bins
        count = torch.searchsorted(keys, last, right=True)
        torch.distributed.all_reduce(count, group=group)
        bins = (count <= ranks[:, None]).sum(1).clamp(max=255)
        found = found + (bins << shift)
    return torch.where(found < 0, found ^ 0x7FFFFFFF, found).int().view(torch.float32)
