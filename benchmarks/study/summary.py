"""Means over seeds, and differences to the base, with intervals."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.study.loop import EVERY
from benchmarks.study.variants import BASE
from grpo_fast.trainer.intervals import Deviations, Estimate

LAST = 20  # steps of the mean reward at the end
Row = dict[str, Any]


def over_seeds(values: Sequence[float]) -> Estimate:
    """Return the mean of one value for each seed, and its 95 % t-interval over the seeds."""
    return Deviations.of(
        torch.tensor(values, dtype=torch.float64), torch.arange(len(values))
    ).estimate()


def values_of(run: Row) -> dict[str, float]:
    """Return the numbers that a run is summed up by.

    "reward" is the mean over all samples of the training, and so says how fast it learned; "last_reward" that
    of the last `LAST` steps; "accuracy" and the others are of held-out problems.
    """
    steps = run["steps"]

    def mean(name: str, last: int = 0) -> float:
        return sum(steps[name][-last:]) / len(steps[name][-last:])

    values = {
        "reward": mean("reward"),
        "last_reward": mean("reward", LAST),
        "accuracy": run["heldout"]["accuracy"],
        "greedy_accuracy": run["heldout"]["greedy_accuracy"],
        "entropy": mean("entropy", LAST // EVERY),
        "kl": mean("kl", LAST // EVERY),
        "clip_fraction": mean("clip_fraction"),
        "without_signal": mean("without_signal"),
        "grad_norm": mean("grad_norm"),
        "roughness": roughness(steps["reward"]),
        "cpu_seconds": mean("cpu_seconds"),
    }
    if "explained_variance" in steps:
        values["explained_variance"] = mean("explained_variance", LAST)
    return values


def roughness(rewards: Sequence[float]) -> float:
    """Return the standard deviation of the noise of the reward from step to step, in the second half.

    It is the root mean square of the change between two steps, over the root of 2. A slow rise has little
    part in it.
    """
    half = rewards[len(rewards) // 2 :]
    changes = [b - a for a, b in itertools.pairwise(half)]
    return (sum(c * c for c in changes) / len(changes) / 2) ** 0.5 if changes else 0.0


def means(runs: Sequence[Row]) -> list[Row]:
    """Return a row for each variant: each value, and its difference to the base of the same seeds."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for run in runs:
        found.setdefault(run["variant"], {})[run["seed"]] = values_of(run)
    rows = []
    base = found.get(BASE.name, {})
    for name, by_seed in found.items():
        row: Row = {"row": "mean", "variant": name, "seeds": sorted(by_seed)}
        for value in next(iter(by_seed.values())):
            row[value] = over_seeds([by_seed[s][value] for s in row["seeds"]]).to_dict()
        both = [s for s in row["seeds"] if s in base]
        if name != BASE.name and both:
            row["minus_base"] = {
                value: over_seeds([by_seed[s][value] - base[s][value] for s in both]).to_dict()
                for value in ("reward", "last_reward", "accuracy", "greedy_accuracy")
            }
        rows.append(row)
    return rows


def line_of(row: Row) -> str:
    """Return the row of a variant in one line."""
    text = f"{row['variant']}: reward {text_of(row['reward'])}, accuracy {text_of(row['accuracy'])}"
    if "minus_base" in row:
        text += f", {text_of(row['minus_base']['accuracy'], sign='+')} to {BASE.name}"
    return text


def text_of(estimate: Row, digits: int = 3, sign: str = "") -> str:
    """Return a mean and half of its interval."""
    half = (estimate["high"] - estimate["low"]) / 2
    half_text = f" ± {half:.{digits}f}" if math.isfinite(half) else ""  # one seed has none
    return f"{estimate['mean']:{sign}.{digits}f}{half_text}"
