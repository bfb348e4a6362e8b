"""Logits that were overwritten with their gradient: which they are, and that nobody reads them again."""

from typing import NamedTuple

import torch
from torch import Tensor

DESTROYED = (
    "these logits were overwritten with their gradient by grpo_loss(..., inplace=True) and cannot be used "
    "afterwards; use inplace=False, or do all other work on the logits first."
)


def check_overwritable(op: str, logits: Tensor) -> None:
    """Refuse logits whose rows cannot be replaced one by one."""
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
    """Remember which bytes of the storage now hold a gradient.

    The note is kept by the storage, which base, views, `detach()` and `.data` share. It holds as long as the
    version counter stands still: whoever writes new logits into the buffer may use them.
    """
    counter = logits.detach()  # shares the counter, and from now on nothing else
    counter.data = torch.empty(0, dtype=logits.dtype, device=logits.device)
    note = Note(counter, counter._version, Layout.of(logits))
    logits.untyped_storage()._grpo_fast_overwritten = note  # type: ignore[attr-defined]


def mark_again(logits: Tensor) -> None:
    """After a change of the gradient in the place of the logits."""
    if getattr(logits.untyped_storage(), "_grpo_fast_overwritten", None) is not None:
        mark(logits)


def check_not_overwritten(op: str, x: Tensor) -> None:
    """Refuse what shares a byte with overwritten logits.

    Autograd notices a use that asks for a gradient. This one also notices the others, as far as they
    come to an operator of ours.
    """
    if torch.compiler.is_compiling() or x.is_inference() or not torch._C._has_storage(x):
        return
    noted = getattr(x.untyped_storage(), "_grpo_fast_overwritten", None)
    if noted is None or noted.counter._version != noted.version or not x.numel():
        return
    # `.data` has a counter of its own, which starts at 0: above that something was written by it.
    if x._version not in (0, noted.version):
        return
    mine, theirs = row_starts(Layout.of(x)), row_starts(noted.layout).sort().values
    # The first row of theirs that ends behind the start of mine: does it start before the end of mine?
    at = torch.searchsorted(theirs + noted.layout.width, mine, right=True)
    starts = theirs[at.clamp(max=len(theirs) - 1)]
    if bool(((at < len(theirs)) & (starts < mine + Layout.of(x).width)).any()):
        raise RuntimeError(f"{op}: {DESTROYED}")


class Note(NamedTuple):
    """Which bytes hold a gradient, and until when."""

    counter: Tensor  # empty; its version is that of the logits, their base and views
    version: int
    layout: "Layout"


class Layout(NamedTuple):
    """Where the rows of (..., V) lie in their storage."""

    offset: int  # elements, as the strides
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
    """(rows,) the first byte of each row in its storage, on the CPU."""
    starts = torch.full((), layout.offset, dtype=torch.int64, device="cpu")
    for n, stride in zip(layout.shape, layout.strides, strict=True):
        starts = starts[..., None] + torch.arange(n, dtype=torch.int64, device="cpu") * stride
    return starts.reshape(-1) * layout.size
