"""The model, the prompts and the completions that all parts measure on."""

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import set_seed

from benchmarks import ROOT
from grpo_fast import ops
from grpo_fast.trainer import model as models
from grpo_fast.trainer import parsing, tasks
from grpo_fast.trainer import rollout as rollouts
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.forward import Forward, MicroBatch
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.trainer.tasks import Task

RECIPE = ROOT / "recipes" / "smollm2-geo.yaml"
# What all parts set beside the recipe, where a part does not say otherwise.
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "weights": "float32",
    "device": "cpu",
    "threads": 1,
}


def config_of(given: Sequence[str], **options: Any) -> TrainConfig:
    """Return the recipe with the options of a part, and then with those of the command line.

    Raises:
        ValueError: an option is unknown, or its value is bad.
    """
    chosen = (f"--{name}={value}" for name, value in (OPTIONS | options).items())
    return parsing.parse([str(RECIPE), *chosen, *given])


class Sampled(NamedTuple):
    """Completions of a policy, sampled as the trainer does, and their rewards."""

    policy: Policy
    rollout: Rollout
    rewards: Tensor  # (B,)
    advantages: Tensor  # (B,)


def loaded(config: TrainConfig) -> tuple[Task, Policy]:
    """Build the task and load the policy, as the trainer does."""
    set_seed(config.seed)
    torch.set_num_threads(config.threads or 1)
    task = tasks.build(config)
    return task, models.build(config, task.alphabet)


def sampled(config: TrainConfig) -> Sampled:
    """Sample the first step of a run, with its prompts and its random numbers, and reward it."""
    task, policy = loaded(config)
    problems = tasks.Order(task.train, config.seed).take(0, config.prompts_per_step)
    rows = [row for row in problems for _ in range(config.group_size)]
    seeds = [rollouts.seed_of(config.seed, 0, 0, b) for b in range(len(rows))]
    rollout = rollouts.Sampler(policy, config).sample([row["prompt"] for row in rows], seeds)
    rewards = rollouts.reward(task, rollout, rows, config.reward_timeout).total
    advantages = ops.group_advantage(rewards, group_size=config.group_size, nan="skip")
    return Sampled(policy, rollout, rewards, advantages)


def planned(config: TrainConfig, given: Sampled) -> tuple[Forward, MicroBatch]:
    """Plan the forward of all completions as the trainer does."""
    forward = Forward(given.policy, config, config.to_objective(), shown=False)
    forward.compare(given.policy.model)
    return forward, forward.micro_batch(given.rollout, given.advantages)


def perturbed(model: Any, size: float, seed: int) -> Any:
    """Return a copy whose weights have noise, in units of the standard deviation of their tensor."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            spread = p.float().std() if p.numel() > 1 else p.new_zeros(())
            p += size * spread * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return other


def beside(there: Path, name: str) -> Path:
    """Return the path of a file of this benchmark about a run."""
    return there.with_name(f"{there.name}.{name}")


def rounded(value: Any) -> Any:
    """Round a number to six digits."""
    return None if value is None else float(f"{value:.6g}")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation of all operators."""
    before = os.environ.get("GRPO_FAST_BACKEND")
    os.environ["GRPO_FAST_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["GRPO_FAST_BACKEND"]
        else:
            os.environ["GRPO_FAST_BACKEND"] = before
