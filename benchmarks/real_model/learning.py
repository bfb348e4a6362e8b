"""Train the recipe with several seeds, and measure accuracy on held-out countries, before and after.

    python -m benchmarks.real_model learning --output_dir FOLDER --seeds 0     # in parallel with
    python -m benchmarks.real_model learning --output_dir FOLDER --seeds 1     # this
    python -m benchmarks.real_model learning --output_dir FOLDER --seeds 0 1 2 --save

Everything is done by the commands of the user, `grpo-fast train recipes/smollm2-geo.yaml` and `grpo-fast
eval`, in processes of their own. A run that is complete is not made again. The seed also decides on which
countries are held out.
"""

import collections
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.measuring import machine
from benchmarks.real_model.setup import RECIPE, beside, rounded
from benchmarks.real_model.sheet import Sheet
from grpo_fast.trainer.intervals import student
from grpo_fast.trainer.results import BASE, DIFFERENCE, TRAINED
from grpo_fast.trainer.tasks.countries import QUESTIONS

KIND = "real_learning"
SEEDS = (0, 1, 2)
TEMPERATURES = ("0", "0.7", "1")
SAMPLES = 4  # answers to each held-out question at each temperature but 0
GOAL = 0.25  # the rise of the mean accuracy that this recipe is for
ANSWERS = 8  # questions whose answers are kept
# The metrics of each step that are kept, beside the reward of each function.
STEPS = (
    "reward", "groups_without_signal", "completion_length", "truncated", "entropy", "tokens",
    "sampling_seconds", "update_seconds", "memory_gib", "seconds",
)  # fmt: skip


def command(*words: str) -> list[str]:
    """Return a command of `grpo-fast` for this Python."""
    return [sys.executable, "-m", "grpo_fast.trainer", *words]


def run(seed: int, given: Sequence[str], folder: Path) -> Path:
    """Train with a seed and evaluate, or do nothing if that was done; return the folder of the run.

    Raises:
        ValueError: it was done with other options.
    """
    there = folder / f"seed-{seed}"
    trained, results = beside(there, "about.json"), beside(there, "eval.json")
    options = ["--seed", str(seed), "--name", there.name, "--output_dir", str(folder), *given]
    about: dict[str, Any] = json.loads(trained.read_text()) if trained.exists() else {}
    if about and about["options"] != list(given):
        raise ValueError(f"{there}: trained with {about['options']}; want another --output_dir")
    if not about:
        folder.mkdir(parents=True, exist_ok=True)
        about = {"commit": machine.commit(), "options": list(given)}
        start = time.perf_counter()
        subprocess.run(command("train", str(RECIPE), *options, "--overwrite"), check=True, cwd=ROOT)
        about["train_seconds"] = time.perf_counter() - start
        trained.write_text(json.dumps(about))
    if not results.exists():
        about["evaluated"] = machine.commit()
        sizes = ["--temperatures", *TEMPERATURES, "--samples", str(SAMPLES)]
        words = command("eval", str(there), "--base", *sizes, "--json", str(results))
        subprocess.run(words, check=True, cwd=ROOT)
        trained.write_text(json.dumps(about))
    return there


def described(there: Path) -> dict[str, Any]:
    """Return the row of a run: its steps, its evaluation, and some answers before and after."""
    lines = (there / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    names = [*STEPS, *(name for name in steps[0] if name.startswith("reward/"))]
    found = json.loads(beside(there, "eval.json").read_text())
    about = json.loads(beside(there, "about.json").read_text())
    return {
        "row": "run",
        "seed": found["config"]["seed"],
        **about,
        "threads": found["machine"]["threads"],
        "steps": {name: [rounded(step[name]) for step in steps] for name in names},
        "problems": len(found["problems"]),
        "clusters": found["clusters"],
        "results": found["results"],
        "kinds": by_kind(found["problems"]),
        "answers": [_answers(problem) for problem in found["problems"][:ANSWERS]],
    }


def by_kind(problems: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return accuracies at temperature 1 for each kind of question, and that of the best constant."""
    found = []
    for kind, question in QUESTIONS.items():
        start = question.split("{}")[0]
        mine = [p for p in problems if p["prompt"][-1]["content"].startswith(start)]
        if not mine:
            continue
        rights = collections.Counter(p["answer"] for p in mine)
        row = {"kind": kind, "problems": len(mine), "constant": max(rights.values()) / len(mine)}
        for model in (BASE, TRAINED):
            means = [
                result["accuracy"]
                for p in mine
                for result in p["results"]
                if result["model"] == model and result["temperature"] == 1
            ]
            row[model] = statistics.fmean(means)
        found.append(row)
    return found


def _answers(problem: dict[str, Any]) -> dict[str, Any]:
    """Return the first answers to a problem at temperature 1, before and after."""
    texts = {
        result["model"]: result["completions"][0]["text"]
        for result in problem["results"]
        if result["temperature"] == 1
    }
    return {"question": problem["prompt"][-1]["content"], "answer": problem["answer"], **texts}


def averaged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean over the seeds of each accuracy, and its 95 % interval (t distribution, seeds)."""
    found = []
    for temperature in map(float, TEMPERATURES):
        for model in (BASE, TRAINED, DIFFERENCE):
            means = [
                result["accuracy"]["mean"]
                for row in rows
                for result in row["results"]
                if result["model"] == model and result["temperature"] == temperature
            ]
            mean = statistics.fmean(means)
            one = {"row": "mean", "temperature": temperature, "model": model, "seeds": len(means)}
            ends: dict[str, Any] = {"low": None, "high": None}
            if len(means) > 1:
                error = statistics.stdev(means) / len(means) ** 0.5
                half = student(len(means) - 1) * error
                ends = {"low": mean - half, "high": mean + half}
            found.append({**one, "mean": mean, **ends, "each": means})
    return found


def measure(given: Sequence[str], sheet: Sheet, folder: Path, seeds: Sequence[int]) -> bool:
    """Make the runs that are missing; tell whether accuracy at temperature 1 rose by `GOAL`.

    Raises:
        ValueError: `given` has a seed.
    """
    if any(word.split("=")[0] == "--seed" for word in given):
        raise ValueError("--seed: each run has its own; give --seeds")
    rows = [described(run(seed, given, folder)) for seed in seeds]
    for row in (*rows, *averaged(rows)):
        sheet.append(row)
    (rise,) = [
        row
        for row in sheet.rows
        if (row["row"], row.get("model"), row.get("temperature")) == ("mean", DIFFERENCE, 1)
    ]
    return rise["mean"] >= GOAL
