"""Which implementation runs: the Triton kernels or PyTorch's own operators."""

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("triton", "torch")
OLDEST_TORCH, OLDEST_TRITON = (2, 8), (3, 4)  # pyproject.toml asks pip for the same


def version_of(text: str) -> tuple[int, int]:
    """Major and minor of a version."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


if version_of(torch.__version__) < OLDEST_TORCH:
    raise ImportError(
        f"grpo_fast needs torch >= 2.8, and torch {torch.__version__} is installed: pip install 'torch>=2.8'"
    )


@functools.cache
def why_no_triton() -> str:
    """Why the kernels cannot be compiled, or "" where they can. Triton exists for Linux only."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    found = importlib.import_module("triton").__version__
    if version_of(found) < OLDEST_TRITON:
        return f"Triton {found} is installed, and the kernels need 3.4"
    return ""


@functools.cache
def _warn_of_slow_path(why: str) -> None:
    """Once: the user has a GPU and gets PyTorch's operators."""
    warnings.warn(
        f"grpo_fast: {why}: PyTorch's operators run in place of the kernels. The results are the same, but "
        "they take longer: pip install 'triton>=3.4'",
        stacklevel=4,
    )


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
    if not forced and x.device.type != "cuda":
        return False  # whatever Triton is there
    why = why_no_triton()
    if not forced:
        if why and not torch.compiler.is_compiling():
            _warn_of_slow_path(why)
        return not why
    if why:
        raise RuntimeError(f"GRPO_FAST_BACKEND=triton, but {why}")
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "GRPO_FAST_BACKEND=triton with CPU tensors runs in Triton's interpreter only: "
            "set TRITON_INTERPRET=1 before Triton is imported"
        )
    return True


def wants_rows_on_chip() -> bool:
    """Whether GRPO_FAST_ON_CHIP=1 asks for `grpo_fast.kernels.on_chip` in place of `grpo_fast.kernels.grpo`.

    Raises:
        ValueError: another value than 0 or 1.
    """
    given = os.environ.get("GRPO_FAST_ON_CHIP", "")
    if given not in ("", "0", "1"):
        raise ValueError(f"GRPO_FAST_ON_CHIP={given!r}: want 0 or 1")
    return given == "1"


@functools.cache
def warn_not_on_chip(why: str) -> None:
    """Warn that GRPO_FAST_ON_CHIP=1 has no effect, once for each reason."""
    warnings.warn(
        f"grpo_fast: GRPO_FAST_ON_CHIP=1 has no effect here: {why}. The results are the same without it",
        stacklevel=4,
    )


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
