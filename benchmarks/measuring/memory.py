"""Measure the peak memory of a call beyond what was in use before it."""

import ctypes
import gc
import re
from collections.abc import Callable

import torch


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
