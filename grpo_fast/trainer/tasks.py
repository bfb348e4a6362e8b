"""Tasks: problems, the rewards of their answers, and demonstrations for the warm-up of a new model."""

import codecs
import dataclasses
import functools
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
    functions = [rewards.load(r, folder, config.device) for r in config.reward]
    task = from_dataset(config) if config.dataset is not None else arithmetic(config)
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


def from_dataset(config: TrainConfig) -> Task:
    """Read the rows of a dataset; `prompt` is a string or a list of chat messages.

    Raises:
        ValueError: there is no such dataset, or a row has another form; the message has its number.
    """
    name = config.dataset or ""
    path = Path(name).expanduser()
    if path.suffix == ".parquet" and path.is_file():
        read = parquet(path)
    elif path.is_file():
        read = json_lines(path)
    elif not path.is_dir() and (
        path.suffix or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name
    ):
        raise ValueError(f"dataset={name!r}: no such file")
    else:
        read = named(name, config.dataset_split)
    needed = why_answers(config)
    rows: list[Row] = []
    first = ""
    for place, found in read:
        try:
            row = checked(in_columns(found(), config), needed)
            if rows and row.keys() != rows[0].keys():
                differ = ", ".join(sorted(row.keys() ^ rows[0].keys()))
                raise ValueError(f"other columns than {first}: {differ}")
            if rows and isinstance(row["prompt"], str) != isinstance(rows[0]["prompt"], str):
                raise ValueError(f"prompt: text and chat messages are mixed, see {first}")
        except ValueError as error:
            raise ValueError(f"{name}, {place}: {error}") from error
        first = first or place
        rows.append(row)
    if not rows:
        raise ValueError(f"{name}: no rows")
    alphabet = "".join(sorted({c for r in rows for c in f"{r['prompt']}{r.get('answer', '')}"}))
    demonstration = (lambda row, rng: str(row["answer"])) if needed else None
    train, heldout = split(rows, config)
    return Task(train, heldout, [rewards.correct], [1.0], demonstration, alphabet)


Read = Iterator[tuple[str, Callable[[], Any]]]  # the place of a row, and the row


def json_lines(path: Path) -> Read:
    """Read a JSON Lines file. Its lines end at \\n alone: other separators of Unicode are part of a text."""
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"line {number}", functools.partial(parse_line, line)


def parquet(path: Path) -> Read:
    """Read a Parquet file, with pyarrow.

    Raises:
        ValueError: it is none.
    """
    try:
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"dataset={str(path)!r}: {error}") from error
    for number, row in enumerate(rows, 1):
        yield f"row {number}", functools.partial(_itself, row)


def named(name: str, split: str) -> Read:
    """Read a split of a dataset that the library `datasets` finds: on the hub, or in a folder.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        import datasets

        found = datasets.load_dataset(name, split=split)
    except Exception as error:  # of whatever the library's readers raise
        text = " ".join(str(error).split())
        raise ValueError(f"dataset={name!r}: no such file, and no dataset: {text}") from error
    for number, row in enumerate(found, 1):
        yield f"row {number}", functools.partial(_itself, row)


def _itself(row: Any) -> Any:
    return row


def why_answers(config: TrainConfig) -> str:
    """Say what needs the answers of a dataset; "" if nothing does."""
    if not config.reward:
        return "without --reward a completion is rewarded where it is the answer"
    if config.model is None and config.warmup_steps:
        return "a new model is warmed up on the answers; --warmup_steps 0 or --model does without"
    return ""


def parse_line(line: bytes) -> Any:
    """Parse one line of a JSON Lines file.

    Raises:
        ValueError: it is not JSON, or not UTF-8.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error


def in_columns(row: Any, config: TrainConfig) -> Any:
    """Return a row with its columns under our names, and its prompt as a chat if `config.chat` is set."""
    if not isinstance(row, dict):
        return row
    names = {config.prompt_column: "prompt", config.answer_column: "answer"}
    row = {names.get(k, k): v for k, v in row.items() if k in names or k not in names.values()}
    if config.chat and isinstance(row.get("prompt"), str):
        system = (
            [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
        )
        row["prompt"] = [*system, {"role": "user", "content": row["prompt"]}]
    return row


def checked(row: Any, needed: str) -> Row:
    """Return a row of a dataset, if it is one.

    Args:
        needed: says what needs the answer; "" if it may be missing.

    Raises:
        ValueError: the message says what is wrong with the row.
    """
    if not isinstance(row, dict):
        raise ValueError(f'want an object like {{"prompt": ...}}, got {type(row).__name__}')
    if "prompt" not in row:
        raise ValueError(
            f"no column prompt; there are: {', '.join(row) or 'none'} (--prompt_column names another)"
        )
    if needed and "answer" not in row:
        raise ValueError(f"no column answer ({needed})")
    for name in rewards.ARGUMENTS:
        if name in row:
            raise ValueError(
                f"a column cannot be called {name!r}, which is an argument of every reward function"
            )
    check_prompt(row["prompt"])
    if needed and not isinstance(row["answer"], (str, int, float)):
        raise ValueError(f"answer: want text or a number, got {_short(row['answer'])}")
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair, which is no text: {error}") from error
    return row


def _short(value: Any) -> str:
    return json.dumps(value, default=str)[:80]


def check_prompt(prompt: Any) -> None:
    """Refuse a prompt that is neither text nor chat messages.

    Raises:
        ValueError: the message shows the prompt.
    """
    if not isinstance(prompt, (str, list)):
        raise ValueError(f"prompt: want text or a list of messages, got {_short(prompt)}")
    if not prompt:
        raise ValueError(f"prompt: empty: {json.dumps(prompt)}")
    for message in [] if isinstance(prompt, str) else prompt:
        keys = ("role", "content")
        if not (isinstance(message, dict) and all(isinstance(message.get(k), str) for k in keys)):
            raise ValueError(
                'prompt: want messages like {"role": "user", "content": "..."}, got '
                f"{_short(message)}"
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


class Order:
    """The rows of the training in their order: all of them, shuffled anew each time.

    It depends on the seed and a position alone, so a run that goes on needs nothing else.
    """

    def __init__(self, rows: list[Row], seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._epoch, self._shuffled = -1, rows

    def at(self, position: int) -> Row:
        """Return the row of a position: 0, 1, 2, ... without end."""
        epoch, place = divmod(position, len(self.rows))
        if epoch != self._epoch:
            shuffled = random.Random(f"{self.seed}/{epoch}").sample(self.rows, len(self.rows))
            self._epoch, self._shuffled = epoch, shuffled
        return self._shuffled[place]

    def take(self, position: int, count: int) -> list[Row]:
        """Return `count` rows from a position on."""
        return [self.at(i) for i in range(position, position + count)]
