"""Rows of logits by PyTorch's operators: in blocks, in place, without an (N, V) intermediate.

This is the twin of `kernels/rows.py` and of the softmax part of `kernels/tiles.py`, in natural
logarithms. With u = (z - max z) / temperature and e = exp(u), a block becomes e once, and its
gradient is `e * factor`.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from grpo_fast.records import RowStatistics, SoftCap, Targets

BLOCK_ELEMENTS = 1 << 21  # 8 MB of float32
UNIT = 8  # as in kernels/edges.py


def apply_soft_cap(z: Tensor, cap: SoftCap) -> Tensor:
    """Return the capped logits, in float32."""
    capped = z.float().mul(cap.logit_scale / cap.softcap)
    return capped.tanh_().mul_(cap.softcap)


def soft_cap_slope(capped: Tensor, cap: SoftCap) -> Tensor:
    """Return the derivative of `apply_soft_cap` in z, written over its result."""
    capped.div_(cap.softcap).square_().neg_().add_(1)
    return capped.mul_(cap.logit_scale)


def row_scale(targets: Targets, rows: slice | Tensor) -> float | Tensor:
    """Return the reciprocal temperature of some rows: one number for all, or one per row."""
    if targets.temperature is None:
        return targets.inv_temperature
    return 1 / targets.temperature[rows]


def block_rows(V: int) -> int:
    """Return how many rows of V entries are computed at a time."""
    return max(1, BLOCK_ELEMENTS // V)


def row_blocks(read: Tensor, *written: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield blocks of the N rows: which rows, and these rows of each (B, T, V) tensor as (R, V).

    The blocks of `written` are views. So are those of `read`, unless its strides do not allow a
    view over several sequences: then a block is a copy.
    """
    B, T, V = read.shape
    step = block_rows(V)
    try:
        flat = [x.view(B * T, V) for x in (read, *written)]
    except RuntimeError:
        yield from _sequence_blocks(read, written, step)
        return
    for start in range(0, B * T, step):
        yield slice(start, start + step), [x[start : start + step] for x in flat]


def _sequence_blocks(
    read: Tensor, written: tuple[Tensor, ...], step: int
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield the blocks of `row_blocks` where rows of different sequences have no common stride."""
    B, T, V = read.shape
    together = max(1, step // T)  # short sequences share a block where no view is needed
    if together > 1 and all(x.is_contiguous() for x in written):
        for b in range(0, B, together):
            blocks = [x[b : b + together].reshape(-1, V) for x in (read, *written)]
            yield slice(b * T, b * T + len(blocks[0])), blocks
        return
    for b in range(B):
        for start in range(0, T, step):
            stop = min(start + step, T)
            yield slice(b * T + start, b * T + stop), [x[b, start:stop] for x in (read, *written)]


def new_gradient(logits: Tensor) -> Tensor:
    """Return an empty tensor for the gradient of `logits`, (B, T, V).

    It is contiguous, except for at most 7 entries before a row.

    If a row of `logits` starts some entries after a multiple of UNIT, the row of the result does,
    too. The kernels move 16 bytes at once where both rows start alike, and single entries of the
    gradient where not. They would start differently where V is odd and `logits` are a slice.
    """
    B, T, V = logits.shape
    new = functools.partial(torch.empty, dtype=logits.dtype, device=logits.device)
    if V % UNIT == 0:
        return new(logits.shape)
    stride_t = V + (logits.stride(1) - V) % UNIT
    stride_b = T * stride_t + (logits.stride(0) - T * stride_t) % UNIT
    before = logits.storage_offset() % UNIT
    return new(before + B * stride_b).as_strided(logits.shape, (stride_b, stride_t, 1), before)


def live_rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    """Return the indices within a block of the rows that count, or None where all do."""
    if mask is None or bool(mask[rows].all()):
        return None
    return mask[rows].nonzero().squeeze(1)


def exponentials(
    z: Tensor, ids: Tensor, inv_temperature: float | Tensor, out: Tensor, want_entropy: bool
) -> tuple[Tensor, RowStatistics, Tensor | None]:
    """Return e of a block, the statistics of its rows, and u if the entropy is wanted.

    The e of the scored token is set to 0.

    Args:
        z: (R, V) logits.
        ids: (R,).
        inv_temperature: a number or (R,).
        out: (R, V) float32 to work in; it may be z itself.
    """
    ids = ids[:, None]
    z_y = z.gather(1, ids).float()
    # The maximum is finite, so that a row of -inf alone, which a part of a vocabulary may be, has
    # exponentials of 0.
    top = z.amax(1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).min)
    u = scaled_difference(z, top, inv_temperature, out)
    scale = inv_temperature[:, None] if isinstance(inv_temperature, Tensor) else inv_temperature
    u_y = (z_y - top) * scale
    kept_u = u.clone() if want_entropy else None
    # The sum leaves out the scored token. So it stays exact for a confident token, whose others
    # have little.
    e = u.exp_().scatter_(1, ids, 0.0)
    rest = row_sum(e)
    p_y = u_y.exp()
    total = rest + p_y
    log_total = torch.where(u_y == 0, rest.log1p(), total.log())
    logp = (u_y - log_total).clamp(max=0)
    entropy = None
    if kept_u is not None:
        products = torch.where(kept_u == -torch.inf, 0, kept_u).mul_(e)
        products = row_sum(products)
        products += torch.where(u_y == -torch.inf, 0, u_y) * p_y
        entropy = (log_total - products / total).squeeze(1)
    statistics = RowStatistics(logp.squeeze(1), entropy, top.squeeze(1), total.squeeze(1))
    return e, statistics, kept_u


def row_sum(x: Tensor) -> Tensor:
    """Return `x.sum(1, keepdim=True)`, with bits that do not depend on the number of rows.

    PyTorch splits the sum of a single long row between threads, but never the sum of one row among
    several.
    """
    if len(x) == 1:
        return x.expand(2, -1).sum(1, keepdim=True)[:1]
    return x.sum(1, keepdim=True)


def scaled_difference(
    z: Tensor, top: Tensor, inv_temperature: float | Tensor, out: Tensor
) -> Tensor:
    """Write `(z - top) * inv_temperature` into `out` and return it; top (R, 1)."""
    if z.dtype == out.dtype:
        torch.sub(z, top, out=out)
    else:
        out.copy_(z).sub_(top)
    if isinstance(inv_temperature, Tensor):
        return out.mul_(inv_temperature[:, None])
    return out if inv_temperature == 1 else out.mul_(inv_temperature)


def gradient(
    e: Tensor,
    u: Tensor | None,
    ids: Tensor,
    dlogp: Tensor,
    dentropy: Tensor | None,
    statistics: RowStatistics,
    inv_temperature: float | Tensor,
    slope: Tensor | None = None,
) -> Tensor:
    """Return dL/dz of a block, written over `e`.

    dz_v = (dlogp (1[v = y] - p_v) - dentropy p_v (log p_v + H)) / temperature, times `slope` (R, V)

    Args:
        ids: (R,), -1 where no column is scored.
        dlogp, dentropy: (R,).
    """
    logp, entropy, _, total = statistics
    factor = -dlogp / total
    target = -dlogp * torch.expm1(logp)
    if dentropy is not None:
        assert entropy is not None
        assert u is not None
        factor = factor - dentropy * (entropy - total.log()) / total
        tilt = -dentropy / total
        p = logp.exp()  # 0 where the logit is -inf; p log p is 0 then
        nothing = (dentropy == 0) | (p == 0)
        target = target - torch.where(nothing, 0, dentropy * p * (logp + entropy))
        u.clamp_(min=-150)  # e is 0 below that, and its product must be 0, too
        e.mul_(u.mul_((tilt * inv_temperature)[:, None]).add_((factor * inv_temperature)[:, None]))
    else:
        e.mul_((factor * inv_temperature)[:, None])
    ids = ids[:, None]
    at = ids.clamp(min=0)
    target = torch.where(ids < 0, e.gather(1, at), (target * inv_temperature)[:, None])
    e.scatter_(1, at, target)
    if slope is not None:
        e.mul_(slope)
    # Select, not multiply: a row without gradient gets 0 even if its logits hold inf or NaN.
    still = dlogp == 0 if dentropy is None else (dlogp == 0) & (dentropy == 0)
    if bool(still.any()):
        e[still] = 0
    return e


def store(dblock: Tensor, live: Tensor | None, dz: Tensor) -> None:
    """Write the gradient of a block's rows that count to its place, and zeros in the others."""
    if live is not None:
        dblock.zero_()
        dblock[live] = dz.to(dblock.dtype)
    elif dz is not dblock:
        dblock.copy_(dz)
