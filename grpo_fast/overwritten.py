"""Logits that `inplace=True` overwrote with their gradient: notes and checks of them."""

from typing import NamedTuple

import torch
from torch import Tensor

DESTROYED = (
    "these logits were overwritten with their gradient by grpo_loss(..., inplace=True) and cannot be used "
    "afterwards; use inplace=False, or do all other work on the logits first."
)


def check_overwritable(op: str, logits: Tensor) -> None:
    """Refuse logits whose rows cannot be overwritten one by one: leaves, and rows that overlap."""
    if logits.is_leaf:
        raise ValueError(
            f"{op}: inplace=True would overwrite a leaf tensor that requires grad; "
            "pass logits that an operation computed, or inplace=False"
        )
    if _rows_may_overlap(logits):
        starts = row_starts(Layout.of(logits)).sort().values
        if bool((starts.diff() < Layout.of(logits).width).any()):
            raise ValueError(
                f"{op}: inplace=True needs logits whose rows do not overlap, got strides {logits.stride()}"
            )


def _rows_may_overlap(x: Tensor) -> bool:
    extent = x.shape[-1]
    dimensions = zip(x.stride()[:-1], x.shape[:-1], strict=True)
    for stride, size in sorted(pair for pair in dimensions if pair[1] > 1):
        if stride < extent:
            return bool(x.numel())
        extent += (size - 1) * stride
    return False


def mark(logits: Tensor) -> None:
    """Note which bytes of the storage now hold a gradient.

    The storage keeps the note; base, views, `detach()` and `.data` share it. The note holds as long
    as the version counter stands still: whoever writes new logits into the buffer may use them.
    """
    counter = logits.detach()  # it shares the version counter, and after the next line nothing else
    counter.data = torch.empty(0, dtype=logits.dtype, device=logits.device)
    note = Note(counter, counter._version, Layout.of(logits))
    logits.untyped_storage()._grpo_fast_overwritten = note  # type: ignore[attr-defined]


def mark_again(logits: Tensor) -> None:
    """Note the bytes again after the gradient in the place of the logits has changed."""
    if getattr(logits.untyped_storage(), "_grpo_fast_overwritten", None) is not None:
        mark(logits)


def check_not_overwritten(op: str, x: Tensor) -> None:
    """Refuse a tensor that shares a byte with overwritten logits.

    Autograd notices a use that asks for a gradient. This check also notices other uses, as far as
    they reach an operator of this library.
    """
    if torch.compiler.is_compiling() or x.is_inference() or not torch._C._has_storage(x):
        return
    noted = getattr(x.untyped_storage(), "_grpo_fast_overwritten", None)
    if noted is None or noted.counter._version != noted.version or not x.numel():
        return
    # `.data` has its own counter, which starts at 0. Above 0, something was written through it.
    if x._version not in (0, noted.version):
        return
    mine, theirs = row_starts(Layout.of(x)), row_starts(noted.layout).sort().values
    # For each of my rows, find the first of their rows that ends after mine starts: does it start
    # before mine ends?
    at = torch.searchsorted(theirs + noted.layout.width, mine, right=True)
    starts = theirs[at.clamp(max=len(theirs) - 1)]
    if bool(((at < len(theirs)) & (starts < mine + Layout.of(x).width)).any()):
        raise RuntimeError(f"{op}: {DESTROYED}")


class Note(NamedTuple):
    """A note of the bytes that hold a gradient, and how long it holds."""

    counter: Tensor  # empty; its version is that of the logits, their base and views
    version: int
    layout: "Layout"


class Layout(NamedTuple):
    """The places of the rows of a tensor (..., V) in its storage."""

    offset: int  # in elements, like the strides
    shape: torch.Size  # without V
    strides: tuple[int, ...]
    width: int  # bytes of a row
    size: int  # bytes of an element

    @staticmethod
    def of(x: Tensor) -> "Layout":
        size = x.element_size()
        width = x.shape[-1] * size
        return Layout(int(x.storage_offset()), x.shape[:-1], x.stride()[:-1], width, size)


def row_starts(layout: Layout) -> Tensor:
    """Return the first byte of each row in its storage, (rows,), on the CPU."""
    starts = torch.full((), layout.offset, dtype=torch.int64, device="cpu")
    for n, stride in zip(layout.shape, layout.strides, strict=True):
        starts = starts[..., None] + torch.arange(n, dtype=torch.int64, device="cpu") * stride
    return starts.reshape(-1) * layout.size
