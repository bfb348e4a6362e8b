"""`StepRecord`: one training step on the completions of one prompt, as it is kept in a JSON file."""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_fast.objective import Objective
from grpo_fast.trainer import files
from grpo_fast.trainer.quoting import quoted

FORMAT = "grpo-fast explain 1"
SHIPPED = Path(__file__).parent / "step.json"


@dataclass(frozen=True)
class Source:
    """The run that a step is from. It has names, and no paths of the machine.

    Attributes:
        run, checkpoint: names of their folders.
        step: the number of finished steps of the run.
        preset: the option `objective` of the run.
        restored: the optimizer had the state of the checkpoint; False: it was new.
        prompts_per_step, num_iterations: options of the run; the recorded step has one prompt, and an
            update for each entry of `StepRecord.updates`.
        reference: the policy that `StepRecord.ref_logps` are from.
        reward_weights: the factor of each reward function.
        versions: of grpo_fast and the libraries below it.
    """

    run: str
    checkpoint: str
    step: int
    model: str
    task: str
    preset: str
    optimizer: str
    learning_rate: float
    restored: bool
    prompts_per_step: int
    num_iterations: int
    reference: str
    reward_weights: dict[str, float]
    versions: dict[str, str]


@dataclass(frozen=True)
class Message:
    """A message of the prompt; a prompt that is text is one message of the role "prompt"."""

    role: str
    content: str


@dataclass(frozen=True)
class Completion:
    """A completion.

    Attributes:
        ended: it has an end-of-sequence token; False: the length limit cut it off.
        tokens: the text of each token, as the tokenizer decodes it alone.
        rewards: of each reward function; None: it gave none.
    """

    text: str
    ended: bool
    token_ids: list[int]
    tokens: list[str]
    reward: float
    rewards: dict[str, float | None]


@dataclass(frozen=True)
class Update:
    """An optimiser step as the trainer reports it: its loss, and the gradient's norm before clipping."""

    loss: float
    grad_norm: float


@dataclass(frozen=True)
class StepRecord:
    """One step: G completions of a prompt, and the updates on them.

    Attributes:
        format: the name and version of this layout.
        objective: all options of `grpo_fast.Objective`.
        scale_rewards: "group" or "batch", which are the same for one group, or "none".
        answer: the right answer, if the task has one.
        logps: log-probs of the completion tokens, in nats, at the temperature of the run: logps[k][i][t] is
            that of token t of completion i after k updates; so logps[0] is that of the policy that sampled.
        ref_logps: the same of the reference, [i][t].
        again: completions of the same prompt after each update, from the same random numbers: again[0] after
            the first one.

    Raises:
        ValueError: the lists do not fit together, or the objective is not one; the message names the field.
    """

    format: str
    source: Source
    objective: dict[str, float | str | None]
    scale_rewards: str
    temperature: float
    prompt: list[Message]
    answer: str | None
    completions: list[Completion]
    logps: list[list[list[float]]]
    ref_logps: list[list[float]]
    updates: list[Update]
    again: list[list[Completion]]

    def __post_init__(self) -> None:
        lengths = [len(c.token_ids) for c in self.completions]
        if len(lengths) < 2 or not all(lengths):
            raise ValueError("completions: want at least two, with at least one token each")
        for i, one in enumerate(self.completions):
            if len(one.tokens) != len(one.token_ids):
                raise ValueError(f"completions[{i}].tokens: want {len(one.token_ids)} of them")
        for name, some in [("completions", [self.completions]), ("again", self.again)]:
            if any(c.rewards.keys() != self.source.reward_weights.keys() for x in some for c in x):
                raise ValueError(f"{name}: their rewards are not those of source.reward_weights")
        if not self.updates:
            raise ValueError("updates: want at least one")
        if len(self.logps) != len(self.updates) + 1:
            raise ValueError(f"logps: want {len(self.updates) + 1} lists, got {len(self.logps)}")
        if [len(x) for x in self.again] != [len(lengths)] * len(self.updates):
            raise ValueError(f"again: want {len(lengths)} completions for each update")
        for name, rows in [
            *((f"logps[{k}]", rows) for k, rows in enumerate(self.logps)),
            ("ref_logps", self.ref_logps),
        ]:
            if [len(row) for row in rows] != lengths:
                raise ValueError(f"{name}: want one number per token of each completion")
            if any(x > 1e-4 for row in rows for x in row):
                raise ValueError(f"{name}: a log-prob is above 0")
        if self.scale_rewards not in ("group", "batch", "none"):
            raise ValueError(f"scale_rewards={self.scale_rewards!r} is unknown")
        if not self.temperature > 0:
            raise ValueError(f"temperature: want a positive number, got {self.temperature}")
        self.to_objective()

    def to_objective(self) -> Objective:
        """Return the objective of the step."""
        options: dict[str, Any] = dict(self.objective)
        known = {field.name for field in dataclasses.fields(Objective)}
        for name in (*(known - options.keys()), *(options.keys() - known)):
            raise ValueError(f"objective: {name} is {'missing' if name in known else 'unknown'}")
        try:
            return Objective(**options)
        except TypeError as error:
            raise ValueError(f"objective: {error}") from error


def save(record: StepRecord, path: Path) -> None:
    """Write a record to a JSON file.

    Raises:
        OSError: it cannot be written; the message names it.
    """
    content = json.dumps(dataclasses.asdict(record), ensure_ascii=False, allow_nan=False)
    files.write(path, (content + "\n").encode(errors="replace"))


def load(path: Path) -> StepRecord:
    """Read a record from a JSON file.

    Raises:
        ValueError: it is no record, or a broken one; the message names the file and the field.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"not a record of the format {FORMAT!r}")
        return checked(StepRecord, content, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def checked(kind: Any, value: Any, where: str) -> Any:
    """Return JSON as a value of an annotated type: a dataclass, list, dict, union, or plain value.

    Raises:
        ValueError: it is not one; the message names the place.
    """
    place = f"{where or 'the record'}: "
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict):
            raise ValueError(f"{place}want an object, got {quoted(value, 40)}")
        if value.keys() != hints.keys():
            name = min(value.keys() ^ hints.keys())
            raise ValueError(f"{place}{name!r} is {'missing' if name in hints else 'unknown'}")
        dot = f"{where}." if where else ""
        found: Any = kind
        return found(**{k: checked(hints[k], x, f"{dot}{k}") for k, x in value.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list and isinstance(value, list):
        return [checked(arguments[0], x, f"{where}[{i}]") for i, x in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {k: checked(arguments[1], x, f"{where}.{k}") for k, x in value.items()}
    if origin is types.UnionType:
        kinds = [k for k in arguments if k is not types.NoneType]
        if value is None and len(kinds) < len(arguments):
            return None
        kind = str if str in kinds and isinstance(value, str) else kinds[0]
        return checked(kind, value, where)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value):
            # `max_length` of an objective stays an int.
            return value
    elif origin is None and type(value) is kind:
        return value
    name = getattr(kind, "__name__", str(kind)) if origin is None else origin.__name__
    raise ValueError(f"{place}want {name}, got {quoted(value, 40)}")
