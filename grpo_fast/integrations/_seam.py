"""Placeholder for linear_logprob and linear_grpo_loss: materialises the logits."""

from typing import Any

from torch import Tensor

from grpo_fast.integrations.transformers import Head
from grpo_fast.loss import LossOutput, grpo_loss
from grpo_fast.ops import logprob


def _logits(hidden: Tensor, weight: Tensor, head: dict[str, Any]) -> Tensor:
    bias = head.get("bias")
    head = Head(
        weight.to(hidden.dtype),
        None if bias is None else bias.to(hidden.dtype),
        head.get("softcap"),
        head.get("logit_scale", 1.0),
    )
    return head.logits(hidden)


def linear_logprob(
    hidden, weight, ids, *, temperature=1.0, mask=None, return_entropy=False, **head
) -> Any:
    logits = _logits(hidden, weight, head)
    return logprob(logits, ids, temperature=temperature, mask=mask, return_entropy=return_entropy)


def linear_grpo_loss(
    hidden,
    weight,
    ids,
    *,
    bias=None,
    softcap=None,
    logit_scale=1.0,
    vocab_size=None,
    **arguments,
) -> LossOutput:
    head = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale}
    return grpo_loss(_logits(hidden, weight, head), ids, **arguments)
