"""The number of tokens that the head processes at a time."""

import torch
from torch import Tensor

from grpo_fast.ops.head.arguments import Options
from grpo_fast.ops.head.products import working_dtypes

# The size of the workspace. Long chunks are better on both devices: the weight and its gradient are
# read, and the gradient is written, once per chunk. On a CPU the workspace is at least a share of
# the memory of a float32 head (CPU_WORKSPACE_SHARE). The head of a 7B model (D = 3584) then gets
# chunks of 512 rows; chunks of 208 rows took a tenth longer.
WORKSPACE_BYTES = {"cuda": 2 << 30, "cpu": 128 << 20}


CPU_WORKSPACE_SHARE = 1 / 7


# Tiles of cuBLAS in the product that gives dh, and the other cost of a chunk, in waves of such
# tiles.
TILE_ROWS, TILE_COLUMNS, CHUNK_COST = 128, 256, 0.35


# In elements. Row strides are a multiple of this, so that rows of any vocabulary start aligned.
PAD = 64


def row_limit(hidden: Tensor, options: Options) -> int:
    """Return how many rows of logits may exist at a time."""
    if options.chunk_size:
        return options.chunk_size
    row = max(padded(options.widest), PAD) * working_dtypes(hidden, options)[1].itemsize
    if hidden.is_cuda:
        return max(1, WORKSPACE_BYTES["cuda"] // row)
    share = CPU_WORKSPACE_SHARE * 4 * options.widest * hidden.shape[1]
    return max(1, max(WORKSPACE_BYTES["cpu"], int(share)) // row)


def chunk_rows(N: int, D: int, most: int, processors: int | None) -> int:
    """Return how many rows to process at a time, at most `most`.

    Chunks are equal, and on a GPU they fill whole waves of tiles.

    Args:
        processors: the number of multiprocessors of the GPU; None for a CPU.
    """
    step = TILE_ROWS if processors else 8
    if most < step or step >= N:
        return max(1, min(most, N))
    if not processors:
        count = -(-N // (most // step * step))
        return round_up(-(-N // count), step)
    return min(
        (equal_chunk(N, C) for C in range(step, min(most, round_up(N, step)) + 1, step)),
        key=lambda C: (waves(N, C, D, processors), C),
    )


def length_of(hidden: Tensor, N: int, options: Options, length: int = 0) -> int:
    """Return how many of N rows the head processes at a time.

    Args:
        hidden: (., D), on the device that computes.
        length: rows of the longest part, where the caller chooses the parts; 0: chosen here.
    """
    given = options.chunk_size or length
    return given or chunk_rows(N, hidden.shape[1], row_limit(hidden, options), processors(hidden))


def processors(x: Tensor) -> int | None:
    """Return how many multiprocessors the GPU of x has; None on a CPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else None


def equal_chunk(N: int, C: int) -> int:
    """Return the rows per chunk for as many equal chunks as chunks of C rows would be."""
    count = -(-N // C)
    return round_up(-(-N // count), TILE_ROWS)


def waves(N: int, C: int, D: int, processors: int) -> float:
    """Return the cost of chunks of C rows: waves of tiles of dh, plus the other cost of each chunk."""
    tiles = -(-C // TILE_ROWS) * -(-D // TILE_COLUMNS)
    return -(-N // C) * (-(-tiles // processors) + CHUNK_COST)


def round_up(x: int, step: int) -> int:
    """Return the least multiple of `step` that is not below x."""
    return -(-x // step) * step


def padded(V: int) -> int:
    """Return the row stride of a workspace for V columns."""
    return round_up(V, PAD)
