"""Who reads which part of a row of logits: the schedules that `rows` follows.

Up to `MAX_V_PER_PROGRAM` entries one program owns a row. A longer row consists of segments, whose statistics
are the same bits whichever program reads them: a program reads one or some of them, one after the other, or
several side by side with as many times the threads. Segments depend on V and the dtype alone: so a row's
result depends neither on the batch around it nor on the kernel that reads it. Where 8 does not divide V, or
the strides, the order of its sums depends on where the row starts within 8 entries (`edges`).
"""

import dataclasses

import torch
import triton

from grpo_fast.kernels.edges import UNIT

MAX_V_PER_PROGRAM = 32_768
WARP_SIZE = 64 if torch.version.hip else 32
PARTS = 16  # how many programs share a long row, at most
SEGMENTS = 4  # of a long row of float32, how many a program reads
STATISTICS = 3  # m, s, t


def compiled_with(num_warps: int, registers: int | None = None) -> dict[str, int | bool]:
    """What every launch asks of the compiler.

    Products and sums are fused: `tiles` counts on single roundings, and some kernels would spill registers
    without it. Triton 3.10 does so on request only, and 3.9 warns where nothing is asked.

    registers: at most so many a thread. Unless a number is given, the assemblers of Triton 3.8 and 3.9
        spill a value or two of some kernels, so that more programs are resident.
    """
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    if registers and not torch.version.hip:  # AMD's compiler knows no such option
        options["maxnreg"] = registers
    return options


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the kernels walk over a row of V entries: `parts` programs of `columns` entries each."""

    parts: int
    columns: int
    K: int
    T: int
    num_warps: int

    def arguments(self) -> dict[str, int]:
        """How a kernel is told of this schedule."""
        return {
            "parts": self.parts,
            "columns": self.columns,
            "K": self.K,
            "T": self.T,
            **compiled_with(self.num_warps),
        }


@dataclasses.dataclass(frozen=True)
class Reading(Schedule):
    """How the kernels that need the statistics of whole rows read them.

    Each of `parts` programs reads `groups` times `side` segments; `segments` is 0 where one program owns a
    row. Segments side by side are read in `steps` tiles [K, T] each.
    """

    segments: int = 0
    groups: int = 1
    side: int = 1
    steps: int = 1

    @property
    def split(self) -> bool:
        return self.segments > 0

    @property
    def write_tile(self) -> tuple[int, int]:
        """(K, T) of the second pass, in which all threads of a program are on the same segment."""
        T = 8 * WARP_SIZE * self.num_warps
        return (self.K if self.T == T else 2), T

    def arguments(self, with_entropy: bool = False) -> dict[str, int]:
        registers = None
        if self.groups > 1:  # four programs of 256 threads a multiprocessor, or three
            registers = 80 if with_entropy else 64
        return {
            **super().arguments(),
            **compiled_with(self.num_warps, registers),
            "segments": self.segments,
            "STEPS": self.steps,
            "SIDE": self.side,
            "GROUPS": self.groups,
            "BLOCK_SEGMENTS": triton.next_power_of_2(self.segments),
            "SPLIT": self.split,
        }

    def meeting_point(self, N, device, arrived=None) -> dict[str, torch.Tensor | None]:
        """Where the programs of N rows leave the statistics of segments, and count themselves.

        arrived: (N,) int32 zeros to count in, used up by one launch; None: made here.
        """
        if not self.split:
            return {"partial_ptr": None, "arrived_ptr": None}
        partial = torch.empty(N, self.segments, STATISTICS, device=device, dtype=torch.float32)
        if arrived is None:
            arrived = torch.zeros(N, device=device, dtype=torch.int32)
        return {"partial_ptr": partial, "arrived_ptr": arrived}


def schedule(V: int, capped: bool = False) -> Schedule:
    """The schedule for rows of V entries that need no statistics, or whose program owns them.

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


def reading(V: int, itemsize: int, capped: bool = False, side: int = 1) -> Reading:
    """The schedule for rows of V entries of `itemsize` bytes that are read for their statistics.

    side: how many segments at a time, 1, 2 or 4, at the caller's choice: it does not reach the result. With
        many threads on a row, few rows are between their two passes, so the cache holds them. Done for
        float32 alone, where it was measured to be faster (benchmarks/NOTES.md).
    """
    plan = schedule(V, capped)
    if plan.parts == 1:
        return Reading(**dataclasses.asdict(plan))
    if capped or itemsize < 4 or WARP_SIZE != 32:  # AMD's GPUs: not measured
        return Reading(**dataclasses.asdict(plan), segments=plan.parts)
    # 16 bytes of each lane, and no lane twice in a row of the tile: else another order of additions.
    threads = plan.num_warps * WARP_SIZE
    T, steps = 16 // itemsize * threads, 2
    segment = steps * plan.K * T
    columns = SEGMENTS * segment
    return Reading(
        parts=triton.cdiv(V, columns),
        columns=columns,
        K=plan.K,
        T=T,
        num_warps=side * plan.num_warps,
        segments=triton.cdiv(V, segment),
        groups=SEGMENTS // side,
        side=side,
        steps=steps,
    )


def overlaps(logits, dlogits) -> bool:
    """Whether the gradient, of smaller elements, lies over the logits, both (B, T, V).

    Element j of a row is then at position j, counted in its own size, from where the row of logits starts:
    `logits.view(torch.bfloat16)[..., :V]`, if nothing lies between the rows.

    Raises:
        ValueError: the two share memory in any other way, but for being the same elements.
    """
    if logits.untyped_storage()._cdata != dlogits.untyped_storage()._cdata:
        return False
    (first, stop), (dfirst, dstop) = _bytes_of(logits), _bytes_of(dlogits)
    if first >= dstop or dfirst >= stop:  # pieces of one buffer, or empty
        return False
    ratio = logits.element_size() / dlogits.element_size()
    steps = zip(logits.shape, logits.stride(), dlogits.stride(), (ratio, ratio, 1), strict=True)
    same = all(size <= 1 or dstep == step * more for size, step, dstep, more in steps)
    if ratio < 1 or logits.shape != dlogits.shape or first != dfirst or not same:
        raise ValueError(
            "dlogits shares memory with logits: want the same elements, or smaller ones that start where "
            f"each row of logits starts, got {_place(dlogits)} over {_place(logits)}"
        )
    starts = (logits.data_ptr() // logits.element_size(), *logits.stride()[:2])
    if ratio > 1 and any(n % UNIT.value for n in starts):
        raise ValueError(
            f"dlogits lies over logits: want rows that start at multiples of {UNIT.value} entries, got "
            f"{_place(logits)}"
        )
    return ratio > 1


def _bytes_of(x) -> tuple[int, int]:
    """(the first byte of x in its storage, the byte after its last one)."""
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    first = x.storage_offset() * x.element_size()
    return first, first + (last + 1) * x.element_size() if x.numel() else first


def _place(x) -> str:
    return f"{x.dtype} {tuple(x.shape)}, strides {x.stride()}, offset {x.storage_offset()}"
