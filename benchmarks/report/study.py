"""Write what the study found of GRPO's options: the tables and the picture of docs/study.md."""

import statistics
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import pictures
from benchmarks.report.markdown import table
from benchmarks.report.study_found import (
    LEARNED,
    NAMES,
    TRIED,
    Found,
    draw_reward,
    found_in,
    joined,
    learned,
    tried_table,
)
from benchmarks.study import summary
from benchmarks.study.summary import text_of
from benchmarks.study.variants import BASE, PARTS

GROUPS = PARTS["groups"]
COMPANY = ("mean-only", "no-kl", "clip-higher", "sequence", "sequence-wide")


def text(results: Path) -> str:
    """Write the tables of docs/study.md; "" if there is no result."""
    found = found_in(results)
    return joined(_groups(found)) if found else ""


def _groups(found: Found) -> Iterator[str]:
    starts = [row for row in found.of("start") if row["seed"] in found.means[BASE.name]["seeds"]]
    seeds = len(starts)
    yield found.origin("mean")
    yield (
        f"{seeds} seeds, {found.steps} steps with 64 completions and four updates each. After the warm-up "
        f"the held-out accuracy at temperature 1 is {statistics.fmean(s['accuracy'] for s in starts):.3f} "
        f"({min(s['accuracy'] for s in starts):.3f} to {max(s['accuracy'] for s in starts):.3f} over the "
        "seeds). ± is half of a 95 % interval (t distribution over the seeds)."
    )
    for names in (GROUPS, (BASE.name, *COMPANY)):
        yield table(
            LEARNED,
            [learned(found, name) for name in found.having(names)],
            left=(0, 3, 6),
        )
    yield (
        "Reward in training is the mean over all completions of the run: it says how fast the variant "
        "learns. The accuracy is that on 150 held-out sums at temperature 1 after the last step, with four "
        "answers each. Differences are between runs of the same seed, and the column after each says "
        "whether 0 is in its interval. Of so many comparisons one in twenty would be outside by chance."
    )
    yield table(
        [
            "variant",
            "greedy accuracy",
            "groups without signal",
            "clipped tokens",
            "entropy at the end",
            "KL at the end",
            "noise of the reward",
            "CPU time of a step",
        ],
        [_inside(found, name) for name in found.having((*GROUPS, *COMPANY))],
    )
    yield (
        f"Entropy and KL to the model after the warm-up are in nats per token, exact sums over the "
        f"vocabulary, over the last {summary.LAST} steps. The noise is the standard deviation of the mean "
        "reward of a step from one step to the next."
    )
    yield "Held-out accuracy of each seed:"
    each = [run["seed"] for run in found.runs(BASE.name)]
    yield table(
        ["variant", *(f"seed {seed}" for seed in each)],
        [
            [NAMES[name], *(f"{run['heldout']['accuracy']:.3f}" for run in found.runs(name))]
            for name in found.having((*GROUPS, *COMPANY))
        ],
    )
    if tried := tried_table(found, (BASE.name,)):
        yield f"{TRIED}{found.elsewhere('tuning')}"
        yield tried


def _inside(found: Found, name: str) -> list[str]:
    row = found.means[name]
    return [
        NAMES[name],
        text_of(row["greedy_accuracy"]),
        f"{row['without_signal']['mean']:.2f}",
        f"{100 * row['clip_fraction']['mean']:.1f} %",
        text_of(row["entropy"]),
        text_of(row["kl"]),
        f"{row['roughness']['mean']:.3f}",
        f"{1e3 * row['cpu_seconds']['mean']:.0f} ms",
    ]


def picture(results: Path) -> bytes:
    """Draw reward curves of the group sizes, and all differences to the base, as SVG; b"" without results."""
    found = found_in(results)
    if found is None:
        return b""
    with pictures.drawing(11, 3.6) as figure:
        curves, company, forest = figure.subplots(1, 3)
        for axis, names, title in (
            (curves, GROUPS, "reward, group size"),
            (company, (BASE.name, *COMPANY), "reward, company"),
        ):
            for name in found.having(names):
                draw_reward(axis, found, name, seconds=False)
            axis.set(title=title, xlabel="step", ylim=(0.2, 1))
            axis.legend(fontsize="x-small", loc="upper left")
        others = [n for n in found.having((*GROUPS, *COMPANY)) if n != BASE.name][::-1]
        for value, label, up, mark in (
            ("reward", "reward in training", 0.15, "s"),
            ("accuracy", "held-out accuracy", -0.15, "o"),
        ):
            rows = [found.means[name]["minus_base"][value] for name in others]
            means = [row["mean"] for row in rows]
            halves = [(row["high"] - row["low"]) / 2 for row in rows]
            places = [i + up for i in range(len(others))]
            forest.errorbar(means, places, xerr=halves, fmt=mark, markersize=4, label=label)
        forest.axvline(0, color="grey", linewidth=1)
        forest.set(title="minus base", xlabel="mean and 95 % interval over seeds")
        forest.legend(fontsize="x-small")
        forest.set_yticks(range(len(others)), [NAMES[name] for name in others])
        return pictures.svg(figure)
