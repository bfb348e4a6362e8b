"""The output of the losses: `LossOutput` and how it is made."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from grpo_fast.metrics import METRICS
from grpo_fast.ops.autograd import sum_once_differentiable
from grpo_fast.ops.coefficients import Batch
from grpo_fast.ops.policy_loss import token_statistics
from grpo_fast.records import Outputs


class LossOutput(NamedTuple):
    """The result of a loss: the loss, and what was computed on the way.

        >>> out = policy_loss(torch.zeros(2, 3), advantages=torch.ones(2))
        >>> sorted(out.metrics)[:3], out.entropy
        (['approx_kl_k1', 'approx_kl_k3', 'clip_fraction_dual'], None)
        >>> torch.testing.assert_close(metrics_from(out.statistics)["tokens"], out.metrics["tokens"])

    Attributes:
        loss: 0-dim, differentiable.
        logps: the log-probs, of the shape of the ids, detached; finite but unspecified where
            masked. `policy_loss` returns those that it got, in float32, also where masked.
        entropy: the entropies in nats, of the shape of the ids, detached; finite but unspecified
            where masked. None where they were not computed. `policy_loss` as for `logps`.
        metrics: 0-dim tensors on the device of the loss; `metrics_from` lists them.
        statistics: (16,) float32, the sums and extremes from which the metrics are computed, and the
            sum of the losses. Gather them across ranks (one collective); then
            `metrics_from(fold_statistics(gathered))` gives the metrics of the global batch.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor | None
    metrics: dict[str, Tensor]
    statistics: Tensor


def loss_output(
    like: Tensor, outputs: Outputs, batch: Batch, op: str = "", anchors: Sequence[Tensor] = ()
) -> LossOutput:
    """Make the output of a loss from the values of (N,) tokens.

    Args:
        like: a tensor of the shape that the caller knows, (B, T) or (N,).
        outputs: `entropy` is None where it was not computed; `kl` is ignored without a reference.
        op, anchors: of a loss that has a graph, as in `sum_once_differentiable`.
    """
    loss, tokens = outputs.loss, batch.tokens
    entropy = None if outputs.entropy is None else outputs.entropy.detach()
    has_ref = tokens.ref_logp is not None
    statistics, values, total = token_statistics(
        Outputs(
            loss.detach(), outputs.logp, entropy, outputs.kl if has_ref else None, outputs.clip
        ),
        batch.mask,
        batch.sequences.share,
        tokens.old_logp,
        tokens.importance,
    )
    metrics = metrics_of(values, has_ref, entropy is not None)
    shaped = None if entropy is None else entropy.view(like.shape)
    total = sum_once_differentiable(op, loss, total, anchors)
    return LossOutput(total, outputs.logp.view(like.shape), shaped, metrics, statistics)


def metrics_of(values: Tensor, has_ref: bool, has_entropy: bool) -> dict[str, Tensor]:
    """Return the metrics (14,) of a step by name, without those that were not computed."""
    metrics = dict(zip(METRICS, values.unbind(), strict=True))
    if not has_ref:
        del metrics["kl"]
    if not has_entropy:
        del metrics["entropy"]
    return metrics
