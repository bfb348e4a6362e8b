"""Find the longest length that fits into a cap on the memory that PyTorch may use."""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

RESOLUTION = 50  # lengths a fiftieth apart are told apart, no closer: a try may take half a minute


@contextlib.contextmanager
def capped(limit: float) -> Iterator[None]:
    """Let PyTorch reserve `limit` bytes of the device, no more."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def longest(
    peak: Callable[[int], int | None], limit: float, start: int, deadline: float, step: int
) -> tuple[int, int | None]:
    """Find the longest length that ran, and the shortest that did not, multiples of `step`.

    The first is 0 where not even `start` ran. The two are `step` or a fiftieth apart, or further
    where time was up.

    Args:
        peak: of a length, the bytes that were in use at once; None where it does not fit.
        limit: bytes. Peaks are linear in the length, so two of them tell where to look. What fits
            is a little less than they say, since free memory may be in pieces.
        deadline: of `time.monotonic()`; what is known by then is returned. A try that would take
            longer, by the time of the last, is not begun.
    """
    low, high = 0, None
    seen: list[tuple[int, int]] = []
    length, misses, pace = start, 0, 0.0
    while (began := time.monotonic()) + pace * length < deadline:
        used = peak(length)
        if used is None:
            high, misses = length, misses + 1
        else:
            low, misses = length, 0
            seen.append((length, used))
            pace = (time.monotonic() - began) / length
        if high is not None and high - low <= max(step, low // RESOLUTION):
            break
        length = _next_length(low, high, misses, seen, limit, step)
    return low, high


def _next_length(
    low: int, high: int | None, misses: int, seen: list[tuple[int, int]], limit: float, step: int
) -> int:
    guess = 2 * low
    if len(seen) >= 2 and seen[-1][1] != seen[-2][1]:
        (a, at_a), (b, at_b) = seen[-2:]
        guess = int(b + (limit - at_b) * (b - a) / (at_b - at_a))
    if high is not None and not low < guess < high:
        # What two lengths predicted is not far off: just below, and further below each time.
        predicted = len(seen) >= 2 and high > 2 * low
        share = max(8 >> max(misses - 1, 0), 2) if predicted else 2
        guess = high - (high - low) // share
    guess = max(guess // step * step, low + step)
    return guess if high is None else min(guess, high - step)
