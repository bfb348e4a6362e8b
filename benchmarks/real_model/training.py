"""Train a few steps by one trainer, and write what they took: a process of `benchmarks.real_model trl`.

python -m benchmarks.real_model.training PROVIDER STEPS FOLDER OUT [OPTIONS OF THE TRAINER]
"""

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.measuring import memory
from benchmarks.real_model import setup
from grpo_fast.trainer import tasks
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.loop import Run
from grpo_fast.trainer.train import train


def by_included(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Train by the included trainer; its own metrics have the times."""
    peaks: list[int | None] = []
    real = Run.grpo

    def grpo(self: Run, *given: Any) -> None:
        peaks.append(memory.peak_extra_bytes(lambda: real(self, *given)))

    with mock.patch.object(Run, "grpo", grpo):
        ended = train(dataclasses.replace(config, output_dir=str(folder), name="run"))
    lines = (ended.run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {
        "step": [row["step_seconds"] for row in rows],
        "sampling": [row["sampling_seconds"] for row in rows],
        "update": [row["step_seconds"] - row["sampling_seconds"] for row in rows],
        "tokens": [row["tokens"] for row in rows],
        "peak_extra_bytes": peaks[0],
        "shared": config.share_prompts,
    }


def by_trl(config: TrainConfig, folder: Path, provider: str) -> dict[str, Any]:
    """Train by TRL's trainer, or by ours for TRL, with the options of the included one."""
    from transformers import TrainerCallback

    trainer = _trainer(config, folder, provider)
    ends: list[float] = []
    sampling: list[float] = []
    tokens: list[float] = []
    real = trainer._generate_and_score_completions

    def sample(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        found = real(*given, **named)
        sampling.append(time.perf_counter() - start)
        tokens.append(float(found["completion_mask"].sum()))
        return found

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    trainer._generate_and_score_completions = sample
    trainer.add_callback(Clock())
    peak = memory.peak_extra_bytes(trainer.train)
    steps = [b - a for a, b in itertools.pairwise(ends)]
    return {
        "step": steps,
        "sampling": sampling,
        "update": [a - b for a, b in zip(steps, sampling, strict=True)],
        "tokens": tokens,
        "peak_extra_bytes": peak,
        "shared": "auto" if provider == "grpo_fast-shared" else "off",
    }


def _trainer(config: TrainConfig, folder: Path, provider: str) -> Any:
    """Build a trainer of TRL's for the recipe: its prompts in the same order, and its options."""
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer as Stock

    from grpo_fast.integrations.trl import GRPOTrainer

    task, policy = setup.loaded(config)
    count = config.prompts_per_step * config.steps
    objective = config.to_objective()
    arguments = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=config.prompts_per_step * config.group_size,
        num_generations=config.group_size,
        max_completion_length=config.max_new_tokens,
        max_steps=config.steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        optim=config.optim,
        max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
        temperature=config.temperature,
        beta=objective.beta,
        epsilon=objective.epsilon_low,
        epsilon_high=objective.epsilon_high,
        loss_type="dapo",
        reward_weights=task.weights,
        seed=config.seed,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    own = provider.startswith("grpo_fast")
    shared = {"share_prompts": "auto" if provider == "grpo_fast-shared" else "off"} if own else {}
    return (GRPOTrainer if own else Stock)(
        model=policy.model,
        reward_funcs=task.rewards,
        args=arguments,
        train_dataset=Dataset.from_list(tasks.Order(task.train, config.seed).take(0, count)),
        processing_class=policy.tokenizer,
        **shared,
    )


def main(arguments: Sequence[str]) -> None:
    provider, steps, folder, out, *given = arguments
    few = {"steps": steps, "heldout": 8, "samples": 0, "completions_steps": 0, "save_steps": 1000}
    config = setup.config_of(given, dtype="float32", **few)
    if provider == "trainer":
        found = by_included(config, Path(folder))
    else:
        found = by_trl(config, Path(folder), provider)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
