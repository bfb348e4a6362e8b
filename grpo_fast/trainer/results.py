"""The results of an evaluation: their means with intervals, as a table for people and as JSON."""

import contextlib
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import grpo_fast
from grpo_fast.trainer import model as models
from grpo_fast.trainer import parsing
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.intervals import Deviations, Estimate
from grpo_fast.trainer.progress import WIDEST
from grpo_fast.trainer.rewards import Text, text_of
from grpo_fast.trainer.tasks import Task
from grpo_fast.trainer.tasks.task import prompt_of

BASE, TRAINED, DIFFERENCE = "base", "trained", "trained-base"
# The options that decide on the problems, the models and the answers; the JSON has them.
OPTIONS = (
    "task", "questions", "max_operand", "problems", "examples", "task_options", "dataset",
    "dataset_split", "chat", "system_prompt", "heldout",
    "seed", "model", "use_peft", "quantize", "dtype", "weights", "attention", "max_new_tokens",
    "temperature", "reward", "reward_weights", "reward_timeout", "micro_batch_size", "sampling_tokens",
    "threads",
)  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """The extent of an evaluation.

    Attributes:
        seeds: each gives other random numbers.
        temperatures: 0 is greedy; None: greedy and the temperature of the run.
        samples: the number of completions for each problem and seed.
        base: the model before GRPO is evaluated, too.
        answers: the number of problems whose answers are shown.
        path: a JSON file that gets everything.

    Raises:
        ValueError: a value cannot be used; the message names it.
    """

    seeds: Sequence[int] = (0,)
    temperatures: Sequence[float] | None = None
    samples: int = 1
    base: bool = False
    answers: int = 0
    path: Path | None = None

    def __post_init__(self) -> None:
        for name, values in (("seeds", self.seeds), ("temperatures", self.temperatures)):
            if values is None:
                continue
            if not values or not all(math.isfinite(x) and x >= 0 for x in values):
                raise ValueError(f"{name}: want finite numbers >= 0, got {list(values)}")
            if len(set(values)) < len(values):  # the same completions would count twice
                raise ValueError(f"{name}: want each number once, got {list(values)}")
        for name, least in (("samples", 1), ("answers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: want a number >= {least}, got {getattr(self, name)}")

    def temperatures_of(self, config: TrainConfig) -> tuple[float, ...]:
        """Return the temperatures of an evaluation of a run with these options."""
        return tuple(self.temperatures or (0.0, config.temperature))

    def seeds_at(self, temperature: float) -> list[int]:
        """Return the seeds at a temperature; greedy completions are the same for all, so one is enough."""
        return list(self.seeds if temperature > 0 else self.seeds[:1])

    def samples_at(self, temperature: float) -> int:
        """Return the number of completions for each problem and seed at a temperature."""
        return self.samples if temperature > 0 else 1


@dataclass
class Results:
    """The completions of one model at one temperature, B in all, and what they earned.

    Attributes:
        problems, seeds, samples: of each completion; `problems` are numbers of held-out problems.
        scores: (B,) float64 for each reward function by its name, the first is accuracy.
        total: (B,) float64, the weighted sums.
        ended: (B,) float64, 1 or 0. lengths: (B,) float64, in tokens.
    """

    model: str
    temperature: float
    problems: list[int]
    seeds: list[int]
    samples: list[int]
    completions: list[Text]
    scores: dict[str, Tensor]
    total: Tensor
    ended: Tensor
    lengths: Tensor
    failures: int

    @property
    def accuracy(self) -> Tensor:
        return next(iter(self.scores.values()))

    def means(self) -> dict[str, float]:
        """Return the means that have no interval: reward/NAME of each function, ended, and length."""
        means = {f"reward/{name}": x.nanmean().item() for name, x in self.scores.items()}
        return {**means, "ended": self.ended.mean().item(), "length": self.lengths.mean().item()}

    def of(self, chosen: list[int]) -> dict[str, Any]:
        """Return some of the completions and their means, as they are written."""
        completions = [
            {
                "seed": self.seeds[b],
                "sample": self.samples[b],
                "text": text_of(self.completions[b]),
                "accuracy": self.accuracy[b].item(),
                "reward": self.total[b].item(),
                "tokens": int(self.lengths[b]),
                "ended": bool(self.ended[b]),
            }
            for b in chosen
        ]
        return {
            "model": self.model,
            "temperature": self.temperature,
            "accuracy": self.accuracy[chosen].nanmean().item(),
            "reward": self.total[chosen].nanmean().item(),
            "completions": completions,
        }


@dataclass
class Evaluation:
    """The results of one model or of two, and the comparison of the two.

    Attributes:
        results: those of the base model, if any, and then those of the trained one.
    """

    checkpoint: Path
    config: TrainConfig
    task: Task
    wanted: Wanted
    results: list[Results]

    def __post_init__(self) -> None:
        cluster = self.task.cluster or prompt_of
        self.names = [cluster(row) for row in self.task.heldout]
        numbers = {name: i for i, name in enumerate(dict.fromkeys(self.names))}
        self.clusters = torch.tensor([numbers[name] for name in self.names])

    def deviations(self, one: Results) -> dict[str, Deviations]:
        """Return those of accuracy and reward."""
        where = self.clusters[one.problems]
        values = {"accuracy": one.accuracy, "reward": one.total}
        return {name: Deviations.of(x, where) for name, x in values.items()}

    def pairs(self) -> list[tuple[Results, Results]]:
        """Return the results of base and trained model at the same temperature."""
        half = len(self.results) // 2
        return list(zip(self.results[:half], self.results[half:], strict=True)) if self.base else []

    @property
    def base(self) -> bool:
        return self.results[0].model == BASE

    def summaries(self) -> list[dict[str, Any]]:
        """Return a summary for each model and temperature, and then for each difference."""
        found = []
        for one in self.results:
            parts = {name: d.estimate() for name, d in self.deviations(one).items()}
            found.append(self._summary(one, one.model, parts, one.means(), one.failures))
        for base, trained in self.pairs():
            before, after = base.means(), trained.means()
            first, second = self.deviations(base), self.deviations(trained)
            parts = {name: second[name].minus(first[name]).estimate() for name in first}
            means = {name: after[name] - before[name] for name in after}
            failures = base.failures + trained.failures
            found.append(self._summary(trained, DIFFERENCE, parts, means, failures))
        return found

    def _summary(
        self,
        one: Results,
        model: str,
        estimates: dict[str, Estimate],
        means: dict[str, float],
        failures: int,
    ) -> dict[str, Any]:
        return {
            "model": model,
            "temperature": one.temperature,
            **estimates,
            **means,
            "problems": len(self.task.heldout),
            "completions": len(one.problems),
            "reward_failures": failures,
        }

    def text(self) -> str:
        """Return the results for people: a table, notes, and answers if they are wanted."""
        problems, clusters = len(self.names), len(set(self.names))
        first = next(iter(self.results[0].scores))
        summaries = self.summaries()
        lines = [
            f"{self.checkpoint}: {problems} held-out problem{'s' * (problems != 1)}, "
            f"{clusters} cluster{'s' * (clusters != 1)}",
            f"accuracy is the mean of {first}; ± is half of a 95 % confidence interval",
            "",
            *aligned([cells(s, first) for s in summaries]),
            *self.notes(summaries),
        ]
        for i in range(min(self.wanted.answers, problems)):
            lines += ["", *self.answers(i)]
        return "\n".join(lines)

    def notes(self, summaries: Sequence[dict[str, Any]]) -> list[str]:
        """Return what a reader of the table has to know."""
        lines = []
        chosen = [one.temperature for one in self.results]
        if 0 in chosen and (len(self.wanted.seeds) > 1 or self.wanted.samples > 1):
            lines.append("temperature 0 is greedy: one completion per problem is enough")
        if len(set(self.names)) == 1:
            lines.append("no interval: it needs two clusters at least")
        for s in summaries:
            where = f"{s['model']}, temperature {s['temperature']:g}"
            equal = [n for n in ("accuracy", "reward") if abs(s[n].half) < 1e-12]
            if equal:
                lines.append(
                    f"{where}: ± 0 for {' and '.join(equal)}: all clusters are equal, so nothing is known "
                    "about the uncertainty"
                )
        for one in self.results:
            values = {f"reward/{name}": x for name, x in one.scores.items()} | {"reward": one.total}
            missing = {name: int(x.isnan().sum()) for name, x in values.items()}
            some = [f"{name} {n}" for name, n in missing.items() if n]
            if some:
                lines.append(
                    f"{one.model}, temperature {one.temperature:g}: left out, without a value: "
                    f"{', '.join(some)} of {len(one.problems)} completions; failures of reward "
                    f"functions: {one.failures}"
                )
        return ["", *lines] if lines else []

    def answers(self, problem: int) -> list[str]:
        """Return the first answers to a problem at each temperature, base beside trained."""
        row = self.task.heldout[problem]
        right = f"  answer {short(row['answer'])}" if "answer" in row else ""
        lines = [f"problem {problem + 1}: {short(row['prompt'])}{right}"]
        order = [r for pair in self.pairs() for r in pair] or self.results
        for one in order:
            b = one.problems.index(problem)
            lines.append(
                f"  temperature {one.temperature:g}, seed {one.seeds[b]}, {one.model}: "
                f"{short(one.completions[b])}  accuracy {number(one.accuracy[b].item())}, "
                f"reward {number(one.total[b].item())}"
            )
        return lines

    def to_dict(self, command: str) -> dict[str, Any]:
        """Return everything, as JSON; NaN stands for a value that there is not, and becomes null."""
        device, dtype = models.placement(self.config)
        options = parsing.to_dict(self.config)
        wanted = self.wanted
        content = {
            "command": command,
            "checkpoint": str(self.checkpoint),
            "seeds": list(wanted.seeds),
            "samples": wanted.samples,
            "interval": "95 %, t distribution, clusters",
            "clusters": len(set(self.names)),
            "accuracy": next(iter(self.results[0].scores)),
            "results": self.summaries(),
            "config": {name: options[name] for name in OPTIONS},
            "dtype": str(dtype).removeprefix("torch."),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "grpo_fast": grpo_fast.__version__,
            },
            "machine": machine(device),
            "problems": self._problems(),
        }
        return jsonable(content)

    def _problems(self) -> list[dict[str, Any]]:
        """Return each problem with all its completions."""
        found: list[list[dict[str, Any]]] = [[] for _ in self.names]
        for one in self.results:
            places: list[list[int]] = [[] for _ in self.names]
            for b, problem in enumerate(one.problems):
                places[problem].append(b)
            for some, chosen in zip(found, places, strict=True):
                some.append(one.of(chosen))
        problems = []
        for row, name, results in zip(self.task.heldout, self.names, found, strict=True):
            answer = {"answer": row["answer"]} if "answer" in row else {}
            cluster = {} if self.task.cluster is None else {"cluster": name}
            problems.append({"prompt": row["prompt"], **answer, **cluster, "results": results})
        return problems


def cells(summary: dict[str, Any], first: str) -> dict[str, str]:
    """Return a row of the table: the text of each column by its name, which has no spaces."""
    signed = summary["model"] == DIFFERENCE
    row = {"model": summary["model"], "temperature": f"{summary['temperature']:g}"}
    for name in ("accuracy", "reward"):
        row[name] = number(summary[name].mean, signed)
        row[f"±{name}"] = number(summary[name].half)
    for name, mean in summary.items():
        if name.startswith("reward/") and name != f"reward/{first}":
            row["_".join(name.split())] = number(mean, signed)
    row["ended"] = number(summary["ended"], signed)
    row["length"] = number(summary["length"], signed, 1)
    return {**row, "completions": str(summary["completions"])}


def number(x: float, signed: bool = False, digits: int = 3) -> str:
    """Format a number; "-" if there is none."""
    return "-" if math.isnan(x) else f"{x:{'+' if signed else ''}.{digits}f}"


def aligned(rows: Sequence[dict[str, str]]) -> list[str]:
    """Return a table as lines: names first, columns two spaces apart, the first one to the left."""
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for name, *others in table:
        right = [x.rjust(width) for x, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *right]))
    return lines


def short(text: Any) -> str:
    """Quote a text, or the last message of a chat; no control character is left in it."""
    text = text_of(text) if isinstance(text, list) else str(text)
    return repr(text if len(text) <= WIDEST else f"{text[:WIDEST]} ...")


def jsonable(x: Any) -> Any:
    """Replace what JSON does not have: NaN and infinity by null, other types of a dataset by text."""
    if isinstance(x, Estimate):
        return jsonable(x.to_dict())
    if isinstance(x, dict):
        return {str(name): jsonable(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [jsonable(value) for value in x]
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    return x if x is None or isinstance(x, (bool, int, str)) else str(x)


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine: its processor, the number of its cores, and what computes."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        name = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": gpu,
    }
