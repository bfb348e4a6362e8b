"""Rows of a gradient of logits, multiplied in place by the upstream gradient of each row.

    x_n = factor_n x_n        for each row n of (B, T, V)

Bytes: rows whose factor is not 1 are read and written, nothing of the others.
"""

import dataclasses

import triton
import triton.language as tl

from grpo_fast.kernels.edges import edge_columns, place_row, rows_of
from grpo_fast.kernels.schedules import schedule

MANY_ROWS = 1024


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
    K: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // parts).to(tl.int64)
    part = pid % parts
    factor = tl.load(factor_ptr + row * stride_factor)
    if factor != 1.0:  # decided on the device: asking from the host would be a sync
        offs = tl.arange(0, K)[:, None] * T + tl.arange(0, T)[None, :]
        row_ptr, body_ptr, head, body = place_row(
            x_ptr, before, row, T_len, stride_b, stride_t, V, ROWS
        )
        start = part * columns
        stop = tl.minimum(start + columns, body)
        full = (stop - start) // (K * T)
        for i in range(0, full):
            tile = body_ptr + start + i * (K * T) + offs
            tl.store(tile, scaled(tl.load(tile), factor))
        base = start + full * (K * T)
        if base < stop:
            scale_some(body_ptr + base + offs, offs < stop - base, factor)
        if ROWS == "anywhere" and part == 0:
            column, there = edge_columns(head, body, V)
            scale_some(row_ptr + column, there, factor)


@triton.jit
def scaled(x, factor):
    """x times the factor, in its dtype. A row of zeros stays one, also under a factor of inf."""
    wide = x.to(tl.float32)
    return tl.where(wide == 0, 0.0, wide * factor).to(x.dtype)


@triton.jit
def scale_some(ptr, there, factor):
    """Scale the entries that are `there`."""
    tl.store(ptr, scaled(tl.load(ptr, mask=there, other=0.0), factor), mask=there)


def scale_rows(factor, x):
    """`x *= factor[:, None]` in place, without touching the rows whose factor is 1.

    Args:
        factor: (N,) fp32, any stride: an expanded scalar has 0.
        x: (B, T, V), the last dimension contiguous, N = B T.
    """
    B, T_len, V = x.shape
    plan = schedule(V)
    if B * T_len >= MANY_ROWS:  # most programs only read a factor of 1: one for each row is enough
        plan = dataclasses.replace(plan, parts=1, columns=V)
    if x.numel():
        _scale_rows_kernel[(B * T_len * plan.parts,)](
            factor_ptr=factor,
            stride_factor=factor.stride(0),
            **rows_of("x", x),
            **plan.arguments(),
        )
