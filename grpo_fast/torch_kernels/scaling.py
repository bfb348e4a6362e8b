"""The product of a gradient and the upstream gradient: the twin of `kernels/scaling.py`.

Where an element is 0 the product is 0, even if the factor is inf or NaN.
"""

import torch
from torch import Tensor

from grpo_fast.torch_kernels.rows import row_blocks


def scale_rows(factor: Tensor, x: Tensor) -> None:
    """Multiply the rows of x (B, T, V) in place: `x *= factor[:, None]`."""
    if bool((factor != 1).any()):
        for rows, (_, block) in row_blocks(x, x):
            block.copy_(torch.where(block == 0, 0, block * factor[rows, None]))


def scale(x: Tensor, factor: Tensor, y: Tensor) -> None:
    """Write `x * factor` into y, which may be x; factor is 0-dim."""
    if y is not x or bool(factor != 1):
        y.copy_(torch.where(x == 0, 0, x * factor))


def weigh_rows(x: Tensor, c: Tensor, y: Tensor) -> None:
    """Write `c[:, None] * x` into y, zeros where c is 0; x (N, D), c (N,)."""
    y.copy_(torch.where(c[:, None] == 0, 0, c[:, None] * x))
