"""Read the numbers that `benchmarks.codegen --save` wrote, without Triton."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.report import markdown

SAVED = Path(__file__).resolve().parent / "codegen.json"


def load(path: Path = SAVED) -> dict[str, Any]:
    """Return {"triton": its version, "rows": [one per target and launch]}."""
    return json.loads(path.read_text())


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Write the rows as a Markdown table."""
    head = ["target", "launch", "registers", "resident programs", "stack", "shared memory"]
    head += ["barriers", "instructions / element", "bits per access"]
    lines = []
    for row in rows:
        work = ", ".join(f"{k} {x:.1f}" for k, x in row["per_element"].items())
        numbers = [v for k, v in row.items() if k not in ("per_element", "bits")]
        lines.append([*numbers, work, ", ".join(map(str, row["bits"]))])
    return markdown.table(head, lines, left=(0, 1, 7, 8))
