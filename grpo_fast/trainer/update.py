"""The GRPO update: optimiser steps on a batch of completions and their rewards."""

import copy
import math

import torch
from torch import Tensor
from transformers import get_scheduler

from grpo_fast import ops
from grpo_fast.loss import fold_statistics, metrics_from
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.forward import Forward, MicroBatch
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.rollout import Rollout


class Learner:
    """The optimiser, the schedule and the reference model of a policy."""

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self.policy, self.config = policy, config
        self.objective = config.to_objective()
        self.forward = Forward(policy, config, self.objective)
        self.updates = 0  # optimiser steps so far
        self.reference = None
        if self.objective.beta:
            self.reference = copy.deepcopy(policy.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            policy.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.scheduler = get_scheduler(
            config.lr_scheduler,
            self.optimizer,
            num_warmup_steps=config.lr_warmup_steps * config.num_iterations,
            num_training_steps=config.steps * config.num_iterations,
        )

    def update(self, rollout: Rollout, rewards: Tensor) -> dict[str, float]:
        """Make `config.num_iterations` optimiser steps on one batch; return the metrics over all of them.

        Args:
            rewards: (B,), groups of `config.group_size` consecutive completions; NaN: without a reward.

        Raises:
            FloatingPointError: the loss or a gradient is not finite; this step did not change the weights.
        """
        micro_batches = self.prepare(rollout, rewards)
        learning_rate = self.scheduler.get_last_lr()[0]
        steps = []
        for _ in range(self.config.num_iterations):
            loss, norm, statistics = self.backward(micro_batches, rollout.mask)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
            self.optimizer.step()
            self.scheduler.step()
            self.updates += 1
            steps.append((loss, norm, statistics))
        losses, norms, gathered = zip(*steps, strict=True)
        folded = metrics_from(fold_statistics(torch.cat(gathered)))
        metrics = {name: value.item() for name, value in folded.items() if name != "tokens"}
        metrics["kl"] = metrics["kl"] if self.reference is not None else math.nan
        entropy = torch.cat([b.entropy for b in micro_batches if b.entropy is not None])
        return metrics | {
            "loss": sum(losses) / len(losses),
            "entropy": entropy[rollout.mask].mean().item(),
            "clip_fraction": sum(v for k, v in metrics.items() if k.startswith("clip_fraction_")),
            "grad_norm": sum(norms) / len(norms),
            "learning_rate": learning_rate,
        }

    def prepare(self, rollout: Rollout, rewards: Tensor) -> list[MicroBatch]:
        """Cut a batch into micro-batches, with advantages and reference log-probs."""
        config = self.config
        advantages = ops.group_advantage(
            rewards.to(self.policy.device),
            group_size=config.group_size,
            scale=config.scale_rewards,
            nan="skip",
        )
        parts = rollout.parts(config.micro_batch_size)
        scores = advantages.split([len(part.prompts) for part in parts])
        micro_batches = [self.forward.micro_batch(*x) for x in zip(parts, scores, strict=True)]
        if self.reference is not None:
            for batch in micro_batches:
                batch.ref_logps = self.forward.log_probs(self.reference, batch)
        return micro_batches

    def backward(
        self, micro_batches: list[MicroBatch], mask: Tensor
    ) -> tuple[float, float, Tensor]:
        """Compute the clipped gradients of the loss of the whole batch.

        Args:
            mask: (B, T) of the whole batch.

        Returns:
            The loss, the norm before clipping, and the statistics of `LossOutput`, (micro-batches, 16).
        """
        model, config = self.policy.model, self.config
        # With dropout the policy that is scored would not be the policy that sampled.
        model.eval()
        self.optimizer.zero_grad()
        token_mean = self.objective.reduction == "token_mean"
        losses, statistics = [], []
        for batch in micro_batches:
            first = batch.entropy is None  # the first step on these completions
            out = self.forward.loss(
                batch,
                with_entropy=first,
                num_items=mask.sum() if token_mean else None,
                # The other reductions are means over sequences.
                loss_scale=None if token_mean else len(batch.advantages) / len(mask),
            )
            if first:
                batch.entropy = out.entropy
                batch.old_logps = out.logps.detach() if config.num_iterations > 1 else None
            out.loss.backward()
            losses.append(out.loss.detach())
            statistics.append(out.statistics)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        return torch.stack(losses).sum().item(), norm.item(), torch.stack(statistics)
