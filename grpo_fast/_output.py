"""What the losses return."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.ops._metrics import METRICS
from grpo_fast.ops._tokens import Tokens
from grpo_fast.ops.policy_loss import token_statistics


class LossOutput(NamedTuple):
    """What a loss returns.

    Attributes:
        loss: 0-dim, differentiable.
        logps: log-probs, of the shape of the ids, detached; finite but unspecified where masked.
        entropy: the same of the entropy in nats, or None where it was not computed.
        metrics: 0-dim tensors on the device of the loss; see `metrics_from`.
        statistics: (16,) fp32, the sums the metrics come from, and that of the losses. Gather them across
            ranks (one collective), then `metrics_from(fold_statistics(gathered))` is the metrics of the
            global batch.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor | None
    metrics: dict[str, Tensor]
    statistics: Tensor


def loss_output(
    like: Tensor,
    loss: Tensor,
    logp: Tensor,
    entropy: Tensor | None,
    kl: Tensor,
    clip: Tensor,
    tokens: Tokens,
    share: Tensor | None,
) -> LossOutput:
    """What a loss returns of (N,) tokens; `like` has the shape that the caller knows.

    share: what a floating mask weighs each token with; None: 1.
    """
    entropy = None if entropy is None else entropy.detach()
    statistics, values, total = token_statistics(
        tokens.mask,
        share,
        loss.detach(),
        logp,
        tokens.old_logp,
        tokens.importance,
        kl if tokens.ref_logp is not None else None,
        entropy,
        clip,
    )
    metrics = dict(zip(METRICS, values.unbind(), strict=True))
    if tokens.ref_logp is None:
        del metrics["kl"]
    if entropy is None:
        del metrics["entropy"]
    shaped = None if entropy is None else entropy.view(like.shape)
    total = SumOf.apply(loss, total) if loss.requires_grad else total
    return LossOutput(total, logp.view(like.shape), shaped, metrics, statistics)


class SumOf(torch.autograd.Function):
    """`SumOf.apply(x, total)` is the sum of x, where that is known already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, total: Tensor) -> Tensor:
        ctx.shape = x.shape
        return total.detach()

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None]:
        return dtotal.expand(ctx.shape), None
