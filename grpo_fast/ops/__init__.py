"""Differentiable operations on log-probs, logits, hidden states and rewards."""

from grpo_fast.ops.group_advantage import group_advantage
from grpo_fast.ops.linear_logprob import linear_logprob
from grpo_fast.ops.logprob import logprob

__all__ = ["group_advantage", "linear_logprob", "logprob"]
