"""What the losses have in common at their end: the objective on log-probs, and what is returned."""

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.objective import Objective
from grpo_fast.ops._metrics import metrics_from
from grpo_fast.ops._tokens import Sequences, Tokens
from grpo_fast.ops.policy_loss import policy_loss_fwd, token_statistics
from grpo_fast.ops.sequence_loss import sequence_loss_fwd


class LossOutput(NamedTuple):
    """What a loss returns.

    Attributes:
        loss: 0-dim, differentiable.
        logps: log-probs, of the shape of the ids, detached; finite but unspecified where masked.
        entropy: the same of the entropy in nats, or None where it was not computed.
        metrics: 0-dim tensors on the device of the loss; see `metrics_from`.
        statistics: (16,) fp32, the sums the metrics come from. Gather them across ranks (one collective),
            then `metrics_from(fold_statistics(gathered))` is the metrics of the global batch.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor | None
    metrics: dict[str, Tensor]
    statistics: Tensor


def policy_of_logps(
    logp: Tensor,
    entropy: Tensor | None,
    tokens: Tokens,
    sequences: Sequences,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weighted loss, KL, clip flags) of (N,) log-probs."""
    assert tokens.advantages is not None
    shared = (
        logp,
        tokens.mask,
        tokens.weight,
        tokens.advantages,
        tokens.old_logp,
        tokens.ref_logp,
        tokens.importance,
    )
    if objective.needs_sequences:
        loss, _, kl, clip = sequence_loss_fwd(*shared, *sequences, objective.key)
    else:
        loss, _, kl, clip = policy_loss_fwd(*shared, objective.key)
    if objective.entropy_coef:
        assert entropy is not None
        # The weight is 0 where a token is masked; select, since its entropy may be NaN there.
        bonus = torch.where(tokens.weight == 0, 0, entropy)
        loss = loss - objective.entropy_coef * tokens.weight * bonus
    return loss, kl, clip


def loss_output(
    like: Tensor,
    loss: Tensor,
    logp: Tensor,
    entropy: Tensor | None,
    kl: Tensor,
    clip: Tensor,
    tokens: Tokens,
) -> LossOutput:
    entropy = None if entropy is None else entropy.detach()
    statistics = token_statistics(
        tokens.mask,
        loss.detach(),
        logp,
        tokens.old_logp,
        tokens.importance,
        kl if tokens.ref_logp is not None else None,
        entropy,
        clip,
    )
    metrics = metrics_from(statistics)
    if tokens.ref_logp is None:
        del metrics["kl"]
    if entropy is None:
        del metrics["entropy"]
    shaped = None if entropy is None else entropy.view(like.shape)
    return LossOutput(loss.sum(), logp.view(like.shape), shaped, metrics, statistics)
