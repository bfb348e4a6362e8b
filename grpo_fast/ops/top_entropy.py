"""The tokens with the highest entropies, on one device or over the processes of a group."""

import math

import torch
from torch import Tensor


def top_entropy_mask(
    entropy: Tensor,
    live: Tensor,
    fraction: float | Tensor,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """Return the tokens that count and have the highest entropies, or NaN, (N,) bool.

    Their entropy is at least the (1 - fraction) quantile over the tokens that count.

    The quantile is that of `torch.quantile`, without its limit of 2^24 values. With a `group` it is
    over the tokens of all its processes. There is no host sync.
    """
    if not len(entropy) and group is None:
        return live
    ascending = torch.where(live, entropy, math.inf).sort().values
    n = live.sum()
    if group is not None:
        torch.distributed.all_reduce(n, group=group)
    # In float32 the rank has the bits of torch.quantile's; beyond 2^24 float32 cannot count.
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
    """Return the values of these ranks (from 0) among those of all processes of `group`.

    Over several processes, the bits of the values are found 8 at a time by counting. So no tokens
    are sent, and the processes may have different numbers of tokens.
    """
    if group is None:
        return ascending[ranks.clamp(max=len(ascending) - 1)]
    # These integers have the order of the floats; + 0.0 turns -0 into 0.
    bits = (ascending + 0.0).view(torch.int32).long()
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    found = torch.full_like(ranks, -(2**31))
    steps = torch.arange(1, 257, device=ranks.device)
    for shift in (24, 16, 8, 0):
        last = found[:, None] + (steps << shift) - 1  # the last key of each of 256 bins
        count = torch.searchsorted(keys, last, right=True)
        torch.distributed.all_reduce(count, group=group)
        bins = (count <= ranks[:, None]).sum(1).clamp(max=255)
        found = found + (bins << shift)
    return torch.where(found < 0, found ^ 0x7FFFFFFF, found).int().view(torch.float32)
