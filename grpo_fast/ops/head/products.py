"""Matrix products of half precision with float32 results, and the dtypes of the head that follow."""

import torch
from torch import Tensor

from grpo_fast.notices import fell_back
from grpo_fast.ops.backend import version_of
from grpo_fast.ops.head.arguments import Options, on_gpu


def mixed_products_of(version: str, hip: str | None) -> bool:
    """Whether `mm` of halves may have a float32 result on a GPU: under ROCm it raises before 2.10."""
    return hip is None or version_of(version) >= (2, 10)


# Whether `addmm` adds a product of halves to a float32 sum. Before 2.10 the sum had to be in the
# dtype of the operands.
MIXED_ADDMM = version_of(torch.__version__) >= (2, 10)


MIXED_MM = mixed_products_of(torch.__version__, torch.version.hip)


SLAB = 8192  # rows of a sum at a time where product and addition are separate


def working_dtypes(hidden: Tensor, options: Options) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtype of the operands of the products, and the dtype of the logits."""
    if not options.fp32_logits:
        return hidden.dtype, hidden.dtype
    # Where a product of halves cannot have a float32 result, float32 copies are multiplied.
    return hidden.dtype if has_mixed_products(hidden) else torch.float32, torch.float32


def has_mixed_products(x: Tensor) -> bool:
    """Whether halves on the device of x can be multiplied with a float32 result."""
    return on_gpu(x) and MIXED_MM


def say_copies() -> None:
    """Warn that this GPU multiplies float32 copies in place of halves."""
    fell_back(
        "float32_copies",
        f"PyTorch {torch.__version__} cannot multiply halves with a float32 result under ROCm",
    )


def early_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype of a gradient of `hidden` that is scaled later.

    It is float32 for float16, whose smallest number is 6e-8.
    """
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute `out = a @ b`; out may be float32 where a and b are halves (`has_mixed_products`).

    It always writes into a buffer, because autocast would turn `@` into a product of halves. The
    library may split a long sum, or a product with few results, and by PyTorch's default it adds up
    the pieces in the dtype of `out`. For such products `out` must be float32, and the caller rounds
    it. Logits in half precision are no such product: they are sums of D elements with many results,
    as in the model's own head.
    """
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def accumulate(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, fresh: bool = False) -> None:
    """Compute `out += alpha a @ b`, or `out = alpha a @ b` if `fresh`.

    The dtype of out is float32 or that of a and b.
    """
    beta = 0 if fresh else 1  # with 0, `out` is not read
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    elif not has_mixed_products(a):
        torch.addmm(out, a.float(), b.float(), beta=beta, alpha=alpha, out=out)
    elif MIXED_ADDMM:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        why = f"PyTorch {torch.__version__} adds to a sum in the dtype of the operands only"
        fell_back("slabs", why, quiet=True)
        _accumulate_in_slabs(out, a, b, alpha, fresh)


def _accumulate_in_slabs(out: Tensor, a: Tensor, b: Tensor, alpha: float, fresh: bool) -> None:
    """Compute `accumulate` for a slab of rows at a time: a product, then an addition."""
    for mine, rows in zip(out.split(SLAB), a.split(SLAB), strict=True):
        if fresh and alpha == 1:
            torch.mm(rows, b, out_dtype=out.dtype, out=mine)
        else:
            found = torch.mm(rows, b, out_dtype=out.dtype)
            torch.mul(found, alpha, out=mine) if fresh else mine.add_(found, alpha=alpha)
