"""Between the matrix products of the head: hidden states of the next chunk in, gradients of the last one out.

    dhidden[to[i]] = stage[i]                        i < n_out; rounded once, to the dtype of dhidden
    h[i] = hidden[from[i]] if live[i] else 0         i < n_in; 0 for the rows after them

Both at once, since each is short: a launch costs as much as they take. Bytes: each row that is moved is read
once and written once.

A program owns BLOCK columns of one row of the chunk.
"""

import triton
import triton.language as tl

from grpo_fast.kernels.schedules import compiled_with

BLOCK = 2048


@triton.jit(do_not_specialize=["n_out", "n_in"])
def _move_rows_kernel(
    stage_ptr,  # (C, D), or None: nothing goes out
    dhidden_ptr,  # (rows, D)
    to_ptr,  # (n_out,) int64, or None: the first rows
    hidden_ptr,  # (rows, D), or None: nothing comes in
    from_ptr,  # (n_in,) int64, or None: the first rows
    live_ptr,  # (n_in,) bool, or None: all
    h_ptr,  # (C, D)
    n_out,
    n_in,
    D,
    blocks,
    stride_n,
    stride_d,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    i = (pid // blocks).to(tl.int64)
    offs = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    keep = offs < D
    if stage_ptr is not None:
        leaves = keep & (i < n_out)
        row = i
        if to_ptr is not None:
            row = tl.load(to_ptr + i, mask=i < n_out, other=0)
        x = tl.load(stage_ptr + i * D + offs, mask=leaves, other=0.0)
        tl.store(dhidden_ptr + row * D + offs, x.to(dhidden_ptr.dtype.element_ty), mask=leaves)
    if hidden_ptr is not None:
        x = tl.zeros([BLOCK], hidden_ptr.dtype.element_ty)
        live = i < n_in
        if live_ptr is not None:
            live = tl.load(live_ptr + i, mask=live, other=0) != 0
        if live:  # what counts for nothing may hold anything: it is not read
            row = i
            if from_ptr is not None:
                row = tl.load(from_ptr + i)
            at = row * stride_n + offs.to(tl.int64) * stride_d
            x = tl.load(hidden_ptr + at, mask=keep, other=0.0)
        tl.store(h_ptr + i * D + offs, x.to(h_ptr.dtype.element_ty), mask=keep)


def move_rows(stage, dhidden, to, n_out, hidden, rows, live, n_in, h):
    """Write rows `to` of dhidden from the first of `stage`, and `h` from rows `rows` of hidden.

    Args:
        stage, h: (C, D) contiguous. Without stage, or without hidden, the respective half is left out.
        dhidden: contiguous. hidden: any strides.
        to, rows: (n_out,) and (n_in,) int64, or None for the first ones.
        live: (n_in,) bool, or None for all.
    """
    C, D = (h if stage is None else stage).shape
    blocks = triton.cdiv(D, BLOCK)
    stride_n, stride_d = (0, 0) if hidden is None else hidden.stride()
    _move_rows_kernel[(C * blocks,)](
        stage_ptr=stage,
        dhidden_ptr=dhidden,
        to_ptr=to,
        hidden_ptr=hidden,
        from_ptr=rows,
        live_ptr=live,
        h_ptr=h,
        n_out=n_out,
        n_in=n_in,
        D=D,
        blocks=blocks,
        stride_n=stride_n,
        stride_d=stride_d,
        BLOCK=BLOCK,
        **compiled_with(4),
    )
