"""Read the committed results: the newest of everything, nothing of unknown origin."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measuring.machine import is_clean

# The order of the tables: what a trainer calls first, then its parts.
STEMS = (
    *("grpo", "linear_grpo", "trl_step", "logprob", "linear_logprob", "linear_cross_entropy"),
    *("policy_loss", "sequence_loss", "group_advantage"),
)
OWN = "grpo_fast"  # what the names of this project's providers begin with


class ResultError(Exception):
    """A result that must not be published."""


@dataclasses.dataclass
class Run:
    """All that one commit measured of one stem on one machine, from any number of processes."""

    stem: str
    info: dict[str, Any]
    date: str
    entries: list[dict[str, Any]]  # `extra_info` and `stats` in one, and "roofs": of their run
    absent: dict[str, str]

    @property
    def device(self) -> str:
        return self.info["device"]

    @property
    def cuda(self) -> bool:
        return self.info["device_type"] == "cuda"

    def cases(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the entries of each case, in the order of measurement."""
        keys = list(dict.fromkeys(map(case_of, self.entries)))
        for key in keys:
            yield [entry for entry in self.entries if case_of(entry) == key]


def case_of(entry: dict[str, Any]) -> tuple[str, str, str]:
    return entry["case"], entry["shape"], entry["variant"]


def documents(results: Path) -> list[dict[str, Any]]:
    """Read all files, the oldest first, each with "machine_info", "datetime" and "benchmarks".

    Raises:
        ResultError: one was measured on code that no commit describes, or nobody knows where.
    """
    found = []
    for path in sorted(results.glob("*/*.json")):
        document = _described(json.loads(path.read_text()))
        info = document["machine_info"]
        commit = info.get("commit") or "unknown"
        if info.get("dirty", True) or not is_clean(commit):
            raise ResultError(f"{path}: measured on commit {commit!r}: want a clean, known commit")
        if not info.get("device"):
            raise ResultError(f"{path}: names no device")
        found.append(document)
    return sorted(found, key=lambda document: document["datetime"])


def _described(document: dict[str, Any]) -> dict[str, Any]:
    """Add the keys that every reader expects: not all kinds of files have them."""
    document = {"datetime": "", "benchmarks": []} | document
    if "variants" in document:  # on_chip's: only its processes see the GPU
        devices = [x["device"] for x in document["variants"] if "device" in x]
        commit = document.get("commit") or "unknown"
        info = {"device": devices[0] if devices else None, "device_type": "cuda"}
        info |= {"commit": commit, "dirty": not is_clean(commit)}
        document = {"machine_info": info} | document
    info = {"absent": {}, "bandwidth": {}, "gemm": {}} | document.get("machine_info", {})
    return document | {"machine_info": info}


def load(results: Path) -> list[Run]:
    """Return the newest commit's run of each stem on each machine, GPUs first.

    A commit that measured other libraries alone hides none that measured this project.
    """
    by_commit: dict[tuple[str, str, str], Run] = {}
    for document in documents(results):
        info, date = document["machine_info"], document["datetime"]
        roofs = info["bandwidth"] | {"gemm": info["gemm"]}
        for stem in _stems(document):
            key = (info["device"], stem, info["commit"])
            run = by_commit.pop(key, None) or Run(stem, info, date, [], {})
            by_commit[key] = run  # the newest last
            run.date = date
            for entry in document["benchmarks"]:
                flat = entry["extra_info"] | entry["stats"] | {"roofs": roofs}
                if flat["stem"] == stem:
                    who = (*case_of(flat), flat["provider"])
                    run.entries = [
                        e for e in run.entries if (*case_of(e), e["provider"]) != who
                    ] + [flat]
            run.absent |= {k: v for k, v in info["absent"].items() if k.split(" ")[0] == stem}
    newest: dict[tuple[str, str], Run] = {}
    for (device, stem, _), run in by_commit.items():
        known = newest.get((device, stem))
        if run.entries and (known is None or _has_own(run) or not _has_own(known)):
            newest[device, stem] = run
    place = {stem: i for i, stem in enumerate(STEMS)}  # stems of other commits come last
    return sorted(
        newest.values(),
        key=lambda run: (not run.cuda, run.device, place.get(run.stem, len(place)), run.stem),
    )


def _has_own(run: Run) -> bool:
    return any(entry["provider"].startswith(OWN) for entry in run.entries)


def _stems(document: dict[str, Any]) -> list[str]:
    measured = [entry["extra_info"]["stem"] for entry in document["benchmarks"]]
    missing = [who.split(" ")[0] for who in document["machine_info"]["absent"]]
    return list(dict.fromkeys([*measured, *(x for x in missing if x.isidentifier())]))


def newest(results: Path, kind: str) -> list[dict[str, Any]]:
    """Return the newest document on each machine that holds `kind`.

    Experiments count by name: the newest of each, in the order of names.
    """
    found = {
        (d["machine_info"]["device"], str(d[kind]) if kind == "experiment" else ""): d
        for d in documents(results)
        if kind in d
    }
    return [found[key] for key in sorted(found)]


def steps(results: Path) -> list[dict[str, Any]]:
    """Return the newest document of `step_7b` on each machine, without tiny models."""
    return [d for d in newest(results, "step") if d["step"] and d["step"][0]["model"] != "tiny"]


BASE = "unshared"  # the provider beside which the others are shown


def shared_prompts(results: Path) -> list[dict[str, Any]]:
    """Return what `shared_prompt` measured of each model on each machine, without tiny models.

    Of each case and provider there is the row of the newest commit that measured it, with its `commit`, and
    the unshared update of that commit. `runs` are the documents that they come from.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    mine = [d for d in documents(results) if d.get("shared_prompt")]
    for document in sorted(mine, key=lambda d: d["datetime"]):
        info = document["machine_info"]
        for model in dict.fromkeys(row["model"] for row in document["shared_prompt"]):
            if model == "tiny":
                continue
            new = [
                row | {"commit": info["commit"]}
                for row in document["shared_prompt"]
                if row["model"] == model
            ]
            known = found.setdefault((info["device"], model), {"shared_prompt": [], "runs": []})
            again = {(_group(row), row["provider"]) for row in new}
            old = [
                row
                for row in known["shared_prompt"]
                if (_group(row), row["provider"]) not in again
                or row["commit"] == info["commit"]
                or row["provider"] == BASE
            ]
            beside = {
                (_group(row), row["commit"]) for row in [*old, *new] if row["provider"] != BASE
            }
            rows = [row for row in [*old, *new] if (_group(row), row["commit"]) in beside]
            commits = {row["commit"] for row in rows}
            runs = [d for d in known["runs"] if d["machine_info"]["commit"] in commits]
            found[info["device"], model] = {
                "machine_info": info,
                "shared_prompt": rows,
                "runs": [*runs, document],
            }
    return [found[key] for key in sorted(found)]


def _group(row: dict[str, Any]) -> tuple[int, ...]:
    """Return the sizes of the group that a row is about."""
    return tuple(row[key] for key in "PGR")
