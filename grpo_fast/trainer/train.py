"""`train`: check the options, build the parts of a run, and make it, also as a dry run or resumed."""

import contextlib
import dataclasses
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from grpo_fast.trainer import checkpoints, console, parsing, progress, runs, tasks
from grpo_fast.trainer import model as models
from grpo_fast.trainer import rollout as rollouts
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.interruption import interruptible
from grpo_fast.trainer.loop import Run
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.parallel import Team
from grpo_fast.trainer.tasks import Task
from grpo_fast.trainer.update import check_optimizer


@dataclass(frozen=True)
class Summary:
    """The end of a run.

    Attributes:
        checkpoint: the last checkpoint.
        first_reward, last_reward: the mean reward of the first batch, before any update, and of the last ten.
        signal: the number of the signal that ended the run early, or None.
    """

    run_dir: Path
    checkpoint: Path
    steps: int
    first_reward: float
    last_reward: float
    seconds: float
    signal: int | None


def train(config: TrainConfig, given: set[str] | None = None) -> Summary:
    """Make a whole run, or go on with one; its folder has config.yaml, metrics.jsonl and checkpoints.

    When it ends, also by an error or by SIGINT, SIGTERM or SIGHUP, a checkpoint is written. In several
    processes (torchrun, accelerate launch) all of them call this.

    Args:
        given: with `config.resume`, the names of the options that replace those of the run; None: those that
            differ from their defaults.

    Raises:
        ValueError: a dataset, reward, model or device cannot be used; nothing was written.
        FileExistsError: the run exists, or another process is writing to it.
        FloatingPointError: the loss or the gradient is NaN or infinite; the message names the step.
        OSError: something could not be written, or a server not reached; the message says what and why.
    """
    with console.lasting():
        if config.dry_run:
            with tempfile.TemporaryDirectory() as folder:
                return _train(shortened(config, folder), given)
        return _train(config, given)


def shortened(config: TrainConfig, folder: str) -> TrainConfig:
    """Return the options of a dry run: two steps with few and short completions."""
    print(
        "dry run: two steps with a tiny model of the same architecture and random weights"
        + (", which is not quantised" if config.quantize else "")
    )
    team = int(os.environ.get("WORLD_SIZE") or 1)
    options: dict[str, Any] = {
        "output_dir": folder, "name": "dry_run", "steps": 2, "warmup_steps": 0, "resume": None,
        "server": None, "report_to": [], "prompts_per_step": 2 * team, "heldout": 1, "samples": 1,
        "group_size": min(config.group_size, 4), "max_new_tokens": min(config.max_new_tokens, 8),
    }  # fmt: skip
    shorter = dataclasses.replace(config, **options)
    try:
        tasks.build(shorter)
    except ValueError as error:
        if config.dataset is None or Path(config.dataset).exists():
            raise
        print(f"dry run: the built-in task takes the place of the dataset: {error}")
        shorter = dataclasses.replace(shorter, dataset=None, chat=False, system_prompt=None)
    return shorter


def _train(config: TrainConfig, given: set[str] | None) -> Summary:
    started = time.perf_counter()
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available() and config.device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before anything is put on a GPU
    device, _ = models.placement(config)
    team = Team(device)
    run_dir = team.on_main(lambda: runs.find_free(config)) if config.resume else None
    if config.resume:
        if run_dir is None:
            if team.main:
                print(f"resume: there is no run in {config.output_dir} yet; this is the first")
            config = dataclasses.replace(config, resume=None)
        else:
            config = parsing.resumed(config, run_dir, given)
    check_team(config, team)
    progress.check_trackers(config)
    check_optimizer(config)
    if run_dir is None:
        team.on_main(lambda: runs.check(config))
    set_seed(config.seed)
    # For a model as small as the new one threads gain little, and cost much where cores are shared.
    torch.set_num_threads(models.threads(config))
    # Of several processes each has its own device.
    here = dataclasses.replace(config, device=str(team.device)) if team.size > 1 else config
    checkpoint = checkpoints.resumable(run_dir)[-1:] if run_dir else []

    def load() -> tuple[Task, Policy]:
        task = tasks.build(here)
        check_answers(config, task)
        policy = models.build(here, task.alphabet, checkpoint[0] if checkpoint else None)
        rollouts.check_prompts(policy, [*task.train, *task.heldout], config.max_new_tokens)
        return task, policy

    task, policy = team.together(load)  # nothing is written, or deleted, before all have loaded all
    config = dataclasses.replace(config, heldout=config.heldout or tasks.count(task.heldout))
    if run_dir is None:
        run_dir = team.on_main(lambda: runs.create(config))
    lock = runs.hold(run_dir) if team.main else contextlib.nullcontext()
    with lock, interruptible() as interruption:
        if team.main:  # again when it goes on, maybe with more steps
            parsing.save(config, run_dir / "config.yaml")
        run = Run(config, task, policy, run_dir, team, started)
        run.whole(interruption, checkpoint[0] if checkpoint else None)
    rows = run.metrics.rows
    first = rows[0]["reward"] if rows else None
    return Summary(
        run_dir=run_dir,
        checkpoint=run.saved[1] if run.saved else run_dir,
        steps=run.step,
        first_reward=float("nan") if first is None else first,
        last_reward=run.metrics.recent("reward"),
        seconds=time.perf_counter() - started,
        signal=run.signal,
    )


def check_team(config: TrainConfig, team: Team) -> None:
    """Refuse options that several processes cannot share, and tell of `fsdp` in one process.

    Raises:
        ValueError: the prompts of a step cannot be dealt out evenly, or accelerate is configured to share
            weights, which `fsdp` does here.
    """
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(name, "false").lower() in ("1", "true") and not config.fsdp:
            raise ValueError(f"{name}: accelerate's settings for it are not used here; give --fsdp")
    if config.prompts_per_step % team.size:
        raise ValueError(
            f"prompts_per_step={config.prompts_per_step}: want a multiple of the {team.size} processes"
        )
    if config.fsdp and team.size == 1:
        print("fsdp: there is one process, so no weights are shared; torchrun starts several")


def check_answers(config: TrainConfig, task: Task) -> None:
    """Refuse answers longer than the completions of a new model, which has one token per character.

    Raises:
        ValueError: an answer is too long.
    """
    if config.model is not None or config.dataset is None or task.demonstration is None:
        return
    if not config.warmup_steps:  # nothing imitates them
        return
    longest = max(len(str(row["answer"])) for row in [*task.train, *task.heldout])
    if longest + 1 > config.max_new_tokens:
        raise ValueError(
            f"max_new_tokens={config.max_new_tokens}: the longest answer has {longest} characters, one token "
            f"each, and an end: set --max_new_tokens {longest + 1} or more"
        )
