"""Write Markdown tables, and the texts of their cells."""

import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import Any

# Less than this is below what the measurement can tell apart (pages, allocator blocks).
SMALLEST_MEMORY = 1 << 20
WIDTH = 100  # columns of prose


def table(head: Sequence[str], rows: Iterable[Iterable[Any]], left: Collection[int] = (0,)) -> str:
    """Write a table; the columns that `left` counts from 0 hold texts, the others numbers."""
    rule = "".join("---|" if i in left else "--:|" for i in range(len(head)))
    lines = [f"| {' | '.join(head)} |".replace("|  |", "| |"), f"|{rule}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def wrapped(text: str) -> str:
    """Break a paragraph into lines of at most `WIDTH` columns."""
    text = " ".join(text.split())
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def time_text(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.1f} µs"


def memory_text(nbytes: int | None) -> str:
    if nbytes is None:
        return ""
    return "< 1 MiB" if nbytes < SMALLEST_MEMORY else f"{nbytes / 2**20:,.0f} MiB"


def share_text(rate: float | None, top: float | None) -> str:
    return f"{100 * rate / top:.0f} %" if rate is not None and top else ""
