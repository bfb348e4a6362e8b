"""The product of a gradient and the upstream gradient, as operators: one read and one write.

Where an element is 0 the product is 0, even if the factor is inf or NaN.
"""

import torch
from torch import Tensor

from grpo_fast.ops.backend import Strided, run


@torch.library.custom_op("grpo_fast::scale_rows_", mutates_args=("x",))
def scale_rows_(x: Tensor, factor: Tensor) -> None:
    """Multiply the rows of x (B, T, V) in place: `x *= factor[:, None]`; a factor of 1 touches nothing."""
    run("scaling.scale_rows", x, Strided(factor), x)


@torch.library.custom_op("grpo_fast::weigh_rows", mutates_args=())
def weigh_rows(x: Tensor, c: Tensor) -> Tensor:
    """Compute `c[:, None] * x`, zeros where c is 0; x (N, D), c (N,)."""
    y = torch.empty_like(x)
    run("scaling.weigh_rows", x, x, c, y)
    return y


@weigh_rows.register_fake
def _(x: Tensor, c: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("grpo_fast::scale_", mutates_args=("x",))
def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply x, contiguous, by a 0-dim factor in place; a factor of 1 touches nothing."""
    run("scaling.scale", x, x, factor, x)


@torch.library.custom_op("grpo_fast::scaled_to", mutates_args=())
def scaled_to(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `(x * factor).to(dtype)`; x is contiguous, factor 0-dim."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    run("scaling.scale", x, x, factor, y)
    return y


@scaled_to.register_fake
def _(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)
