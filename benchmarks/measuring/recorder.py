"""Write measurements as they are made, to a JSON file that is complete after each of them."""

import datetime
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.measuring import machine

STATISTICS = ("min", "max", "mean", "stddev", "median", "iqr", "rounds")


class Recorder:
    """One file of results; nothing is lost if the process dies later.

    {"machine_info": ..., "datetime": ..., "benchmarks": [{"name", "extra_info", "stats"}, ...]},
    the same as pytest-benchmark's own. `machine_info["absent"]` says who has no number, and why.
    "running" and "finished" name benchmarks: a process that takes over from one that died leaves
    those out.
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        self.path = path
        self.document: dict[str, Any] = {"benchmarks": [], "running": None, "finished": []}
        self.absent: dict[str, str] = {}
        if resume and path.exists():
            self.document = json.loads(path.read_text())
            self.absent = self.document["machine_info"]["absent"]
            del self.document["machine_info"]  # of the process that died

    def start(self, key: str) -> None:
        self.document["running"] = key
        self.write()

    def finish(self, key: str) -> None:
        self.document["running"] = None
        self.document["finished"].append(key)
        self.write()

    def add(self, name: str, extra_info: dict[str, Any], stats: Any) -> None:
        numbers = {key: getattr(stats, key) for key in STATISTICS}
        entry = {"name": name, "extra_info": dict(extra_info), "stats": numbers}
        self.document["benchmarks"].append(entry)
        self.write()

    def skip(self, who: str, why: str) -> None:
        self.absent[who] = why
        self.write()

    def write(self) -> None:
        if "machine_info" not in self.document:
            self.document["machine_info"] = machine.describe()
        self.document["machine_info"]["absent"] = self.absent
        write(self.path, self.document)


class Sheet:
    """A file of rows, written after each; they are `kind` of its document."""

    def __init__(self, out: Path | None, kind: str, **document: Any) -> None:
        self.out = out
        self.rows: list[dict[str, Any]] = []
        info = (machine.describe() if out else {}) | {"absent": {}}
        self.document = {"machine_info": info, "benchmarks": [], kind: self.rows, **document}

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print(row, flush=True)
        self.write()

    def write(self) -> None:
        if self.out:
            write(self.out, self.document)


def write(path: Path, document: dict[str, Any]) -> None:
    """Replace a file of results, whole or not at all."""
    now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
    document["datetime"] = now.isoformat(timespec="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(temporary, path)


def note_end(path: Path, why: str) -> str | None:
    """Write down why a process ended that left its file of results behind.

    Returns:
        What was running; None if nothing was, or nothing is known.
    """
    if not path.exists():
        return None
    document = json.loads(path.read_text())
    running = document.get("running")
    if running:
        document["machine_info"]["absent"][running] = why
        document["finished"].append(running)
        document["running"] = None
        write(path, document)
    return running


def reason_of(error: Exception) -> str:
    """Name an error in one line, for results."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
