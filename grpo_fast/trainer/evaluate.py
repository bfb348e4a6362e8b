"""The evaluation of a policy on held-out problems."""

import dataclasses
from pathlib import Path

import torch

from grpo_fast.trainer import checkpoints, rollout, tasks
from grpo_fast.trainer import config as configs
from grpo_fast.trainer import model as models
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.tasks import Row, Task

BATCH = 256


def mean_rewards(
    policy: Policy, task: Task, rows: list[Row], config: TrainConfig, temperature: float
) -> dict[str, float]:
    """Return means over one completion per row: "reward", the total, and "accuracy".

    "accuracy" is the mean of the first reward function: the one that tells whether an answer is right.

    Args:
        temperature: the temperature of sampling; 0 is greedy.
    """
    prompts = [row["prompt"] for row in rows]
    answers = rollout.sample(
        policy,
        prompts,
        config.max_new_tokens,
        temperature,
        min(BATCH, config.micro_batch_size or BATCH),
        batch_tokens=config.sampling_tokens,
    )
    scores = rollout.reward(task, answers, rows, config.reward_timeout)
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


def evaluate_run(run_dir: Path, device: str = "auto", seed: int = 0) -> str:
    """Return the `report` of the newest checkpoint of a run, or of `run_dir` if that is a checkpoint.

    Raises:
        ValueError: it is no run, or has no checkpoint.
    """
    run_dir = run_dir.expanduser()
    checkpoint = run_dir
    if not any((run_dir / f"{kind}config.json").is_file() for kind in ("", "adapter_")):
        checkpoint = checkpoints.latest(run_dir)
    settings = checkpoint.resolve().parent.parent / "config.yaml"
    config = dataclasses.replace(configs.parse([str(settings)]), device=device)
    task = tasks.build(config)
    policy = models.build(config, task.alphabet, checkpoint.resolve())
    rollout.check_prompts(policy, task.heldout, config.max_new_tokens)
    torch.manual_seed(seed)
    return f"{checkpoint}: {report(policy, task, config)}"
