"""Where rows of logits start and end, and the entries outside what is read 16 bytes at a time.

A row of an odd vocabulary starts anywhere. Its body starts at the next multiple of `UNIT` entries and
holds a multiple of as many. All loops over rows run over bodies, so that the compiler can tell that every
access of a lane is aligned. The edges, at most UNIT - 1 entries before the body and as many after it, are
read and written as one short vector. ROWS says what is known beforehand, so that there is no code for what
cannot occur:

    "aligned"    16 divides starts, strides and V: Triton sees that for itself
    "units"      UNIT divides them
    "anywhere"   there may be edges

A column is counted from the first entry of a row, a place from the first entry of its body.
"""

import torch
import triton
import triton.language as tl

from grpo_fast.kernels.tiles import (
    LOG2_ZERO,
    LOWEST,
    dlogits_tile,
    merge_softmax,
    merge_sums,
    reduce_softmax,
    soft_cap,
)

UNIT = tl.constexpr(8)  # entries; 16 bytes of bfloat16, 32 of float32


def lined_up(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(x moved back to where a unit starts, by how many entries).

    Triton asks of a pointer whether 16 divides it. Not moved where the memory of x does not reach back so
    far: accesses are narrow then.
    """
    size = x.element_size()
    before = x.data_ptr() % (UNIT.value * size) // size
    if before == 0 or before > x.storage_offset():
        return x, 0
    return x.as_strided(x.shape, x.stride(), x.storage_offset() - before), before


def rows_of(name: str, x: torch.Tensor) -> dict:
    """Where the rows of x, (B, T, V), lie, as the arguments of a kernel that calls it `name`_ptr."""
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
    """ROWS, given where the first row starts, the distances of rows, and V."""
    if all(n % 16 == 0 for n in numbers):
        return "aligned"
    return "anywhere" if any(n % UNIT.value for n in numbers) else "units"


def gradient_of(rows: dict, dx: torch.Tensor) -> dict:
    """Where the rows of the gradient lie, as the arguments of a kernel; `rows` is what `rows_of` gave.

    SAME_ROWS: whether each of its rows starts as many entries off a unit as that of the tensor.
    """
    start, before = lined_up(dx)
    found = {"dbefore": before, "dstride_b": dx.stride(0), "dstride_t": dx.stride(1)}
    unit = 16 if rows["ROWS"] == "aligned" else UNIT.value
    same = all((rows[name[1:]] - n) % unit == 0 for name, n in found.items())
    return {"dlogits_ptr": start, **found, "SAME_ROWS": same}


@triton.jit
def row_offset(row, T_len, stride_b, stride_t):
    """Where row (b, t) = divmod(row, T_len) starts. int64: B * T * V passes 2**31 for any real batch."""
    row = row.to(tl.int64)
    return (row // T_len) * stride_b + (row % T_len) * stride_t


@triton.jit
def to_unit(offset, ROWS: tl.constexpr):
    """The next offset that UNIT divides. Where it does already, the compiler learns so."""
    if ROWS == "anywhere":
        offset = (offset + (UNIT - 1)) // UNIT * UNIT
    if ROWS == "units":
        offset = offset // UNIT * UNIT
    return offset


@triton.jit
def place_row(x_ptr, before, row, T_len, stride_b, stride_t, V, ROWS: tl.constexpr):
    """(pointer to the row, pointer to its body, entries before the body, entries of the body)."""
    offset = row_offset(row, T_len, stride_b, stride_t)
    if ROWS == "anywhere":
        offset += before
        start = to_unit(offset, ROWS)
        head = tl.minimum(start - offset, V).to(tl.int32)
        body = (V - head) // UNIT * UNIT
    else:  # `before` is 0
        offset = to_unit(offset, ROWS)
        start = offset
        head = 0
        body = V // UNIT * UNIT if ROWS == "units" else V
    return x_ptr + offset, x_ptr + start, head, body


@triton.jit
def place_gradient(
    dx_ptr,
    dbefore,
    row,
    T_len,
    dstride_b,
    dstride_t,
    head,
    ROWS: tl.constexpr,
    SAME_ROWS: tl.constexpr,
):
    """(pointer to a row of the gradient, pointer to what belongs to the body), `head` entries after it."""
    offset = row_offset(row, T_len, dstride_b, dstride_t)
    if SAME_ROWS and ROWS != "anywhere":  # `dbefore` is 0
        offset = to_unit(offset, ROWS)
        start = offset
    else:
        offset += dbefore
        start = to_unit(offset, ROWS) if SAME_ROWS else offset + head
    return dx_ptr + offset, dx_ptr + start


@triton.jit
def edge_columns(head, body, V):
    """(columns [2 UNIT] of the edges of a row, which of them there are)."""
    i = tl.arange(0, 2 * UNIT)
    column = tl.where(i < UNIT, i, i - UNIT + head + body)
    return column, (column < V) & ((i < head) | (i >= UNIT))


@triton.jit
def read_edges(
    row_ptr,
    target,
    head,
    body,
    V,
    scale,
    m,
    s,
    t,
    HAS_ENTROPY: tl.constexpr,
    softcap=None,
    logit_scale=None,
    cap_rate=None,
):
    """The statistics (m, s, t) of a row, given those of its body; without column `target` in both."""
    column, there = edge_columns(head, body, V)
    z = tl.load(row_ptr + column, mask=there, other=-float("inf")).to(tl.float32)
    if softcap is not None:
        z, _ = soft_cap(z, softcap, logit_scale, cap_rate)
    z = tl.where(there & (column != target), z, -float("inf"))
    m_edge = tl.maximum(z * scale, LOWEST)
    u = tl.fma(z, scale, -m_edge)
    s_edge = tl.exp2(u)
    t_edge = s_edge * tl.maximum(u, LOG2_ZERO)
    m_edge, s_edge, t_edge = reduce_softmax(m_edge, s_edge, t_edge, HAS_ENTROPY)
    if HAS_ENTROPY:
        m, s, t = merge_softmax(m, s, t, m_edge, s_edge, t_edge)
    else:
        m, s = merge_sums(m, s, m_edge, s_edge)
    return m, s, t


@triton.jit
def write_edges(
    row_ptr,
    drow_ptr,
    target,
    dtarget,
    head,
    body,
    V,
    scale,
    m,
    k0,
    k1,
    HAS_ENTROPY: tl.constexpr,
    softcap=None,
    logit_scale=None,
    cap_rate=None,
    OVERLAP: tl.constexpr = False,
):
    """The gradient at the edges of a row, `dtarget` at the scored column; `drow_ptr` may be `row_ptr`.

    OVERLAP: as in `rows.write_dlogits`. No edge is before the body then, and what is after it is still there:
    the gradient of the body is shorter than the body, and comes before.
    """
    column, there = edge_columns(head, body, V)
    z = tl.load(row_ptr + column, mask=there, other=-float("inf")).to(tl.float32)
    dz = capped_dlogits(z, scale, m, k0, k1, HAS_ENTROPY, softcap, logit_scale, cap_rate)
    dz = tl.where(column == target, dtarget, dz).to(drow_ptr.dtype.element_ty)
    if OVERLAP:
        tl.debug_barrier()
    tl.store(drow_ptr + column, dz, mask=there)


@triton.jit
def zero_edges(drow_ptr, head, body, V):
    """Write zeros at the edges of a row of the gradient."""
    column, there = edge_columns(head, body, V)
    zeros = tl.zeros([2 * UNIT], tl.float32).to(drow_ptr.dtype.element_ty)
    tl.store(drow_ptr + column, zeros, mask=there)


@triton.jit
def capped_dlogits(
    z, scale, m, k0, k1, HAS_ENTROPY: tl.constexpr, softcap=None, logit_scale=None, cap_rate=None
):
    """The gradient of some logits (`dlogits_tile`), through the soft cap if there is one."""
    if softcap is not None:
        z, slope = soft_cap(z, softcap, logit_scale, cap_rate)
    dz = dlogits_tile(z, scale, m, k0, k1, HAS_ENTROPY)
    if softcap is not None:
        dz = dz * slope
    return dz
