"""Rows of logits by PyTorch's operators: in blocks, in place, without an (N, V) intermediate.

This is the twin of `kernels/rows.py` and of the softmax part of `kernels/tiles.py`, in natural
logarithms. With u = (z - max z) / temperature and e = exp(u), a block becomes e once, and its
gradient is `e * factor`. On a CPU large vocabularies run compiled (`compiled.py`): the passes over
(R, V) are there in a second form, the formulas of rows are shared.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.records import RowStatistics, SoftCap, Targets
from grpo_fast.torch_kernels.compiled import VOCABULARY, call, compiles

BLOCK_ELEMENTS = 1 << 21  # 8 MB of float32
# Compiled code needs memory of that size only where rows are left out; a call of it takes 0.1 ms.
COMPILED_ELEMENTS = 1 << 23
UNIT = 8  # as in kernels/edges.py
PART = 256  # of compiled rows: how many entries are added up at once


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


def block_rows(logits: Tensor) -> int:
    """Return how many rows of logits (..., V) are computed at a time."""
    V = logits.shape[-1]
    return max(1, (COMPILED_ELEMENTS if compiles_rows(logits) else BLOCK_ELEMENTS) // V)


def compiles_rows(logits: Tensor) -> bool:
    """Tell whether the passes over rows of logits (..., V) are compiled."""
    return compiles(logits, logits.shape[-1], VOCABULARY)


def schedule(logits: Tensor) -> str:
    """Say in which blocks rows of logits are computed."""
    how = "compiled, " if compiles_rows(logits) else ""
    return f"{how}blocks of at most {block_rows(logits)} rows"


def row_blocks(read: Tensor, *written: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield blocks of the N rows: which rows, and these rows of each (B, T, V) tensor as (R, V).

    The blocks of `written` are views. So are those of `read`, unless its strides do not allow a
    view over several sequences: then a block is a copy.
    """
    B, T, V = read.shape
    step = block_rows(read)
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


class Block(NamedTuple):
    """Rows of logits, and how they are read."""

    z: Tensor  # (R, V)
    ids: Tensor  # (R,) int64, -1 where no column is scored
    inv_temperature: float | Tensor  # a number, or (R,)
    softcap: SoftCap | None


class Kept(NamedTuple):
    """The exponentials of a block, and u if the entropy was wanted, for `write_block`."""

    e: Tensor  # (R, V) float32; 0 at the scored entry
    u: Tensor | None
    z: Tensor  # the logits, after the soft cap


def read_block(
    block: Block, with_entropy: bool, out: Tensor | None = None
) -> tuple[RowStatistics, Kept | None]:
    """Return the statistics of the rows of a block; what else was computed is kept, unless compiled.

    Args:
        out: (R, V) float32 to work in; it may be `block.z`. None: it is made where needed.
    """
    z, ids, inv_temperature, softcap = block
    if compiles_rows(z):
        scale = _scale_operand(inv_temperature)
        found = call(_statistics, (with_entropy,), z, ids, scale, *_cap_operands(softcap))
        if found is not None:
            return RowStatistics(*found), None
    if out is None:
        out = torch.empty(z.shape, dtype=torch.float32, device=z.device)
    if softcap is not None:
        z = apply_soft_cap(z, softcap)
    ids = ids[:, None]
    z_y = z.gather(1, ids).float()
    top = _top(z, 1)[:, None]
    u = scaled_difference(z, top, inv_temperature, out)
    u_y = (z_y - top) * _column(inv_temperature)
    kept_u = u.clone() if with_entropy else None
    # The sum leaves out the scored token. So it stays exact for a confident token, whose others
    # have little.
    e = u.exp_().scatter_(1, ids, 0.0)
    products = None
    if kept_u is not None:
        products = row_sum(torch.where(kept_u == -torch.inf, 0, kept_u).mul_(e))
    return _row_statistics(row_sum(e), products, u_y, top), Kept(e, kept_u, z)


def _statistics(
    z: Tensor,
    ids: Tensor,
    inv_temperature: Tensor | None,
    cap_in: Tensor | None,
    cap_out: Tensor | None,
    logit_scale: Tensor | None,
    with_entropy: bool,
) -> RowStatistics:
    """Compute what `read_block` returns in a form that inductor turns into one read of a row.

    Each part of a row is relative to its own maximum, and short: inductor adds term by term, and
    float32 is too short for many terms. The part of the scored entry is computed a second time,
    without it.
    """

    def difference(x: Tensor, top: Tensor) -> Tensor:
        u = x - top
        if inv_temperature is None:
            return u
        return u * inv_temperature.view(-1, *(1,) * (u.ndim - 1))

    V, ids = z.shape[1], ids[:, None]
    whole = V // PART * PART
    parts = [z[:, :whole].unflatten(1, (-1, PART))] if whole else []
    if whole < V:
        parts.append(z[:, None, whole:])
    tops, sums, products = [], [], []
    for part in parts:
        part = _capped(part, cap_in, cap_out)
        tops.append(_top(part, -1))
        u = difference(part, tops[-1][:, :, None])
        sums.append(u.exp().sum(-1))
        if with_entropy:
            products.append(_times(u, u.exp()).sum(-1))
    top_k, e_k = torch.cat(tops, 1), torch.cat(sums, 1)
    top = top_k.amax(1, keepdim=True)
    shift, k = difference(top_k, top), torch.arange(e_k.shape[1], device=z.device)
    factor = torch.where(k == ids // PART, 0, shift.exp())
    column = ids // PART * PART + torch.arange(PART, device=z.device)
    u = difference(_capped(z.gather(1, column.clamp(max=V - 1)), cap_in, cap_out), top)
    e = torch.where((column < V) & (column != ids), u.exp(), 0)
    rest = (e_k * factor).sum(1, keepdim=True) + e.sum(1, keepdim=True)
    weighted = None
    if with_entropy:
        of_parts = (torch.cat(products, 1) + _times(shift, e_k)) * factor
        weighted = of_parts.sum(1, keepdim=True) + _times(u, e).sum(1, keepdim=True)
    u_y = difference(_capped(z.gather(1, ids), cap_in, cap_out), top)
    return _row_statistics(rest, weighted, u_y, top)


def _times(u: Tensor, e: Tensor) -> Tensor:
    """Return u e, and 0 where e is 0, since u may be -inf there."""
    return torch.where(e == 0, 0, u * e)


def _top(z: Tensor, dim: int) -> Tensor:
    """Return the maximum of each row, or of each part of a row.

    It is finite, so that a row of -inf alone, which a part of a vocabulary may be, has exponentials
    of 0.
    """
    return z.amax(dim).float().clamp(min=torch.finfo(torch.float32).min)


def _column(x: float | Tensor) -> float | Tensor:
    """Return one value per row, (R,), as (R, 1); a value for all rows unchanged."""
    return x[:, None] if isinstance(x, Tensor) and x.ndim else x


def _scale_operand(x: float | Tensor) -> Tensor | None:
    """Return the reciprocal temperature as compiled code takes it: (R,), 0-dim, or None for 1."""
    if isinstance(x, Tensor):
        return x
    return None if x == 1 else torch.tensor(x, dtype=torch.float32)


def _cap_operands(cap: SoftCap | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the factors of a soft cap before and after the tanh, and of the slope, 0-dim."""
    if cap is None:
        return None, None, None
    number = functools.partial(torch.tensor, dtype=torch.float32)
    return number(cap.logit_scale / cap.softcap), number(cap.softcap), number(cap.logit_scale)


def _capped(z: Tensor, cap_in: Tensor | None, cap_out: Tensor | None) -> Tensor:
    """Return the logits in float32, after a soft cap if there is one."""
    z = z.float()
    return z if cap_in is None or cap_out is None else (z * cap_in).tanh() * cap_out


def _row_statistics(
    rest: Tensor, products: Tensor | None, u_y: Tensor, top: Tensor
) -> RowStatistics:
    """Return the statistics of rows, (R,), from their sums (R, 1).

    Args:
        rest: the sum of the exponentials, without the scored one.
        products: the sum of u e, without the scored one; None: no entropy is wanted.
        u_y: u of the scored entry.
    """
    p_y = u_y.exp()
    total = rest + p_y
    log_total = torch.where(u_y == 0, rest.log1p(), total.log())
    logp = (u_y - log_total).clamp(max=0)
    entropy = None
    if products is not None:
        products = products + torch.where(u_y == -torch.inf, 0, u_y) * p_y
        entropy = (log_total - products / total).squeeze(1)
    return RowStatistics(logp.squeeze(1), entropy, top.squeeze(1), total.squeeze(1))


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


class RowFactors(NamedTuple):
    """The values of a row for its gradient, (R,): e (a + b u) in each entry, c in the scored one."""

    top: Tensor
    a: Tensor
    b: Tensor | None  # None: no gradient goes through the entropy
    c: Tensor
    still: Tensor  # bool: no gradient at all


def write_block(
    block: Block,
    dlogp: Tensor,
    dentropy: Tensor | None,
    statistics: RowStatistics,
    dblock: Tensor,
    live: Tensor | None,
    kept: Kept | None = None,
) -> None:
    """Write the gradient of a block of logits to its place.

    dz_v = (dlogp (1[v = y] - p_v) - dentropy p_v (log p_v + H)) / temperature, times the slope of
    the soft cap

    Args:
        block: its rows may be those of `dblock`.
        dlogp, dentropy: (R,).
        statistics: of the rows of the block.
        dblock: (R', V) all rows.
        live: which of them the rows of the block are; None: all. The others get 0.
        kept: from `read_block`; None: the exponentials are computed again.
    """
    factors, z = _row_factors(block, dlogp, dentropy, statistics), block.z
    if kept is None and compiles_rows(z):
        direct = live is None and (_same(z, dblock) or not _overlap(z, dblock))
        out = dblock if direct else torch.empty_like(z, dtype=dblock.dtype)
        other = None if _same(z, out) else out
        scale = _scale_operand(block.inv_temperature)
        given = (z, other, block.ids, scale, *factors, *_cap_operands(block.softcap))
        if call(_gradient, (), *given) is not None:
            if not direct:
                store(dblock, live, out)
            return
    store(dblock, live, _gradient_by_operators(block, factors, dblock, live, kept))


def _row_factors(
    block: Block, dlogp: Tensor, dentropy: Tensor | None, statistics: RowStatistics
) -> RowFactors:
    """Return the factors of the gradient of the rows of a block."""
    logp, entropy, top, total = statistics
    scale = block.inv_temperature
    a, b, still = -dlogp / total, None, dlogp == 0
    c = -dlogp * torch.expm1(logp)
    if dentropy is not None:
        assert entropy is not None
        a = a - dentropy * (entropy - total.log()) / total
        b = -dentropy / total * scale
        p = logp.exp()  # 0 where the logit is -inf; p log p is 0 then
        nothing = (dentropy == 0) | (p == 0)
        c = c - torch.where(nothing, 0, dentropy * p * (logp + entropy))
        still = still & (dentropy == 0)
    # Select, not multiply: a row without gradient gets 0 even if its logits hold inf or NaN.
    return RowFactors(top, a * scale, b, c * scale, still)


LOWEST_U = -150  # e is 0 below that, and its product with u must be 0, too


def _gradient_by_operators(
    block: Block, factors: RowFactors, dblock: Tensor, live: Tensor | None, kept: Kept | None
) -> Tensor:
    """Return the gradient of the rows of a block, in float32; it may be in `dblock`."""
    top, a, b, c, still = factors
    if kept is None:
        z = block.z
        direct = live is None and dblock.dtype == torch.float32
        out = dblock if direct else torch.empty(z.shape, dtype=torch.float32, device=z.device)
        z = z if block.softcap is None else apply_soft_cap(z, block.softcap)
        u = scaled_difference(z, top[:, None], block.inv_temperature, out)
        kept = Kept(u.exp_(), None, z) if b is None else Kept(u.exp(), u, z)
    e = kept.e
    if b is None:
        e.mul_(a[:, None])
    else:
        assert kept.u is not None
        e.mul_(kept.u.clamp_(min=LOWEST_U).mul_(b[:, None]).add_(a[:, None]))
    ids = block.ids[:, None]
    at = ids.clamp(min=0)
    e.scatter_(1, at, torch.where(ids < 0, e.gather(1, at), c[:, None]))
    if block.softcap is not None:
        e.mul_(soft_cap_slope(kept.z, block.softcap))
    if bool(still.any()):
        e[still] = 0
    return e


def _gradient(*given: Tensor | None) -> tuple[()]:
    """Write the gradient over z, or beside it, in a form that inductor turns into one pass.

    Args:
        given: z, where the gradient goes (None: over z), ids, the reciprocal temperature, the
            fields of `RowFactors`, and `_cap_operands`.
    """
    z, out, ids, inv_temperature, *factors, cap_in, cap_out, logit_scale = given
    top, a, b, c, still = RowFactors(*factors)  # type: ignore[arg-type]
    assert z is not None
    assert ids is not None
    capped = _capped(z, cap_in, cap_out)
    u = capped - top[:, None]
    if inv_temperature is not None:
        u = u * _column(inv_temperature)
    e = u.exp()
    e = e * a[:, None] if b is None else e * (u.clamp(min=LOWEST_U) * b[:, None] + a[:, None])
    e = torch.where(torch.arange(z.shape[1], device=z.device) == ids[:, None], c[:, None], e)
    if cap_out is not None and logit_scale is not None:
        e = e * ((1 - (capped / cap_out).square()) * logit_scale)
    (z if out is None else out).copy_(torch.where(still[:, None], 0, e))
    return ()


def _same(x: Tensor, y: Tensor) -> bool:
    """Tell whether two tensors are one."""
    return x.dtype == y.dtype and x.data_ptr() == y.data_ptr() and x.stride() == y.stride()


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Tell whether two tensors may share memory."""
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def store(dblock: Tensor, live: Tensor | None, dz: Tensor) -> None:
    """Write the gradient of a block's rows that count to its place, and zeros in the others."""
    if live is not None:
        dblock.zero_()
        dblock[live] = dz.to(dblock.dtype)
    elif dz is not dblock:
        dblock.copy_(dz)
