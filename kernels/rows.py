"""Streaming one row of logits: the loads and stores that every kernel on (B, T, V) logits shares.

A row is read in tiles [K, T]. T = 8 * (threads of a program), 16 bytes of bfloat16 per lane, so that the
softmax fold along K stays in registers: no barrier and no shuffle in the hot loop.

Two schedules. Up to `MAX_V_PER_PROGRAM` entries one program owns a row. Above, `S` programs read a part of
the row each and store partial statistics; the last to arrive combines them, in fixed order, and goes on
alone: nobody waits, nobody spins, and the order of arrival does not reach the result. The schedule depends on
V alone, so a row's result does not depend on the batch around it.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from grpo_fast.kernels.tiles import (
    LOWEST,
    dlogits_tile,
    fold_softmax,
    reduce_softmax,
    soft_cap,
)

MAX_V_PER_PROGRAM = 32_768
WARP_SIZE = 64 if torch.version.hip else 32
PARTS = 16  # how many programs share a long row, at most
STATISTICS = 3  # m, s, t


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the kernels walk over a row of V entries: `parts` programs of `columns` entries each."""

    parts: int
    columns: int
    K: int
    T: int
    num_warps: int

    @property
    def split(self) -> bool:
        return self.parts > 1

    @property
    def block_parts(self) -> int:
        return triton.next_power_of_2(self.parts)

    def arguments(self, x) -> dict[str, int]:
        """How a kernel is told of this schedule and of the rows of x, (B, T, V)."""
        return {
            "stride_b": x.stride(0),
            "stride_t": x.stride(1),
            "T_len": x.shape[1],
            "V": x.shape[2],
            "parts": self.parts,
            "columns": self.columns,
            "K": self.K,
            "T": self.T,
            "num_warps": self.num_warps,
        }

    def meeting_point(self, N, device) -> dict[str, torch.Tensor | None]:
        """Where the parts of N rows leave their statistics and count themselves."""
        if not self.split:
            return {"partial_ptr": None, "arrived_ptr": None}
        partial = torch.empty(N, self.parts, STATISTICS, device=device, dtype=torch.float32)
        arrived = torch.zeros(N, device=device, dtype=torch.int32)
        return {"partial_ptr": partial, "arrived_ptr": arrived}


def schedule(V: int, capped: bool = False) -> Schedule:
    """The schedule for rows of V entries.

    A soft cap takes registers: with half the threads a program spills none, and as many threads are resident.
    """
    if V <= 1024:
        return Schedule(parts=1, columns=V, K=1, T=1024, num_warps=128 // WARP_SIZE)
    threads = 128 if capped else 256
    K, T, warps = 4, 8 * threads, threads // WARP_SIZE
    if V <= MAX_V_PER_PROGRAM:
        return Schedule(parts=1, columns=V, K=K, T=T, num_warps=warps)
    tiles = triton.cdiv(V, K * T)
    columns = triton.cdiv(tiles, PARTS) * K * T
    return Schedule(parts=triton.cdiv(V, columns), columns=columns, K=K, T=T, num_warps=warps)


def soft_cap_scalars(softcap, logit_scale) -> dict[str, float | None]:
    """What the kernels take: the rate is known here, so that no program holds it in a register."""
    rate = None if softcap is None else -2.8853900817779268 * logit_scale / softcap  # -2 / ln 2
    return {"softcap": softcap, "logit_scale": logit_scale, "cap_rate": rate}


@triton.jit
def load_target(ids_ptr, row, V):
    """The scored entry of a row as int32; -1, which no column has, where the id is outside [0, V)."""
    target = tl.load(ids_ptr + row)
    return tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)


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
    softcap=None,
    logit_scale=None,
    cap_rate=None,
):
    """(m, s, t) of columns [start, stop) of a row without column `target`.

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
        # A second pass often follows: ask the cache to keep the row.
        z = tl.load(row_ptr + base + offs, eviction_policy="evict_last").to(tl.float32)
        if softcap is not None:
            z, _ = soft_cap(z, softcap, logit_scale, cap_rate)
        m, s, t = fold_softmax(m, s, t, z, scale, HAS_ENTROPY)
    for tile in range(skip, count, step):
        first = start + tile * BLOCK
        for base in range(first, tl.minimum(first + BLOCK, stop), T):
            keep = strip < stop - base  # the target goes after the load, which then stays 128-bit
            z = tl.load(
                row_ptr + base + strip, mask=keep, other=-float("inf"), eviction_policy="evict_last"
            ).to(tl.float32)
            if softcap is not None:
                z, _ = soft_cap(z, softcap, logit_scale, cap_rate)
                z = tl.where(keep, z, -float("inf"))
            z = tl.where(strip == target - base, -float("inf"), z)
            m, s, t = fold_softmax(m, s, t, z, scale, HAS_ENTROPY)
    return reduce_softmax(m, s, t, HAS_ENTROPY)


@triton.jit
def arrive(partial_ptr, arrived_ptr, row, part, parts, m, s, t):
    """Store the statistics of one part of a row; True for the last part to arrive."""
    slot_ptr = partial_ptr + (row * parts + part) * 3
    tl.store(slot_ptr, m)
    tl.store(slot_ptr + 1, s)
    tl.store(slot_ptr + 2, t)
    tl.debug_barrier()  # the stores of all threads come before the counter of one
    return tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel", scope="gpu") == parts - 1


@triton.jit
def combine_parts(partial_ptr, row, parts, BLOCK_PARTS: tl.constexpr, HAS_ENTROPY: tl.constexpr):
    """The statistics of a whole row from those of its parts, in the order of the parts."""
    part = tl.arange(0, BLOCK_PARTS)
    slot_ptr = partial_ptr + (row * parts + part) * 3
    there = part < parts
    # volatile: other programs wrote these, the cache of this one may be stale
    m = tl.load(slot_ptr, mask=there, other=LOWEST, volatile=True)
    s = tl.load(slot_ptr + 1, mask=there, other=0.0, volatile=True)
    t = tl.load(slot_ptr + 2, mask=there, other=0.0, volatile=True)
    return reduce_softmax(m, s, t, HAS_ENTROPY)


@triton.jit
def capped_dlogits(
    z, scale, m, k0, k1, HAS_ENTROPY: tl.constexpr, softcap=None, logit_scale=None, cap_rate=None
):
    """`dlogits_tile`, through the soft cap if there is one."""
    if softcap is not None:
        z, slope = soft_cap(z, softcap, logit_scale, cap_rate)
    dz = dlogits_tile(z, scale, m, k0, k1, HAS_ENTROPY)
    if softcap is not None:
        dz = dz * slope
    return dz


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
):
    """Columns [start, stop) of the gradient of a row; `drow_ptr` may be `row_ptr`.

    BACKWARDS, from back to front: what one program has read last is still in the cache. Of a row read by
    many side by side no end is. What is done with leaves the cache first, so that rows which other programs
    have yet to come back to can stay. The scored column is written twice: by the loops like any other, at
    last with its own value, `dtarget`, a soft cap's slope included. Strips around it, as in the first pass,
    would make the one program that rewrites a row wait for memory a few times more.
    """
    BLOCK: tl.constexpr = K * T
    offs = tile_offsets(K, T)
    strip = tile_offsets(1, T)
    full = (stop - start) // BLOCK
    for i in range(0, full):
        base = start + (full - 1 - i if BACKWARDS else i) * BLOCK
        z = tl.load(row_ptr + base + offs, eviction_policy="evict_first").to(tl.float32)
        dz = capped_dlogits(z, scale, m, k0, k1, HAS_ENTROPY, softcap, logit_scale, cap_rate)
        dz = dz.to(drow_ptr.dtype.element_ty)
        tl.store(drow_ptr + base + offs, dz, eviction_policy="evict_first")
    for base in range(start + full * BLOCK, stop, T):
        keep = strip < stop - base
        z = tl.load(
            row_ptr + base + strip, mask=keep, other=-float("inf"), eviction_policy="evict_first"
        ).to(tl.float32)
        dz = capped_dlogits(z, scale, m, k0, k1, HAS_ENTROPY, softcap, logit_scale, cap_rate)
        dz = dz.to(drow_ptr.dtype.element_ty)
        tl.store(drow_ptr + base + strip, dz, mask=keep, eviction_policy="evict_first")
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
def row_offset(row, T_len, stride_b, stride_t):
    """Where row (b, t) = divmod(row, T_len) starts. int64: B * T * V passes 2**31 for any real batch."""
    row = row.to(tl.int64)
    return (row // T_len) * stride_b + (row % T_len) * stride_t


@triton.jit
def inverse_temperature(temperature_ptr, row, inv_temperature):
    """1 / temperature of a row, fp32: its own where there is one per token, else the common one."""
    if temperature_ptr is not None:
        inv_temperature = 1.0 / tl.load(temperature_ptr + row)
    # The interpreter would go on in float64 in some kernels, and their log-probs differ in the last bit.
    return tl.full([], inv_temperature, tl.float32)
