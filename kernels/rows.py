"""Streaming one row of logits: the loads and stores that every kernel on (B, T, V) logits shares.

A row is read in tiles [K, T] of T = 8 * (threads of a program), 16 bytes of bfloat16 per lane, so that the
softmax fold along K stays in registers: no barrier and no shuffle in the hot loop.

Of a row that several programs share (`schedules`) the last program to arrive combines the statistics of all
segments, in fixed order, and goes on alone: nobody waits, nobody spins, and the order of arrival does not
reach the result.
"""

import triton
import triton.language as tl

from grpo_fast.kernels.edges import capped_dlogits
from grpo_fast.kernels.tiles import LOWEST, fold_softmax, reduce_softmax, soft_cap

# What each pass over rows tells the cache. Others were measured: benchmarks/NOTES.md.
FIRST_OF_TWO = tl.constexpr("evict_last")  # the second comes back for it
ONLY_ONE = tl.constexpr("evict_first")  # nothing is read again
REWRITE = tl.constexpr("evict_first")  # loads and stores of the second


def soft_cap_scalars(softcap, logit_scale) -> dict[str, float | None]:
    """What the kernels take: the rate is known here, so that no program holds it in a register."""
    rate = None if softcap is None else -2.8853900817779268 * logit_scale / softcap  # -2 / ln 2
    return {"softcap": softcap, "logit_scale": logit_scale, "cap_rate": rate}


@triton.jit
def load_target(ids_ptr, row, V):
    """The scored entry of a row as int32; -1, which no column has, where the id is outside [0, V)."""
    target = tl.load(ids_ptr + row)
    inside = (target >= 0) & (target < V)
    return tl.where(inside, target.to(tl.int32), -1)


@triton.jit
def load_scored(row_ptr, target):
    """The scored logit in float32; NaN without one: a loss of NaN is noticed, one of another entry is not."""
    return tl.load(row_ptr + target, mask=target >= 0, other=float("nan")).to(tl.float32)


@triton.jit
def tile_offsets(K: tl.constexpr, T: tl.constexpr):
    return tl.arange(0, K)[:, None] * T + tl.arange(0, T)[None, :]  # [K, T]


@triton.jit
def tile_plan(target, start, stop, BLOCK: tl.constexpr):
    """Which tiles of columns [start, stop) need care: the target's, and the last if it is not full.

    Returns (full, skip, count, step): range(skip, count, step) need care, the first `full` without `skip`
    do not. The loops read these as [K, T], the others in strips [1, T]: compares and masks for K T elements
    would take as many registers again, and the program would keep them for all its life.
    """
    full = (stop - start) // BLOCK
    count = tl.cdiv(stop - start, BLOCK)
    there = (target >= start) & (target < start + full * BLOCK)
    skip = tl.where(there, (target - start) // BLOCK, full)
    return full, skip, count, tl.maximum(full - skip, 1)


@triton.jit
def read_statistics(
    row_ptr,
    target,
    scale,
    start,
    stop,
    K: tl.constexpr,
    T: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HINT: tl.constexpr,
    softcap=None,
    logit_scale=None,
    cap_rate=None,
):
    """(m, s, t) of columns [start, stop) of a row without column `target`.

    HINT: to the cache, FIRST_OF_TWO or ONLY_ONE.
    softcap, logit_scale, cap_rate: all or none (`soft_cap_scalars`): what is read goes through `soft_cap`.
    """
    BLOCK: tl.constexpr = K * T
    offs = tile_offsets(K, T)
    strip = tile_offsets(1, T)
    m = tl.full([T], LOWEST, tl.float32)
    s = tl.zeros([T], tl.float32)
    t = tl.zeros([T], tl.float32)
    full, skip, count, step = tile_plan(target, start, stop, BLOCK)
    for i in range(0, full - (skip < full).to(tl.int32)):
        base = start + (i + (i >= skip).to(tl.int32)) * BLOCK
        z = tl.load(row_ptr + base + offs, eviction_policy=HINT).to(tl.float32)
        if softcap is not None:
            z, _ = soft_cap(z, softcap, logit_scale, cap_rate)
        m, s, t = fold_softmax(m, s, t, z, scale, HAS_ENTROPY)
    for tile in range(skip, count, step):
        first = start + tile * BLOCK
        for base in range(first, tl.minimum(first + BLOCK, stop), T):
            keep = strip < stop - base  # the target goes after the load, which then stays 128-bit
            z = tl.load(
                row_ptr + base + strip, mask=keep, other=-float("inf"), eviction_policy=HINT
            ).to(tl.float32)
            if softcap is not None:
                z, _ = soft_cap(z, softcap, logit_scale, cap_rate)
                z = tl.where(keep, z, -float("inf"))
            z = tl.where(strip == target - base, -float("inf"), z)
            m, s, t = fold_softmax(m, s, t, z, scale, HAS_ENTROPY)
    return reduce_softmax(m, s, t, HAS_ENTROPY)


@triton.jit
def tile_is_plain(ahead, target, stop, BLOCK: tl.constexpr):
    """Whether the tile that starts at column `ahead` is whole, and without the target."""
    return ((target < ahead) | (target >= ahead + BLOCK)) & (ahead <= stop - BLOCK)


@triton.jit
def read_segments(
    row_ptr,
    target,
    scale,
    start,
    V,
    K: tl.constexpr,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    SIDE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HINT: tl.constexpr,
):
    """(m, s, t), [SIDE] each, of as many segments from column `start` on, without column `target`.

    A tile that holds the target, or ends beyond V, is read in strips [1, T] after the others: each segment as
    `read_statistics` reads it, so that SIDE does not reach the result. What is not read counts as -inf, which
    leaves m, s and t as they are.
    """
    BLOCK: tl.constexpr = K * T
    SEGMENT: tl.constexpr = STEPS * BLOCK
    # One axis for the lanes of all segments: of two, Triton 3.6 lays out every tile anew.
    lane = tl.arange(0, SIDE * T)
    ahead = lane // T * SEGMENT  # of the segment of a lane
    offs = ahead + lane % T
    tile_offs = tl.arange(0, K)[:, None] * T + offs[None, :]
    m = tl.full([SIDE * T], LOWEST, tl.float32)
    s = tl.zeros([SIDE * T], tl.float32)
    t = tl.zeros([SIDE * T], tl.float32)
    for step in range(STEPS):
        base = start + step * BLOCK
        plain = tile_is_plain(ahead, target - base, V - base, BLOCK)
        z = tl.load(
            row_ptr + base + tile_offs,
            mask=plain[None, :],
            other=-float("inf"),
            eviction_policy=HINT,
        ).to(tl.float32)
        m, s, t = fold_softmax(m, s, t, z, scale, HAS_ENTROPY)
    stop = start + SIDE * SEGMENT
    if ((target >= start) & (target < stop)) | (stop > V):
        for step in range(STEPS):
            base = start + step * BLOCK
            care = tile_is_plain(ahead, target - base, V - base, BLOCK) == 0
            there = (target >= start) & (target < stop)
            there = there & ((target - start) % SEGMENT // BLOCK == step)
            if there | (base + (SIDE - 1) * SEGMENT + BLOCK > V):
                for i in range(K):
                    # The target goes after the load, which then stays 128-bit.
                    keep = care & (offs < V - base - i * T)
                    strip = tl.load(
                        row_ptr + base + i * T + offs,
                        mask=keep,
                        other=-float("inf"),
                        eviction_policy=HINT,
                    ).to(tl.float32)
                    strip = tl.where(offs == target - base - i * T, -float("inf"), strip)
                    m, s, t = fold_softmax(m, s, t, strip[None, :], scale, HAS_ENTROPY)
    shape: tl.constexpr = (SIDE, T)
    return reduce_softmax(
        tl.reshape(m, shape), tl.reshape(s, shape), tl.reshape(t, shape), HAS_ENTROPY
    )


@triton.jit
def read_group(
    row_ptr,
    partial_ptr,
    row,
    target,
    scale,
    group,
    size,
    V,
    segments,
    K: tl.constexpr,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    SIDE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HINT: tl.constexpr,
    softcap=None,
    logit_scale=None,
    cap_rate=None,
):
    """Leave the statistics of SIDE segments, `size` columns in all, where the last to arrive finds them."""
    start = group * size
    if SIDE == 1:
        stop = tl.minimum(start + size, V)
        m, s, t = read_statistics(
            row_ptr,
            target,
            scale,
            start,
            stop,
            K,
            T,
            HAS_ENTROPY,
            HINT,
            softcap,
            logit_scale,
            cap_rate,
        )
        slot_ptr = partial_ptr + (row * segments + group) * 3
        tl.store(slot_ptr, m)
        tl.store(slot_ptr + 1, s)
        tl.store(slot_ptr + 2, t)
    else:
        m_side, s_side, t_side = read_segments(
            row_ptr, target, scale, start, V, K, T, STEPS, SIDE, HAS_ENTROPY, HINT
        )
        segment = group * SIDE + tl.arange(0, SIDE)
        side_ptr = partial_ptr + (row * segments + segment) * 3
        there = segment < segments
        tl.store(side_ptr, m_side, mask=there)
        tl.store(side_ptr + 1, s_side, mask=there)
        tl.store(side_ptr + 2, t_side, mask=there)


@triton.jit
def read_part(
    row_ptr,
    partial_ptr,
    row,
    part,
    target,
    scale,
    columns,
    V,
    segments,
    K: tl.constexpr,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    SIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HINT: tl.constexpr,
    softcap=None,
    logit_scale=None,
    cap_rate=None,
):
    """Read one part of a row, GROUPS groups of segments one after the other."""
    if GROUPS == 1:  # without a loop, which would take registers
        read_group(
            row_ptr,
            partial_ptr,
            row,
            target,
            scale,
            part,
            columns,
            V,
            segments,
            K,
            T,
            STEPS,
            SIDE,
            HAS_ENTROPY,
            HINT,
            softcap,
            logit_scale,
            cap_rate,
        )
    else:
        size = columns // GROUPS
        # All segments, those that a body (`edges`) is too short for as well: they are combined.
        for group in range(part * GROUPS, tl.minimum((part + 1) * GROUPS, tl.cdiv(segments, SIDE))):
            read_group(
                row_ptr,
                partial_ptr,
                row,
                target,
                scale,
                group,
                size,
                V,
                segments,
                K,
                T,
                STEPS,
                SIDE,
                HAS_ENTROPY,
                HINT,
                softcap,
                logit_scale,
                cap_rate,
            )


@triton.jit
def arrive(arrived_ptr, row, parts):
    """Count one part of a row; True for the last to arrive."""
    tl.debug_barrier()  # the stores of all threads come before the counter of one
    return tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel", scope="gpu") == parts - 1


@triton.jit
def combine_segments(
    partial_ptr, row, segments, BLOCK_SEGMENTS: tl.constexpr, HAS_ENTROPY: tl.constexpr
):
    """The statistics of a whole row from those of its segments, in their order."""
    segment = tl.arange(0, BLOCK_SEGMENTS)
    slot_ptr = partial_ptr + (row * segments + segment) * 3
    there = segment < segments
    # volatile: other programs wrote these, the cache of this one may be stale
    m = tl.load(slot_ptr, mask=there, other=LOWEST, volatile=True)
    s = tl.load(slot_ptr + 1, mask=there, other=0.0, volatile=True)
    t = tl.load(slot_ptr + 2, mask=there, other=0.0, volatile=True)
    return reduce_softmax(m, s, t, HAS_ENTROPY)


@triton.jit
def write_dlogits(
    row_ptr,
    drow_ptr,
    target,
    dtarget,
    scale,
    m,
    k0,
    k1,
    start,
    stop,
    K: tl.constexpr,
    T: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BACKWARDS: tl.constexpr,
    softcap=None,
    logit_scale=None,
    cap_rate=None,
    OVERLAP: tl.constexpr = False,
):
    """Columns [start, stop) of the gradient of a row; `drow_ptr` may be `row_ptr`.

    BACKWARDS, from back to front: what one program has read last is still in the cache. Of a row read by
    many side by side no end is. What is done with leaves the cache first, so that rows which other programs
    have yet to come back to can stay. The scored column is written twice: by the loops like any other, at
    last with its own value, `dtarget`, a soft cap's slope included. Strips around it, as in the first pass,
    would make the one program that rewrites a row wait for memory a few times more.

    OVERLAP: the gradient has smaller elements, from the first byte of the row on (`schedules.overlaps`).
    Column j is then written over a column before it: one of this tile, or of one before. So the whole row
    is of one program, forwards, and no thread writes before all threads have read the tile.
    """
    tl.static_assert(not (OVERLAP and BACKWARDS))
    BLOCK: tl.constexpr = K * T
    offs = tile_offsets(K, T)
    strip = tile_offsets(1, T)
    full = (stop - start) // BLOCK
    for i in range(0, full):
        base = start + (full - 1 - i if BACKWARDS else i) * BLOCK
        z = tl.load(row_ptr + base + offs, eviction_policy=REWRITE).to(tl.float32)
        dz = capped_dlogits(z, scale, m, k0, k1, HAS_ENTROPY, softcap, logit_scale, cap_rate)
        dz = dz.to(drow_ptr.dtype.element_ty)
        if OVERLAP:
            tl.debug_barrier()
        tl.store(drow_ptr + base + offs, dz, eviction_policy=REWRITE)
    for base in range(start + full * BLOCK, stop, T):
        keep = strip < stop - base
        z = tl.load(
            row_ptr + base + strip, mask=keep, other=-float("inf"), eviction_policy=REWRITE
        ).to(tl.float32)
        dz = capped_dlogits(z, scale, m, k0, k1, HAS_ENTROPY, softcap, logit_scale, cap_rate)
        dz = dz.to(drow_ptr.dtype.element_ty)
        if OVERLAP:
            tl.debug_barrier()
        tl.store(drow_ptr + base + strip, dz, mask=keep, eviction_policy=REWRITE)
    if (target >= start) & (target < stop):
        tl.debug_barrier()  # one thread writes over what another's loop left there
        tl.store(drow_ptr + target, dtarget.to(drow_ptr.dtype.element_ty))


@triton.jit
def write_zeros(drow_ptr, start, stop, K: tl.constexpr, T: tl.constexpr):
    """Columns [start, stop) of a row without gradient: written without being read."""
    BLOCK: tl.constexpr = K * T
    offs = tile_offsets(K, T)
    zeros = tl.zeros([K, T], tl.float32).to(drow_ptr.dtype.element_ty)
    full = (stop - start) // BLOCK
    for i in range(0, full):
        tl.store(drow_ptr + start + i * BLOCK + offs, zeros)
    base = start + full * BLOCK
    if base < stop:
        tl.store(drow_ptr + base + offs, zeros, mask=offs < stop - base)


@triton.jit
def inverse_temperature(temperature_ptr, row, inv_temperature):
    """1 / temperature of a row, fp32: its own where there is one per token, else the common one."""
    if temperature_ptr is not None:
        inv_temperature = 1.0 / tl.load(temperature_ptr + row)
    # The interpreter would go on in float64 in some kernels, and their log-probs differ in the last bit.
    return tl.full([], inv_temperature, tl.float32)
