"""Tasks: problems, the rewards of their answers, and demonstrations for the warm-up of a new model."""

import codecs
import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_fast.trainer import rewards
from grpo_fast.trainer.config import HELDOUT, TrainConfig
from grpo_fast.trainer.rewards import Reward

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Problems and their rewards.

    Attributes:
        train, heldout: rows with a "prompt" and any other columns; no row is in both.
        rewards, weights: a completion earns the weighted sum of its rewards.
        demonstration: returns a completion to imitate in the warm-up of a new model; or None.
        alphabet: the characters that the tokenizer of a new model needs.
    """

    train: list[Row]
    heldout: list[Row]
    rewards: list[Reward]
    weights: list[float]
    demonstration: Callable[[Row, random.Random], str] | None
    alphabet: str


def build(config: TrainConfig) -> Task:
    """Build the task of a configuration.

    Raises:
        ValueError: the dataset or a reward function cannot be read, or there are too few problems.
    """
    folder = Path(config.reward_dir) if config.reward_dir else None
    functions = [rewards.load(r, folder) for r in config.reward]
    task = from_file(config) if config.dataset is not None else arithmetic(config)
    if not functions:
        return task
    weights = config.reward_weights or [1.0] * len(functions)
    return dataclasses.replace(task, rewards=functions, weights=weights)


def arithmetic(config: TrainConfig) -> Task:
    """Build the task of adding two whole numbers: the answer to `12+34=` is `[46]`.

    The right number earns 0.9, and the right form 0.1. A share `config.warmup_error_rate` of the
    demonstrations has one wrong digit: as in pretraining text, the form is right, but not every content.
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
    """Read the rows of a JSON Lines file; `prompt` is a string or a list of chat messages.

    Raises:
        ValueError: a line is no such row; the message has its number.
    """
    path = Path(config.dataset or "").expanduser()
    if not path.is_file():
        raise ValueError(f"dataset={config.dataset!r}: no such file")
    needed = why_answers(config)
    rows: list[Row] = []
    first = 0
    # Lines end at \n alone: other line separators of Unicode are part of a string.
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_row(line, needed)
            if rows and row.keys() != rows[0].keys():
                differ = ", ".join(sorted(row.keys() ^ rows[0].keys()))
                raise ValueError(f"other columns than line {first}: {differ}")
            if rows and isinstance(row["prompt"], str) != isinstance(rows[0]["prompt"], str):
                raise ValueError(f"prompt: text and chat messages are mixed, see line {first}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        first = first or number
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows")
    alphabet = "".join(sorted({c for r in rows for c in f"{r['prompt']}{r.get('answer', '')}"}))
    demonstration = (lambda row, rng: str(row["answer"])) if needed else None
    train, heldout = split(rows, config)
    return Task(train, heldout, [rewards.correct], [1.0], demonstration, alphabet)


def why_answers(config: TrainConfig) -> str:
    """Say what needs the answers of a dataset; "" if nothing does."""
    if not config.reward:
        return "without --reward a completion is rewarded where it is the answer"
    if config.model is None and config.warmup_steps:
        return "a new model is warmed up on the answers; --warmup_steps 0 or --model does without"
    return ""


def parse_row(line: bytes, needed: str) -> Row:
    """Parse one line of a dataset.

    Args:
        needed: says what needs the answer; "" if it may be missing.

    Raises:
        ValueError: the message says what is wrong with the line.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from error
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f'want an object like {{"prompt": ...}}, got {type(row).__name__}')
    if "prompt" not in row:
        raise ValueError(f"no column prompt; there are: {', '.join(row) or 'none'}")
    if needed and "answer" not in row:
        raise ValueError(f"no column answer ({needed})")
    for name in rewards.ARGUMENTS:
        if name in row:
            raise ValueError(
                f"a column cannot be called {name!r}, which is an argument of every reward function"
            )
    check_prompt(row["prompt"])
    if needed and not isinstance(row["answer"], (str, int, float)):
        raise ValueError(f"answer: want text or a number, got {json.dumps(row['answer'])[:80]}")
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair, which is no text: {error}") from error
    return row


def check_prompt(prompt: Any) -> None:
    """Refuse a prompt that is neither text nor chat messages.

    Raises:
        ValueError: the message shows the prompt.
    """
    if not isinstance(prompt, (str, list)):
        raise ValueError(f"prompt: want text or a list of messages, got {json.dumps(prompt)[:80]}")
    if not prompt:
        raise ValueError(f"prompt: empty: {json.dumps(prompt)}")
    for message in [] if isinstance(prompt, str) else prompt:
        keys = ("role", "content")
        if not (isinstance(message, dict) and all(isinstance(message.get(k), str) for k in keys)):
            raise ValueError(
                'prompt: want messages like {"role": "user", "content": "..."}, got '
                f"{json.dumps(message)[:80]}"
            )


def count(rows: list[Row]) -> int:
    """Count the different prompts."""
    return len(by_prompt(rows))


def by_prompt(rows: list[Row]) -> dict[str, list[Row]]:
    """Group rows by their prompt."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(json.dumps(row["prompt"]), []).append(row)
    return found


def split(rows: list[Row], config: TrainConfig) -> tuple[list[Row], list[Row]]:
    """Split rows into those for training and those of `config.heldout` other prompts.

    Raises:
        ValueError: no row would be left for training.
    """
    groups = list(by_prompt(rows).values())
    random.Random(config.seed).shuffle(groups)
    count = config.heldout or max(1, min(HELDOUT, len(groups) // 10))
    heldout, train = groups[:count], groups[count:]
    if not train:
        raise ValueError(
            f"heldout={count}: want fewer than the {len(groups)} different prompts; "
            + (
                f"set --heldout to at most {len(groups) - 1}"
                if len(groups) > 1
                else "there must be two at least, one to train on and one held out"
            )
        )
    return [r for g in train for r in g], [r for g in heldout for r in g]


def batches(rows: list[Row], size: int, rng: random.Random) -> Iterator[list[Row]]:
    """Yield batches of `size` rows without end; the rows are shuffled again each time all are used."""
    queue: list[Row] = []
    while True:
        while len(queue) < size:
            queue += rng.sample(rows, len(rows))
        batch, queue = queue[:size], queue[size:]
        yield batch
