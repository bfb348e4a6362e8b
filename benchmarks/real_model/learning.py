"""Train the recipe with several seeds, and measure accuracy on held-out countries, before and after.

    python -m benchmarks.real_model learning --output_dir FOLDER --seeds 0     # in parallel with
    python -m benchmarks.real_model learning --output_dir FOLDER --seeds 1     # this
    python -m benchmarks.real_model learning --output_dir FOLDER --seeds 0 1 2 --save

Everything is done by the commands of the user, `grpo-fast train recipes/smollm2-geo.yaml` and `grpo-fast
eval`, in processes of their own. A run that is complete is not made again. The seed also decides on which
countries are held out.
"""

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
from benchmarks.real_model.sheet import Sheet
from grpo_fast.trainer.evaluate import BASE, DIFFERENCE, TRAINED, student

KIND = "real_learning"
RECIPE = ROOT / "recipes" / "smollm2-geo.yaml"
SEEDS = (0, 1, 2)
TEMPERATURES = ("0", "0.7", "1")
SAMPLES = 4  # answers to each held-out question at each temperature but 0
ANSWERS = 8  # questions whose answers are kept
STEPS = (
    "reward", "reward/names_the_answer", "reward/one_sentence", "reward/short", "groups_without_signal",
    "completion_length", "truncated", "entropy", "tokens", "sampling_seconds", "update_seconds",
    "memory_gib", "seconds",
)  # fmt: skip


def command(*words: str) -> list[str]:
    """Return a command of `grpo-fast` for this Python."""
    return [sys.executable, "-m", "grpo_fast.trainer", *words]


def run(seed: int, given: Sequence[str], folder: Path) -> Path:
    """Train with a seed and evaluate, or do nothing if that was done; return the folder of the run."""
    there = folder / f"seed-{seed}"
    results = there.with_name(f"{there.name}.eval.json")
    if results.exists():
        return there
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--seed", str(seed), "--name", there.name, "--output_dir", str(folder), *given]
    start = time.perf_counter()
    subprocess.run(command("train", str(RECIPE), *options, "--overwrite"), check=True, cwd=ROOT)
    about = {"commit": machine.commit(), "train_seconds": time.perf_counter() - start}
    there.with_name(f"{there.name}.about.json").write_text(json.dumps(about))
    sizes = ["--temperatures", *TEMPERATURES, "--samples", str(SAMPLES), "--answers", str(ANSWERS)]
    words = command("eval", str(there), "--base", *sizes, "--json", str(results))
    subprocess.run(words, check=True, cwd=ROOT)
    return there


def described(there: Path) -> dict[str, Any]:
    """Return the row of a run: its steps, its evaluation, and some answers before and after."""
    lines = (there / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    found = json.loads(there.with_name(f"{there.name}.eval.json").read_text())
    about = json.loads(there.with_name(f"{there.name}.about.json").read_text())
    return {
        "row": "run",
        "seed": found["config"]["seed"],
        **about,
        "threads": found["machine"]["threads"],
        "steps": {name: [_short(step[name]) for step in steps] for name in STEPS},
        "problems": len(found["problems"]),
        "clusters": found["clusters"],
        "results": found["results"],
        "answers": [_answers(problem) for problem in found["problems"][:ANSWERS]],
    }


def _answers(problem: dict[str, Any]) -> dict[str, Any]:
    """Return the first answers to a problem at temperature 1, before and after."""
    texts = {
        result["model"]: result["completions"][0]["text"]
        for result in problem["results"]
        if result["temperature"] == 1
    }
    return {"question": problem["prompt"][-1]["content"], "answer": problem["answer"], **texts}


def _short(value: Any) -> Any:
    """Round a number to five digits."""
    return None if value is None else float(f"{value:.5g}")


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
    """Make the runs that are missing; tell whether accuracy at temperature 1 rose by 25 points."""
    rows = [described(run(seed, given, folder)) for seed in seeds]
    for row in (*rows, *averaged(rows)):
        sheet.append(row)
    (rise,) = [
        row
        for row in sheet.rows
        if (row["row"], row.get("model"), row.get("temperature")) == ("mean", DIFFERENCE, 1)
    ]
    return rise["mean"] >= 0.25
