"""Differentiable operations on log-probs, logits and rewards."""

from grpo_fast.ops.group_advantage import group_advantage
from grpo_fast.ops.logprob import logprob

__all__ = ["group_advantage", "logprob"]
