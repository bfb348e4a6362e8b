"""Heads of other libraries: PyTorch's own, cut-cross-entropy, QuACK, verl."""

import importlib.util
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import eager
from benchmarks.providers.common import IGNORED, Function, UnavailableError, need_gpu


def with_eager_loss(head: Callable[[], Function], ignores: bool = True) -> Callable[[], Function]:
    """Give a GRPO loss to a head that knows none: its log-probs, then the objective in PyTorch.

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


def _per_token(head: Function) -> Function:
    """Turn a cross-entropy per token into log-probs."""
    return lambda hidden, weight, ids: -head(hidden, weight, ids).view_as(ids)


def torch_head(reduction: str) -> Function:
    """Load PyTorch's `linear_cross_entropy` in chunks; without a reduction it gives log-probs."""
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def call(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return F.linear_cross_entropy(
            hidden.flatten(0, 1), weight, ids.flatten(), reduction=reduction, options=options
        )

    return _per_token(call) if reduction == "none" else call


def cce(exact: bool, reduction: str) -> Function:
    """Load cut-cross-entropy; without a reduction it gives log-probs."""
    need_gpu("cut-cross-entropy")  # its locks: the interpreter won't do
    from cut_cross_entropy import linear_cross_entropy

    # Its default leaves out blocks of the gradient whose entries are all small.
    options = {"filter_eps": None} if exact else {}
    call = partial(linear_cross_entropy, reduction=reduction, **options)
    return _per_token(call) if reduction == "none" else call


def quack_cross_entropy() -> Function:
    """Load QuACK's head, in chunks of 4096 tokens, its default."""
    need_gpu("QuACK")
    if torch.cuda.get_device_capability() < (9, 0):
        raise UnavailableError("QuACK needs Hopper or newer")
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as head
    except TypeError as error:  # QuACK 0.6.5, in a folder not named site-packages
        raise UnavailableError(f"QuACK: {str(error).splitlines()[0]}") from error
    return lambda hidden, weight, ids: head(hidden.flatten(0, 1), weight, ids.flatten())


def _without_package_imports(name: str) -> None:
    """Make a package importable module by module: verl's own `__init__` wants Ray and more."""
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
    """Load verl's Triton head; it always computes the entropy as well."""
    need_gpu("verl's head")
    _without_package_imports("verl")
    from verl.utils.kernel import kernels  # noqa: F401 (else imported when first called)
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def call(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        arguments = hidden.flatten(0, 1), weight, ids.flatten(), 1.0, "none", None
        return linear_cross_entropy(*arguments)[0].view_as(ids)

    return call
