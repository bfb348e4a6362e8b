"""The task of adding two whole numbers, for a new model."""

import random

from grpo_fast.trainer import rewards
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.rewards import Reward
from grpo_fast.trainer.tasks.task import Row, Task, split


def build(config: TrainConfig) -> Task:
    """Build the task of adding two whole numbers: the answer to `12+34=` is `[46]`.

    The right number earns 0.9, and the right form 0.1. A share `config.warmup_error_rate` of the
    demonstrations has one wrong digit: as in pretraining text, the form is right, but not every content.
    """
    numbers = range(config.max_operand + 1)
    rows: list[Row] = [
        {"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in numbers for b in numbers
    ]

    def demonstration(row: Row, rng: random.Random) -> str:
        digits = list(row["answer"])
        if rng.random() < config.warmup_error_rate:
            where = rng.randrange(len(digits))
            digits[where] = rng.choice([d for d in "0123456789" if d != digits[where]])
        return f"[{''.join(digits)}]"

    train, heldout = split(rows, config)
    functions: list[Reward] = [rewards.correct, rewards.bracketed_number]
    return Task(train, heldout, functions, [0.9, 0.1], demonstration, "0123456789+=[]")
