"""The stages of a step as text, for a terminal and for a browser without scripts."""

# ruff: noqa: RUF001  # the sign of a product

import dataclasses
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo_fast.trainer.explain import numbers
from grpo_fast.trainer.explain.numbers import Numbers
from grpo_fast.trainer.explain.record import StepRecord
from grpo_fast.trainer.explain.stages import stages

MARKS = {"\n": "⏎", "\t": "⇥"}
FULL = 12  # the width of the longest bar


def visible(value: Any) -> Any:
    """Return a record, or any part of it, with marks for the characters that command a display.

    These are control characters, those that turn the direction of the text, and lone surrogates.
    """
    if isinstance(value, str):
        return "".join(c if c.isprintable() else MARKS.get(c, f"[U+{ord(c):04X}]") for c in value)
    if isinstance(value, list):
        return [visible(x) for x in value]
    if isinstance(value, dict):
        return {visible(k): visible(x) for k, x in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        found = {f.name: visible(getattr(value, f.name)) for f in fields}
        return dataclasses.replace(value, **found)
    return value


def about(record: StepRecord) -> str:
    """Say in a sentence or two which step this is."""
    source = record.source
    return (
        f"Run {source.run}, checkpoint {source.checkpoint}: {source.model} on {source.task}, with the "
        f"objective {source.preset}, after {source.step} finished steps."
    )


def origin(record: StepRecord) -> list[str]:
    """Say where the numbers are from, and how the step differs from one of its run."""
    source, objective = record.source, record.to_objective()
    updates = len(record.updates)
    libraries = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    prompts = f"{source.prompts_per_step} prompt{'s' * (source.prompts_per_step != 1)}"
    made = f"{source.num_iterations} update{'s' * (source.num_iterations != 1)}"
    state = "that of the checkpoint" if source.restored else "new"
    return [
        about(record),
        f"Objective: preset {source.preset}, reduction {objective.reduction}, epsilon "
        f"{objective.epsilon_low:g} (low) and {objective.epsilon_high:g} (high), beta {objective.beta:g}; "
        f"rewards scaled by: {record.scale_rewards}; temperature {record.temperature:g}.",
        f"A step of this run has {prompts} and makes {made} on them. This step has one prompt, and makes "
        f"{updates}, so that the ratios leave 1.",
        f"Optimiser: {source.optimizer}, learning rate {source.learning_rate:g}, the highest of the "
        f"schedule; its state at the start was {state}.",
        f"Reference of the KL: {source.reference}.",
        f"Computed with {libraries}.",
    ]


def console(file: IO[str] | None = None, width: int | None = None) -> Console:
    """Return a console that takes every text as it is; without `file` it is standard output."""
    return Console(file=file, width=width, markup=False, emoji=False, highlight=False)


def show(record: StepRecord, out: Console) -> None:
    """Print all stages of a step.

    Raises:
        ValueError: the objective is not explained.
    """
    record = visible(record)
    found = numbers.of_updates(record)
    out.print(Text("One step of GRPO", style="bold"))
    for line in origin(record):
        out.print(Text(line))
    figures = {
        "sample": sample, "reward": reward, "advantage": advantage, "ratio": ratio, "clip": clip,
        "kl": kl, "gradient": gradient, "update": update,
    }  # fmt: skip
    for k, stage in enumerate(stages(record), 1):
        out.print()
        out.rule(Text(f"{k}. {stage.title}", style="bold"), align="left")
        for paragraph in stage.text:
            out.print(Text(paragraph))
        out.print()
        for line in stage.formula.splitlines():
            out.print(Text(f"    {line}", style="bold"))
        out.print()
        for symbol, meaning in stage.symbols:
            out.print(Text(f"    {symbol}: {meaning}"))
        out.print()
        figures[stage.name](record, found, out)


def table(*columns: str) -> Table:
    """Return a table; the columns whose names begin with a space have texts, the others numbers."""
    made = Table()
    for name in columns:
        words = name.startswith(" ")
        made.add_column(
            Text(name.strip()),
            justify="left" if words else "right",
            overflow="fold",
            no_wrap=not words,
        )
    return made


def bar(x: float, largest: float) -> str:
    """Return a bar of a length in proportion to a number, with its sign."""
    length = round(FULL * abs(x) / largest) if largest else 0
    return ("+" if x > 0 else "-") * length


def sample(record: StepRecord, found: list[Numbers], out: Console) -> None:
    """Print the prompt and its completions."""
    for message in record.prompt:
        out.print(Text(f"{message.role}: {message.content}"))
    if record.answer is not None:
        out.print(Text(f"right answer: {record.answer}"))
    made = table("#", " completion", "tokens", " end")
    for k, one in enumerate(record.completions, 1):
        end = "by the model" if one.ended else "cut off"
        made.add_row(str(k), Text(one.text), str(len(one.tokens)), end)
    out.print(made)


def reward(record: StepRecord, found: list[Numbers], out: Console) -> None:
    """Print the rewards and their parts."""
    weights = record.source.reward_weights
    made = table("#", *(f"{v:g} × {name}" for name, v in weights.items()), "reward")
    for k, one in enumerate(record.completions, 1):
        parts = (one.rewards[name] for name in weights)
        cells = ("none" if x is None else f"{x:.2f}" for x in parts)
        made.add_row(str(k), *cells, f"{one.reward:.3f}")
    out.print(made)


def advantage(record: StepRecord, found: list[Numbers], out: Console) -> None:
    """Print mean, standard deviation and advantages."""
    first = found[0]
    out.print(f"mean {first.mean:.4f}, standard deviation {first.std:.4f}")
    largest = max(map(abs, first.advantages))
    made = table("#", "reward", "advantage", " ")
    for k, (one, x) in enumerate(zip(record.completions, first.advantages, strict=True), 1):
        made.add_row(str(k), f"{one.reward:.3f}", f"{x:+.3f}", bar(x, largest))
    out.print(made)


def by_token(
    record: StepRecord, values: list[list[float]], marks: list[list[str]], spec: str, out: Console
) -> None:
    """Print a number for each token, completion by completion; a space of a token becomes a dot."""
    for k, (one, row, signs) in enumerate(zip(record.completions, values, marks, strict=True), 1):
        parts = [
            f"{word.replace(' ', '·')}={x:{spec}}{sign}"
            for word, x, sign in zip(one.tokens, row, signs, strict=True)
        ]
        out.print(Text(f"{k}: {'  '.join(parts)}"))


def ratio(record: StepRecord, found: list[Numbers], out: Console) -> None:
    """Print the ratios of the last update, which are farthest from 1."""
    for k, one in enumerate(found, 1):
        ratios = [x for row in one.ratios for x in row]
        out.print(f"update {k}: ratios from {min(ratios):.3f} to {max(ratios):.3f}")
    last = found[-1]
    out.print(f"\nratios before update {len(found)}:")
    by_token(record, last.ratios, [[""] * len(row) for row in last.ratios], ".3f", out)


def clip(record: StepRecord, found: list[Numbers], out: Console) -> None:
    """Print which tokens the clip stops."""
    made = table("update", "stopped above", "stopped below", "share")
    for k, one in enumerate(found, 1):
        sides = [x for row in one.clipped for x in row]
        share = f"{one.clip_fraction:.1%}"
        made.add_row(str(k), str(sides.count(1)), str(sides.count(-1)), share)
    out.print(made)
    last = found[-1]
    marks = [["*" if x else "" for x in row] for row in last.clipped]
    out.print(f"\nratios before update {len(found)}; * is stopped:")
    by_token(record, last.ratios, marks, ".3f", out)


def kl(record: StepRecord, found: list[Numbers], out: Console) -> None:
    """Print k3 before the first update."""
    for k, one in enumerate(found, 1):
        out.print(f"update {k}: mean k3 {one.kl_mean:.4f} nats")
    first = found[0]
    out.print("\nk3 before update 1:")
    by_token(record, first.kl, [[""] * len(row) for row in first.kl], ".3f", out)


def gradient(record: StepRecord, found: list[Numbers], out: Console) -> None:
    """Print the coefficients of the last update, where the clip acts."""
    last = found[-1]
    scaled = [[1000 * x for x in row] for row in last.coefficients]
    out.print(f"coefficients × 1000 before update {len(found)}; below 0: more likely:")
    by_token(record, scaled, [[""] * len(row) for row in scaled], "+.2f", out)


def update(record: StepRecord, found: list[Numbers], out: Console) -> None:
    """Print the losses, and the completions of the same prompt after the first update."""
    made = table(
        "update", "loss\nbefore", "loss\nafter", "by the\ntrainer", "gradient\nnorm", "mean\nreward"
    )  # of two lines: a terminal may have 80 columns
    for k, one in enumerate(found):
        again = record.again[k]
        mean = sum(c.reward for c in again) / len(again)
        made.add_row(
            str(k + 1), f"{one.loss:+.6f}", f"{one.loss_after:+.6f}",
            f"{record.updates[k].loss:+.6f}", f"{record.updates[k].grad_norm:.3f}", f"{mean:.3f}",
        )  # fmt: skip
    out.print(made)
    out.print(f"mean reward before the updates: {found[0].mean:.3f}")
    shown = table("#", " before", "reward", " after update 1", "reward")
    pairs = zip(record.completions, record.again[0], strict=True)
    for k, (old, new) in enumerate(pairs, 1):
        cells: list[Any] = [
            Text(old.text),
            f"{old.reward:.3f}",
            Text(new.text),
            f"{new.reward:.3f}",
        ]
        shown.add_row(str(k), *cells)
    out.print(shown)
