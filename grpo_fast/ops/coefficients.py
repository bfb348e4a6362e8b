"""The objective on (N,) tokens: its values, and the coefficients of the gradient.

The coefficient of a token is c = dloss/dlogp. If it depends on the token's own log-prob alone, one
launch does everything. If it depends on other tokens there are two ways. One is autograd:
log-probs, then the objective, then the gradient in the backward. The other is to compute the
coefficients before the launch, which adds them to its own.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.notices import note, noting
from grpo_fast.objective import Objective
from grpo_fast.operands import Modes, Terms, replaced
from grpo_fast.ops.autograd import with_gradient
from grpo_fast.ops.backend import implementation, use_triton
from grpo_fast.ops.operator import watched
from grpo_fast.ops.policy_loss import policy_loss_fwd
from grpo_fast.ops.sequence_loss import sequence_loss_fwd
from grpo_fast.ops.top_entropy import top_entropy_mask
from grpo_fast.records import Rewards, Sequences, Tokens, Weighing
from grpo_fast.torch_kernels import policy_loss as twin
from grpo_fast.torch_kernels.reduction_weights import total_of
from grpo_fast.torch_kernels.terms import weigh


class Batch(NamedTuple):
    """The tokens of a batch, checked and flat, for an objective on their log-probs."""

    mask: Tensor | None  # (N,) bool: tokens that count; None for all
    tokens: Tokens
    rewards: Rewards
    sequences: Sequences


class PerToken(NamedTuple):
    """The arguments of an objective for each token, as in `Tokens`, while the weights are not known.

    (N,) each; for `padded_loss` (B, T), or (B,) with one value per sequence.
    """

    advantages: Tensor | None
    old_logp: Tensor | None
    ref_logp: Tensor | None
    importance: Tensor | None
    score: Tensor | None


class Values(NamedTuple):
    """The results of an objective on log-probs; all (N,), `kl` (0,) where there is no reference."""

    loss: Tensor  # times the token's weight
    dlogp: Tensor  # dloss/dlogp; not differentiable itself
    kl: Tensor
    clip: Tensor
    entropy_weight: Tensor | None  # weight in the entropy bonus; None: the token's weight


def values(logp: Tensor, entropy: Tensor | None, batch: Batch, terms: Terms) -> Values:
    """Compute the objective on log-probs; `loss` is differentiable in `logp` and `entropy`."""
    modes, tokens = terms.modes, batch.tokens
    if modes.by_entropy:
        assert entropy is not None
        tokens = _keep_top_entropy(batch, entropy.detach(), terms)
    if modes.needs_sequences:
        found = sequence_loss_fwd(logp, batch.mask, tokens, batch.sequences, terms)
    else:
        found = policy_loss_fwd(logp, batch.mask, tokens, terms)
    loss = found.loss
    if modes.has_bonus:
        assert entropy is not None
        weight = tokens.weight if tokens.entropy_weight is None else tokens.entropy_weight
        loss = loss - terms.number("entropy_coef") * weigh(weight, entropy)
    return Values(loss, found.dlogp, found.kl, found.clip, tokens.entropy_weight)


def _keep_top_entropy(batch: Batch, entropy: Tensor, terms: Terms) -> Tokens:
    """Return the tokens with a surrogate and bonus only where the entropy is among the highest."""
    tokens, share = batch.tokens, batch.sequences.share
    live = torch.ones_like(entropy, dtype=torch.bool) if batch.mask is None else batch.mask
    kept = top_entropy_mask(entropy, live, terms.number("top_entropy_quantile"))
    # An entropy that is NaN decides nothing: the loss is NaN.
    chosen = torch.where(live & entropy.isnan(), torch.nan, kept.float())
    importance = chosen if tokens.importance is None else tokens.importance * chosen
    weight = tokens.weight
    if terms.modes.entropy_reduction == "token_mean":
        assert tokens.entropy_weight is not None
        # A mean over all tokens that count becomes a mean over those kept.
        weighs = live if share is None else share
        total, rest = (total_of(x, weight.dtype) for x in (weighs, weighs * kept))
        weight = tokens.entropy_weight * (total / rest)
    return replaced(tokens, importance=importance, entropy_weight=torch.where(kept, weight, 0))


def entropy_gradient(tokens: Tokens, terms: Terms, found: Values) -> Tensor | None:
    """Return dloss/dentropy of each token; None without an entropy bonus."""
    if not terms.modes.has_bonus:
        return None
    weight = tokens.weight if found.entropy_weight is None else found.entropy_weight
    return -terms.number("entropy_coef") * weight


def coefficients_known(old_logp: Tensor | None, modes: Modes) -> bool:
    """Whether `coefficient_on_policy` can compute the coefficients."""
    by_kl = modes.has_kl and modes.kl == "k3_unbiased" and modes.through_mean
    return old_logp is None and not by_kl and not modes.by_entropy


def coefficient_on_policy(batch: Batch, terms: Terms) -> Tensor | None:
    """Return the surrogate's part of dloss/dlogp, (N,), where it is known before any log-prob; else None.

    On policy every ratio is 1, the ratio of a sequence too, so the part is known for all objectives
    on sequences. There are two exceptions: a KL term that goes through the mean of the sequence,
    and tokens that are chosen by entropy.
    """
    tokens = batch.tokens
    if not coefficients_known(tokens.old_logp, terms.modes):
        return None
    logp = torch.zeros_like(tokens.weight)
    alone = replaced(terms, modes=terms.modes.surrogate_alone())
    known = replaced(tokens, ref_logp=None)
    return sequence_loss_fwd(logp, batch.mask, known, batch.sequences, alone).dlogp


def with_coefficients(tokens: Tokens, c: Tensor, terms: Terms) -> tuple[Tokens, Terms]:
    """Return tokens and terms for a launch that gets the surrogate's coefficients c.

    The launch itself computes only KL and entropy bonus.
    """
    tokens = replaced(
        tokens,
        advantages=torch.zeros_like(tokens.weight),
        old_logp=None,
        importance=None,
        score=None,
        coefficient=c,
    )
    return tokens, replaced(terms, modes=terms.modes.without_surrogate())


def in_one_call(
    logps: Tensor, objective: Objective, importance: Tensor | None, *given: Any
) -> bool:
    """Tell whether `padded_loss` computes a loss: of many padded tokens on a CPU that nothing traces.

    Args:
        importance: the importance weights.
        given: the other arguments.
    """
    weighs_sequences = objective.surrogate == "vespo" and importance is not None
    return not (
        objective.needs_entropy
        or weighs_sequences
        or watched(logps, importance, *given)
        or not twin.pays_off(logps)
        or use_triton(logps)
    )


class PaddedLoss(NamedTuple):
    """The loss of padded tokens, and what is computed on the way."""

    loss: Tensor  # (), differentiable in the log-probs
    statistics: Tensor  # (16,) fp32
    metrics: Tensor  # (14,) fp32


def padded_loss(
    op: str,
    logps: Tensor,
    logp: Tensor,
    entropy: Tensor | None,
    weighing: Weighing,
    each: PerToken,
    objective: Objective,
) -> PaddedLoss | None:
    """Compute the loss of padded tokens where `in_one_call` tells so; None if compiling fails.

    Args:
        logps: (B, T), any floating dtype: the loss is differentiable in them.
        logp: the same values, fp32 and contiguous, without a graph.
        entropy: (B, T) fp32, contiguous, without a graph; or None.
        weighing: of padded tokens.
        each: the values of tokens, (B, T), or of sequences, (B,); fp32.
    """
    found = twin.padded_loss(logp, entropy, weighing, each, objective)
    if found is None:
        return None
    if noting():
        note(implementation(logp), "padded_loss")
    dlogp, statistics, metrics, total = found
    return PaddedLoss(with_gradient(op, logps, total, dlogp), statistics, metrics)


class WithGradientOf(torch.autograd.Function):
    """`WithGradientOf.apply(x, value)` returns `value` with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, dvalue: Tensor) -> tuple[Tensor, None]:
        return dvalue, None
