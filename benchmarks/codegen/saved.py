"""Read the numbers that `benchmarks.codegen --save` wrote, without Triton."""

import ast
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.report import markdown

FOLDER = Path(__file__).resolve().parent
SAVED = FOLDER / "codegen.json"
# What the compiled code follows from, beside Triton.
SOURCES = ("kernels/*.py", "benchmarks/codegen/*.py", "grpo_fast/*.py")


def load(path: Path = SAVED) -> dict[str, Any]:
    """Return {"triton": its version, "sources": their `digest`, "rows": [one per target and launch]}."""
    return json.loads(path.read_text())


def digest(root: Path = FOLDER.parents[1]) -> str:
    """Return a hash of the sources that the compiled code follows from, without their comments.

    It differs between versions of Python, too.
    """
    found = hashlib.sha256()
    for path in sorted(path for x in SOURCES for path in root.glob(x)):
        found.update(ast.dump(ast.parse(path.read_text())).encode())
    return found.hexdigest()[:16]


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
