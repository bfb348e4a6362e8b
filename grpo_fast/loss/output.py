"""What the losses return."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.metrics import METRICS
from grpo_fast.ops.coefficients import Batch
from grpo_fast.ops.policy_loss import token_statistics
from grpo_fast.records import Outputs


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


def loss_output(like: Tensor, outputs: Outputs, batch: Batch) -> LossOutput:
    """Make a loss's output from what was computed of (N,) tokens.

    Args:
        like: has the shape that the caller knows.
        outputs: `entropy` is None where it was not computed; `kl` is ignored without a reference.
    """
    loss, tokens, nothing = outputs.loss, batch.tokens, outputs.logp.new_empty(0)
    entropy = None if outputs.entropy is None else outputs.entropy.detach()
    has_ref = tokens.ref_logp is not None
    statistics, values, total = token_statistics(
        Outputs(
            loss.detach(),
            outputs.logp,
            nothing if entropy is None else entropy,
            outputs.kl if has_ref else nothing,
            outputs.clip,
        ),
        batch.mask,
        batch.sequences.share,
        tokens.old_logp,
        tokens.importance,
    )
    metrics = dict(zip(METRICS, values.unbind(), strict=True))
    if not has_ref:
        del metrics["kl"]
    if entropy is None:
        del metrics["entropy"]
    shaped = None if entropy is None else entropy.view(like.shape)
    total = SumOf.apply(loss, total) if loss.requires_grad else total
    return LossOutput(total, outputs.logp.view(like.shape), shaped, metrics, statistics)


class SumOf(torch.autograd.Function):
    """`SumOf.apply(x, total)` is the sum of x, where that is known already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, total: Tensor) -> Tensor:
        ctx.shape = x.shape
        return total.detach()

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None]:
        return dtotal.expand(ctx.shape), None
