"""Gradients that are scaled after they were computed: the launches of the backward.

    x_n  = factor_n x_n      for each row n of (B, T, V), in place               `scale_rows`
    y    = factor * x        factor: one number, known on the device only        `scale`
    y_nd = c_n x_nd          (N, D)                                              `weigh_rows`

The forward computes gradients for an upstream gradient of 1, which is right in most steps. Then `scale_rows`
and `scale` in place have nothing to do. With a frozen head the gradient in the hidden states is c (Y - P) W:
the forward stores x = (Y - P) W, and `weigh_rows` multiplies it by the coefficients c that come later.

Bytes: `scale_rows` reads and writes the rows whose factor is not 1. `scale` reads x and writes y, or nothing
where y is x and the factor is 1. `weigh_rows` reads the rows whose coefficient is not 0, and writes all rows.

A program of `scale_rows` owns a row, or a part of one (`schedules`); one of `scale` a block of elements; one
of `weigh_rows` a block of columns of a row.
"""

import triton
import triton.language as tl

from grpo_fast.kernels.edges import Rows, edge_columns, place_row, rows_of
from grpo_fast.kernels.schedules import compiled_with, parts_of, schedule

MANY_ROWS = 1024
ELEMENTS = 4096  # of a program of `scale`
COLUMNS = 2048  # of a program of `weigh_rows`


@triton.jit(do_not_specialize=["before", "T_len"])
def _scale_rows_kernel(
    factor_ptr,  # (N,) fp32
    x_ptr,  # (B, T, V), scaled in place
    stride_factor,
    before,
    stride_b,
    stride_t,
    T_len,
    V,
    parts,
    columns,
    TILE: tl.constexpr,  # Tile
    ROWS: tl.constexpr,
):
    K: tl.constexpr = TILE.K
    T: tl.constexpr = TILE.T
    pid = tl.program_id(0)
    index = (pid // parts).to(tl.int64)
    part = pid % parts
    factor = tl.load(factor_ptr + index * stride_factor)
    if factor != 1.0:  # decided on the device: asking from the host would be a sync
        offs = tl.arange(0, K)[:, None] * T + tl.arange(0, T)[None, :]
        row = place_row(Rows(x_ptr, before, stride_b, stride_t), index, T_len, V, ROWS)
        start = part * columns
        stop = tl.minimum(start + columns, row.body)
        full = (stop - start) // (K * T)
        for i in range(0, full):
            tile = row.body_ptr + start + i * (K * T) + offs
            tl.store(tile, scaled(tl.load(tile), factor))
        base = start + full * (K * T)
        if base < stop:
            scale_some(row.body_ptr + base + offs, offs < stop - base, factor)
        if ROWS == "anywhere" and part == 0:
            column, there = edge_columns(row, V)
            scale_some(row.ptr + column, there, factor)


@triton.jit
def scaled(x, factor):
    """x times the factor, in the dtype of x. Zeros stay zeros, also if the factor is inf."""
    wide = x.to(tl.float32)
    return tl.where(wide == 0, 0.0, wide * factor).to(x.dtype)


@triton.jit
def scale_some(ptr, there, factor):
    """Scale the entries at which `there` is true."""
    tl.store(ptr, scaled(tl.load(ptr, mask=there, other=0.0), factor), mask=there)


def scale_rows(factor, x):
    """Multiply rows of x in place by their factors; rows whose factor is 1 are not touched.

    Args:
        factor: (N,) fp32, any stride: an expanded scalar has 0.
        x: (B, T, V), the last dimension contiguous, N = B T.
    """
    B, T_len, V = x.shape
    # Most programs only read a factor of 1: of many rows, one for each row is enough.
    plan = schedule(V, shared=B * T_len < MANY_ROWS)
    if x.numel():
        _scale_rows_kernel[(B * T_len * plan.parts,)](
            factor_ptr=factor,
            stride_factor=factor.stride(0),
            **rows_of("x", x),
            **plan.arguments(),
        )


@triton.jit
def _scale_kernel(
    x_ptr,  # (n,)
    factor_ptr,  # () fp32
    y_ptr,  # (n,), which may be x
    n,
    INPLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32)
    moves = True
    if INPLACE:
        moves = factor != 1.0  # decided on the device: asking from the host would be a sync
    if moves:
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        keep = offs < n
        x = tl.load(x_ptr + offs, mask=keep, other=0.0).to(tl.float32)
        # A gradient of 0 stays 0, also if the factor is inf.
        x = tl.where(x == 0, 0.0, x * factor)
        tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty), mask=keep)


def scale(x, factor, y):
    """Write factor * x to y. If y is x and the factor is 1, nothing is touched.

    Args:
        x, y: contiguous, of the same shape, any floating dtypes.
        factor: 0-dim.
    """
    n = x.numel()
    if n:
        _scale_kernel[(parts_of(n, ELEMENTS),)](
            x_ptr=x,
            factor_ptr=factor,
            y_ptr=y,
            n=n,
            INPLACE=y is x,
            BLOCK=ELEMENTS,
            **compiled_with(8),
        )


@triton.jit
def _weigh_rows_kernel(
    c_ptr,  # (N,) fp32
    x_ptr,  # (N, D)
    y_ptr,  # (N, D)
    D,
    blocks,
    stride_c,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    offs = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    keep = offs < D
    c = tl.load(c_ptr + row * stride_c).to(tl.float32)
    y = tl.zeros([BLOCK], tl.float32)
    if c != 0:  # a row whose coefficient is 0 is not read: it may hold anything
        y = c * tl.load(x_ptr + row * D + offs, mask=keep, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + offs, y.to(y_ptr.dtype.element_ty), mask=keep)


def weigh_rows(x, c, y):
    """Write c[:, None] * x to y, and zeros where c is 0.

    Args:
        x, y: (N, D), contiguous.
        c: (N,), any stride.
    """
    N, D = x.shape
    blocks = parts_of(D, COLUMNS)
    if x.numel():
        _weigh_rows_kernel[(N * blocks,)](
            c_ptr=c,
            x_ptr=x,
            y_ptr=y,
            D=D,
            blocks=blocks,
            stride_c=c.stride(0),
            BLOCK=COLUMNS,
            **compiled_with(4),
        )
