"""Matrix products of half precision with float32 results, and the dtypes of the head that follow."""

import functools
import warnings

import torch
from torch import Tensor

from grpo_fast.ops.backend import version_of
from grpo_fast.ops.head.arguments import Options


def mixed_products_of(version: str, hip: str | None) -> bool:
    """Whether `mm` of halves may have a float32 result on a GPU: under ROCm it raises before 2.10."""
    return hip is None or version_of(version) >= (2, 10)


# `addmm` of halves into a float32 sum: before 2.10 it wanted the sum in the dtype of the operands.
MIXED_ADDMM = version_of(torch.__version__) >= (2, 10)


MIXED_MM = mixed_products_of(torch.__version__, torch.version.hip)


SLAB = 8192  # rows of such a sum at a time, where it has to be added up separately


def working_dtypes(hidden: Tensor, options: Options) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the operands of the products, and of the logits."""
    if not options.fp32_logits:
        return hidden.dtype, hidden.dtype
    # Where no product of halves has a float32 result, it is one of float32 copies.
    return hidden.dtype if has_mixed_products(hidden) else torch.float32, torch.float32


def has_mixed_products(x: Tensor) -> bool:
    """Whether halves on the device of x can be multiplied with a float32 result."""
    return on_gpu(x) and MIXED_MM


def on_gpu(x: Tensor) -> bool:
    """Whether PyTorch's CUDA (or ROCm) operators work on x."""
    return x.is_cuda


@functools.cache
def warn_of_copies() -> None:
    """Once: what a GPU that could multiply halves does instead."""
    warnings.warn(
        f"grpo_fast: PyTorch {torch.__version__} cannot multiply half-precision matrices with a float32 "
        "result under ROCm: the head is multiplied in float32, which is right but slower. PyTorch 2.10 or "
        'newer can; logits_dtype="bf16" multiplies halves here and rounds the logits',
        stacklevel=2,
    )


def early_dtype(hidden: Tensor) -> torch.dtype:
    """Of a gradient of `hidden` that is yet to be scaled: below 6e-8 float16 has nothing."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b`; out may be float32 where a and b are halves (`has_mixed_products`).

    Always into a buffer: autocast would turn `@` into a product of halves. The library may split a sum that
    is long, or a product that has few results, and by PyTorch's default it adds up the pieces in the dtype of
    `out`. There `out` has to be float32, and the caller rounds it. Logits in half precision are no such
    product: sums of D elements, many results, the same as in the model's own head.
    """
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def accumulate(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, fresh: bool = False) -> None:
    """`out += alpha a @ b`, or `out = alpha a @ b` if `fresh`; out is float32, or of the dtype of a and b."""
    beta = 0 if fresh else 1  # with 0 what `out` holds is not read
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    elif not has_mixed_products(a):
        torch.addmm(out, a.float(), b.float(), beta=beta, alpha=alpha, out=out)
    elif MIXED_ADDMM:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        _accumulate_in_slabs(out, a, b, alpha, fresh)


def _accumulate_in_slabs(out: Tensor, a: Tensor, b: Tensor, alpha: float, fresh: bool) -> None:
    """`accumulate` by products of their own, of a slab of rows at a time."""
    for mine, rows in zip(out.split(SLAB), a.split(SLAB), strict=True):
        if fresh and alpha == 1:
            torch.mm(rows, b, out_dtype=out.dtype, out=mine)
        else:
            found = torch.mm(rows, b, out_dtype=out.dtype)
            torch.mul(found, alpha, out=mine) if fresh else mine.add_(found, alpha=alpha)
