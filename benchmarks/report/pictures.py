"""Draw figures whose files are the same each time, with text that stays text."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def drawing(width: float, height: float) -> Iterator[Any]:
    """Give an empty figure of matplotlib, sizes in inches; draw and call `svg` inside."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "grpo_fast"}):
        yield Figure(figsize=(width, height), layout="constrained")


def svg(figure: Any) -> bytes:
    """Return a figure as an SVG file."""
    target = io.BytesIO()
    figure.savefig(target, format="svg", metadata={"Date": None})
    return target.getvalue()
