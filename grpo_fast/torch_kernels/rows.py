"""Rows of logits by PyTorch's operators: in blocks, in place, without an (N, V) intermediate.

This is the twin of `kernels/rows.py` and of the softmax part of `kernels/tiles.py`, in natural
logarithms. With u = (z - max z) / temperature and e = exp(u), a block becomes e once, and its
gradient is `e * factor`. On a CPU large vocabularies run compiled (`compiled.py`): the passes over
(R, V) are there in a second form, the formulas of rows are shared.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.records import RowStatistics, SoftCap, Targets
from grpo_fast.torch_kernels.compiled import VOCABULARY, call, compiles

BLOCK_ELEMENTS = 1 << 21  # 8 MB of float32
# Compiled code needs memory of that size only where rows are left out.
COMPILED_ELEMENTS = 1 << 23
UNIT = 8  # as in kernels/edges.py
PART = 256  # of compiled rows: how many entries are added up at once
LOG2_E = math.log2(math.e)


def soft_cap_argument(z: Tensor, cap: SoftCap) -> Tensor:
    """Return x = logit_scale z / softcap in float32: the logits become softcap tanh(x)."""
    return z.float().mul(cap.logit_scale / cap.softcap)


def apply_soft_cap(x: Tensor, cap: SoftCap, out: Tensor) -> Tensor:
    """Write the capped logits into `out` and return it; x is from `soft_cap_argument`."""
    return torch.tanh(x, out=out).mul_(cap.softcap)


def soft_cap_slope(x: Tensor, cap: SoftCap) -> Tensor:
    """Return the derivative of the capped logits in z, written over x.

    It is logit_scale / cosh(x)^2. The same number 1 - tanh(x)^2 would lose its digits where the cap
    is nearly reached.
    """
    return x.cosh_().square_().reciprocal_().mul_(cap.logit_scale)


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


def row_blocks(
    read: Tensor, *written: Tensor, at_once: bool = False
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield blocks of the N rows: which rows, and these rows of each (B, T, V) tensor as (R, V).

    The blocks of `written` are views. So are those of `read`, unless its strides do not allow a
    view over several sequences: then a block is a copy.

    Args:
        at_once: one block, if the rows are compiled and their strides allow it.
    """
    B, T, V = read.shape
    step = block_rows(read)
    try:
        flat = [x.view(B * T, V) for x in (read, *written)]
    except RuntimeError:
        yield from _sequence_blocks(read, written, step)
        return
    if at_once and compiles_rows(read) and all(_close(x) for x in flat):
        step = max(B * T, 1)
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
    x: Tensor | None  # from `soft_cap_argument`; None without a soft cap


def read_block(
    block: Block, with_entropy: bool, out: Tensor | None = None
) -> tuple[RowStatistics, Kept | None]:
    """Return the statistics of the rows of a block; what else was computed is kept, unless compiled.

    Args:
        out: (R, V) float32 to work in; it may be `block.z`. None: it is made where needed.
    """
    z, ids, inv_temperature, softcap = block
    if compiles_rows(z):
        found = _read_compiled(block, with_entropy)
        if found is not None:
            return found, None
        if len(z) > (step := block_rows(z)):  # compiling has failed just now
            parts = [read_block(_rows(block, s), with_entropy)[0] for s in _steps(len(z), step)]
            return _joined(parts), None
    if out is None:
        out = torch.empty(z.shape, dtype=torch.float32, device=z.device)
    x = None
    if softcap is not None:
        x = soft_cap_argument(z, softcap)
        z = apply_soft_cap(x, softcap, out)
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
    return _row_statistics(row_sum(e), products, u_y, top), Kept(e, kept_u, x)


def _read_compiled(block: Block, with_entropy: bool) -> RowStatistics | None:
    """Return what `read_block` returns, by code of inductor; None if compiling fails.

    The logits are read once. Each part of a row has a maximum and sums of its own, and is short:
    inductor adds term by term, and float32 is too short for many terms. The part of the scored
    entry is computed a second time, without it.
    """
    z, ids, inv_temperature, softcap = block
    z = z if _close(z) else z.contiguous()
    options = _scale_operand(inv_temperature), *_cap_operands(softcap)[:2]
    parts = call(_read_parts, (with_entropy,), z, *options)
    # A function of its own. In one function with the parts, inductor gives each of their sums a
    # loop over all rows, and reads the logits from memory twice.
    if parts is None:
        return None
    found = call(_join_parts, (with_entropy,), z, ids, *options, *parts)
    return None if found is None else RowStatistics(*found)


def _read_parts(
    z: Tensor,
    inv_temperature: Tensor | None,
    cap_in: Tensor | None,
    cap_out: Tensor | None,
    with_entropy: bool,
) -> list[Tensor]:
    """Return the maxima, the sums of e and, if wanted, those of u e, (R, K) each, of parts of rows.

    First those of the K whole parts, then those of what is left, K = 1.
    """
    whole = z.shape[1] // PART * PART
    parts = [z[:, :whole].unflatten(1, (-1, PART))] if whole else []
    if whole < z.shape[1]:
        parts.append(z[:, None, whole:])
    found = []
    for part in parts:
        part = _capped(part, cap_in, cap_out)
        top = _top(part, -1)
        u = _scaled(part - top[:, :, None], inv_temperature)
        e = (u * LOG2_E).exp2()  # faster than exp
        found += [top, e.sum(-1)]
        if with_entropy:
            found.append(_times(u, e).sum(-1))
    return found


def _join_parts(
    z: Tensor,
    ids: Tensor,
    inv_temperature: Tensor | None,
    cap_in: Tensor | None,
    cap_out: Tensor | None,
    *given: Any,
) -> RowStatistics:
    """Return the statistics of rows from those of their parts, with the option at the end."""
    *parts, with_entropy = given
    each = 3 if with_entropy else 2
    top_k, e_k = (torch.cat(parts[i::each], 1) for i in range(2))
    top = top_k.amax(1, keepdim=True)
    shift = _scaled(top_k - top, inv_temperature)
    mine = ids // PART
    factor = torch.where(
        torch.arange(e_k.shape[1], device=z.device) == mine[:, None], 0, shift.exp()
    )
    # A window as long as a part that contains the part of the scored entry.
    V, length = z.shape[1], min(PART, z.shape[1])
    first = (mine * PART)[:, None]
    start = first.clamp(max=V - length)
    row = torch.arange(z.shape[0], device=z.device)[:, None]
    window = _capped(z.unfold(1, length, 1)[row, start].squeeze(1), cap_in, cap_out)
    column = start + torch.arange(length, device=z.device)
    u = _scaled(window - top, inv_temperature)
    e = torch.where((column >= first) & (column != ids[:, None]), u.exp(), 0)
    rest = (e_k * factor).sum(1, keepdim=True) + e.sum(1, keepdim=True)
    weighted = None
    if with_entropy:
        # With a bound: a part of the lowest numbers is -1e38 e, times a factor of 0.
        of_shift = _times(shift.clamp(min=LOWEST_U), e_k)
        of_parts = (torch.cat(parts[2::each], 1) + of_shift) * factor
        weighted = of_parts.sum(1, keepdim=True) + _times(u, e).sum(1, keepdim=True)
    u_y = _scaled(_capped(z.gather(1, ids[:, None]), cap_in, cap_out) - top, inv_temperature)
    return _row_statistics(rest, weighted, u_y, top)


def _scaled(u: Tensor, inv_temperature: Tensor | None) -> Tensor:
    """Return u / temperature, with a temperature for each row, for all rows, or none."""
    if inv_temperature is None:
        return u
    return u * inv_temperature.view(-1, *(1,) * (u.ndim - 1))


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
    return None if x == 1 else torch.tensor(x, dtype=torch.float32, device="cpu")


def _cap_operands(cap: SoftCap | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the factors of a soft cap before and after the tanh, and of the slope, 0-dim."""
    if cap is None:
        return None, None, None
    number = functools.partial(torch.tensor, dtype=torch.float32, device="cpu")
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
        direct = direct and _close(dblock)
        z = z if _close(z) else z.contiguous()
        out = dblock if direct else torch.empty_like(z, dtype=dblock.dtype)
        other = None if _same(z, out) else out
        scale = _scale_operand(block.inv_temperature)
        given = (z, other, block.ids, scale, *factors, *_cap_operands(block.softcap))
        if call(_gradient, (), *given) is not None:
            if not direct:
                store(dblock, live, out)
            return
        if live is None and len(z) > (step := block_rows(z)):  # compiling has failed just now
            for s in _steps(len(z), step):
                dh, of_rows = None if dentropy is None else dentropy[s], _rows(statistics, s)
                write_block(_rows(block, s), dlogp[s], dh, of_rows, dblock[s], None)
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
        z, x = block.z, None
        direct = live is None and dblock.dtype == torch.float32
        out = dblock if direct else torch.empty(z.shape, dtype=torch.float32, device=z.device)
        if block.softcap is not None:
            x = soft_cap_argument(z, block.softcap)
            z = apply_soft_cap(x, block.softcap, out)
        u = scaled_difference(z, top[:, None], block.inv_temperature, out)
        kept = Kept(u.exp_(), None, x) if b is None else Kept(u.exp(), u, x)
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
        assert kept.x is not None
        e.mul_(soft_cap_slope(kept.x, block.softcap))
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
    u = _capped(z, cap_in, cap_out) - top[:, None]
    if inv_temperature is not None:
        u = u * _column(inv_temperature)
    e = u.exp()
    e = e * a[:, None] if b is None else e * (u.clamp(min=LOWEST_U) * b[:, None] + a[:, None])
    e = torch.where(torch.arange(z.shape[1], device=z.device) == ids[:, None], c[:, None], e)
    if cap_in is not None and logit_scale is not None:
        # `soft_cap_slope` by an exponential, which inductor computes faster than cosh
        t = (-2 * (z.float() * cap_in).abs()).exp()
        e = e * (4 * logit_scale * t / (1 + t).square())
    (z if out is None else out).copy_(torch.where(still[:, None], 0, e))
    return ()


def _close(x: Tensor) -> bool:
    """Tell whether rows (R, V) are close together.

    Code is compiled for a stride. The last rows of sequences have another one for each length.
    """
    return x.stride(0) <= 2 * x.shape[1]


def _steps(R: int, step: int) -> list[slice]:
    """Return R rows in steps."""
    return [slice(start, start + step) for start in range(0, R, step)]


def _rows(record: Any, some: slice) -> Any:
    """Return some rows of a record; what it has for all rows stays."""
    kept = (x[some] if isinstance(x, Tensor) and x.ndim else x for x in record)
    return type(record)(*kept)


def _joined(found: list[RowStatistics]) -> RowStatistics:
    """Return the statistics of rows that were computed in steps."""
    entropies = [x.entropy for x in found if x.entropy is not None]
    return RowStatistics(
        torch.cat([x.logp for x in found]),
        torch.cat(entropies) if entropies else None,
        torch.cat([x.top for x in found]),
        torch.cat([x.total for x in found]),
    )


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
