"""What the fused linear head does for log-probs besides its matrix products: rows times late coefficients.

    y_nd = c_n x_nd    (N, D)

With a frozen head the gradient in the hidden states is c (Y - P) W: the forward stores x = (Y - P) W, and any
coefficient that comes later scales its rows. Bytes: rows whose coefficient is not 0 are read once; every row
is written once.

A program owns BLOCK columns of a row.
"""

import triton
import triton.language as tl

from grpo_fast.kernels.schedules import compiled_with

BLOCK = 2048


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
    if c != 0:  # a row without gradient has none, whatever it holds: it is not read
        y = c * tl.load(x_ptr + row * D + offs, mask=keep, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + offs, y.to(y_ptr.dtype.element_ty), mask=keep)


def weigh_rows(x, c, y):
    """`y = c[:, None] * x`, zeros where c is 0; x, y (N, D) contiguous, c (N,) of any stride."""
    N, D = x.shape
    blocks = triton.cdiv(D, BLOCK)
    if x.numel():
        _weigh_rows_kernel[(N * blocks,)](
            c_ptr=c,
            x_ptr=x,
            y_ptr=y,
            D=D,
            blocks=blocks,
            stride_c=c.stride(0),
            BLOCK=BLOCK,
            **compiled_with(4),
        )
