"""Log-probability of one token per row of logits, and the entropy of the row, without a softmax in memory.

    s       = z / temperature                                   (B, T, V)
    logp    = s[y] - logsumexp(s),   H = logsumexp(s) - sum_v p_v s_v
    dz_v    = (dlogp (1[v = y] - p_v) - dH p_v (log p_v + H)) / temperature

Bytes, at w per logit: the forward reads N V w, and N w for the scored logits; the backward reads N V w and
writes N V w, and N w once more for the scored ones. Rows whose upstream gradient is 0 are written only.
Of masked rows no logit is read.

A program owns a row, or a part of one (`schedules`). m and s (log2 units, `tiles`) are kept for the
backward.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from grpo_fast.kernels.edges import (
    Rows,
    Writer,
    gradient_of,
    place_gradient,
    place_row,
    read_edges,
    rows_of,
    write_edges,
    zero_edges,
)
from grpo_fast.kernels.rows import (
    ONLY_ONE,
    Reader,
    Slots,
    arrive,
    inverse_temperature,
    is_live,
    load_scored,
    load_target,
    read_row,
    whole_row,
    write_dlogits,
    write_zeros,
)
from grpo_fast.kernels.schedules import overlaps, reading, schedule
from grpo_fast.kernels.scoring import load_statistics, saved_statistics, score_row
from grpo_fast.kernels.tiles import (
    LN2,
    LOG2E,
    RowGradient,
    cap_of,
    dlogits_factors,
    dlogits_target,
    soft_cap,
)
from grpo_fast.records import RowStatistics


@triton.jit(do_not_specialize=["before", "T_len"])
def _logprob_fwd_kernel(
    logits_ptr,  # (B, T, V)
    targets,  # Targets, (N,), without inv_temperature, which would cost registers in there
    out,  # RowStatistics, (N,) fp32
    meeting,  # Meeting
    before,
    stride_b,
    stride_t,
    T_len,
    V,
    split,  # Split
    inv_temperature,
    cap,  # Cap, HighCap, or None
    TILES: tl.constexpr,  # ReadTiles
    ROWS: tl.constexpr,
):
    HAS_ENTROPY: tl.constexpr = out.entropy is not None
    READER: tl.constexpr = Reader(TILES, HAS_ENTROPY, ONLY_ONE)
    pid = tl.program_id(0)
    index = (pid // split.parts).to(tl.int64)
    part = pid % split.parts
    live = is_live(targets.mask, index)
    target = load_target(targets.ids, index, V)  # beside the mask: one wait for memory, not two
    if live:
        rows = Rows(logits_ptr, before, stride_b, stride_t)
        row = place_row(rows, index, T_len, V, ROWS)
        inv_temperature = inverse_temperature(targets.temperature, index, inv_temperature)
        scale = inv_temperature * LOG2E
        slots = Slots(meeting.partial, index, split.segments)
        sums = read_row(row, slots, part, target, scale, split.columns, READER, cap)
        if arrive(meeting.arrived, index, split.parts, TILES.SPLIT):
            edges = None
            if ROWS == "anywhere":
                edges = read_edges(row, target, V, scale, HAS_ENTROPY, cap)
            whole = whole_row(sums, slots, edges, READER=READER)
            z = load_scored(row.ptr, target)
            score = score_row(row.ptr, target, z, whole, inv_temperature, V, TILES.T, cap)
            store_statistics(out, index, score)
    elif part == 0:
        tl.store(out.logp + index, 0.0)
        tl.store(out.top + index, 0.0)
        tl.store(out.total + index, 1.0)
        if HAS_ENTROPY:
            tl.store(out.entropy + index, 0.0)


@triton.jit
def store_statistics(out, index, score):
    """Store what the backward needs of a row."""
    m, s = saved_statistics(score.m, score.s, score.back)
    tl.store(out.logp + index, score.logp)
    tl.store(out.top + index, m)
    tl.store(out.total + index, s)
    if out.entropy is not None:
        tl.store(out.entropy + index, score.entropy)


@triton.jit(do_not_specialize=["before", "dbefore", "T_len"])
def _logprob_bwd_kernel(
    dlogp_ptr,  # (N,) fp32
    dentropy_ptr,  # (N,) fp32, or None
    logits_ptr,  # (B, T, V)
    targets,  # Targets, (N,), without inv_temperature, which would cost registers in there
    statistics,  # RowStatistics, (N,) fp32
    dlogits_ptr,  # (B, T, V)
    before,
    stride_b,
    stride_t,
    dbefore,
    dstride_b,
    dstride_t,
    T_len,
    V,
    parts,
    columns,
    inv_temperature,
    cap,  # Cap, HighCap, or None
    TILE: tl.constexpr,  # Tile
    ROWS: tl.constexpr,
    SAME_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    HAS_ENTROPY: tl.constexpr = dentropy_ptr is not None
    WRITER: tl.constexpr = Writer(TILE, HAS_ENTROPY, False, OVERLAP)
    pid = tl.program_id(0)
    index = (pid // parts).to(tl.int64)
    part = pid % parts
    row = place_row(Rows(logits_ptr, before, stride_b, stride_t), index, T_len, V, ROWS)
    drows = Rows(dlogits_ptr, dbefore, dstride_b, dstride_t)
    drow = place_gradient(drows, index, T_len, row, ROWS, SAME_ROWS)
    start = part * columns
    stop = tl.minimum(start + columns, row.body)
    dlogp = tl.load(dlogp_ptr + index)
    dentropy = 0.0
    entropy = 0.0
    if HAS_ENTROPY:
        dentropy = tl.load(dentropy_ptr + index)
        entropy = tl.load(statistics.entropy + index)
    live = (dlogp != 0) | (dentropy != 0)
    if targets.mask is not None:
        live = live & (tl.load(targets.mask + index) != 0)
    if live:
        target = load_target(targets.ids, index, V)
        inv_temperature = inverse_temperature(targets.temperature, index, inv_temperature)
        logp = tl.load(statistics.logp + index)
        m, s, scale = load_statistics(
            statistics.top, statistics.total, index, inv_temperature * LOG2E
        )
        k0, k1 = dlogits_factors(dlogp, dentropy, entropy, s, tl.log2(s), inv_temperature)
        dtarget = dlogits_target(dlogp, dentropy, entropy, logp, inv_temperature)
        if cap is not None:
            dtarget = dtarget * target_slope(row, target, start, stop, part, cap, ROWS)
            tl.debug_barrier()  # in place, every thread has read the logit before one overwrites it
        gradient = RowGradient(target, dtarget, scale, m, k0, k1)
        write_dlogits(row, drow, gradient, start, stop, WRITER, cap)
        if ROWS == "anywhere" and part == 0:
            write_edges(row, drow, gradient, V, WRITER, cap)
    else:
        write_zeros(drow, start, stop, TILE)
        if ROWS == "anywhere" and part == 0:
            zero_edges(drow, V)


@triton.jit
def target_slope(row, target, start, stop, part, cap, ROWS: tl.constexpr):
    """The derivative of the soft cap at the scored logit, if this program writes its gradient."""
    place = target - row.head
    here = (place >= start) & (place < stop)
    if ROWS == "anywhere":
        here = here | ((part == 0) & ((place < 0) | (place >= row.body)) & (target >= 0))
    z = tl.load(row.ptr + target, mask=here, other=0.0).to(tl.float32)
    _, slope = soft_cap(z, cap)
    return slope


def schedule_of(logits, softcap=None):
    """How `logprob_fwd` walks over rows of logits."""
    return reading(logits.shape[-1], logits.element_size(), softcap is not None)


def logprob_fwd(logits, targets, with_entropy, softcap=None, out=None, arrived=None):
    """Launch the forward kernel.

    Args:
        logits: (B, T, V), the last dimension contiguous.
        targets: `Targets`, N = B T.
        softcap: `SoftCap`, or None.
        out: what is returned, to be written; None: made here.
        arrived: (N,) int32 zeros, for this launch alone; None: made here if they are needed.

    Returns:
        `RowStatistics`; the entropy is None without `with_entropy`.
    """
    B, T_len, _ = logits.shape
    N = B * T_len
    if out is None:
        new = functools.partial(torch.empty, N, device=logits.device, dtype=torch.float32)
        out = RowStatistics(new(), new() if with_entropy else None, new(), new())
    plan = schedule_of(logits, softcap)
    if N:
        _logprob_fwd_kernel[(N * plan.parts,)](
            **rows_of("logits", logits),
            targets=targets._replace(inv_temperature=None),
            inv_temperature=targets.inv_temperature,
            out=out,
            meeting=plan.meeting_point(N, logits.device, arrived),
            cap=cap_of(softcap),
            **plan.arguments(out.entropy is not None),
        )
    return out


def logprob_bwd(dlogp, dentropy, logits, targets, statistics, dlogits, softcap=None):
    """Launch the backward kernel, which writes `dlogits`, (B, T, V).

    `dlogits` may be `logits`, or lie over them (`schedules.overlaps`). In the second case one program writes
    a row: it would overwrite a part that another program has yet to read.

    Args:
        dlogp, dentropy: (N,) fp32; the second may be None.
        statistics: `RowStatistics` of the forward; the entropy may be None if `dentropy` is.
    """
    B, T_len, V = logits.shape
    plan = schedule(V, softcap is not None)
    over = overlaps(logits, dlogits)
    if over:
        plan = dataclasses.replace(plan, parts=1, columns=plan.parts * plan.columns)
    if dlogits.numel():
        rows = rows_of("logits", logits)
        _logprob_bwd_kernel[(B * T_len * plan.parts,)](
            dlogp_ptr=dlogp,
            dentropy_ptr=dentropy,
            **rows,
            **gradient_of(rows, dlogits),
            targets=targets._replace(inv_temperature=None),
            inv_temperature=targets.inv_temperature,
            statistics=statistics,
            **plan.arguments(),
            cap=cap_of(softcap),
            OVERLAP=over,
        )


def unit_of_tops(inv_temperature, total):
    """The unit, in nats, of the maxima `top` that `logprob_fwd` returns.

    They are in log2 units of the scaled row; where the total is negative, logits (`saved_statistics`).

    Args:
        inv_temperature: (N,). total: (..., N), what `logprob_fwd` returned.
    """
    scale = inv_temperature * LOG2E.value
    return torch.where(total < 0, scale.double() * LN2.value, LN2.value)
