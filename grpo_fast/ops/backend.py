"""The choice of the implementation: the Triton kernels or PyTorch's own operators."""

import contextlib
import functools
import importlib.util
import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.records import SoftCap

BACKENDS = ("triton", "torch")
OLDEST_TORCH, OLDEST_TRITON = (2, 8), (3, 4)  # pyproject.toml asks pip for the same


def version_of(text: str) -> tuple[int, int]:
    """Return major and minor of a version."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


if version_of(torch.__version__) < OLDEST_TORCH:
    raise ImportError(
        f"grpo_fast needs torch >= 2.8, and torch {torch.__version__} is installed: pip install 'torch>=2.8'"
    )


@functools.cache
def why_no_triton() -> str:
    """Return why the kernels cannot be compiled, or "" where they can. Triton exists for Linux only."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    found = importlib.import_module("triton").__version__
    if version_of(found) < OLDEST_TRITON:
        return f"Triton {found} is installed, and the kernels need 3.4"
    return ""


@functools.cache
def _warn_of_slow_path(why: str) -> None:
    """Warn once that PyTorch's operators run on a GPU in place of the kernels."""
    warnings.warn(
        f"grpo_fast: {why}: PyTorch's operators run in place of the kernels. The results are the same, but "
        "they take longer: pip install 'triton>=3.4'",
        stacklevel=4,
    )


def use_triton(x: Tensor) -> bool:
    """Whether an op on `x` launches kernels.

    By default it does on CUDA (and ROCm) tensors where Triton is installed; all other tensors take
    the PyTorch path. `GRPO_FAST_BACKEND=triton` or `torch` forces one of them.

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
        return False  # even if Triton is installed
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
    """Whether GRPO_FAST_ON_CHIP=1 asks for the kernel `on_chip` in place of `grpo`.

    Raises:
        ValueError: a value other than 0 and 1.
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


def grpo_kernel(logits: Tensor, dlogits: Tensor, softcap: SoftCap | None) -> str:
    """Choose the kernel that turns logits into their gradient, for `run`.

    It is the one on the chip where GRPO_FAST_ON_CHIP=1 asks for it. If that cannot run, a warning says why.
    """
    if wants_rows_on_chip():
        why = "PyTorch's operators run in place of the kernels"
        if use_triton(logits):
            on_chip = _module("..kernels.on_chip")
            why = on_chip.unsupported(logits, dlogits, softcap.softcap if softcap else None)
        if not why:
            return "on_chip.grpo_fwd_bwd"
        warn_not_on_chip(why)
    return "grpo.grpo_fwd_bwd"


def run(function: str, like: Tensor, *args: Any, by_pytorch: bool = False, **kwargs: Any) -> Any:
    """Call a kernel: its launcher in `grpo_fast.kernels`, or its twin in `grpo_fast.torch_kernels`.

    This is the one place that chooses. Both have the same names and signatures.

    Args:
        function: module and name, such as "logprob.logprob_fwd".
        like: a tensor on the device that computes.
        by_pytorch: whether to use PyTorch's operators on any device, for float64 or where there is
            nothing to launch on.
    """
    if by_pytorch or not use_triton(like):
        twin = _function(f"..torch_kernels.{function}")
        return twin(*(x.vector if isinstance(x, Strided) else x for x in args), **kwargs)
    launcher = _function(f"..kernels.{function}")
    args = tuple(_dense(value) for value in args)
    kwargs = {key: _dense(value) for key, value in kwargs.items()}
    # Triton launches on the current GPU.
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        return launcher(*args, **kwargs)


def _function(path: str) -> Any:
    """The function at the end of a path that is relative to this package."""
    module, _, name = path.rpartition(".")
    return getattr(_module(module), name)


@functools.cache
def _module(path: str) -> Any:
    return importlib.import_module(path, __package__)


class Strided(NamedTuple):
    """A vector whose launcher handles its stride, so that it need not be contiguous."""

    vector: Tensor


def _dense(value: Any) -> Any:
    """Return a vector, or a record with its vectors, with a stride of 1, which the kernels need.

    A vector with another stride is copied, an expanded one too: a vector that a launcher is to write
    (`out`) must be contiguous. Launchers handle the strides of everything else.
    """
    if isinstance(value, Strided):
        return value.vector
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_dense(x) for x in value))
    return value.contiguous() if isinstance(value, Tensor) and value.ndim == 1 else value
