"""Read and write one row of logits: the loads and stores that every kernel on (B, T, V) logits shares.

A row is read in tiles [K, T] with T = 8 * (threads of a program), 16 bytes of bfloat16 per lane. So the
softmax fold along K stays in registers: no barrier and no shuffle in the hot loop.

Several programs may share a row (`schedules`). Each leaves the statistics of its segments. Then the last
program to arrive combines them, in fixed order, and goes on alone (`arrive`); or the programs wait for each
other, for a limited time, and all of them go on (`meet`). The order of arrival does not change the result.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from grpo_fast.kernels.edges import add_edges, capped_dlogits
from grpo_fast.kernels.tiles import LOWEST, Softmax, fold_softmax, reduce_softmax, soft_cap

# What each pass over rows tells the cache. Others were measured: benchmarks/NOTES.md.
FIRST_OF_TWO = tl.constexpr("evict_last")  # the second pass comes back for the row
FIRST_OF_TWO_SOON = tl.constexpr("")  # likewise, as soon as all programs of the row have read it
ONLY_ONE = tl.constexpr("evict_first")  # nothing is read again
REWRITE = tl.constexpr("evict_first")  # loads and stores of the second pass

# The counter of a row (`meet`).
LEFT_BITS = tl.constexpr(8)
ARRIVED = tl.constexpr(255)


class Reader(NamedTuple):
    """How the logits of a row are read: compile-time constants."""

    TILES: Any  # `schedules.ReadTiles`
    HAS_ENTROPY: Any
    HINT: Any  # to the cache: FIRST_OF_TWO or ONLY_ONE


class Slots(NamedTuple):
    """Where the statistics of the segments of a row are kept."""

    ptr: Any  # `schedules.Meeting.partial`
    row: Any
    segments: Any


@triton.jit
def load_target(ids_ptr, row, V):
    """The scored column of a row as int32; -1, which is no column, where the id is outside [0, V)."""
    target = tl.load(ids_ptr + row)
    inside = (target >= 0) & (target < V)
    return tl.where(inside, target.to(tl.int32), -1)


@triton.jit
def load_scored(row_ptr, target):
    """The scored logit in float32; NaN where the target is -1.

    A loss that is NaN is noticed. The loss of another entry would not be.
    """
    return tl.load(row_ptr + target, mask=target >= 0, other=float("nan")).to(tl.float32)


@triton.jit
def is_live(mask_ptr, row):
    """Whether a row counts."""
    live = True
    if mask_ptr is not None:
        live = tl.load(mask_ptr + row) != 0
    return live


@triton.jit
def tile_offsets(K: tl.constexpr, T: tl.constexpr):
    """The columns of a tile [K, T]."""
    return tl.arange(0, K)[:, None] * T + tl.arange(0, T)[None, :]


@triton.jit
def tile_plan(target, start, stop, BLOCK: tl.constexpr):
    """Which tiles of columns [start, stop) are special: that of the target, and the last if it is not full.

    Returns (full, skip, count, step). The tiles range(skip, count, step) are special. The first `full` tiles
    are plain, except tile `skip`. Plain tiles are read as [K, T]. Special ones are read in strips [1, T]:
    comparisons and masks of K T elements would take as many registers again, and the program would keep them
    as long as it runs.
    """
    full = (stop - start) // BLOCK
    count = tl.cdiv(stop - start, BLOCK)
    there = (target >= start) & (target < start + full * BLOCK)
    skip = tl.where(there, (target - start) // BLOCK, full)
    return full, skip, count, tl.maximum(full - skip, 1)


@triton.jit
def read_statistics(row_ptr, target, scale, start, stop, READER: tl.constexpr, cap=None):
    """(m, s, t) of columns [start, stop) of a row without column `target`.

    Args:
        READER: `Reader`.
        cap: `tiles.Cap` or `tiles.HighCap`; what is read goes through `soft_cap`. None: there is no soft cap.
    """
    K: tl.constexpr = READER.TILES.K
    T: tl.constexpr = READER.TILES.T
    HAS_ENTROPY: tl.constexpr = READER.HAS_ENTROPY
    HINT: tl.constexpr = READER.HINT
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
        if cap is not None:
            z, _ = soft_cap(z, cap)
        m, s, t = fold_softmax(m, s, t, z, scale, HAS_ENTROPY)
    for tile in range(skip, count, step):
        first = start + tile * BLOCK
        for base in range(first, tl.minimum(first + BLOCK, stop), T):
            keep = strip < stop - base  # the target goes after the load, which then stays 128-bit
            z = tl.load(
                row_ptr + base + strip, mask=keep, other=-float("inf"), eviction_policy=HINT
            ).to(tl.float32)
            if cap is not None:
                z, _ = soft_cap(z, cap)
                z = tl.where(keep, z, -float("inf"))
            z = tl.where(strip == target - base, -float("inf"), z)
            m, s, t = fold_softmax(m, s, t, z, scale, HAS_ENTROPY)
    return reduce_softmax(m, s, t, HAS_ENTROPY)


@triton.jit
def tile_is_plain(ahead, target, stop, BLOCK: tl.constexpr):
    """Whether the tile that starts at column `ahead` is whole and does not hold the target."""
    return ((target < ahead) | (target >= ahead + BLOCK)) & (ahead <= stop - BLOCK)


@triton.jit
def read_segments(row_ptr, target, scale, start, V, READER: tl.constexpr):
    """(m, s, t), [SIDE] each, of SIDE segments from column `start` on, without column `target`.

    A tile that holds the target, or ends beyond V, is read in strips [1, T] after the others. A segment is
    read in the order of `read_statistics`, so that SIDE does not change the result. What is not read counts
    as -inf, which leaves m, s and t as they are.
    """
    K: tl.constexpr = READER.TILES.K
    T: tl.constexpr = READER.TILES.T
    STEPS: tl.constexpr = READER.TILES.STEPS
    SIDE: tl.constexpr = READER.TILES.SIDE
    HAS_ENTROPY: tl.constexpr = READER.HAS_ENTROPY
    HINT: tl.constexpr = READER.HINT
    BLOCK: tl.constexpr = K * T
    SEGMENT: tl.constexpr = STEPS * BLOCK
    # The lanes of all segments are on one axis: with two axes, Triton 3.6 changes the layout of every tile.
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
def read_group(row_ptr, slots, target, scale, group, size, V, READER: tl.constexpr, cap=None):
    """Store the statistics of SIDE segments, `size` columns together, where the last program finds them."""
    SIDE: tl.constexpr = READER.TILES.SIDE
    start = group * size
    if SIDE == 1:
        stop = tl.minimum(start + size, V)
        m, s, t = read_statistics(row_ptr, target, scale, start, stop, READER, cap)
        slot_ptr = slots.ptr + (slots.row * slots.segments + group) * 3
        tl.store(slot_ptr, m)
        tl.store(slot_ptr + 1, s)
        tl.store(slot_ptr + 2, t)
    else:
        m_side, s_side, t_side = read_segments(row_ptr, target, scale, start, V, READER)
        segment = group * SIDE + tl.arange(0, SIDE)
        side_ptr = slots.ptr + (slots.row * slots.segments + segment) * 3
        there = segment < slots.segments
        tl.store(side_ptr, m_side, mask=there)
        tl.store(side_ptr + 1, s_side, mask=there)
        tl.store(side_ptr + 2, t_side, mask=there)


@triton.jit
def read_part(row, slots, part, target, scale, columns, READER: tl.constexpr, cap=None):
    """Read one part of a row: GROUPS groups of segments, one after the other."""
    GROUPS: tl.constexpr = READER.TILES.GROUPS
    place = target - row.head
    if GROUPS == 1:  # without a loop, which would take registers
        read_group(
            row.body_ptr, slots, place, scale, part, columns, row.body, READER=READER, cap=cap
        )
    else:
        size = columns // GROUPS
        # All segments are read, also those that a body (`edges`) is too short for: they are combined.
        groups = tl.cdiv(slots.segments, READER.TILES.SIDE)
        for group in range(part * GROUPS, tl.minimum((part + 1) * GROUPS, groups)):
            read_group(
                row.body_ptr, slots, place, scale, group, size, row.body, READER=READER, cap=cap
            )


@triton.jit
def read_row(row, slots, part, target, scale, columns, READER: tl.constexpr, cap=None):
    """Read what this program reads of the body of a row.

    Returns the statistics where a program owns the row. Where programs share it, they are stored in `slots`
    instead, and zeros are returned.
    """
    m = 0.0
    s = 0.0
    t = 0.0
    if READER.TILES.SPLIT:
        read_part(row, slots, part, target, scale, columns, READER, cap)
    else:
        place = target - row.head
        m, s, t = read_statistics(row.body_ptr, place, scale, 0, row.body, READER, cap)
    return Softmax(m, s, t)


@triton.jit
def whole_row(sums, slots, edges, READER: tl.constexpr):
    """The statistics of a whole row without its scored entry, once all programs have read their parts.

    Args:
        sums: what `read_row` returned.
        edges: what `edges.read_edges` returned; None where rows have no edges.
    """
    if READER.TILES.SPLIT:
        sums = combine_segments(slots, READER.TILES.BLOCK_SEGMENTS, READER.HAS_ENTROPY)
    if edges is not None:
        sums = add_edges(sums, edges, READER.HAS_ENTROPY)
    return sums


@triton.jit
def arrive(arrived_ptr, row, parts, SPLIT: tl.constexpr):
    """Whether all parts of a row have been read. Of several programs, the last to arrive learns so."""
    last = True
    if SPLIT:
        tl.debug_barrier()  # the stores of all threads come before the counter of one
        last = tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel", scope="gpu") == parts - 1
    return last


@triton.jit
def meet(arrived_ptr, row, part, parts, POLLS: tl.constexpr):
    """Wait for the other programs of a row, for a limited time.

    The counter of a row holds how many programs have arrived, and above `ARRIVED` one bit for each program
    that has left before the last one arrived.

    Returns (last, parts to write as bits): the last program writes its own part, and the parts of those that
    have left. The others write their own, or nothing if they have left. No program depends on when another
    one runs: so nothing can hang.
    """
    place = arrived_ptr + row
    tl.debug_barrier()  # the stores of all threads come before the counter of one
    seen = tl.atomic_add(place, 1, sem="acq_rel", scope="gpu") + 1
    last = (seen & ARRIVED) == parts
    own = (1 << part).to(tl.int32)
    todo = own
    if last:
        todo = own | (seen >> LEFT_BITS)
    else:
        polls = 0
        while ((seen & ARRIVED) < parts) & (polls < POLLS):
            seen = tl.atomic_add(place, 0, sem="acquire", scope="gpu")
            polls += 1
        if (seen & ARRIVED) < parts:
            seen = tl.atomic_add(place, own << LEFT_BITS, sem="acq_rel", scope="gpu")
            todo = tl.where((seen & ARRIVED) < parts, 0, own)
    return last, todo


@triton.jit
def combine_segments(slots, BLOCK_SEGMENTS: tl.constexpr, HAS_ENTROPY: tl.constexpr):
    """The statistics of a whole row from those of its segments, in their order."""
    segment = tl.arange(0, BLOCK_SEGMENTS)
    slot_ptr = slots.ptr + (slots.row * slots.segments + segment) * 3
    there = segment < slots.segments
    # volatile: other programs wrote these, the cache of this one may be stale
    m = tl.load(slot_ptr, mask=there, other=LOWEST, volatile=True)
    s = tl.load(slot_ptr + 1, mask=there, other=0.0, volatile=True)
    t = tl.load(slot_ptr + 2, mask=there, other=0.0, volatile=True)
    return reduce_softmax(m, s, t, HAS_ENTROPY)


@triton.jit
def write_dlogits(row, drow, gradient, start, stop, WRITER: tl.constexpr, cap=None):
    """Write columns [start, stop) of the body of the gradient of a row.

    The gradient may be written over the logits. The loops write the scored column like any other. At last one
    thread writes its own value there. (Strips around it, as in the first pass, would make the one program
    that rewrites a row wait for memory a few times more.)

    BACKWARDS: the loop runs from the end of the row to its start. What one program has read last is still in
    the cache then. It does not help where several programs have read the row side by side. Logits that are
    done with leave the cache first, so that other rows stay, to which other programs have yet to come back.

    OVERLAP: the gradient has smaller elements, and starts at the first byte of the row of logits
    (`schedules.overlaps`). Column j of the gradient then lies over a column of the logits that is in the same
    tile or in one before it. So one program writes the whole row, forwards, and no thread writes before all
    threads have read the tile.

    Args:
        row, drow: where the logits and their gradient lie (`edges.Row`).
        gradient: `tiles.RowGradient`; a soft cap's slope is in its `dtarget` already.
        WRITER: `edges.Writer`.
    """
    K: tl.constexpr = WRITER.TILE.K
    T: tl.constexpr = WRITER.TILE.T
    OVERLAP: tl.constexpr = WRITER.OVERLAP
    BACKWARDS: tl.constexpr = WRITER.BACKWARDS
    BLOCK: tl.constexpr = K * T
    tl.static_assert(not (OVERLAP and BACKWARDS))
    dtype: tl.constexpr = drow.ptr.dtype.element_ty
    place = gradient.target - row.head
    offs = tile_offsets(K, T)
    strip = tile_offsets(1, T)
    full = (stop - start) // BLOCK
    for i in range(0, full):
        base = start + (full - 1 - i if BACKWARDS else i) * BLOCK
        z = tl.load(row.body_ptr + base + offs, eviction_policy=REWRITE).to(tl.float32)
        dz = capped_dlogits(z, gradient, WRITER.HAS_ENTROPY, cap).to(dtype)
        if OVERLAP:
            tl.debug_barrier()
        tl.store(drow.body_ptr + base + offs, dz, eviction_policy=REWRITE)
    for base in range(start + full * BLOCK, stop, T):
        keep = strip < stop - base
        z = tl.load(
            row.body_ptr + base + strip, mask=keep, other=-float("inf"), eviction_policy=REWRITE
        ).to(tl.float32)
        dz = capped_dlogits(z, gradient, WRITER.HAS_ENTROPY, cap).to(dtype)
        if OVERLAP:
            tl.debug_barrier()
        tl.store(drow.body_ptr + base + strip, dz, mask=keep, eviction_policy=REWRITE)
    if (place >= start) & (place < stop):
        tl.debug_barrier()  # one thread writes over what another's loop left there
        tl.store(drow.body_ptr + place, gradient.dtarget.to(dtype))


@triton.jit
def write_zeros(drow, start, stop, TILE: tl.constexpr):
    """Write zeros to columns [start, stop) of the body of a row without a gradient; no logit is read."""
    K: tl.constexpr = TILE.K
    T: tl.constexpr = TILE.T
    BLOCK: tl.constexpr = K * T
    offs = tile_offsets(K, T)
    zeros = tl.zeros([K, T], tl.float32).to(drow.ptr.dtype.element_ty)
    full = (stop - start) // BLOCK
    for i in range(0, full):
        tl.store(drow.body_ptr + start + i * BLOCK + offs, zeros)
    base = start + full * BLOCK
    if base < stop:
        tl.store(drow.body_ptr + base + offs, zeros, mask=offs < stop - base)


@triton.jit
def inverse_temperature(temperature_ptr, row, inv_temperature):
    """1 / temperature of a row in fp32: the row's own temperature if tokens have one, else the common one."""
    if temperature_ptr is not None:
        inv_temperature = 1.0 / tl.load(temperature_ptr + row)
    # The interpreter would go on in float64 in some kernels, and their log-probs differ in the last bit.
    return tl.full([], inv_temperature, tl.float32)
