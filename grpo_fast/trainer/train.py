"""The training loop: warm up a new model, then sample, reward and update until done or interrupted."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import set_seed

from grpo_fast.trainer import config as configs
from grpo_fast.trainer import evaluate, runs, tasks
from grpo_fast.trainer import model as models
from grpo_fast.trainer import rollout as rollouts
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.trainer.tasks import Task
from grpo_fast.trainer.update import Learner
from grpo_fast.trainer.warmup import warm_up


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        checkpoint: the last one written.
        first_reward, last_reward: mean reward of the first batch, before any update, and of the last ten.
        signal: number of the signal that ended it early, or None.
    """

    run_dir: Path
    checkpoint: Path
    steps: int
    first_reward: float
    last_reward: float
    seconds: float
    signal: int | None


def train(config: TrainConfig) -> Summary:
    """A whole run: `config.yaml`, `metrics.jsonl`, `curve.png` and checkpoints in a folder of its own.

    However it ends (also by SIGINT or SIGTERM), the weights of that moment are saved.

    Raises:
        ValueError: a dataset, reward, model or device that cannot be used.
        FileExistsError: the run exists.
        FloatingPointError: loss or gradient became NaN or infinite; names the step.
    """
    started = time.perf_counter()
    set_seed(config.seed)
    # On a model as small as the built-in one threads gain little, and lose much where cores are shared.
    usual = torch.get_num_threads() if config.model else 1
    torch.set_num_threads(config.threads or usual)
    task = tasks.build(config)
    policy = models.build(config, task.alphabet)
    run_dir = runs.create(config)
    configs.save(config, run_dir / "config.yaml")
    print(f"{run_dir}: {len(task.train)} training and {len(task.heldout)} held-out problems")
    run = _Run(config, task, policy, run_dir, runs.Metrics(run_dir), started)
    with interruptible() as interruption:
        try:
            if config.model is None and task.demonstration is not None:
                taken = warm_up(policy, task, config, lambda: bool(interruption.signal))
                print(f"warm-up: {taken} steps, {time.perf_counter() - started:.0f} s")
            if not interruption.signal:
                run.show("before GRPO")
                run.grpo(interruption)
        finally:
            checkpoint = models.save(policy, run_dir, run.step, config.keep_checkpoints)
            runs.plot(run.metrics.rows, run_dir / "curve.png")
        if not interruption.signal:
            run.show("after GRPO")
    rows = run.metrics.rows
    return Summary(
        run_dir=run_dir,
        checkpoint=checkpoint,
        steps=run.step,
        first_reward=rows[0]["reward"] if rows else float("nan"),
        last_reward=run.metrics.recent("reward"),
        seconds=time.perf_counter() - started,
        signal=interruption.signal,
    )


@dataclass
class Interruption:
    signal: int | None = None


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Turn the first SIGINT or SIGTERM into a note to stop after the step; a second one stops at once.

    Outside the main thread, where Python handles no signals, it does nothing.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def note(number: int, frame: object) -> None:
        if interruption.signal is not None:
            raise KeyboardInterrupt
        interruption.signal = number
        # print may be in the middle of a write that this handler interrupted
        os.write(2, b"\nstopping after this step; once more to stop at once\n")

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass
class _Run:
    config: TrainConfig
    task: Task
    policy: Policy
    run_dir: Path
    metrics: runs.Metrics
    started: float
    step: int = 0

    def grpo(self, interruption: Interruption) -> None:
        """All GRPO steps. `self.step` counts the finished ones."""
        config = self.config
        learner = Learner(self.policy, config)
        batches = tasks.batches(
            self.task.train, config.prompts_per_step, random.Random(config.seed + 1)
        )
        with tqdm(total=config.steps, desc="GRPO", mininterval=0.5) as bar:
            while self.step < config.steps and not interruption.signal:
                row = self.grpo_step(learner, next(batches))
                self.metrics.write(row)
                self.step += 1
                bar.update()
                bar.set_postfix_str(
                    f"reward {row['reward']:.3f}, "
                    + (f"kl {row['kl']:.3f}, " if learner.reference is not None else "")
                    + f"clip {row['clip_fraction']:.3f}, {row['tokens_per_second']:.0f} tokens/s"
                )
                if self.step % config.save_steps == 0 and self.step < config.steps:
                    models.save(self.policy, self.run_dir, self.step, config.keep_checkpoints)
                    runs.plot(self.metrics.rows, self.run_dir / "curve.png")

    def grpo_step(self, learner: Learner, problems: list[tasks.Row]) -> dict[str, float]:
        """Sample `group_size` completions per problem, reward them, update; the row of metrics."""
        config, begin = self.config, time.perf_counter()
        rows = [row for row in problems for _ in range(config.group_size)]
        rollout = rollouts.sample(
            self.policy, [row["prompt"] for row in rows], config.max_new_tokens, config.temperature
        )
        rewards, means = rollouts.reward(self.task, rollout, rows)
        try:
            metrics = learner.update(rollout, rewards)
        except FloatingPointError as error:
            raise FloatingPointError(f"step {self.step}: {error}; the run ends here") from error
        seconds = time.perf_counter() - begin
        return {
            "step": self.step,
            "reward": rewards.mean().item(),
            "reward_std": rewards.std().item(),
            **{f"reward/{name}": mean for name, mean in means.items()},
            "groups_without_signal": same_reward(rewards, config.group_size),
            **completion_metrics(rollout),
            **metrics,
            "tokens_per_second": rollout.mask.sum().item() / seconds,
            "step_seconds": seconds,
            "seconds": time.perf_counter() - self.started,
        }

    def show(self, when: str) -> None:
        """Print accuracy on the held-out problems and a few answers to them."""
        print(f"{when}: {evaluate.report(self.policy, self.task, self.config)}")
        config, rows = self.config, self.task.heldout[: self.config.samples]
        if not rows:
            return
        prompts = [row["prompt"] for row in rows]
        answers = rollouts.sample(self.policy, prompts, config.max_new_tokens, config.temperature)
        rewards, _ = rollouts.reward(self.task, answers, rows)
        for prompt, answer, value in zip(
            answers.prompts, answers.completions, rewards.tolist(), strict=True
        ):
            print(f"  {prompt!r} -> {answer!r}  reward {value:.2f}")


def same_reward(rewards: Tensor, group_size: int) -> float:
    """Share of groups whose rewards are all equal, which teach nothing."""
    groups = rewards.view(-1, group_size)
    return (groups == groups[:, :1]).all(1).float().mean().item()


def completion_metrics(rollout: Rollout) -> dict[str, float]:
    """Mean length in tokens, and the share of completions cut off by the length limit."""
    return {
        "completion_length": rollout.mask.sum(1).float().mean().item(),
        "truncated": 1 - rollout.ended.float().mean().item(),
    }
