"""Tasks: problems, the rewards of their answers, and demonstrations for the warm-up of a new model."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from grpo_fast.trainer import rewards
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.tasks import arithmetic, countries, dataset, reasoning_gym
from grpo_fast.trainer.tasks.task import Order, Row, Task, batches, count

__all__ = ["Order", "Row", "Task", "batches", "build", "count"]


def build(config: TrainConfig) -> Task:
    """Build the task of a configuration.

    Raises:
        ValueError: the dataset or a reward function cannot be read, or there are too few problems.
    """
    folder = Path(config.reward_dir) if config.reward_dir else None
    functions = [rewards.load(r, folder, config.device) for r in config.reward]
    task = (dataset.build if config.dataset is not None else _maker(config.task))(config)
    if not functions:
        return task
    weights = config.reward_weights or [1.0] * len(functions)
    return dataclasses.replace(task, rewards=functions, weights=weights)


def _maker(name: str) -> Callable[[TrainConfig], Task]:
    """Return the function that makes the task of this name."""
    makers = {"arithmetic": arithmetic.build, "countries": countries.build}
    return reasoning_gym.build if name.startswith("reasoning_gym:") else makers[name]
