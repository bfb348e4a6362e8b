"""PPO from the parts of the included trainer: a value model, GAE and the clipped value loss.

The policy, its sampler, its loss and its optimizer are those of a GRPO run. So is the KL, which stands in the
loss and not in the reward. What differs is where advantages come from: each token has its own, from the
values of a model that is trained beside the policy.

Sources: Schulman et al. 2016 (GAE, arXiv 1506.02438), Schulman et al. 2017 (PPO, arXiv 1707.06347), Ouyang et
al. 2022 (a value model beside the policy, started from a copy of a language model, arXiv 2203.02155).
"""

import copy
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.study.variants import Critic
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.forward import Forward, MicroBatch, Scored
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.rollout import Rollout, completion_logits
from grpo_fast.trainer.update import Learner, micro_batches_of, optimizer_of, scheduler_of


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float = 1.0, trace: float = 0.95
) -> Tensor:
    """Return generalised advantage estimates, (B, T) float32; 0 where masked.

    With d_t = r_t + gamma V_(t+1) - V_t, the advantage of token t is the sum of (gamma lambda)^k d_(t+k)
    over the tokens of its completion. The reward is that of the last token, and the value after it is 0.
    So it is where the length limit cut the completion off: nothing follows that could be rewarded.

    Args:
        rewards: (B,), one for each completion.
        values: (B, T); V_t is the value before token t is chosen.
        mask: (B, T) bool; the tokens of a completion come first, one at least.
        discount: gamma. trace: lambda.

    Raises:
        ValueError: a reward is missing (NaN), a completion has no tokens, or a mask has a hole.
    """
    if bool(rewards.isnan().any()):
        raise ValueError(f"rewards: want one for each completion, got {rewards.tolist()}")
    lengths = mask.sum(1)
    prefix = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    if bool((mask != prefix).any()) or not bool((lengths > 0).all()):
        raise ValueError("mask: want the tokens of each completion first, and one at least")
    earned = torch.zeros_like(values, dtype=torch.float32)
    earned.scatter_(1, lengths[:, None] - 1, rewards.to(earned)[:, None])
    advantages = torch.zeros_like(earned)
    following = running = torch.zeros_like(earned[:, 0])
    for t in reversed(range(mask.shape[1])):
        live = mask[:, t]
        step = earned[:, t] + discount * following - values[:, t]
        running = torch.where(live, step + discount * trace * running, 0)
        following = torch.where(live, values[:, t], 0)
        advantages[:, t] = running
    return advantages


def whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """Return advantages with mean 0 and standard deviation 1 over the tokens of the mask; 0 elsewhere."""
    some = advantages[mask]
    scaled = (advantages - some.mean()) / (some.std(correction=0) + 1e-8)
    return torch.where(mask, scaled, 0)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Return PPO's clipped value loss: half the mean over tokens of the larger squared error.

    The errors are those of V, and of V kept within `clip` of its old value.

    Args:
        values, old, returns: (B, T). mask: (B, T) bool.
    """
    near = old + (values - old).clamp(-clip, clip)
    worse = torch.maximum((values - returns).square(), (near - returns).square())
    return 0.5 * worse[mask].mean()


def value_model(model: Any) -> Any:
    """Return a copy of a language model whose head gives one number, 0 at first, instead of logits."""
    found = copy.deepcopy(model)
    like = found.get_input_embeddings().weight
    head = nn.Linear(like.shape[1], 1).to(like)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    found.set_output_embeddings(head)
    return found.requires_grad_(True)


class PerToken(Forward):
    """The forward of a policy whose micro-batches have an advantage for each token, (B, T)."""

    def loss(self, batch: MicroBatch, with_entropy: bool, **given: Any) -> Scored:
        """Compute the loss, with advantages in the order of the tokens."""
        if batch.plan is None:
            return super().loss(batch, with_entropy, **given)
        packed = dataclasses.replace(batch, advantages=batch.plan.packed(batch.advantages))
        return super().loss(packed, with_entropy, **given)


class PPO(Learner):
    """The policy, its optimizer and its reference as in GRPO; and a value model with an optimizer of its own.

    Each update of the policy comes with one of the value model, on all completions of the batch.
    """

    def __init__(self, policy: Policy, config: TrainConfig, settings: Critic) -> None:
        super().__init__(policy, config)
        if self.objective.reduction != "token_mean":
            raise ValueError(f"reduction={self.objective.reduction!r}: PPO wants 'token_mean'")
        self.settings = settings
        self.forward: Forward = PerToken(policy, config, self.objective, shown=False)
        self.critic = value_model(policy.model)
        self.critic_weights = list(self.critic.parameters())
        own = dataclasses.replace(config, learning_rate=settings.learning_rate)
        self.critic_optimizer = optimizer_of(self.critic_weights, own)
        self.critic_scheduler = scheduler_of(self.critic_optimizer, config)
        self.rollout: Rollout | None = None  # of this step
        self.old = self.returns = torch.empty(0)  # (B, T) of this step
        self.value_losses: list[float] = []

    def values(self, rollout: Rollout) -> Tensor:
        """Compute the values before each token of some completions, (B, T) float32."""
        with self.policy.autocast():
            return completion_logits(self.critic, rollout)[..., 0].float()

    def update(self, rollout: Rollout, rewards: Tensor) -> dict[str, float]:
        """Update policy and value model; return the metrics of `Learner`, and of the values before it.

        Args:
            rewards: (B,), one for each completion; none may be missing.
        """
        self.value_losses = []
        metrics = super().update(rollout, rewards)
        left, spread = (
            (x[rollout.mask]).var(correction=0) for x in (self.returns - self.old, self.returns)
        )
        return metrics | {
            "value_loss": sum(self.value_losses) / len(self.value_losses),
            "explained_variance": (1 - left / spread).item() if spread > 0 else math.nan,
        }

    def prepare(
        self, rollout: Rollout, rewards: Tensor
    ) -> tuple[list[MicroBatch], dict[str, Tensor | int]]:
        """Value the completions, and cut them into micro-batches with an advantage for each token."""
        config, settings, mask = self.config, self.settings, rollout.mask
        self.policy.model.eval()
        self.critic.eval()
        with torch.no_grad():
            parts = rollout.parts(config.micro_batch_size)
            self.old = torch.cat([self.values(part) for part in parts])
        rewards = rewards.to(self.policy.device)
        raw = gae(rewards, self.old, mask, settings.discount, settings.trace)
        self.rollout, self.returns = rollout, raw + self.old
        self.advantages = whitened(raw, mask)
        self.forward.compare(self.policy.model)
        self.forward.compare(self.reference)
        everyone = torch.ones(len(mask), dtype=torch.bool)
        layout = self.forward.layout
        micro_batches = [
            batch
            for rows in micro_batches_of(rollout, everyone, config, layout)
            for batch in self.planned(rollout, self.advantages, rows, layout)
        ]
        if self.has_reference:
            with self.before_grpo() as model:
                for batch in micro_batches:
                    batch.ref_logps = self.forward.log_probs(model, batch)
        return micro_batches, {"tokens": mask.sum().clamp(min=1), "sequences": len(mask)}

    def backward(
        self, micro_batches: list[MicroBatch], counts: dict[str, Tensor | int]
    ) -> tuple[float, float, Tensor]:
        """Compute the gradients of the policy, after one update of the value model."""
        self.improve()
        return super().backward(micro_batches, counts)

    def improve(self) -> None:
        """Make one update of the value model.

        Raises:
            FloatingPointError: the loss or the gradient of the values is not finite.
        """
        assert self.rollout is not None
        mask, total, start = self.rollout.mask, 0.0, 0
        self.critic_optimizer.zero_grad()
        for part in self.rollout.parts(self.config.micro_batch_size):
            rows = slice(start, start + len(part.prompts))
            start = rows.stop
            loss = value_loss(
                self.values(part),
                self.old[rows],
                self.returns[rows],
                part.mask,
                self.settings.value_clip,
            )
            loss = loss * (part.mask.sum() / mask.sum())  # a mean over the tokens of all parts
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(self.critic_weights, self.config.max_grad_norm)
        if not (math.isfinite(total) and bool(norm.isfinite())):
            raise FloatingPointError(f"value loss {total}, gradient norm {norm.item()}")
        self.critic_optimizer.step()
        self.critic_scheduler.step()
        self.value_losses.append(total)
