"""What a run leaves behind: its folder, metrics.jsonl and curve.png."""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from grpo_fast.trainer.config import TrainConfig

SMOOTHING = 10  # steps of the moving mean


def create(config: TrainConfig) -> Path:
    """Make the folder of a run. Without `config.name`: the first free of arithmetic, arithmetic-2, ...

    Raises:
        FileExistsError: `config.name` is taken and `config.overwrite` is not set, or what is there is not
            a run.
    """
    parent = Path(config.output_dir)
    parent.mkdir(parents=True, exist_ok=True)
    if config.name is not None:
        path = parent / config.name
        if path.exists():
            if not config.overwrite:
                raise FileExistsError(
                    f"name={config.name!r}: {path} exists; --overwrite replaces it"
                )
            if not (path / "config.yaml").is_file():
                raise FileExistsError(f"overwrite: {path} is not a run, it has no config.yaml")
            shutil.rmtree(path)
        path.mkdir()
        return path
    stem = config.task if config.dataset is None else Path(config.dataset).stem
    for suffix in ("", *(f"-{i}" for i in itertools.islice(itertools.count(2), 10_000))):
        try:
            (parent / (stem + suffix)).mkdir()
        except FileExistsError:
            continue
        return parent / (stem + suffix)
    raise FileExistsError(f"{parent}: no free name like {stem}-2; give one with --name")


class Metrics:
    """metrics.jsonl: one object per step, on disk as soon as it is written."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.rows: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        """Append a row. NaN, for what was not measured, becomes null: JSON has no NaN."""
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        self.rows.append(clean)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")

    def recent(self, name: str, steps: int = SMOOTHING) -> float:
        """The mean of a metric over the last steps."""
        values = [row[name] for row in self.rows[-steps:]]
        return sum(values) / len(values) if values else math.nan


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw reward, KL and entropy over the steps."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in rows]
    reward = [row["reward"] for row in rows]
    smooth = [
        sum(reward[max(0, i - SMOOTHING + 1) : i + 1]) / min(i + 1, SMOOTHING)
        for i in range(len(reward))
    ]
    top.plot(steps, reward, color="C0", alpha=0.35, label="batch")
    top.plot(steps, smooth, color="C0", label=f"mean of {SMOOTHING} steps")
    top.set(ylabel="reward")
    top.legend(loc="lower right")
    for name, colour in (("entropy", "C1"), ("kl", "C2")):
        values = [math.nan if row[name] is None else row[name] for row in rows]
        if not all(map(math.isnan, values)):
            bottom.plot(steps, values, color=colour, label=f"{name} [nats per token]")
    bottom.set(xlabel="step")
    if bottom.lines:
        bottom.legend(loc="best")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
