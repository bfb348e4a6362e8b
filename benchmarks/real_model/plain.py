"""The loss in plain PyTorch: all logits in float32, torch.log_softmax, and the specification's objective.

It takes the place of `linear_grpo_loss` in the included trainer for one run. Everything else of the run stays
as it is: data, samples, their random numbers, the forward of the layers, micro-batches, the optimizer.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from grpo_fast import Objective, reference
from grpo_fast.loss import LossOutput, policy_loss
from grpo_fast.metrics import STATISTICS
from grpo_fast.trainer import forward


def loss_of_hidden(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, return_entropy: bool = False, **given: Any
) -> LossOutput:
    """Return what `linear_grpo_loss` returns, from logits that are all in memory.

    The operands of the product have the dtype of `hidden`, as in any head. Loss and gradient are those of
    `grpo_fast.reference`. The metrics, which no gradient depends on, are those of `policy_loss`.

    Raises:
        TypeError: the head has options, such as a bias: the model is not one for this comparison.
    """
    extras = [given.pop(name, None) for name in ("bias", "softcap", "tp_group")]
    if any(x is not None for x in extras) or given.pop("logit_scale", 1) != 1:
        raise TypeError(
            "the plain loss is for a head without bias, softcap and scale, on one device"
        )
    logits = hidden.float() @ weight.to(hidden.dtype).float().mT
    loss = reference.grpo_loss(logits, ids, **given)
    temperature = given.pop("temperature", 1.0)
    with torch.no_grad():
        logps = reference.logprob(logits, ids, temperature)
        entropy = reference.entropy(logits, temperature) if return_entropy else None
        metrics = policy_loss(logps, **given)
        statistics = metrics.statistics.clone()
        if entropy is not None:
            mask = given.get("mask")
            live = entropy if mask is None else entropy[mask.bool()]
            statistics[STATISTICS.index("entropy")] = live.sum()
    return LossOutput(loss, logps, entropy, metrics.metrics, statistics)


@contextlib.contextmanager
def in_trainer() -> Iterator[None]:
    """Let the included trainer compute its loss by `loss_of_hidden`.

    Raises:
        RuntimeError: it never did: the model is trained from its logits.
    """
    with mock.patch.object(forward, "linear_grpo_loss", wraps=loss_of_hidden) as replaced:
        yield
    if not replaced.called:
        raise RuntimeError("the trainer did not compute the plain loss: nothing was compared")


def loss_of_logits(
    logits: Tensor, ids: Tensor, given: dict[str, Any], objective: Objective
) -> Tensor:
    """Return the specification's loss of padded completions, in the dtype of the logits."""
    floats = {
        name: x.to(logits.dtype) if x is not None and x.is_floating_point() else x
        for name, x in given.items()
    }
    return reference.grpo_loss(logits, ids, objective=objective, **floats)
