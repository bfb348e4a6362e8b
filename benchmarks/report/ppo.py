"""Write what the study found of PPO beside GRPO: the tables and the picture of docs/ppo.md."""

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import pictures
from benchmarks.report.markdown import memory_text, table
from benchmarks.report.study_found import (
    LEARNED,
    TRIED,
    Found,
    Row,
    draw_reward,
    found_in,
    joined,
    learned,
    tried_table,
)
from benchmarks.study import summary
from benchmarks.study.summary import text_of
from benchmarks.study.variants import BASE

GIB = 2**30
BESIDE = ("grpo", "ppo", "ppo-8x8", "batch-mean")
LEVEL = 0.6  # of the reward: how long it takes is in a table


def text(results: Path) -> str:
    """Write the tables of docs/ppo.md; "" if there is no result with PPO."""
    found = found_in(results)
    if found is None or "ppo" not in found.means:
        return ""
    return joined(_beside(found))


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
                *learned(found, name),
                f"{1e3 * found.means[name]['cpu_seconds']['mean']:.0f} ms",
                _until(found, name),
            ]
            for name in found.having(BESIDE)
        ],
        left=(0, 3, 6),
    )
    if tried := tried_table(found, BESIDE):
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


def picture(results: Path) -> bytes:
    """Draw the reward of PPO and GRPO over steps and over seconds, as SVG; b"" without results."""
    found = found_in(results)
    if found is None or "ppo" not in found.means:
        return b""
    with pictures.drawing(11, 3.6) as figure:
        for axis, seconds in zip(figure.subplots(1, 2), (False, True), strict=True):
            for name in found.having(BESIDE):
                draw_reward(axis, found, name, seconds)
            where = "CPU seconds of one core, sampling and update" if seconds else "step"
            axis.set(title="reward", xlabel=where, ylim=(0.2, 1))
        figure.axes[0].legend(fontsize="small", loc="lower right")
        return pictures.svg(figure)
