"""Move rows between the matrix products of the head: hidden states come in, gradients go out.

    dhidden[to[i]] = stage[i]                        i < n_out; rounded once, to the dtype of dhidden
    h[i] = hidden[from[i]] if live[i] else 0         i < n_in; 0 for the rows after them

The hidden states are those of the next chunk, the gradients those of the last one. One launch does both,
since a launch takes as long as either. Bytes: each row that is moved is read once and written once.

A program owns BLOCK columns of one row of the chunk.
"""

import triton
import triton.language as tl

from grpo_fast.kernels.schedules import compiled_with, parts_of
from grpo_fast.records import Incoming, Outgoing

BLOCK = 2048


@triton.jit(do_not_specialize=["n_out", "n_in"])
def _move_rows_kernel(
    outgoing,  # Outgoing without n; of None where nothing goes out
    incoming,  # Incoming without n; of None where nothing comes in
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
    if outgoing.stage is not None:
        # Not `keep & (i < n_out)`: Triton 3.9's interpreter has no mask of a row and a scalar.
        leaves = offs < tl.where(i < n_out, D, 0)
        row = i
        if outgoing.rows is not None:
            row = tl.load(outgoing.rows + i, mask=i < n_out, other=0)
        x = tl.load(outgoing.stage + i * D + offs, mask=leaves, other=0.0)
        dtype: tl.constexpr = outgoing.dhidden.dtype.element_ty
        tl.store(outgoing.dhidden + row * D + offs, x.to(dtype), mask=leaves)
    if incoming.hidden is not None:
        x = tl.zeros([BLOCK], incoming.hidden.dtype.element_ty)
        live = i < n_in
        if incoming.live is not None:
            live = tl.load(incoming.live + i, mask=live, other=0) != 0
        if live:  # a row that does not count may hold anything: it is not read
            row = i
            if incoming.rows is not None:
                row = tl.load(incoming.rows + i)
            at = row * stride_n + offs.to(tl.int64) * stride_d
            x = tl.load(incoming.hidden + at, mask=keep, other=0.0)
        tl.store(incoming.h + i * D + offs, x.to(incoming.h.dtype.element_ty), mask=keep)


def move_rows(outgoing, incoming):
    """Launch the kernel that moves rows out of the workspace of the head and into it.

    Args:
        outgoing: `Outgoing`, or None: nothing goes out.
        incoming: `Incoming`, or None: nothing comes in.
    """
    n_out = n_in = stride_n = stride_d = 0
    # Triton would specialise on the numbers of rows, if they were in a tuple. A record of None stands for
    # None: Triton 3.6 cannot ask whether a tuple is None.
    given_out, given_in = Outgoing(*[None] * 4), Incoming(*[None] * 5)
    if outgoing is not None:
        C, D = outgoing.stage.shape
        n_out, given_out = outgoing.n, outgoing._replace(n=None)
    if incoming is not None:
        C, D = incoming.h.shape
        n_in, given_in = incoming.n, incoming._replace(n=None)
        stride_n, stride_d = incoming.hidden.stride()
    blocks = parts_of(D, BLOCK)
    _move_rows_kernel[(C * blocks,)](
        outgoing=given_out,
        incoming=given_in,
        n_out=n_out,
        n_in=n_in,
        D=D,
        blocks=blocks,
        stride_n=stride_n,
        stride_d=stride_d,
        BLOCK=BLOCK,
        **compiled_with(4),
    )
