"""Tasks: what is asked, how answers are rewarded, and what a new model is shown before GRPO."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_fast.trainer import rewards
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.rewards import Reward

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Problems and their rewards.

    Attributes:
        train, heldout: rows with a "prompt" and any other columns; no row is in both.
        rewards, weights: the reward of a completion is the weighted sum.
        demonstration: a completion to imitate in the warm-up of a new model, or None.
        alphabet: characters that a new model's tokenizer needs.
    """

    train: list[Row]
    heldout: list[Row]
    rewards: list[Reward]
    weights: list[float]
    demonstration: Callable[[Row, random.Random], str] | None
    alphabet: str


def build(config: TrainConfig) -> Task:
    """The task a configuration describes.

    Raises:
        ValueError: an unreadable dataset or reward function, or too few problems.
    """
    task = from_file(config) if config.dataset is not None else arithmetic(config)
    if config.reward:
        functions = [rewards.load(r) for r in config.reward]
        weights = config.reward_weights or [1.0] * len(functions)
    else:
        functions, weights = task.rewards, task.weights
    return Task(task.train, task.heldout, functions, weights, task.demonstration, task.alphabet)


def arithmetic(config: TrainConfig) -> Task:
    """Sums of two whole numbers, `12+34=`, answered in brackets: `[46]`.

    The answer earns 0.9, its form 0.1. A share `config.warmup_error_rate` of the demonstrations has one
    wrong digit: like most text a model is pretrained on, they show the form and only often the truth.
    """
    numbers = range(config.max_operand + 1)
    rows: list[Row] = [
        {"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in numbers for b in numbers
    ]

    def demonstration(row: Row, rng: random.Random) -> str:
        digits = list(row["answer"])
        if rng.random() < config.warmup_error_rate:
            where = rng.randrange(len(digits))
            digits[where] = rng.choice([d for d in "0123456789" if d != digits[where]])
        return f"[{''.join(digits)}]"

    train, heldout = split(rows, config)
    functions: list[Reward] = [rewards.correct, rewards.bracketed_number]
    return Task(train, heldout, functions, [0.9, 0.1], demonstration, "0123456789+=[]")


def from_file(config: TrainConfig) -> Task:
    """The rows of a JSONL file; `prompt` is a string or a list of chat messages.

    Raises:
        ValueError: a line that is not an object with both columns, by number.
    """
    path = Path(config.dataset or "")
    if not path.is_file():
        raise ValueError(f"dataset={config.dataset!r}: no such file")
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        missing = {"prompt", "answer"} - set(row if isinstance(row, dict) else ())
        if missing:
            raise ValueError(f"{path}, line {number}: no column {', '.join(sorted(missing))}")
        if rows and row.keys() != rows[0].keys():
            raise ValueError(f"{path}, line {number}: other columns than line 1")
        rows.append(row)
    alphabet = "".join(sorted({c for row in rows for c in f"{row['prompt']}{row['answer']}"}))
    train, heldout = split(rows, config)
    return Task(
        train, heldout, [rewards.correct], [1.0], lambda row, rng: str(row["answer"]), alphabet
    )


def split(rows: list[Row], config: TrainConfig) -> tuple[list[Row], list[Row]]:
    """(training rows, `config.heldout` others). No prompt is on both sides.

    Raises:
        ValueError: fewer than one training row would be left.
    """
    by_prompt: dict[str, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(json.dumps(row["prompt"]), []).append(row)
    groups = list(by_prompt.values())
    random.Random(config.seed).shuffle(groups)
    heldout, train = groups[: config.heldout], groups[config.heldout :]
    if not train:
        raise ValueError(f"heldout={config.heldout}: want fewer than the {len(groups)} problems")
    return [r for g in train for r in g], [r for g in heldout for r in g]


def batches(rows: list[Row], size: int, rng: random.Random) -> Iterator[list[Row]]:
    """Endless batches of `size` rows: a new permutation of all rows each time they are used up."""
    queue: list[Row] = []
    while True:
        while len(queue) < size:
            queue += rng.sample(rows, len(rows))
        batch, queue = queue[:size], queue[size:]
        yield batch
