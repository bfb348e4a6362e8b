"""What the fused linear head does besides its matrix products and the `grpo` kernel: the late factor.

    y = factor * x    factor: one number, known on the device only

The gradients in hidden states and weight are computed in the forward, for an upstream gradient of 1. The
factor is 1 in most steps, so in place nothing is read or written then. Bytes otherwise: x once, y once.

A program owns BLOCK elements.
"""

import triton
import triton.language as tl

from grpo_fast.kernels.schedules import compiled_with

BLOCK = 4096


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
        # A gradient of 0 stays one, also under a factor of inf.
        x = tl.where(x == 0, 0.0, x * factor)
        tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty), mask=keep)


def scale(x, factor, y):
    """`y = factor * x`; y may be x, which then stays untouched if the factor is 1.

    Args:
        x, y: contiguous, of the same shape, any floating dtypes.
        factor: 0-dim.
    """
    n = x.numel()
    if n:
        _scale_kernel[(triton.cdiv(n, BLOCK),)](
            x_ptr=x,
            factor_ptr=factor,
            y_ptr=y,
            n=n,
            INPLACE=y is x,
            BLOCK=BLOCK,
            **compiled_with(8),
        )
