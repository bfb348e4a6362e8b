"""The same training twice: by this project's loss, and by the plain one with all logits in memory.

Both are runs of the included trainer with the same options, in folders that are kept, so a second call goes
on where the first one stopped. Each completion has random numbers of its own. So the runs have the same
completions until the weights differ so much that one token is another one; from there on they are two samples
of the same process. How far two such samples are apart is seen from runs with other seeds. The run `apart`
has this project's loss and a row for each completion (`--share_prompts off`): another order of the same sums,
and so what a change of rounding alone does.

    python -m benchmarks.real_model trajectories --which kernels --output_dir FOLDER      # in parallel with
    python -m benchmarks.real_model trajectories --which reference --output_dir FOLDER    # this
    python -m benchmarks.real_model trajectories --output_dir FOLDER --save               # then compares
"""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.measuring import machine
from benchmarks.real_model import plain, setup
from benchmarks.real_model.setup import beside, rounded
from benchmarks.real_model.sheet import Sheet
from grpo_fast.trainer import checkpoints, evaluate, parsing, tasks
from grpo_fast.trainer import model as models
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.loop import Run
from grpo_fast.trainer.train import train

KIND = "real_trajectories"
WHICH = ("kernels", "reference", "apart", "other-seed")
STEPS = 300
WINDOW = 20  # steps of a mean
BAND = 0.1  # the largest gap between means of the reward of two runs
FIRST = 1e-3  # the largest relative difference of the first gradient norms
SAMPLES = 4  # answers to each held-out question
NAMES = ("reward", "accuracy", "loss", "grad_norm", "entropy", "tokens")
SEEN = "tokens.jsonl"  # beside the run: digests of the completions of each step
ABOUT = "about.json"


def config_of(which: str, given: Sequence[str], folder: Path) -> TrainConfig:
    """Return the options of a run; `apart` and `other-seed` have one that differs."""
    few = {"steps": STEPS, "save_steps": 50, "keep_checkpoints": 1, "completions_steps": 0}
    config = setup.config_of(given, **few, samples=0)
    seed = config.seed + (which == "other-seed")
    share = "off" if which == "apart" else config.share_prompts
    if which == "reference" and (config.num_iterations > 1 or config.to_objective().beta):
        raise ValueError(
            f"num_iterations={config.num_iterations}, beta={config.to_objective().beta}: want 1 and 0, "
            "because log-probs of another forward would not be those of the plain loss"
        )
    return dataclasses.replace(
        config, name=which, seed=seed, share_prompts=share, output_dir=str(folder)
    )


def run(which: str, given: Sequence[str], folder: Path) -> Path:
    """Make a run, go on with it, or do nothing if it has all its steps; return its folder."""
    config = config_of(which, given, folder)
    there = folder / which
    if len(rows_of(there)) >= config.steps:
        return there
    beside(there, ABOUT).parent.mkdir(parents=True, exist_ok=True)
    about = {"commit": machine.commit(), "path": "plain" if which == "reference" else "kernels"}
    if checkpoints.checkpoints(there):
        known = json.loads(beside(there, ABOUT).read_text())["commit"]
        about["commit"] = ", ".join(dict.fromkeys([*known.split(", "), about["commit"]]))
    else:
        beside(there, SEEN).unlink(missing_ok=True)
    beside(there, ABOUT).write_text(json.dumps(about))
    if checkpoints.checkpoints(there):
        config = dataclasses.replace(config, resume=str(there), name=None)
        allowed = {"steps"}
    else:
        config, allowed = dataclasses.replace(config, overwrite=there.exists()), set()
    loss = plain.in_trainer() if which == "reference" else contextlib.nullcontext()
    with setup.backend("torch"), loss, noting(beside(there, SEEN)):
        train(config, allowed)
    return there


@contextlib.contextmanager
def noting(path: Path) -> Iterator[None]:
    """Write digests of the completions of each step that the trainer samples."""
    real = Run.collect

    def collect(self: Run) -> Any:
        found = real(self)
        rollout = found[1]
        digests = [
            hashlib.blake2b(str(ids[live].tolist()).encode(), digest_size=4).hexdigest()
            for ids, live in zip(rollout.completion_ids, rollout.mask, strict=True)
        ]
        with open(path, "a") as lines:
            lines.write(json.dumps({"step": self.step, "completions": digests}) + "\n")
        return found

    with mock.patch.object(Run, "collect", collect):
        yield


def read(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; of a step that was made again the last line counts."""
    if not path.exists():
        return []
    rows = (json.loads(line) for line in path.read_text().splitlines() if line)
    found = {row["step"]: row for row in rows}
    return [found[step] for step in sorted(found)]


def rows_of(there: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run, with the mean of its first reward function as "accuracy"."""
    rows = read(there / "metrics.jsonl")
    for row in rows:
        row["accuracy"] = next((v for k, v in row.items() if k.startswith("reward/")), math.nan)
    return rows


def held_out(there: Path) -> dict[str, Any]:
    """Return accuracy and reward of the newest checkpoint on held-out problems, `SAMPLES` answers each."""
    config, checkpoint = parsing.parse([str(there / "config.yaml")]), checkpoints.latest(there)
    torch.set_num_threads(config.threads or 1)
    task = tasks.build(config)
    policy = models.build(config, task.alphabet, checkpoint.resolve())
    rows = [row for row in task.heldout for _ in range(SAMPLES)]
    found = evaluate.mean_rewards(policy, task, rows, config, config.temperature)
    return found | {"answers": len(rows)}


def described(there: Path, with_answers: bool) -> dict[str, Any]:
    """Return the row of a run: every step, and its held-out accuracy."""
    rows, about = rows_of(there), beside(there, ABOUT)
    config = parsing.parse([str(there / "config.yaml")])
    known = json.loads(about.read_text()) if about.exists() else {}  # `learning` has one, too
    origin = {"path": known.get("path", "kernels"), "commit": known.get("commit", "")}
    return {
        "row": "run",
        "name": there.name,
        "seed": config.seed,
        **origin,
        "steps": len(rows),
        **{name: [rounded(row.get(name)) for row in rows] for name in NAMES},
        "heldout": held_out(there) if with_answers and rows else None,
    }


def compared(one: Path, other: Path) -> dict[str, Any]:
    """Return how far two runs are apart: their completions, their steps, and means of their steps."""
    rows = list(zip(rows_of(one), rows_of(other), strict=False))
    row: dict[str, Any] = {"row": "difference", "names": [one.name, other.name], "steps": len(rows)}
    tokens = [[x["completions"] for x in read(beside(there, SEEN))] for there in (one, other)]
    if all(tokens):
        same = [a == b for a, b in zip(*tokens, strict=False)]
        first = same.index(False) if False in same else None
        row["steps_with_equal_completions"] = len(same) if first is None else first
        row["all_equal"] = first is None
        pairs = (
            list(zip(tokens[0][first], tokens[1][first], strict=True)) if first is not None else []
        )
        row["different_in_first"] = sum(a != b for a, b in pairs)
        row["completions_per_step"] = len(tokens[0][0])
        before = rows[: row["steps_with_equal_completions"]]
        for name in ("loss", "grad_norm", "entropy"):
            values = [(a[name], b[name]) for a, b in before if None not in (a[name], b[name])]
            row[f"{name}_until_then"] = max((abs(a - b) for a, b in values), default=None)
    for name in ("reward", "accuracy"):
        means = [
            [sum(pair[i][name] for pair in rows[at : at + WINDOW]) / WINDOW for i in range(2)]
            for at in range(0, len(rows) - WINDOW + 1, WINDOW)
        ]
        gaps = [a - b for a, b in means]
        row[f"{name}_means"] = [[rounded(x) for x in pair] for pair in means]
        row[f"{name}_gap_max"] = max(map(abs, gaps), default=None)
        row[f"{name}_gap_rms"] = math.sqrt(sum(g * g for g in gaps) / len(gaps)) if gaps else None
    return row


def measure(
    given: Sequence[str], sheet: Sheet, folder: Path, which: Sequence[str], others: Sequence[Path]
) -> bool:
    """Make the runs that are missing, and compare all of them; tell whether the two losses agree.

    They agree if the first step has the same completions and, within `FIRST`, the same gradient norm, and if
    no two means of `WINDOW` steps of the reward are further apart than `BAND`.

    Args:
        which: of `WHICH`; one alone is made, and not compared.
        others: further runs of the recipe, for the spread between seeds.
    """
    made = [run(name, given, folder) for name in which]
    if len(made) + len(others) == 1:
        return True
    known = [folder / name for name in WHICH if rows_of(folder / name)]
    for there in (*known, *others):
        has = bool(checkpoints.checkpoints(there))
        sheet.append(described(there, has))
    pairs = [(a, b) for i, a in enumerate(known) for b in known[i + 1 :]]
    pairs += [(a, b) for i, a in enumerate(others) for b in (*others[i + 1 :], *known[:1])]
    for one, other in pairs:
        sheet.append(compared(one, other))
    if not set(WHICH[:2]) <= {there.name for there in known}:
        return True  # there is nothing to compare
    (first,) = [r for r in sheet.rows if r.get("names") == list(WHICH[:2])]
    a, b = (rows_of(folder / name)[0]["grad_norm"] for name in WHICH[:2])
    equal = first["steps_with_equal_completions"] > 0 and abs(a - b) <= FIRST * max(a, b)
    return equal and (first["reward_gap_max"] or 0) <= BAND
