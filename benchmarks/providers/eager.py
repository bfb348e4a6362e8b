"""Compute what a trainer computes without a fused kernel: the baseline, and torch.compile's input.

It is the leanest form that is still accurate: no division by a temperature of 1, no metrics, and
the conversion to float32 is left to `log_softmax`. On a GPU that converts float16 logits as it
reads them. For bfloat16 PyTorch has no such kernel and makes a copy, which is gone before the
backward pass. The results are checked against `grpo_fast.reference`, as all others are.
"""

from typing import Any

import torch
from torch import Tensor

from grpo_fast import Objective


def logprob(logits: Tensor, ids: Tensor) -> Tensor:
    logp = torch.log_softmax(logits, -1, dtype=torch.float32)
    return logp.gather(-1, ids[..., None]).squeeze(-1)


def policy_loss(
    logps: Tensor,
    *,
    mask: Tensor | None,
    advantages: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor,
    objective: Objective,
) -> Tensor:
    if mask is None:
        mask = torch.ones_like(logps)
    log_ratio = logps - old_logps
    if objective.ratio == "sequence":
        log_ratio = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - objective.epsilon_low, 1 + objective.epsilon_high)
    loss = -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    if objective.beta:
        gap = ref_logps - logps
        loss = loss + objective.beta * (gap.exp() - gap - 1)
    if objective.reduction == "token_mean":
        return (loss * mask).sum() / mask.sum().clamp(min=1)
    return ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def grpo(logits: Tensor, ids: Tensor, **arguments: Any) -> Tensor:
    return policy_loss(logprob(logits, ids), **arguments)


def group_advantage(rewards: Tensor, group_size: int) -> Tensor:
    groups = rewards.view(-1, group_size)
    mean = groups.mean(1).repeat_interleave(group_size)
    std = groups.std(1).repeat_interleave(group_size)
    return (rewards - mean) / (std + 1e-4)


def linear_logprob(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return logprob(hidden @ weight.mT, ids)


def linear_grpo(hidden: Tensor, weight: Tensor, ids: Tensor, **arguments: Any) -> Tensor:
    return policy_loss(linear_logprob(hidden, weight, ids), **arguments)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return -linear_logprob(hidden, weight, ids).mean()
