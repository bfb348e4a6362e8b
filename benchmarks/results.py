"""Where measurements go as they are made: a JSON file that is complete after every one of them."""

import datetime
import json
import os
from pathlib import Path
from typing import Any

from benchmarks import machine

STATISTICS = ("min", "max", "mean", "stddev", "median", "iqr", "rounds")


class Recorder:
    """One file of results; nothing is lost if the process dies later.

    {"machine_info": ..., "datetime": ..., "benchmarks": [{"name", "extra_info", "stats"}, ...]}, the same as
    pytest-benchmark's own. `machine_info["absent"]` says who has no number, and why.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self.absent: dict[str, str] = {}
        self.info: dict[str, Any] | None = None

    def add(self, name: str, extra_info: dict[str, Any], stats: Any) -> None:
        numbers = {key: getattr(stats, key) for key in STATISTICS}
        self.entries.append({"name": name, "extra_info": dict(extra_info), "stats": numbers})
        self.write()

    def skip(self, who: str, why: str) -> None:
        self.absent[who] = why
        self.write()

    def write(self) -> None:
        if self.info is None:
            self.info = machine.describe()
        write(self.path, self.info | {"absent": self.absent}, self.entries)


def write(path: Path, info: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Replace a file of results, whole or not at all."""
    now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None).isoformat()
    document = {"machine_info": info, "datetime": now, "benchmarks": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(temporary, path)


def note_absent(path: Path, who: str, why: str) -> None:
    """Add to a file of results, which may not exist yet, why somebody has no (further) numbers."""
    if path.exists():
        document = json.loads(path.read_text())
        info, entries = document["machine_info"], document["benchmarks"]
    else:
        info, entries = machine.describe() | {"absent": {}}, []
    info["absent"][who] = why
    write(path, info, entries)
