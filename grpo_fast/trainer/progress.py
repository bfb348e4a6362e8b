"""The display of a run while it works: its progress, tables of completions, and experiment trackers."""

import dataclasses
import sys
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from grpo_fast.trainer.config import TrainConfig

EVERY = 10.0  # seconds between two lines where the output is no terminal
WIDEST = 300  # characters of a text in a table; the file has all of it


class Bar:
    """A progress bar on stderr; where that is no terminal, a line now and then.

    Args:
        done: how much of `total` is done at the start.
    """

    def __init__(self, name: str, total: int, done: int = 0, shown: bool = True) -> None:
        self.name, self.total, self.done, self.shown = name, total, done, shown
        self.begin, self.first, self.said = time.monotonic(), done, -EVERY
        self.bar: Progress | None = None
        if shown and sys.stderr.isatty():
            self.bar = Progress(
                TextColumn(name),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=Console(file=sys.stderr),
                redirect_stdout=sys.stdout.isatty(),  # a file gets what is printed to it
            )
            self.task = self.bar.add_task(name, total=total, completed=done, text="")

    def __enter__(self) -> "Bar":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, text: str) -> None:
        """Count one more step and show a text beside it."""
        self.done += 1
        if not self.shown:
            return
        if self.bar:
            self.bar.update(self.task, completed=self.done, text=text)
            return
        elapsed = time.monotonic() - self.begin
        if elapsed - self.said >= EVERY or self.done == self.total:
            self.said = elapsed
            left = elapsed / (self.done - self.first) * (self.total - self.done)
            minutes, seconds = divmod(round(left), 60)
            print(
                f"{self.name} {self.done}/{self.total}, {minutes}:{seconds:02d} left, {text}",
                file=sys.stderr,
                flush=True,
            )


def line_of(row: dict[str, Any]) -> str:
    """Return the metrics of a step that its progress shows."""
    parts = [f"reward {row['reward']:.3f}"]
    if row["kl"] == row["kl"]:
        parts.append(f"kl {row['kl']:.3f}")
    parts.append(f"clip {row['clip_fraction']:.3f}")
    parts.append(f"{row['tokens_per_second']:.0f} tokens/s")
    return ", ".join([*parts, f"{row['memory_gib']:.1f} GiB"])


def table(step: int, completions: Sequence[dict[str, Any]]) -> None:
    """Print completions with their rewards and advantages."""
    shown = Table(title=f"completions of step {step}", show_lines=True, expand=True)
    for name, ratio in (("prompt", 2), ("completion", 4)):
        shown.add_column(name, ratio=ratio, overflow="fold")
    for name in ("reward", "advantage", "tokens"):
        shown.add_column(name, justify="right")
    for one in completions:
        numbers = ["" if one[k] is None else f"{one[k]:.2f}" for k in ("reward", "advantage")]
        texts = [_short(one[k]) for k in ("prompt", "completion")]
        shown.add_row(*texts, *numbers, str(one["tokens"]))
    Console(file=sys.stdout, markup=False, emoji=False, highlight=False).print(shown)


def _short(text: Any) -> str:
    text = text if isinstance(text, str) else text[-1]["content"]  # of a chat the last message
    text = text if len(text) <= WIDEST else f"{text[:WIDEST]} ..."
    # No text of a model or a dataset commands the terminal.
    return "".join(
        c if c == "\n" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text
    )


def check_trackers(config: TrainConfig) -> None:
    """Refuse a tracker that accelerate does not know, or that is not installed.

    Raises:
        ValueError: the message names those that are.
    """
    if not config.report_to:
        return
    known = trackers()
    for name in config.report_to:
        if name not in known:
            raise ValueError(
                f"report_to={name!r} is unknown or not installed; installed: "
                f"{', '.join(sorted(known)) or 'none'}"
            )


class Trackers:
    """The experiment trackers of `--report_to`, through accelerate."""

    def __init__(self, config: TrainConfig, run_dir: Path, device: torch.device) -> None:
        self.accelerator: Any = None
        if not config.report_to:
            return
        from accelerate import Accelerator

        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            log_with=config.report_to,
            project_dir=str(run_dir),
        )
        options = {
            name: value if isinstance(value, (int, float, str, bool)) else str(value)
            for name, value in dataclasses.asdict(config).items()
        }
        self.accelerator.init_trackers("grpo_fast", config=options)

    def log(self, row: dict[str, Any]) -> None:
        """Pass on the metrics of a step."""
        if self.accelerator is not None:
            known = {k: v for k, v in row.items() if v is not None and v == v}
            self.accelerator.log(known, step=row["step"])

    def end(self) -> None:
        """Let the trackers finish."""
        if self.accelerator is not None:
            self.accelerator.end_training()


def trackers() -> list[str]:
    """Return the names of the trackers that are installed."""
    from accelerate.tracking import get_available_trackers

    return [getattr(name, "value", str(name)) for name in get_available_trackers()]
