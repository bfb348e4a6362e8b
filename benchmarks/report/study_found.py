"""Read what the study found, for the pages docs/study.md and docs/ppo.md: rows, cells, curves."""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report.committed import documents
from benchmarks.report.markdown import table, wrapped
from benchmarks.study.summary import text_of
from benchmarks.study.variants import VARIANTS
from grpo_fast.trainer.intervals import student

KIND = "study"
NAMES = {
    "g2": "G = 2",
    "g4": "G = 4",
    "grpo": "GRPO, G = 8",
    "g16": "G = 16",
    "mean-only": "mean only",
    "no-kl": "no KL",
    "clip-higher": "clip-higher",
    "sequence": "sequence ratio, clip 3e-4",
    "sequence-wide": "sequence ratio, clip 0.2",
    "ppo": "PPO, 64 x 1",
    "ppo-8x8": "PPO, 8 x 8",
    "batch-mean": "batch mean, 64 x 1",
}
LEARNED = (
    *("variant", "reward in training", "minus base", "says"),
    *("held-out accuracy", "minus base", "says"),
)
TRIED = "What was tried on seed 100, which is not among the seeds above:"
Row = dict[str, Any]


class Found:
    """What the study has found on a machine: of each kind of rows those of the newest file that has them.

    So a part that is measured anew needs no new runs of the others.
    """

    def __init__(self, documents: Sequence[Row]) -> None:
        self.documents = documents
        about = self.about("mean")
        self.window, self.steps = about["window"], about["steps"]
        self.means = {row["variant"]: row for row in self.of("mean")}
        self.cost = {row["provider"]: row for row in self.of("cost")}

    def about(self, kind: str) -> Row:
        """Return the newest file with rows of a kind; an empty one if there is none."""
        having = (d for d in self.documents if any(row["row"] == kind for row in d[KIND]))
        return next(reversed(list(having)), {KIND: []})

    def of(self, kind: str) -> list[Row]:
        """Return the rows of a kind."""
        return [row for row in self.about(kind)[KIND] if row["row"] == kind]

    def runs(self, variant: str) -> list[Row]:
        """Return the runs of a variant, in the order of their seeds."""
        return [row for row in self.of("run") if row["variant"] == variant]

    def having(self, names: Sequence[str]) -> list[str]:
        """Return the variants that have been measured."""
        return [name for name in names if name in self.means]

    def origin(self, kind: str) -> str:
        """Say where the rows of a kind are from."""
        document = self.about(kind)
        info = document["machine_info"]
        return (
            f"{info['device']}, one thread for each run; commit {info['commit']}, "
            f"{document['datetime'][:10]}; `{info['command']}`; torch {info['torch']}."
        )

    def elsewhere(self, kind: str) -> str:
        """Say where the rows of a kind are from, if another call has measured them."""
        same = self.about(kind) is self.about("mean")
        return "" if same else f" Measured by another call: {self.origin(kind)}"


def found_in(results: Path) -> Found | None:
    """Return what the study has found on the machine of the newest runs; None without results."""
    mine = [d for d in documents(results) if KIND in d]
    learned = [d for d in mine if any(row["row"] == "mean" for row in d[KIND])]
    if not learned:
        return None
    device = learned[-1]["machine_info"]["device"]
    return Found([d for d in mine if d["machine_info"]["device"] == device])


def joined(parts: Iterator[str]) -> str:
    """Join tables and paragraphs, which are wrapped."""
    return "\n\n".join(x if x.startswith("|") else wrapped(x) for x in parts)


def verdict(row: Row) -> str:
    """Say whether zero is outside an interval; "" where one seed has no interval."""
    if not math.isfinite(row["low"]):
        return ""
    return "better" if row["low"] > 0 else "worse" if row["high"] < 0 else "within the spread"


def learned(found: Found, name: str) -> list[str]:
    """Return the cells of a variant below the headings `LEARNED`."""
    row = found.means[name]
    cells = [VARIANTS[name].text]
    for value in ("reward", "accuracy"):
        cells.append(text_of(row[value]))
        difference = row.get("minus_base", {}).get(value)
        cells += [text_of(difference, sign="+"), verdict(difference)] if difference else ["", ""]
    return cells


def tried_table(found: Found, methods: Sequence[str]) -> str:
    """Return the table of the settings that were tried for these methods; "" if there are none."""
    rows = [row for row in found.of("tuning") if row["variant"].split(" ")[0] in methods]
    if not rows:
        return ""
    return table(
        [
            "variant",
            "changed",
            "reward in training",
            "reward of the last steps",
            "held-out accuracy",
        ],
        [
            [
                NAMES[row["variant"].split(" ")[0]],
                f"`{row['variant'].partition(' ')[2]}`",
                *(f"{row[name]:.3f}" for name in ("reward", "last_reward", "accuracy")),
            ]
            for row in rows
        ],
        left=(0, 1),
    )


def draw_reward(axis: Any, found: Found, name: str, seconds: bool) -> None:
    """Draw the mean over the seeds, and its 95 % interval as a band."""
    runs = found.runs(name)
    columns = list(zip(*(run["steps"]["reward"] for run in runs), strict=True))
    means = [statistics.fmean(column) for column in columns]
    places = [float(found.window * (i + 1)) for i in range(len(columns))]
    if seconds:
        spent = (
            statistics.fmean(x)
            for x in zip(*(r["steps"]["cpu_seconds"] for r in runs), strict=True)
        )
        places = [found.window * s for s in itertools.accumulate(spent)]
    (line,) = axis.plot(places, means, label=NAMES[name])
    if len(runs) > 1:
        factor = student(len(runs) - 1) / len(runs) ** 0.5
        halves = [factor * statistics.stdev(column) for column in columns]
        low = [m - h for m, h in zip(means, halves, strict=True)]
        high = [m + h for m, h in zip(means, halves, strict=True)]
        axis.fill_between(places, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axis.grid(alpha=0.3)
