"""The choice of the implementation: the Triton kernels or PyTorch's own operators."""

import contextlib
import functools
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast import notices
from grpo_fast.records import SoftCap

OLDEST_TORCH, OLDEST_TRITON = (2, 8), (3, 4)  # pyproject.toml asks pip for the same


def version_of(text: str) -> tuple[int, int]:
    """Return major and minor of a version."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


if version_of(torch.__version__) < OLDEST_TORCH:
    raise ImportError(
        f"grpo_fast needs torch >= 2.8, and torch {torch.__version__} is installed: pip install 'torch>=2.8'"
    )


# A wrong value is refused when the operators are imported, and not when something falls back much later.
for _name in ("GRPO_FAST_LOG", "GRPO_FAST_STRICT"):
    notices.setting(_name)


def triton_version() -> str | None:
    """Return the version of Triton, None where it is not installed.

    The package itself says it: its distribution has other names, such as pytorch-triton-rocm.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    found: str = importlib.import_module("triton").__version__
    return found


def interprets() -> bool:
    """Tell whether Triton's interpreter runs the kernels, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def why_no_triton() -> str:
    """Return why the kernels cannot be compiled, or "" where they can. Triton exists for Linux only."""
    found = triton_version()
    if found is None:
        return "Triton is not installed"
    if version_of(found) < OLDEST_TRITON:
        return f"Triton {found} is installed, and the kernels need 3.4"
    return ""


class Path(NamedTuple):
    """The implementation that an op takes.

    Attributes:
        kernels: whether it launches the Triton kernels; else PyTorch's operators run.
        reason: why.
        fallback: whether the kernels were to run, and cannot.
    """

    kernels: bool
    reason: str
    fallback: bool = False


def path_of(x: Tensor) -> Path:
    """Return the implementation of an op on `x`, and why it is this one.

    By default the kernels run on CUDA (and ROCm) tensors where Triton is installed; all other
    tensors take the PyTorch path. `GRPO_FAST_BACKEND=triton` or `torch` forces one of them.

    Raises:
        ValueError: another value of GRPO_FAST_BACKEND.
        RuntimeError: "triton" is forced where it cannot run.
    """
    forced, device = notices.setting("GRPO_FAST_BACKEND"), x.device.type
    if forced == "torch":
        return Path(False, "GRPO_FAST_BACKEND=torch")
    if not forced and device != "cuda":  # even if Triton is installed
        return Path(False, f"the device is {device}, the kernels need a GPU")
    why = why_no_triton()
    if not forced:
        return Path(False, why, fallback=True) if why else Path(True, "the device is cuda")
    if why:
        raise RuntimeError(f"GRPO_FAST_BACKEND=triton, but {why}")
    if x.device.type == "cpu" and not interprets():
        raise RuntimeError(
            "GRPO_FAST_BACKEND=triton with CPU tensors runs in Triton's interpreter only: "
            "set TRITON_INTERPRET=1 before Triton is imported"
        )
    return Path(True, "GRPO_FAST_BACKEND=triton")


def implementation(x: Tensor) -> str:
    """Name the implementation of an op on `x`, with the reason where it is not the kernels on a GPU."""
    path = path_of(x)
    if not path.kernels:
        return f"PyTorch path: {path.reason}"
    compiled = x.device.type == "cuda" and not interprets()
    return "Triton kernels" if compiled else "Triton's interpreter"


def path_and_reason(x: Tensor) -> str:
    """Name the implementation of an op on `x`, always with the reason."""
    name, _, _ = implementation(x).partition(":")
    return f"{name} ({path_of(x).reason})"


def use_triton(x: Tensor) -> bool:
    """Whether an op on `x` launches kernels: `path_of`, with a warning where it falls back.

    Raises:
        FallbackError: it falls back, and GRPO_FAST_STRICT=1.
        ValueError, RuntimeError: as `path_of`.
    """
    path = path_of(x)
    if path.fallback:
        notices.fell_back("triton", path.reason)
    return path.kernels


def grpo_kernel(logits: Tensor, dlogits: Tensor, softcap: SoftCap | None) -> str:
    """Choose the kernel that turns logits into their gradient, for `run`.

    It is the one on the chip where GRPO_FAST_ON_CHIP=1 asks for it. If that cannot run, a warning says why.
    """
    if notices.switch("GRPO_FAST_ON_CHIP"):
        why = "PyTorch's operators run in place of the kernels"
        if use_triton(logits):
            on_chip = _module("..kernels.on_chip")
            why = on_chip.unsupported(logits, dlogits, softcap.softcap if softcap else None)
        if not why:
            return "on_chip.grpo_fwd_bwd"
        notices.fell_back("on_chip", why)
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
    kernels = not by_pytorch and use_triton(like)
    if notices.noting() and not function.startswith("schedules."):  # a question, no kernel
        why = "PyTorch path (float64, or no tokens)" if by_pytorch else path_and_reason(like)
        notices.note(why, function.rpartition(".")[2])
    if not kernels:
        twin = _function(f"..torch_kernels.{function}")
        return twin(*(x.vector if isinstance(x, Strided) else x for x in args), **kwargs)
    launcher = _function(f"..kernels.{function}")
    args = tuple(map(_dense, args))
    kwargs = {key: _dense(value) for key, value in kwargs.items()}
    # Triton launches on the current GPU.
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        return launcher(*args, **kwargs)


def note_schedule(function: str, like: Tensor, *args: Any) -> None:
    """Note how a kernel walks over its rows, for the line of the call that is running.

    Args:
        function: module and name of a function that says so, such as "logprob.schedule_of".
    """
    if notices.noting():
        home = "kernels" if use_triton(like) else "torch_kernels"
        notices.note(str(_function(f"..{home}.{function}")(*args)))


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
    if isinstance(value, Tensor):
        return value.contiguous() if value.ndim == 1 else value
    if not isinstance(value, tuple):
        return value
    if isinstance(value, Strided):
        return value.vector
    return value._make(map(_dense, value)) if hasattr(value, "_make") else value
