"""Where rows of logits start and end, and the entries outside what is read 16 bytes at a time.

A row of an odd vocabulary starts anywhere. Its body starts at the next multiple of `UNIT` entries, and its
length is a multiple of `UNIT`. All loops over rows run over bodies: so the compiler knows that every access
of a lane is aligned. The edges are at most UNIT - 1 entries before the body, and as many after it. They are
read and written as one short vector. The constant ROWS says what is known beforehand, so that no code is
compiled for what cannot occur:

    "aligned"    16 divides starts, strides and V: Triton sees that for itself
    "units"      UNIT divides them
    "anywhere"   there may be edges

A column is counted from the first entry of a row, a place from the first entry of its body.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from grpo_fast.kernels.tiles import (
    LOG2_ZERO,
    LOWEST,
    Softmax,
    dlogits_tile,
    merge_softmax,
    merge_sums,
    reduce_softmax,
    soft_cap,
)

UNIT = tl.constexpr(8)  # entries; 16 bytes of bfloat16, 32 of float32


def lined_up(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(x, moved back in memory to where a unit starts; by how many entries it was moved).

    Triton specialises a kernel on whether 16 divides a pointer. Where the memory of x does not reach back far
    enough, x is not moved, and accesses are narrow.
    """
    size = x.element_size()
    before = x.data_ptr() % (UNIT.value * size) // size
    if before == 0 or before > x.storage_offset():
        return x, 0
    return x.as_strided(x.shape, x.stride(), x.storage_offset() - before), before


def rows_of(name: str, x: torch.Tensor) -> dict:
    """The arguments that tell a kernel where the rows of x, (B, T, V), lie; x is its `name`_ptr."""
    start, before = lined_up(x)
    return {
        f"{name}_ptr": start,
        "before": before,
        "stride_b": x.stride(0),
        "stride_t": x.stride(1),
        "T_len": x.shape[1],
        "V": x.shape[2],
        "ROWS": kind(before, x.stride(0), x.stride(1), x.shape[2]),
    }


def kind(*numbers: int) -> str:
    """The constant ROWS, given where the first row starts, the strides of rows, and V."""
    if all(n % 16 == 0 for n in numbers):
        return "aligned"
    return "anywhere" if any(n % UNIT.value for n in numbers) else "units"


def gradient_of(rows: dict, dx: torch.Tensor) -> dict:
    """The arguments that tell a kernel where the rows of the gradient dx lie.

    The constant SAME_ROWS says whether each row of the gradient starts as many entries off a unit as the row
    of logits does.

    Args:
        rows: what `rows_of` made of the logits.
    """
    start, before = lined_up(dx)
    found = {"dbefore": before, "dstride_b": dx.stride(0), "dstride_t": dx.stride(1)}
    unit = 16 if rows["ROWS"] == "aligned" else UNIT.value
    same = all((rows[name[1:]] - n) % unit == 0 for name, n in found.items())
    return {"dlogits_ptr": start, **found, "SAME_ROWS": same}


class Rows(NamedTuple):
    """Where the rows of a tensor (B, T, V) lie."""

    ptr: Any
    before: Any  # entries from the pointer to the first row
    stride_b: Any
    stride_t: Any


class Row(NamedTuple):
    """Where one row lies."""

    ptr: Any  # its first entry
    body_ptr: Any  # the first entry of its body
    head: Any  # how many entries are before the body
    body: Any  # how many entries the body holds


class Writer(NamedTuple):
    """How the gradient of a row is written: compile-time constants; see `rows.write_dlogits`."""

    TILE: Any  # `schedules.Tile`
    HAS_ENTROPY: Any
    BACKWARDS: Any
    OVERLAP: Any


@triton.jit
def row_offset(row, T_len, stride_b, stride_t):
    """The offset of row (b, t) = divmod(row, T_len), in int64: B * T * V passes 2**31 for any real batch."""
    row = row.to(tl.int64)
    return (row // T_len) * stride_b + (row % T_len) * stride_t


@triton.jit
def to_unit(offset, ROWS: tl.constexpr):
    """The next offset that UNIT divides. Where it divides the offset already, this tells the compiler."""
    if ROWS == "anywhere":
        offset = (offset + (UNIT - 1)) // UNIT * UNIT
    if ROWS == "units":
        offset = offset // UNIT * UNIT
    return offset


@triton.jit
def place_row(rows, row, T_len, V, ROWS: tl.constexpr):
    """The place (`Row`) of one row of `rows` (`Rows`)."""
    offset = row_offset(row, T_len, rows.stride_b, rows.stride_t)
    if ROWS == "anywhere":
        offset += rows.before
        start = to_unit(offset, ROWS)
        head = tl.minimum(start - offset, V).to(tl.int32)
        body = (V - head) // UNIT * UNIT
    else:  # `before` is 0
        offset = to_unit(offset, ROWS)
        start = offset
        head = 0
        body = V // UNIT * UNIT if ROWS == "units" else V
    return Row(rows.ptr + offset, rows.ptr + start, head, body)


@triton.jit
def place_gradient(rows, row, T_len, like, ROWS: tl.constexpr, SAME_ROWS: tl.constexpr):
    """The place of one row of the gradient; its body holds the columns that the body of `like` holds.

    Args:
        rows: where the rows of the gradient lie.
        like: the `Row` of logits.
    """
    offset = row_offset(row, T_len, rows.stride_b, rows.stride_t)
    if SAME_ROWS and ROWS != "anywhere":  # `rows.before` is 0
        offset = to_unit(offset, ROWS)
        start = offset
    else:
        offset += rows.before
        start = to_unit(offset, ROWS) if SAME_ROWS else offset + like.head
    return Row(rows.ptr + offset, rows.ptr + start, like.head, like.body)


@triton.jit
def edge_columns(row, V):
    """(columns [2 UNIT] of the edges of a row, which of them exist)."""
    i = tl.arange(0, 2 * UNIT)
    column = tl.where(i < UNIT, i, i - UNIT + row.head + row.body)
    return column, (column < V) & ((i < row.head) | (i >= UNIT))


@triton.jit
def read_edges(row, target, V, scale, HAS_ENTROPY: tl.constexpr, cap=None):
    """The statistics of the edges of a row without column `target`."""
    column, there = edge_columns(row, V)
    z = tl.load(row.ptr + column, mask=there, other=-float("inf")).to(tl.float32)
    if cap is not None:
        z, _ = soft_cap(z, cap)
    z = tl.where(there & (column != target), z, -float("inf"))
    m = tl.maximum(z * scale, LOWEST)
    u = tl.fma(z, scale, -m)
    s = tl.exp2(u)
    t = s * tl.maximum(u, LOG2_ZERO)
    m, s, t = reduce_softmax(m, s, t, HAS_ENTROPY)
    return Softmax(m, s, t)


@triton.jit
def add_edges(sums, edges, HAS_ENTROPY: tl.constexpr):
    """The statistics of a row from those of its body and those of its edges."""
    m, s, t = sums
    m_edge, s_edge, t_edge = edges
    if HAS_ENTROPY:
        m, s, t = merge_softmax(m, s, t, m_edge, s_edge, t_edge)
    else:
        m, s = merge_sums(m, s, m_edge, s_edge)
    return Softmax(m, s, t)


@triton.jit
def write_edges(row, drow, gradient, V, WRITER: tl.constexpr, cap=None):
    """Write the gradient at the edges of a row, after `rows.write_dlogits` has written its body.

    Where the gradient lies over the logits (OVERLAP), no edge is before the body. The edge after the body has
    not been overwritten: the gradient of the body is shorter than the body, and ends before the edge.

    Args:
        row, drow: where the logits and their gradient lie, perhaps the same place.
        gradient: `tiles.RowGradient`.
        WRITER: `Writer`.
    """
    column, there = edge_columns(row, V)
    z = tl.load(row.ptr + column, mask=there, other=-float("inf")).to(tl.float32)
    dz = capped_dlogits(z, gradient, WRITER.HAS_ENTROPY, cap)
    dz = tl.where(column == gradient.target, gradient.dtarget, dz).to(drow.ptr.dtype.element_ty)
    if WRITER.OVERLAP:
        tl.debug_barrier()
    tl.store(drow.ptr + column, dz, mask=there)


@triton.jit
def zero_edges(drow, V):
    """Write zeros at the edges of a row of the gradient."""
    column, there = edge_columns(drow, V)
    zeros = tl.zeros([2 * UNIT], tl.float32).to(drow.ptr.dtype.element_ty)
    tl.store(drow.ptr + column, zeros, mask=there)


@triton.jit
def capped_dlogits(z, gradient, HAS_ENTROPY: tl.constexpr, cap=None):
    """The gradient of some logits (`dlogits_tile`), through the soft cap if there is one."""
    if cap is not None:
        z, slope = soft_cap(z, cap)
    dz = dlogits_tile(z, gradient.scale, gradient.m, gradient.k0, gradient.k1, HAS_ENTROPY)
    if cap is not None:
        dz = dz * slope
    return dz
