"""Which implementation runs: the Triton kernels or PyTorch's own operators."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("triton", "torch")


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported; it exists for Linux only."""
    return importlib.util.find_spec("triton") is not None


def use_triton(x: Tensor) -> bool:
    """Whether an op on `x` launches kernels.

    By default CUDA (and ROCm) tensors do where Triton is installed, all others take the PyTorch path.
    `GRPO_FAST_BACKEND=triton` or `torch` forces one of them.

    Raises:
        ValueError: another value of GRPO_FAST_BACKEND.
        RuntimeError: "triton" is forced where it cannot run.
    """
    forced = os.environ.get("GRPO_FAST_BACKEND", "")
    if forced and forced not in BACKENDS:
        raise ValueError(f"GRPO_FAST_BACKEND={forced!r}: want one of {', '.join(BACKENDS)}")
    if forced == "torch":
        return False
    if not forced:
        return x.device.type == "cuda" and has_triton()
    if not has_triton():
        raise RuntimeError("GRPO_FAST_BACKEND=triton, but Triton is not installed")
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "GRPO_FAST_BACKEND=triton with CPU tensors runs in Triton's interpreter only: "
            "set TRITON_INTERPRET=1 before Triton is imported"
        )
    return True


def launch(launcher: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`launcher(*args, **kwargs)` with the GPU of `x` as the current one: Triton launches on that.

    The kernels step through vectors one element at a time, whatever the stride. This is the one place that
    makes it so: a vector with another stride is copied, an expanded one too. Launchers make their own output
    vectors and take strides for everything else (`Strided` vectors included).
    """
    args = tuple(_dense(value) for value in args)
    kwargs = {name: _dense(value) for name, value in kwargs.items()}
    with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
        return launcher(*args, **kwargs)


class Strided(NamedTuple):
    """A vector whose stride the launcher takes into account."""

    vector: Tensor


def _dense(value: Any) -> Any:
    if isinstance(value, Strided):
        return value.vector
    return value.contiguous() if isinstance(value, Tensor) and value.ndim == 1 else value


def check_values(x: Tensor) -> bool:
    """Whether argument values are looked at: always on the CPU, elsewhere on GRPO_FAST_VALIDATE=1.

    On a GPU the look would be a host sync; in a compiled graph, a graph break.
    """
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or os.environ.get("GRPO_FAST_VALIDATE") == "1"
