"""Who reads which part of a row of logits: the schedules that `rows` follows.

One program owns a row of up to `MAX_V_PER_PROGRAM` entries. A longer row consists of segments. The statistics
of a segment are the same bits, whichever program reads it. A program reads one segment, or several: one after
the other, or side by side with as many times the threads. Segments depend on V and the dtype alone. So the
result of a row depends neither on the batch around it nor on the kernel that reads it. Where 8 does not
divide V or a stride, the order of additions also depends on where the row starts within 8 entries (`edges`).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
import triton

from grpo_fast.kernels.edges import UNIT

MAX_V_PER_PROGRAM = 32_768
WARP_SIZE = 64 if torch.version.hip else 32
PARTS = 16  # how many programs share a long row, at most
FEWEST_TILES = 2  # that each of them reads: with one, it spends most of its time on other things
POLLS = 256  # how often a program looks for the others of its row: each time takes about 1 us
INTERPRETED_POLLS = 1  # the interpreter runs one program after the other
MOST_TOGETHER = 24  # programs of a row that can wait for each other (`rows.meet`)
SEGMENTS = 4  # of a long row of float32, how many a program reads
STATISTICS = 3  # m, s, t


def parts_of(n: int, size: int) -> int:
    """How many parts of `size` elements hold n elements. `triton.cdiv` takes 2 us on the host."""
    return -(-n // size)


def compiled_with(num_warps: int, registers: int | None = None) -> dict[str, int | bool]:
    """The compiler options of a launch.

    Products and sums are fused: `tiles` counts on single roundings, and some kernels would spill registers
    without it. Triton 3.10 fuses on request only, and 3.9 warns where nothing is requested.

    Args:
        registers: the limit of registers of a thread. Without a limit, the assemblers of Triton 3.8 and 3.9
            spill a value or two of some kernels, so that more programs are resident.
    """
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    if registers and not torch.version.hip:  # AMD's compiler knows no such option
        options["maxnreg"] = registers
    return options


@functools.cache
def registers_to_wait(device: torch.device) -> int | None:
    """The limit of registers, on a device, of programs that wait for each other; None: there is none.

    On an H200, five programs of 48 registers per multiprocessor are 10 % faster than four, though a thread
    spills two of them. On an H100, whose L2 cache has 50 MB and not 60, they are 2 % slower. Other GPUs were
    not measured (benchmarks/NOTES.md).
    """
    if device.type != "cuda" or torch.version.hip:
        return None
    found = torch.cuda.get_device_properties(device)
    if (found.major, found.minor) != (9, 0):
        return None
    return 48 if found.L2_cache_size > 55_000_000 else 64


class Tile(NamedTuple):
    """The tile [K, T] in which a row is written."""

    K: int
    T: int


class ReadTiles(NamedTuple):
    """How a row is read: tiles [K, T] of segments; compile-time constants."""

    K: int
    T: int
    STEPS: int  # tiles of a segment
    SIDE: int  # segments at a time
    GROUPS: int  # how often a program reads SIDE segments
    BLOCK_SEGMENTS: int  # the segments of a row, rounded up to a power of two
    SPLIT: bool  # whether programs share a row


class Split(NamedTuple):
    """Which programs read a row."""

    parts: Any  # how many they are
    columns: Any  # how many entries each of them reads
    segments: Any  # how many segments the row has


class Meeting(NamedTuple):
    """Where the programs that share a row meet."""

    partial: Any  # (N, segments, STATISTICS) fp32; None where one program owns a row
    arrived: (
        Any  # (N,) int32, zeros: how many programs of a row have read their parts; None likewise
    )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the kernels walk over a row of V entries: `parts` programs of `columns` entries each."""

    parts: int
    columns: int
    K: int
    T: int
    num_warps: int

    def __str__(self) -> str:
        if self.parts == 1:
            return f"1 program a row of {self.columns:,} entries, {self.num_warps} warps"
        return f"{self.parts} programs a row, {self.columns:,} entries each, {self.num_warps} warps"

    def arguments(self) -> dict[str, Any]:
        """The arguments that tell a kernel of this schedule."""
        return {
            "parts": self.parts,
            "columns": self.columns,
            "TILE": Tile(self.K, self.T),
            **compiled_with(self.num_warps),
        }


@dataclasses.dataclass(frozen=True)
class Reading(Schedule):
    """How rows are read by the kernels that need the statistics of whole rows.

    Each of `parts` programs reads `groups` times `side` segments, each of them in `steps` tiles [K, T].
    `segments` is 0 where one program owns a row.
    """

    segments: int = 0
    groups: int = 1
    side: int = 1
    steps: int = 1
    polls: int = 0  # how often a program looks for the others of its row; 0: the last one writes it

    def __str__(self) -> str:
        if not self.split:
            return super().__str__()
        how = "each waits for the others" if self.polls else "the last one finishes the row"
        return f"{super().__str__()}; {how}"

    @property
    def split(self) -> bool:
        return self.segments > 0

    @property
    def write_tile(self) -> Tile:
        """The tile of the second pass, in which all threads of a program work on the same segment."""
        T = 8 * WARP_SIZE * self.num_warps
        return Tile(self.K if self.T == T else 2, T)

    def arguments(self, with_entropy: bool = False, waiting: int | None = None) -> dict[str, Any]:
        """The arguments that tell a kernel of this schedule; they are not to be changed.

        Args:
            waiting: the limit of registers of programs that wait for each other (`registers_to_wait`).
        """
        return _arguments_of(self, with_entropy, waiting)

    def meeting_point(self, N, device, arrived=None) -> Meeting:
        """Where the programs of N rows leave the statistics of segments, and count themselves.

        Args:
            arrived: (N,) int32 zeros to count in, used up by one launch; None: made here.
        """
        if not self.split:
            return Meeting(None, None)
        partial = torch.empty(N, self.segments, STATISTICS, device=device, dtype=torch.float32)
        if arrived is None:
            arrived = torch.zeros(N, device=device, dtype=torch.int32)
        return Meeting(partial, arrived)


@functools.lru_cache(maxsize=256)
def _arguments_of(plan: Reading, with_entropy: bool, waiting: int | None) -> dict[str, Any]:
    registers = None
    if plan.groups > 1:  # four programs of 256 threads a multiprocessor, or three
        registers = 80 if with_entropy else 64
    elif plan.polls and plan.num_warps == 4:
        # Five programs. Without a limit, a B200 would spill two values under a soft cap.
        registers = 96
    elif plan.polls and waiting and not with_entropy:
        # For rows of float32, 64 were measured.
        registers = waiting if plan.steps == 1 else max(waiting, 64)
    tiles = ReadTiles(
        K=plan.K,
        T=plan.T,
        STEPS=plan.steps,
        SIDE=plan.side,
        GROUPS=plan.groups,
        BLOCK_SEGMENTS=triton.next_power_of_2(plan.segments),
        SPLIT=plan.split,
    )
    return {
        "split": Split(plan.parts, plan.columns, plan.segments),
        "TILES": tiles,
        **compiled_with(plan.num_warps, registers),
    }


def schedule(V: int, capped: bool = False, shared: bool = True) -> Schedule:
    """The schedule for rows of V entries that need no statistics, or that one program owns.

    A soft cap takes registers. With half the threads a program spills none, and as many threads are resident.

    Args:
        shared: whether several programs may share a long row.
    """
    return _schedule(V, capped, shared, WARP_SIZE)


@functools.lru_cache(maxsize=256)
def _schedule(V: int, capped: bool, shared: bool, warp_size: int) -> Schedule:
    if V <= 1024:
        return Schedule(parts=1, columns=V, K=1, T=1024, num_warps=128 // warp_size)
    threads = 128 if capped else 256
    K, T, warps = 4, 8 * threads, threads // warp_size
    if V <= MAX_V_PER_PROGRAM or not shared:
        return Schedule(parts=1, columns=V, K=K, T=T, num_warps=warps)
    tiles = parts_of(V, K * T)
    columns = max(parts_of(tiles, PARTS), FEWEST_TILES) * K * T
    return Schedule(parts=parts_of(V, columns), columns=columns, K=K, T=T, num_warps=warps)


def reading(
    V: int, itemsize: int, capped: bool = False, side: int = 1, together: bool = False
) -> Reading:
    """The schedule for rows of V entries of `itemsize` bytes that are read for their statistics.

    Args:
        side: how many segments a program reads at a time: 1, 2 or 4. It does not change the result. With many
            threads on a row, few rows are between their two passes, so that the cache holds them. This is
            done for float32 alone, where it was measured to be faster (benchmarks/NOTES.md).
        together: whether the programs of a row wait for each other (`rows.meet`). Each then reads one segment
            at a time, and `side` has no effect. AMD's GPUs were not measured: there no program waits.
    """
    together = together and WARP_SIZE == 32
    polls = 0
    if together:
        polls = INTERPRETED_POLLS if triton.knobs.runtime.interpret else POLLS
    return _reading(V, itemsize, capped, side, together, polls, WARP_SIZE)


@functools.lru_cache(maxsize=256)
def _reading(
    V: int, itemsize: int, capped: bool, side: int, together: bool, polls: int, warp_size: int
) -> Reading:
    plan = _schedule(V, capped, True, warp_size)
    if plan.parts == 1:
        return Reading(**dataclasses.asdict(plan))
    if capped or itemsize < 4 or warp_size != 32:  # AMD's GPUs: not measured
        return Reading(**dataclasses.asdict(plan), segments=plan.parts, polls=polls)
    # Each lane holds 16 bytes, once in a row of the tile: else the order of additions would change.
    threads = plan.num_warps * warp_size
    T, steps = 16 // itemsize * threads, 2
    segment = steps * plan.K * T
    groups = SEGMENTS
    if together:
        side = 1
        groups = parts_of(parts_of(V, segment), MOST_TOGETHER)
    columns = groups * segment
    groups //= side
    return Reading(
        parts=parts_of(V, columns),
        columns=columns,
        K=plan.K,
        T=T,
        num_warps=side * plan.num_warps,
        segments=parts_of(V, segment),
        groups=groups,
        side=side,
        steps=steps,
        polls=polls,
    )


def counts_arrivals(V: int) -> bool:
    """Whether a launch on rows of V entries counts programs, in a vector of int32 zeros."""
    return schedule(V).parts > 1


def overlaps(logits, dlogits) -> bool:
    """Whether the gradient, of smaller elements, lies over the logits, both (B, T, V).

    Element j of a row is then at position j, counted in its own size, from where the row of logits starts:
    `logits.view(torch.bfloat16)[..., :V]`, if nothing lies between the rows.

    Raises:
        ValueError: the two share memory in any other way, but for being the same elements.
    """
    if logits is dlogits:
        return False
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
