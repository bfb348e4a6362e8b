"""Heads of other libraries: PyTorch's own, cut-cross-entropy, QuACK, verl."""

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import eager
from benchmarks.providers.common import IGNORED, Function, UnavailableError, need_gpu


def with_eager_loss(head: Callable[[], Function], ignores: bool) -> Callable[[], Function]:
    """A GRPO loss of a head that knows none: its log-probs, then the objective in PyTorch.

    Args:
        ignores: the head skips ids of -100; else it works on every token.
    """

    def load() -> Function:
        log_probs = head()

        def call(hidden: Tensor, weight: Tensor, ids: Tensor, **arguments: Any) -> Tensor:
            mask = arguments["mask"]
            if mask is not None and ignores:
                ids = ids.masked_fill(~mask, IGNORED)
            return eager.policy_loss(log_probs(hidden, weight, ids), **arguments)

        return call

    return load


def _torch_head(reduction: str) -> Function:
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has no linear_cross_entropy")
    from torch.nn import LinearCrossEntropyOptions

    options = LinearCrossEntropyOptions()

    def call(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return F.linear_cross_entropy(
            hidden.flatten(0, 1), weight, ids.flatten(), reduction=reduction, options=options
        )

    return call


def torch_logprob() -> Function:
    """`torch.nn.functional.linear_cross_entropy` in chunks, per token."""
    head = _torch_head("none")
    return lambda hidden, weight, ids: -head(hidden, weight, ids).view_as(ids)


def torch_cross_entropy() -> Function:
    return _torch_head("mean")


def _cce(exact: bool, reduction: str) -> Function:
    need_gpu("cut-cross-entropy")
    if not torch.cuda.is_available():
        raise UnavailableError("cut-cross-entropy's locks need a GPU")
    from cut_cross_entropy import linear_cross_entropy

    # Its default leaves out blocks of the gradient whose entries are all small.
    options = {"filter_eps": None} if exact else {}
    return lambda hidden, weight, ids: linear_cross_entropy(
        hidden, weight, ids, reduction=reduction, **options
    )


def cce_logprob(exact: bool) -> Callable[[], Function]:
    def load() -> Function:
        head = _cce(exact, "none")
        return lambda hidden, weight, ids: -head(hidden, weight, ids).view_as(ids)

    return load


def cce_cross_entropy(exact: bool) -> Callable[[], Function]:
    return lambda: _cce(exact, "mean")


def quack_cross_entropy() -> Function:
    """In chunks of 4096 tokens, its default."""
    if not torch.cuda.is_available():
        raise UnavailableError("QuACK needs a GPU")
    if torch.cuda.get_device_capability() < (9, 0):
        raise UnavailableError("QuACK needs Hopper or newer")
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy
    except TypeError as error:  # QuACK 0.6.5, in a folder not named site-packages
        raise UnavailableError(f"QuACK: {str(error).partition(chr(10))[0]}") from error

    def call(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(hidden.flatten(0, 1), weight, ids.flatten())

    return call


def _without_package_imports(name: str) -> None:
    """Make a package importable module by module: verl's own `__init__` wants Ray and a cluster's worth."""
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UnavailableError(f"not installed: {name}")
    root = Path(spec.origin).parent
    for suffix in ("", ".utils"):
        package = types.ModuleType(name + suffix)
        package.__path__ = [str(root.joinpath(*suffix.split(".")))]
        sys.modules[name + suffix] = package


def verl_logprob() -> Function:
    """verl's Triton head; it computes the entropy as well, always."""
    if not torch.cuda.is_available():
        raise UnavailableError("verl's head needs a GPU")
    _without_package_imports("verl")
    from verl.utils.kernel import kernels  # noqa: F401 (else imported when first called)
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def call(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        logps, _ = linear_cross_entropy(
            hidden.flatten(0, 1), weight, ids.flatten(), 1.0, "none", None
        )
        return logps.view_as(ids)

    return call
