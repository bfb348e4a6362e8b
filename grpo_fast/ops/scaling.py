"""The product of a gradient and the upstream gradient, as operators: one read and one write.

Where an element is 0 the product is 0, even if the factor is inf or NaN.
"""

from typing import Any

import torch
from torch import Tensor

from grpo_fast.ops.backend import Strided, run
from grpo_fast.ops.operator import operator


def _scale_rows_(x: Tensor, factor: Tensor) -> None:
    """Multiply the rows of x (B, T, V) in place: `x *= factor[:, None]`; a factor of 1 touches nothing."""
    run("scaling.scale_rows", x, Strided(factor), x)


def _none(*_: Any) -> None:
    return None


scale_rows_ = operator(
    "scale_rows_",
    _scale_rows_,
    {"x": Tensor, "factor": Tensor},
    "()",
    fake=_none,
    mutates=True,
)


def _weigh_rows(x: Tensor, c: Tensor) -> Tensor:
    """Compute `c[:, None] * x`, zeros where c is 0; x (N, D), c (N,)."""
    y = torch.empty_like(x)
    run("scaling.weigh_rows", x, x, c, y)
    return y


def _like(x: Tensor, c: Tensor) -> Tensor:
    return torch.empty_like(x)


weigh_rows = operator("weigh_rows", _weigh_rows, {"x": Tensor, "c": Tensor}, "Tensor", fake=_like)


def _scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply x, contiguous, by a 0-dim factor in place; a factor of 1 touches nothing."""
    run("scaling.scale", x, x, factor, x)


scale_ = operator(
    "scale_", _scale_, {"x": Tensor, "factor": Tensor}, "()", fake=_none, mutates=True
)


def _scaled_to(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `(x * factor).to(dtype)`; x is contiguous, factor 0-dim."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    run("scaling.scale", x, x, factor, y)
    return y


def _like_in(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


scaled_to = operator(
    "scaled_to",
    _scaled_to,
    {"x": Tensor, "factor": Tensor, "dtype": torch.dtype},
    "Tensor",
    fake=_like_in,
)
