"""The training loop: warm up a new model, then sample, reward and update until done or interrupted."""

import contextlib
import dataclasses
import math
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import set_seed

from grpo_fast.trainer import config as configs
from grpo_fast.trainer import console, evaluate, files, runs, tasks
from grpo_fast.trainer import model as models
from grpo_fast.trainer import rollout as rollouts
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.interruption import Interruption, interruptible, undivided
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.rewards import RewardError
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.trainer.tasks import Task
from grpo_fast.trainer.update import Learner
from grpo_fast.trainer.warmup import warm_up


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


def train(config: TrainConfig) -> Summary:
    """Make a whole run; its folder has `config.yaml`, `metrics.jsonl`, `curve.png` and checkpoints.

    When it ends, also by an error or by SIGINT, SIGTERM or SIGHUP, its weights are saved.

    Raises:
        ValueError: a dataset, reward, model or device cannot be used; nothing was written.
        FileExistsError: the run exists, or another process is writing to it.
        FloatingPointError: the loss or the gradient is NaN or infinite; the message names the step.
        RewardError: a reward function raised, or returned no list of rewards.
        OSError: something could not be written; the message says what and why.
    """
    with console.lasting():
        return _train(config)


def _train(config: TrainConfig) -> Summary:
    started = time.perf_counter()
    check_alone()
    runs.check(config)
    set_seed(config.seed)
    # For a model as small as the new one threads gain little, and cost much where cores are shared.
    usual = torch.get_num_threads() if config.model else 1
    torch.set_num_threads(config.threads or usual)
    task = tasks.build(config)
    config = dataclasses.replace(config, heldout=tasks.count(task.heldout))
    check_answers(config, task)
    policy = models.build(config, task.alphabet)
    rollouts.check_prompts(policy, [*task.train, *task.heldout], config.max_new_tokens)
    run_dir = runs.create(config)
    with runs.hold(run_dir), interruptible() as interruption:
        configs.save(config, run_dir / "config.yaml")
        if config.model is not None and config.dataset is None:
            print(f"no --dataset: {config.model} is trained on the built-in task {config.task!r}")
        print(f"{run_dir}: {len(task.train)} training and {len(task.heldout)} held-out problems")
        run = _Run(config, task, policy, run_dir, runs.Metrics(run_dir), started)
        try:
            if config.model is None and task.demonstration is not None:
                taken = warm_up(policy, task, config, lambda: bool(interruption.signal))
                print(f"warm-up: {taken} steps, {time.perf_counter() - started:.0f} s")
            if not interruption.signal:
                run.show("before GRPO")
                run.grpo(interruption)
            checkpoint = run.save()
            run.draw()
        except BaseException as error:
            run.rescue()
            if isinstance(error, ValueError) and not isinstance(error, RewardError):
                # No option is wrong any more: let its traceback be seen.
                raise RuntimeError(f"step {run.step}: {error}") from error
            raise
        if not interruption.signal:
            run.show("after GRPO")
        if run.metrics.rows and all(r["groups_without_signal"] == 1 for r in run.metrics.rows):
            print(
                "warning: in no group did completions earn different rewards: nothing was learned from them",
                file=sys.stderr,
            )
    rows = run.metrics.rows
    first = rows[0]["reward"] if rows else None
    return Summary(
        run_dir=run_dir,
        checkpoint=checkpoint,
        steps=run.step,
        first_reward=float("nan") if first is None else first,
        last_reward=run.metrics.recent("reward"),
        seconds=time.perf_counter() - started,
        signal=interruption.signal,
    )


def check_alone() -> None:
    """Refuse to run as one of several processes: each would train its own copy.

    Raises:
        ValueError: the variables of torchrun, accelerate or MPI say that there are several.
    """
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        if os.environ.get(name, "1") not in ("", "0", "1"):
            raise ValueError(
                f"{name}={os.environ[name]}: this trainer is one process on one device; for more, use "
                "this library's losses in TRL or verl (docs/trl.md, docs/integrations.md)"
            )


def check_answers(config: TrainConfig, task: Task) -> None:
    """Refuse answers longer than the completions of a new model, which has one token per character.

    Raises:
        ValueError: an answer is too long.
    """
    if config.model is not None or config.dataset is None or task.demonstration is None:
        return
    longest = max(len(str(row["answer"])) for row in [*task.train, *task.heldout])
    if longest + 1 > config.max_new_tokens:
        raise ValueError(
            f"max_new_tokens={config.max_new_tokens}: the longest answer has {longest} characters, one token "
            f"each, and an end: set --max_new_tokens {longest + 1} or more"
        )


@dataclass
class _Run:
    config: TrainConfig
    task: Task
    policy: Policy
    run_dir: Path
    metrics: runs.Metrics
    started: float
    step: int = 0
    saved: tuple[int, Path] | None = None  # optimiser steps, and where
    updates: int = 0
    process: int = dataclasses.field(default_factory=os.getpid)
    warned: bool = False

    def save(self) -> Path:
        """Write a checkpoint of the current weights, unless there is one, and return it."""
        if self.saved is None or self.saved[0] != self.updates:
            with undivided():
                path = models.save(
                    self.policy, self.run_dir, self.step, self.config.keep_checkpoints
                )
                self.saved = self.updates, path
        return self.saved[1]

    def draw(self) -> None:
        runs.plot(self.metrics.rows, self.run_dir / "curve.png")

    def rescue(self) -> None:
        """Save the weights of a run that ends by an exception, and say where they are.

        It does nothing in a child that a reward function has forked: the run itself goes on.
        """
        if os.getpid() != self.process:
            return
        with contextlib.suppress(OSError, KeyboardInterrupt), undivided():
            try:
                print(f"the weights after step {self.step} are in {self.save()}", file=sys.stderr)
            except Exception as error:  # must not hide the one that ended the run
                found = models.checkpoints(self.run_dir)
                why = files.reason(error) if isinstance(error, OSError) else error
                print(
                    f"the weights after step {self.step} could not be saved: {why}; "
                    f"the newest checkpoint is {found[-1] if found else 'none'}",
                    file=sys.stderr,
                )
            self.draw()

    def grpo(self, interruption: Interruption) -> None:
        """Make all GRPO steps. `self.step` counts the finished ones."""
        config = self.config
        learner = Learner(self.policy, config)
        batches = tasks.batches(
            self.task.train, config.prompts_per_step, random.Random(config.seed + 1)
        )
        with tqdm(total=config.steps, desc="GRPO", mininterval=0.5) as bar:
            while self.step < config.steps and not interruption.signal:
                row = self.grpo_step(learner, next(batches))
                self.metrics.write(row)
                bar.update()
                bar.set_postfix_str(
                    f"reward {row['reward']:.3f}, "
                    + (f"kl {row['kl']:.3f}, " if learner.reference is not None else "")
                    + f"clip {row['clip_fraction']:.3f}, {row['tokens_per_second']:.0f} tokens/s"
                )
                if self.step % config.save_steps == 0 and self.step < config.steps:
                    self.save()
                    self.draw()

    def grpo_step(self, learner: Learner, problems: list[tasks.Row]) -> dict[str, float]:
        """Sample `group_size` completions per problem, reward them, update, and return the metrics."""
        config, begin = self.config, time.perf_counter()
        rows = [row for row in problems for _ in range(config.group_size)]
        rollout = self.sample(rows)
        rewards, means = rollouts.reward(self.task, rollout, rows)
        if rewards.isnan().any() and not self.warned:
            self.warned = True
            tqdm.write(
                f"step {self.step}: every reward function gave None for "
                f"{int(rewards.isnan().sum())} completions; such completions have advantage 0",
                file=sys.stderr,
            )
        step = self.step
        with undivided():  # the weights after a whole step have its name
            try:
                metrics = learner.update(rollout, rewards)
                self.step += 1
            except FloatingPointError as error:
                raise FloatingPointError(f"step {step}: {error}; the run ends here") from error
            finally:
                self.updates = learner.updates
        seconds = time.perf_counter() - begin
        return {
            "step": step,
            "reward": rewards.nanmean().item(),
            "reward_std": spread(rewards),
            **{f"reward/{name}": mean for name, mean in means.items()},
            "without_reward": rewards.isnan().float().mean().item(),
            "groups_without_signal": same_reward(rewards, config.group_size),
            **completion_metrics(rollout),
            **metrics,
            "tokens_per_second": rollout.mask.sum().item() / seconds,
            "step_seconds": seconds,
            "seconds": time.perf_counter() - self.started,
        }

    def sample(self, rows: list[tasks.Row]) -> Rollout:
        """Sample one completion for each of `rows`."""
        config, prompts = self.config, [row["prompt"] for row in rows]
        return rollouts.sample(
            self.policy,
            prompts,
            config.max_new_tokens,
            config.temperature,
            config.micro_batch_size,
        )

    def show(self, when: str) -> None:
        """Print accuracy on the held-out problems and a few answers to them."""
        print(f"{when}: {evaluate.report(self.policy, self.task, self.config)}")
        rows = self.task.heldout[: self.config.samples]
        if not rows:
            return
        answers = self.sample(rows)
        rewards, _ = rollouts.reward(self.task, answers, rows)
        for prompt, answer, value in zip(
            answers.prompts, answers.completions, rewards.tolist(), strict=True
        ):
            print(f"  {prompt!r} -> {answer!r}  reward {value:.2f}")


def spread(rewards: Tensor) -> float:
    """Return the standard deviation of the rewards that are not missing; NaN for fewer than two."""
    known = rewards[~rewards.isnan()]
    return known.std().item() if len(known) > 1 else math.nan


def same_reward(rewards: Tensor, group_size: int) -> float:
    """Return the share of groups whose rewards are all equal (or missing, NaN): nothing is learned there."""
    groups = rewards.view(-1, group_size)
    lowest, highest = groups.nan_to_num(math.inf).amin(1), groups.nan_to_num(-math.inf).amax(1)
    return (lowest >= highest).float().mean().item()


def completion_metrics(rollout: Rollout) -> dict[str, float]:
    """Return the mean length in tokens, and the share of completions cut off by the length limit."""
    return {
        "completion_length": rollout.mask.sum(1).float().mean().item(),
        "truncated": 1 - rollout.ended.float().mean().item(),
    }
