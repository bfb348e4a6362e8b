"""The evaluation of a policy on held-out problems, with intervals, also beside the model before GRPO."""

import contextlib
import dataclasses
import errno
import gc
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from grpo_fast.trainer import checkpoints, files, parsing, rollout, tasks
from grpo_fast.trainer import model as models
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.progress import Bar
from grpo_fast.trainer.results import BASE, TRAINED, Evaluation, Results, Wanted
from grpo_fast.trainer.rewards import Scores
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.trainer.tasks import Row, Task

BATCH = 256


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
        share=config.share_prompts != "off",
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


def measure(
    policy: Policy, task: Task, config: TrainConfig, wanted: Wanted, name: str, bar: Bar
) -> list[Results]:
    """Evaluate a model at each temperature."""
    rows = task.heldout
    found = []
    for temperature in wanted.temperatures_of(config):
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
    checkpoint, folder = checkpoints.chosen(run_dir.expanduser())
    config = dataclasses.replace(parsing.parse([str(folder / "config.yaml")]), device=device)
    plan: list[tuple[Path | None, list[str]]] = [(checkpoint.resolve(), [TRAINED])]
    if wanted.base and config.use_peft:
        plan[0][1].insert(0, BASE)
    elif wanted.base:  # it comes first: if it cannot be loaded, no time was lost
        plan.insert(0, (source_of_base(config, folder), [BASE]))
    torch.set_num_threads(models.threads(config))
    task = tasks.build(config)
    seeds = sum(len(wanted.seeds_at(t)) for t in wanted.temperatures_of(config))
    found: list[Results] = []
    with Bar("evaluation", (1 + wanted.base) * seeds) as bar:
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
