"""`Task`: problems and their rewards; the split of problems, and their order in training."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

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
        cluster: returns a name for a row. Rows of one name depend on each other, so the intervals of an
            evaluation count them as one; None: rows of the same prompt.
    """

    train: list[Row]
    heldout: list[Row]
    rewards: list[Reward]
    weights: list[float]
    demonstration: Callable[[Row, random.Random], str] | None
    alphabet: str
    cluster: Callable[[Row], str] | None = None


def in_chat(text: str, system_prompt: str | None) -> list[dict[str, str]]:
    """Return a text as a chat message of the user, after a system message if there is one."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": text}]


def alphabet(rows: list[Row]) -> str:
    """Return the characters of the prompts and answers of rows, sorted."""
    return "".join(sorted({c for r in rows for c in f"{r['prompt']}{r.get('answer', '')}"}))


def count(rows: list[Row]) -> int:
    """Count the different prompts."""
    return len({prompt_of(row) for row in rows})


def prompt_of(row: Row) -> str:
    """Return the prompt of a row as text, also if it is a chat."""
    return json.dumps(row["prompt"])


def split(
    rows: list[Row], config: TrainConfig, together: Callable[[Row], str] = prompt_of
) -> tuple[list[Row], list[Row]]:
    """Split rows into those for training and those of at least `config.heldout` other prompts.

    Args:
        together: returns a name for a row. Rows of one name are all held out, or none is.

    Raises:
        ValueError: no row would be left for training.
    """
    named: dict[str, list[Row]] = {}
    for row in rows:
        named.setdefault(together(row), []).append(row)
    groups = list(named.values())
    random.Random(config.seed).shuffle(groups)
    prompts = count(rows)
    wanted = config.heldout or max(1, min(HELDOUT, prompts // 10))
    heldout: list[Row] = []
    taken = 0
    while groups and taken < wanted:
        group = groups.pop(0)
        heldout += group
        taken += count(group)
    if not groups:
        raise ValueError(
            f"heldout={wanted}: want fewer than the {prompts} different prompts; "
            + (
                f"set --heldout to at most {prompts - count(group)}"
                if len(named) > 1
                else "there must be two at least, one to train on and one held out"
            )
        )
    return [r for g in groups for r in g], heldout


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
