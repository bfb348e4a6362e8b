"""Write what the study found: the tables and pictures of docs/study.md and docs/ppo.md."""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import pictures
from benchmarks.report.committed import documents
from benchmarks.report.markdown import memory_text, table, wrapped
from benchmarks.study import summary
from benchmarks.study.summary import text_of
from benchmarks.study.variants import BASE, PARTS, VARIANTS
from grpo_fast.trainer.intervals import student

KIND = "study"
GIB = 2**30
GROUPS = PARTS["groups"]
COMPANY = ("mean-only", "no-kl", "clip-higher", "sequence", "sequence-wide")
BESIDE = ("grpo", "ppo", "ppo-8x8", "batch-mean")
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
LEVEL = 0.6  # of the reward: how long it takes is in a table
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


def _found(results: Path) -> Found | None:
    mine = [d for d in documents(results) if KIND in d]
    learned = [d for d in mine if any(row["row"] == "mean" for row in d[KIND])]
    if not learned:
        return None
    device = learned[-1]["machine_info"]["device"]
    return Found([d for d in mine if d["machine_info"]["device"] == device])


def joined(parts: Iterator[str]) -> str:
    """Join tables and paragraphs, which are wrapped."""
    return "\n\n".join(x if x.startswith("|") else wrapped(x) for x in parts)


def groups_text(results: Path) -> str:
    """Write the tables of docs/study.md; "" if there is no result."""
    found = _found(results)
    return joined(_groups(found)) if found else ""


def ppo_text(results: Path) -> str:
    """Write the tables of docs/ppo.md; "" if there is no result with PPO."""
    found = _found(results)
    if found is None or "ppo" not in found.means:
        return ""
    return joined(_beside(found))


def verdict(row: Row) -> str:
    """Say whether zero is outside an interval; "" where one seed has no interval."""
    if not math.isfinite(row["low"]):
        return ""
    return "better" if row["low"] > 0 else "worse" if row["high"] < 0 else "within the spread"


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
            [_learned(found, name) for name in found.having(names)],
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
    if tried := _tried(found, (BASE.name,)):
        yield f"{TRIED}{found.elsewhere('tuning')}"
        yield tried


def _learned(found: Found, name: str) -> list[str]:
    row = found.means[name]
    cells = [VARIANTS[name].text]
    for value in ("reward", "accuracy"):
        cells.append(text_of(row[value]))
        difference = row.get("minus_base", {}).get(value)
        cells += [text_of(difference, sign="+"), verdict(difference)] if difference else ["", ""]
    return cells


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


def _tried(found: Found, methods: Sequence[str]) -> str:
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


def _beside(found: Found) -> Iterator[str]:
    yield found.origin("mean")
    yield table(["", "GRPO", "PPO"], _row_by_row(found), left=(0, 1, 2))
    yield (
        f"± is half of a 95 % interval over {len(found.means['ppo']['seeds'])} seeds. Memory and time on "
        "SmolLM2 are those of the next table."
    )
    if found.cost:
        yield from _costs(found)
    yield "What lies between the two, with the same number of completions. The base is GRPO."
    yield table(
        [
            *LEARNED,
            "CPU time of a step",
            f"steps, CPU time to {LEVEL}",
        ],
        [
            [
                *_learned(found, name),
                f"{1e3 * found.means[name]['cpu_seconds']['mean']:.0f} ms",
                _until(found, name),
            ]
            for name in found.having(BESIDE)
        ],
        left=(0, 3, 6),
    )
    if tried := _tried(found, BESIDE):
        yield f"{TRIED}{found.elsewhere('tuning')}"
        yield tried


def _row_by_row(found: Found) -> Iterator[list[str]]:
    grpo, ppo = (found.means[name] for name in (BASE.name, "ppo"))
    yield [
        "advantage",
        "reward minus the mean of its group, over the standard deviation: one number for a completion",
        "GAE on the values of a model: one number for each token",
    ]
    yield ["models in memory", "2: policy, reference (1 without KL)", "3: and a value model"]
    yield ["optimizers", "1", "2"]
    yield ["prompts x completions in a step", "8 x 8", "64 x 1"]
    yield ["completions per prompt", "two at least", "one is enough"]
    yield [
        "reward",
        "one number for a completion; what is equal in a group teaches nothing",
        "one number for a completion here; GAE would take one for each token",
    ]
    yield [
        "groups without signal",
        f"{grpo['without_signal']['mean']:.2f}",
        "there are no groups",
    ]
    yield [
        "settings of its own",
        "G, division by std",
        "learning rate of the values, lambda, value clip",
    ]
    if found.cost:
        yield from _cost_cells(found)
    yield _pair("reward in training", grpo, ppo, "reward")
    yield _pair(f"reward of the last {summary.LAST} steps", grpo, ppo, "last_reward")
    yield _pair("held-out accuracy, temperature 1", grpo, ppo, "accuracy")
    yield _pair("held-out accuracy, greedy", grpo, ppo, "greedy_accuracy")
    yield ["worst seed, best seed", *(_extremes(found, name) for name in (BASE.name, "ppo"))]
    yield [
        "standard deviation of the accuracy over the seeds",
        *(f"{_deviation(found, name):.3f}" for name in (BASE.name, "ppo")),
    ]
    yield _pair("noise of the reward from step to step", grpo, ppo, "roughness")
    yield _pair("gradient norm before clipping", grpo, ppo, "grad_norm", 2)
    yield _pair("entropy at the end, nats", grpo, ppo, "entropy")
    yield _pair("KL at the end, nats", grpo, ppo, "kl")
    yield [
        "CPU time of a step, arithmetic",
        *(f"{1e3 * x['cpu_seconds']['mean']:.0f} ms" for x in (grpo, ppo)),
    ]
    yield [
        f"steps, and CPU seconds, until the reward is {LEVEL}",
        *(_until(found, name) for name in (BASE.name, "ppo")),
    ]
    if "explained_variance" in ppo:
        yield [
            "variance of the returns that the values explain, at the end",
            "there are no values",
            text_of(ppo["explained_variance"], 2),
        ]


def _pair(title: str, one: Row, other: Row, name: str, digits: int = 3) -> list[str]:
    return [title, text_of(one[name], digits), text_of(other[name], digits)]


def _extremes(found: Found, name: str) -> str:
    values = [run["heldout"]["accuracy"] for run in found.runs(name)]
    return f"{min(values):.3f}, {max(values):.3f}"


def _deviation(found: Found, name: str) -> float:
    values = [run["heldout"]["accuracy"] for run in found.runs(name)]
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def _until(found: Found, name: str) -> str:
    """Return the steps and seconds until the mean reward of a window is `LEVEL`, medians over the seeds."""
    reached = []
    for run in found.runs(name):
        seconds = itertools.accumulate(x * found.window for x in run["steps"]["cpu_seconds"])
        above = (
            (found.window * (i + 1), s)
            for i, (reward, s) in enumerate(zip(run["steps"]["reward"], seconds, strict=True))
            if reward >= LEVEL
        )
        reached.append(next(above, None))
    known = [x for x in reached if x is not None]
    if not known:
        return "no seed reaches it"
    steps, times = (statistics.median(x) for x in zip(*known, strict=True))
    note = "" if len(known) == len(reached) else f" ({len(known)} of {len(reached)} seeds)"
    return f"{steps:.0f}, {times:.1f} s{note}"


def _cost_cells(found: Found) -> Iterator[list[str]]:
    grpo, ppo = (found.cost[name] for name in ("grpo-kl", "ppo-kl"))
    yield [
        "weights, gradients, AdamW states; SmolLM2, float32",
        *(f"{sum(x['held'].values()) / GIB:.2f} GiB" for x in (grpo, ppo)),
    ]
    for row in found.of("predicted"):
        both = row["trained"] + row["reference"], 2 * row["trained"] + row["reference"]
        yield [
            f"the same; {row['model'].partition('/')[2]}, bfloat16 with float32 copies, predicted",
            *(f"{x / GIB:.0f} GiB" for x in both),
        ]
    yield [
        "peak memory of training, SmolLM2",
        *(memory_text(x["peak_extra_bytes"]) for x in (grpo, ppo)),
    ]
    yield [
        "CPU time of a step, SmolLM2",
        *(f"{x['cpu_seconds']['median']:.1f} s" for x in (grpo, ppo)),
    ]


def _costs(found: Found) -> Iterator[str]:
    rows = found.of("cost")
    yield table(
        [
            "SmolLM2-135M, 32 completions",
            "weights",
            "gradients",
            "AdamW",
            "peak",
            "CPU time of a step",
            "of these sampling",
            "update",
        ],
        [
            [
                row["text"],
                *(_held(row, kind) for kind in ("", "_gradients", "_optimizer")),
                memory_text(row["peak_extra_bytes"]),
                f"{row['cpu_seconds']['median']:.1f} s ({row['cpu_seconds']['min']:.1f} to "
                f"{row['cpu_seconds']['max']:.1f})",
                f"{row['sampling_seconds']['median']:.1f} s",
                f"{row['update_seconds']['median']:.1f} s",
            ]
            for row in rows
        ],
    )
    yield (
        f"Each in a process of its own, in turns, {rows[0]['rounds']} times; {rows[0]['steps']} steps, "
        "without the first of each process. One thread, float32, options of recipes/smollm2-geo.yaml, one "
        "update of each model in a step. CPU time is that of the process, so other work on the machine "
        "counts little; sampling and update are on the wall. The peak is the resident memory beyond what "
        f"was resident before the model was loaded.{found.elsewhere('cost')}"
    )


def _held(row: Row, kind: str) -> str:
    names = ("policy", "critic") if kind else ("policy", "reference", "critic")
    return memory_text(sum(row["held"].get(name + kind, 0) for name in names))


def groups_picture(results: Path) -> bytes:
    """Draw reward curves of the group sizes, and all differences to the base, as SVG; b"" without results."""
    found = _found(results)
    if found is None:
        return b""
    with pictures.drawing(11, 3.6) as figure:
        curves, company, forest = figure.subplots(1, 3)
        for axis, names, title in (
            (curves, GROUPS, "reward, group size"),
            (company, (BASE.name, *COMPANY), "reward, company"),
        ):
            for name in found.having(names):
                _draw(axis, found, name, seconds=False)
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


def ppo_picture(results: Path) -> bytes:
    """Draw the reward of PPO and GRPO over steps and over seconds, as SVG; b"" without results."""
    found = _found(results)
    if found is None or "ppo" not in found.means:
        return b""
    with pictures.drawing(11, 3.6) as figure:
        for axis, seconds in zip(figure.subplots(1, 2), (False, True), strict=True):
            for name in found.having(BESIDE):
                _draw(axis, found, name, seconds)
            where = "CPU seconds of one core, sampling and update" if seconds else "step"
            axis.set(title="reward", xlabel=where, ylim=(0.2, 1))
        figure.axes[0].legend(fontsize="small", loc="lower right")
        return pictures.svg(figure)


def _draw(axis: Any, found: Found, name: str, seconds: bool) -> None:
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
