"""What the other libraries' providers have in common."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[..., Tensor]
IGNORED = -100  # the id that cross-entropies leave out


class UnavailableError(Exception):
    """This provider cannot run here; the message says why."""


def need_gpu(name: str) -> None:
    """Triton kernels run on a GPU, or, for tests of correctness alone, in Triton's interpreter.

    Raises:
        UnavailableError: neither is there.
    """
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise UnavailableError(f"{name} needs a GPU")


def version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
