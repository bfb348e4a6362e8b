"""The losses: `grpo_loss` on logits, `linear_grpo_loss` on hidden states, `policy_loss` on log-probs."""

from grpo_fast.loss.from_hidden import linear_grpo_loss
from grpo_fast.loss.from_log_probs import policy_loss
from grpo_fast.loss.from_logits import grpo_loss
from grpo_fast.loss.output import LossOutput
from grpo_fast.metrics import fold_statistics, metrics_from

__all__ = [
    "LossOutput",
    "fold_statistics",
    "grpo_loss",
    "linear_grpo_loss",
    "metrics_from",
    "policy_loss",
]
