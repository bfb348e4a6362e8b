"""Tasks from the user's data: JSON Lines, Parquet, or the library `datasets`."""

import codecs
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grpo_fast.trainer import rewards
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.tasks.task import Row, Task, alphabet, in_chat, split


def build(config: TrainConfig) -> Task:
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
    demonstration = (lambda row, rng: str(row["answer"])) if needed else None
    train, heldout = split(rows, config)
    return Task(train, heldout, [rewards.correct], [1.0], demonstration, alphabet(rows))


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
        row["prompt"] = in_chat(row["prompt"], config.system_prompt)
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
