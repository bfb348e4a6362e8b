"""The evaluation of a policy on held-out problems, with intervals, also beside the model before GRPO."""

import contextlib
import dataclasses
import errno
import gc
import json
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
from grpo_fast.trainer import checkpoints, files, rollout, tasks
from grpo_fast.trainer import config as configs
from grpo_fast.trainer import model as models
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.intervals import Deviations, Estimate
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.progress import WIDEST, Bar
from grpo_fast.trainer.rewards import Scores, Text, text_of
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.trainer.tasks import Row, Task
from grpo_fast.trainer.tasks.task import prompt_of

BATCH = 256
BASE, TRAINED, DIFFERENCE = "base", "trained", "trained-base"
# The options that decide on the problems, the models and the answers; the JSON has them.
OPTIONS = (
    "task", "questions", "max_operand", "problems", "examples", "task_options", "dataset",
    "dataset_split", "chat", "system_prompt", "heldout",
    "seed", "model", "use_peft", "quantize", "dtype", "weights", "attention", "max_new_tokens",
    "temperature", "reward", "reward_weights", "reward_timeout", "micro_batch_size", "sampling_tokens",
    "threads",
)  # fmt: skip


def answered(
    policy: Policy,
    task: Task,
    rows: list[Row],
    config: TrainConfig,
    temperature: float,
    seeds: Sequence[int],
) -> tuple[Rollout, Scores]:
    """Sample one completion for each of `rows`, and reward it; `seeds` has one number for each."""
    answers = rollout.sample(
        policy,
        [row["prompt"] for row in rows],
        config.max_new_tokens,
        temperature,
        min(BATCH, config.micro_batch_size or BATCH),
        batch_tokens=config.sampling_tokens,
        seeds=seeds,
    )
    return answers, rollout.reward(task, answers, rows, config.reward_timeout)


def seeds_of(seed: int, problems: int, samples: int = 1) -> list[int]:
    """Return the seeds of the completions of one pass, `samples` for each problem.

    They depend on nothing else, so base and trained model get the same random numbers.
    """
    return [
        rollout.seed_of("evaluation", seed, i, j) for i in range(problems) for j in range(samples)
    ]


def mean_rewards(
    policy: Policy, task: Task, rows: list[Row], config: TrainConfig, temperature: float
) -> dict[str, float]:
    """Return means over one completion per row: "reward", the total, and "accuracy".

    "accuracy" is the mean of the first reward function: the one that tells whether an answer is right. The
    completions are those of seed 0.

    Args:
        temperature: the temperature of sampling; 0 is greedy.
    """
    _, scores = answered(policy, task, rows, config, temperature, seeds_of(0, len(rows)))
    return {"reward": scores.total.nanmean().item(), "accuracy": next(iter(scores.means.values()))}


def report(policy: Policy, task: Task, config: TrainConfig) -> str:
    """Return one line with accuracy and reward on the held-out problems, greedy and sampled."""
    greedy, sampled = (
        mean_rewards(policy, task, task.heldout, config, t) for t in (0.0, config.temperature)
    )
    return (
        f"accuracy {greedy['accuracy']:.3f} greedy, {sampled['accuracy']:.3f} sampled; "
        f"reward {greedy['reward']:.3f} greedy, {sampled['reward']:.3f} sampled "
        f"({len(task.heldout)} held-out problems)"
    )


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


def measure(
    policy: Policy, task: Task, config: TrainConfig, wanted: Wanted, name: str, bar: Bar
) -> list[Results]:
    """Evaluate a model at each temperature."""
    rows = task.heldout
    found = []
    for temperature in wanted.temperatures or (0.0, config.temperature):
        seeds, samples = wanted.seeds_at(temperature), wanted.samples_at(temperature)
        problems = [i for i in range(len(rows)) for _ in range(samples)]
        passes: list[tuple[Rollout, Scores]] = []
        for seed in seeds:  # one by one: a seed's batches do not depend on the others
            numbers = seeds_of(seed, len(rows), samples)
            some = [rows[i] for i in problems]
            passes.append(answered(policy, task, some, config, temperature, numbers))
            bar.advance(f"{name}, temperature {temperature:g}")
        found.append(
            Results(
                model=name,
                temperature=temperature,
                problems=problems * len(seeds),
                seeds=[seed for seed in seeds for _ in problems],
                samples=list(range(samples)) * (len(rows) * len(seeds)),
                completions=[c for answers, _ in passes for c in answers.completions],
                scores={
                    name: torch.cat([s.each[name] for _, s in passes]) for name in passes[0][1].each
                },
                total=torch.cat([s.total for _, s in passes]).double(),
                ended=torch.cat([answers.ended for answers, _ in passes]).double(),
                lengths=torch.cat([answers.mask.sum(1).cpu() for answers, _ in passes]).double(),
                failures=sum(s.failures for _, s in passes),
            )
        )
    return found


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
        options = configs.to_dict(self.config)
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


def evaluate_run(
    run_dir: Path, device: str = "auto", wanted: Wanted | None = None, command: str = ""
) -> str:
    """Evaluate the newest checkpoint of a run, or `run_dir` if that is a checkpoint; return the text.

    Args:
        command: it is written to the JSON file.

    Raises:
        ValueError: it is no run, or has no checkpoint; there is no model before GRPO, or no such device; the
            JSON file cannot be written.
    """
    wanted = wanted or Wanted()
    if wanted.path is not None:
        check_writable(wanted.path)
    checkpoint = checkpoints.chosen(run_dir.expanduser())
    folder = checkpoint.resolve().parent.parent
    config = dataclasses.replace(configs.parse([str(folder / "config.yaml")]), device=device)
    plan: list[tuple[Path | None, list[str]]] = [(checkpoint.resolve(), [TRAINED])]
    if wanted.base and config.use_peft:
        plan[0][1].insert(0, BASE)
    elif wanted.base:  # it comes first: if it cannot be loaded, no time was lost
        plan.insert(0, (source_of_base(config, folder), [BASE]))
    torch.set_num_threads(models.threads(config))
    task = tasks.build(config)
    temperatures = tuple(wanted.temperatures or (0.0, config.temperature))
    wanted = dataclasses.replace(wanted, temperatures=temperatures)
    passes = (1 + wanted.base) * sum(len(wanted.seeds_at(t)) for t in temperatures)
    found: list[Results] = []
    with Bar("evaluation", passes) as bar:
        for source, names in plan:
            found += of_model(config, task, source, wanted, names, bar)
            gc.collect()  # what is left of this model goes before the next one comes
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    evaluation = Evaluation(checkpoint, config, task, wanted, found)
    if wanted.path is not None:
        content = json.dumps(evaluation.to_dict(command), indent=1, allow_nan=False)
        files.write(wanted.path, (content + "\n").encode())
    return evaluation.text()


def of_model(
    config: TrainConfig,
    task: Task,
    source: Path | None,
    wanted: Wanted,
    names: Sequence[str],
    bar: Bar,
) -> list[Results]:
    """Build a model and evaluate it; nothing keeps it afterwards.

    Args:
        source: the folder of its weights, or of its adapter; None: `config.model`.
        names: the model has an adapter if it has both names; without that, it is the base model.
    """
    policy = models.build(config, task.alphabet, source)
    rollout.check_prompts(policy, task.heldout, config.max_new_tokens)
    found = []
    for name in names:
        transformers.set_seed(wanted.seeds[0] % 2**32)  # for reward functions that draw numbers
        bare = name == BASE and policy.adapted
        with policy.without_adapter() if bare else contextlib.nullcontext():
            found += measure(policy, task, config, wanted, name, bar)
    return found


def source_of_base(config: TrainConfig, folder: Path) -> Path | None:
    """Return the folder of the model before GRPO; None: `config.model` is that model.

    Raises:
        ValueError: the run has not kept it.
    """
    if config.model is not None:
        return None
    kept = folder / "reference"
    if not kept.is_dir():
        raise ValueError(
            f"base: {kept} does not exist. A run of a new model keeps the model before GRPO only if "
            "there is a KL to it: train with --beta above 0"
        )
    return kept


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before the time of the evaluation is spent.

    Raises:
        ValueError: the message says why.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        partial = files.hidden(path, "partial")
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise ValueError(f"json={str(path)!r}: cannot be written: {error.strerror}") from error
