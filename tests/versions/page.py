"""The table of docs/compatibility.md about versions, from docs/data/versions.json."""

import json
from collections import Counter
from pathlib import Path

from benchmarks.report import markdown

ROOT = Path(__file__).resolve().parents[2]
SAVED = ROOT / "docs" / "data" / "versions.json"
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- versions: python -m tests.versions --save -->", "<!-- end of versions -->"
HEAD = ("environment", "Python", "torch", "triton", "transformers", "TRL", "NumPy", "tests")
HEAD += ("launches compiled", "deprecations", "commit, date")


def load(path: Path = SAVED) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


def save(rows: list[dict], names: list[str], path: Path = SAVED) -> None:
    """Put rows in place of those of the same name, in the order of `names`; other names are dropped."""
    known = {row["name"]: row for row in (*load(path), *rows)}
    kept = [known[name] for name in names if name in known]
    path.write_text(json.dumps(kept, indent=1) + "\n")


def cells(row: dict) -> list[str]:
    """One row of the table."""
    versions = row.get("versions", {})
    shown = [
        versions.get(x) or "" for x in ("python", "torch", "triton", "transformers", "trl", "numpy")
    ]
    when = f"{row['commit']}, {row['date']}"
    if "reason" in row:
        return [row["name"], *shown, f"not finished. {row['reason']}", "", "", when]
    tests, built = row["tests"], row["compiled"]
    counted = [f"{tests[kind]} {kind}" for kind in ("passed", "failed", "skipped") if tests[kind]]
    spills = f", spills in {len(built['spilled'])}" if built["spilled"] else ""
    old = str(len(tests["deprecations"]) or "none")
    result = f"1 in {row['one in']}: {', '.join(counted)}"
    return [row["name"], *shown, result, f"{built['launches']}{spills}", old, when]


def table(rows: list[dict]) -> str:
    return markdown.table(HEAD, map(cells, rows), left=range(len(HEAD)))


def failures(rows: list[dict]) -> str:
    """The tests that failed, by environment and name, with how many cases."""
    lines = []
    for row in rows:
        names = [x.partition("[")[0] for x in row.get("tests", {}).get("failures", ())]
        found = Counter(name.split("::")[-1].partition(":")[0] for name in names)
        texts = [f"`{name}` ({count})" for name, count in sorted(found.items())]
        if texts:
            lines.append(
                markdown.wrapped(f"- `{row['name']}`, failed: {', '.join(texts)}").replace(
                    "\n", "\n  "
                )
            )
    return "\n".join(lines)


def written(text: str, rows: list[dict]) -> str:
    """The text of the page with the table of these rows."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    listed = failures(rows)
    listed = f"{listed}\n\n" if listed else ""
    return f"{before}{BEGIN}\n\n{table(rows)}\n\n{listed}{END}{after}"
