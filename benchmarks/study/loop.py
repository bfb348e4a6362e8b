"""The loop that GRPO and PPO share: sample, reward, update, with what a step took."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from benchmarks.study.ppo import PPO
from benchmarks.study.variants import Variant
from grpo_fast.trainer import checkpoints, evaluate, files, tasks
from grpo_fast.trainer import model as models
from grpo_fast.trainer import rollout as rollouts
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.loop import silent
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.parallel import Team
from grpo_fast.trainer.rollout import Rollout, Sampler, completion_logits
from grpo_fast.trainer.tasks import Task
from grpo_fast.trainer.update import Learner
from grpo_fast.trainer.warmup import warm_up

EVERY = 5  # steps between two measurements of entropy and KL
SAMPLES = 4  # answers to each held-out problem at temperature 1
# Of the metrics of an update; those of a value model where there is one.
KEPT = ("clip_fraction", "grad_norm", "value_loss", "explained_variance")


class Clock:
    """Seconds since its start, on the wall and of this process's own work."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Return both."""
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


class Loop:
    """A run of some steps, by GRPO or, where the variant has a critic, by PPO."""

    def __init__(self, variant: Variant, config: TrainConfig, task: Task, policy: Policy) -> None:
        self.variant, self.config, self.task, self.policy = variant, config, task, policy
        self.learner = (
            PPO(policy, config, variant.critic) if variant.critic else Learner(policy, config)
        )
        self.sampler = Sampler(policy, config)
        self.order = tasks.Order(task.train, config.seed)

    def step(
        self, step: int, look: Callable[[Rollout], dict[str, float]] | None = None
    ) -> dict[str, float]:
        """Make a step and return its metrics.

        Args:
            look: called with the completions before the update; what it takes is not counted.
        """
        count, samples = self.config.prompts_per_step, self.variant.samples
        clock = Clock()
        problems = self.order.take(step * count, count)
        rows = [row for row in problems for _ in range(samples)]
        seeds = [rollouts.seed_of(self.config.seed, step, 0, b) for b in range(len(rows))]
        rollout = self.sampler.sample([row["prompt"] for row in rows], seeds)
        scores = rollouts.reward(self.task, rollout, rows, self.config.reward_timeout)
        sampling = clock.read()
        seen = look(rollout) if look else {}
        clock = Clock()
        metrics = self.learner.update(rollout, scores.total)
        update = clock.read()
        return {
            "reward": scores.total.mean().item(),
            "accuracy": next(iter(scores.means.values())),
            "without_signal": _without_signal(scores.total, self.variant.group or samples),
            "tokens": rollout.mask.sum().item(),
            **{name: metrics[name] for name in KEPT if name in metrics},
            **seen,
            "sampling_seconds": sampling[0],
            "update_seconds": update[0],
            "seconds": sampling[0] + update[0],
            "cpu_seconds": sampling[1] + update[1],
        }

    def held(self) -> dict[str, int]:
        """Return the bytes of the models, gradients and optimizer states, by name."""
        learner = self.learner
        found = {
            "policy": _bytes(self.policy.model.parameters()),
            "policy_gradients": _bytes(p.grad for p in learner.parameters),
            "policy_optimizer": _states(learner.optimizer),
        }
        if learner.reference is not None:
            found["reference"] = _bytes(learner.reference.parameters())
        if isinstance(learner, PPO):
            found["critic"] = _bytes(learner.critic_weights)
            found["critic_gradients"] = _bytes(p.grad for p in learner.critic_weights)
            found["critic_optimizer"] = _states(learner.critic_optimizer)
        return found


def _without_signal(rewards: Tensor, size: int) -> float:
    """Return the share of groups whose rewards are equal; 0 where nothing is compared."""
    return silent(rewards, size).float().mean().item() if size > 1 else 0.0


def _bytes(tensors: Any) -> int:
    return sum(x.nbytes for x in tensors if x is not None)


def _states(optimizer: torch.optim.Optimizer) -> int:
    return _bytes(
        x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)
    )


@torch.no_grad()
def observed(policy: Policy, start: Any, rollout: Rollout) -> dict[str, float]:
    """Return entropy, and KL to the model `start`, in nats per token: exact sums over the vocabulary."""
    now, then = (
        completion_logits(m, rollout).float().log_softmax(-1)[rollout.mask]
        for m in (policy.model, start)
    )
    shares = now.exp()
    return {
        "entropy": -(shares * now).sum(-1).mean().item(),
        "kl": (shares * (now - then)).sum(-1).mean().item(),
    }


def held_out(policy: Policy, task: Task, config: TrainConfig) -> dict[str, float]:
    """Return accuracy and reward on held-out problems, at temperature 1 and greedy."""
    rows = [row for row in task.heldout for _ in range(SAMPLES)]
    found = evaluate.mean_rewards(policy, task, rows, config, 1.0)
    greedy = evaluate.mean_rewards(policy, task, task.heldout, config, 0.0)
    return {**found, "greedy_accuracy": greedy["accuracy"], "greedy_reward": greedy["reward"]}


def loaded(config: TrainConfig, start: Path | None) -> tuple[Task, Policy]:
    """Build the task, and the policy from a folder of weights or with new ones."""
    set_seed(config.seed)
    torch.set_num_threads(models.threads(config))
    task = tasks.build(config)
    return task, models.build(config, task.alphabet, start)


def warmed(config: TrainConfig, folder: Path) -> dict[str, float]:
    """Make the warm-up of a seed, and write the model that all its runs start from."""
    clock = Clock()
    task, policy = loaded(config, None)
    steps = warm_up(policy, task, config, lambda: False)
    seconds = clock.read()
    partial = files.hidden(folder, "partial")
    partial.mkdir(parents=True, exist_ok=True)
    checkpoints.write_model(policy, partial, Team(policy.device))
    files.publish(partial, folder)
    found = {"steps": steps, "seconds": seconds[0], "cpu_seconds": seconds[1]}
    return found | held_out(policy, task, config)


def trained(variant: Variant, config: TrainConfig, start: Path) -> dict[str, Any]:
    """Make a run, and return its steps, what it holds in memory and its accuracy.

    Of "entropy" and "kl" there is one number for `EVERY` steps.
    """
    task, policy = loaded(config, start)
    before = models.reference(policy)
    loop = Loop(variant, config, task, policy)

    def look(rollout: Rollout) -> dict[str, float]:
        return observed(policy, before, rollout)

    rows = [loop.step(s, None if s % EVERY else look) for s in range(config.steps)]
    return {
        "steps": {name: [row[name] for row in rows if name in row] for name in rows[0]},
        "bytes": loop.held(),
        "heldout": held_out(policy, task, config),
    }
