"""Make the tensors of the launches of `bounds.py`: each ends where its memory ends."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.inputs.shapes import device
from grpo_fast.records import Tokens

HALF, FULL = torch.float16, torch.float32
Launch = Callable[[], object]
# The launches of each kernel, by its name.
Kernels = dict[str, Callable[[], Iterator[tuple[str, Launch]]]]


def new(*shape: int, dtype: torch.dtype = FULL) -> Tensor:
    """Return random numbers in memory of their own."""
    return torch.randn(shape, device=device()).to(dtype)


def flags(n: int) -> Tensor:
    """Return n bools; every third is False."""
    return torch.arange(n, device=device()) % 3 != 2


def tokens(n: int, extras: bool, advantages: bool = True) -> Tokens:
    """Return the numbers of n tokens: all of them, or the least that a loss needs."""
    given = Tokens._fields if extras else ("weight", "advantages")
    found = Tokens(**{name: new(n) for name in given})
    found.weight[n // 2] = 0.0  # a row without a gradient
    return found if advantages else found._replace(advantages=None)
