"""Differentiable operations on log-probs, logits, hidden states and rewards."""

# In this package `logprob`, `linear_logprob` and `group_advantage` are the functions, which hide the
# modules of the same name: `from grpo_fast.ops import logprob` must give the function. A module is
# still reached by its full path: `from grpo_fast.ops.logprob import read_rows`.
from grpo_fast.ops.group_advantage import group_advantage
from grpo_fast.ops.linear_logprob import linear_logprob
from grpo_fast.ops.logprob import logprob

__all__ = ["group_advantage", "linear_logprob", "logprob"]
