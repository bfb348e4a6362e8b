"""Measure the peak memory of a call beyond what was in use before it."""

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Iterator

import torch

# Of the C library's mallopt: the parameters, and values that it has by default and that keep memory.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
DEFAULT = {TRIM_THRESHOLD: 128 << 10, MMAP_MAX: 65_536}
KEEP = {TRIM_THRESHOLD: -1, MMAP_MAX: 0}


def release() -> None:
    """Free what nobody can reach: a failure's traceback holds its tensors, in a cycle with itself."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_extra_bytes(run: Callable[[], object]) -> int | None:
    """Return the bytes; None where they cannot be measured (CPU memory outside Linux)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not _reset_high_water():
        return None
    before = _status("VmRSS")
    run()
    return max(_status("VmHWM") - before, 0)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Let the C library keep freed memory for later allocations, as the allocator of a GPU does.

    By default large blocks go back to the system, and every new one waits for its pages: up to a second per
    GiB in a virtual machine. Does nothing where the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        _set(KEEP)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, AttributeError, TypeError):
            _set(DEFAULT)


def _set(parameters: dict[int, int]) -> None:
    library = ctypes.CDLL(None)
    for parameter, value in parameters.items():
        library.mallopt(parameter, value)


def _reset_high_water() -> bool:
    """Make VmHWM start anew from the present resident set; False where the system cannot."""
    try:
        # Freed memory that the allocator keeps would be used first, and not be seen.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
    except (OSError, AttributeError, TypeError):
        return False
    return True


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        match = re.search(rf"{field}:\s+(\d+) kB", status.read())
    assert match is not None
    return int(match[1]) << 10
