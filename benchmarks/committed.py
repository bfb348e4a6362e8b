"""The committed results, results/*/*.json: the newest of everything, nothing of unknown origin."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import is_clean


class ResultError(Exception):
    """A result that must not be published."""


@dataclasses.dataclass
class Run:
    """What one commit measured of one stem on one machine, from however many processes."""

    stem: str
    info: dict[str, Any]
    date: str
    entries: list[
        dict[str, Any]
    ]  # `extra_info` and `stats` in one, and the "roofs" they were measured under
    absent: dict[str, str]

    @property
    def device(self) -> str:
        return self.info["device"]

    @property
    def cuda(self) -> bool:
        return self.info["device_type"] == "cuda"

    def cases(self) -> Iterator[list[dict[str, Any]]]:
        """The entries of each case, in the order of measurement."""
        keys = list(dict.fromkeys(map(case_of, self.entries)))
        for key in keys:
            yield [entry for entry in self.entries if case_of(entry) == key]


def case_of(entry: dict[str, Any]) -> tuple[str, str, str]:
    return entry["case"], entry["shape"], entry["variant"]


def documents(results: Path) -> list[dict[str, Any]]:
    """All files, the oldest first.

    Raises:
        ResultError: one was measured on code that no commit describes.
    """
    found = []
    for path in sorted(results.glob("*/*.json")):
        document = json.loads(path.read_text())
        info = document["machine_info"]
        commit = info.get("commit") or "unknown"
        if info.get("dirty", True) or not is_clean(commit):
            raise ResultError(f"{path}: measured on commit {commit!r}: want a clean, known commit")
        found.append(document)
    return sorted(found, key=lambda document: document["datetime"])


def load(results: Path) -> list[Run]:
    """The newest commit's run of each stem on each machine, GPUs first."""
    by_commit: dict[tuple[str, str, str], Run] = {}
    newest: dict[tuple[str, str], Run] = {}
    for document in documents(results):
        info, date = document["machine_info"], document["datetime"]
        roofs = info["bandwidth"] | {"gemm": info.get("gemm", {})}
        for stem in _stems(document):
            key = (info["device"], stem, info["commit"])
            run = by_commit.setdefault(key, Run(stem, info, date, [], {}))
            run.date = date
            for entry in document["benchmarks"]:
                flat = entry["extra_info"] | entry["stats"] | {"roofs": roofs}
                if flat["stem"] == stem:
                    who = (*case_of(flat), flat["provider"])
                    run.entries = [
                        e for e in run.entries if (*case_of(e), e["provider"]) != who
                    ] + [flat]
            run.absent |= {k: v for k, v in info["absent"].items() if k.split(" ")[0] == stem}
            newest[key[:2]] = run
    order = sorted(newest, key=lambda key: (not newest[key].cuda, key))
    return [newest[key] for key in order if newest[key].entries]


def _stems(document: dict[str, Any]) -> list[str]:
    measured = [entry["extra_info"]["stem"] for entry in document["benchmarks"]]
    missing = [who.split(" ")[0] for who in document["machine_info"]["absent"]]
    return list(dict.fromkeys([*measured, *(x for x in missing if x.isidentifier())]))


def steps(results: Path) -> list[dict[str, Any]]:
    """The newest document of `step_7b` on each machine, GPUs first; a tiny model's says nothing."""
    found = [d for d in documents(results) if d.get("step") and d["step"][0]["model"] != "tiny"]
    newest = {d["machine_info"]["device"]: d for d in found}
    return sorted(newest.values(), key=lambda d: d["machine_info"]["device_type"] != "cuda")
