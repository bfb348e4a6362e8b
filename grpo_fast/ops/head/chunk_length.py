"""How many tokens the head works on at a time."""

import torch
from torch import Tensor

from grpo_fast.ops.head.arguments import Options
from grpo_fast.ops.head.products import working_dtypes

# Of the workspace. Both want long chunks, since the weight and its gradient are read, and the gradient is
# written, once per chunk. On a CPU at least a share of what a float32 head takes: a 7B model's (D = 3584)
# then gets chunks of 512 rows; 208 cost it a tenth of the time.
WORKSPACE_BYTES = {"cuda": 2 << 30, "cpu": 128 << 20}


CPU_WORKSPACE_SHARE = 1 / 7


# cuBLAS tiles of the product that gives dh, and what a chunk costs besides, in waves of such tiles.
TILE_ROWS, TILE_COLUMNS, CHUNK_COST = 128, 256, 0.35


# Elements: with row strides that are a multiple of it, rows of any vocabulary start aligned.
PAD = 64


def row_limit(hidden: Tensor, options: Options) -> int:
    """How many rows of logits may exist at a time."""
    if options.chunk_size:
        return options.chunk_size
    row = max(padded(options.widest), PAD) * working_dtypes(hidden, options)[1].itemsize
    if hidden.is_cuda:
        return max(1, WORKSPACE_BYTES["cuda"] // row)
    share = CPU_WORKSPACE_SHARE * 4 * options.widest * hidden.shape[1]
    return max(1, max(WORKSPACE_BYTES["cpu"], int(share)) // row)


def chunk_rows(N: int, D: int, most: int, processors: int | None) -> int:
    """How many rows to take at a time, at most `most`: equal chunks, on a GPU whole waves of tiles.

    Args:
        processors: of the GPU; None for a CPU.
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


def processors(x: Tensor) -> int | None:
    """How many multiprocessors the GPU of x has; None on a CPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else None


def equal_chunk(N: int, C: int) -> int:
    """The rows of each of as many chunks as chunks of C would be."""
    count = -(-N // C)
    return round_up(-(-N // count), TILE_ROWS)


def waves(N: int, C: int, D: int, processors: int) -> float:
    """The cost of chunks of C rows: waves of tiles of dh, and what each chunk costs besides."""
    tiles = -(-C // TILE_ROWS) * -(-D // TILE_COLUMNS)
    return -(-N // C) * (-(-tiles // processors) + CHUNK_COST)


def round_up(x: int, step: int) -> int:
    """The least multiple of `step` that is not below x."""
    return -(-x // step) * step


def padded(V: int) -> int:
    """The row stride of a workspace for V columns."""
    return round_up(V, PAD)
