"""The objective on (N,) tokens in the phases that a loss goes through: values, then coefficients.

A token's coefficient is c = dloss/dlogp. Where it depends on the token's own log-prob alone, one launch does
all. Where it depends on other tokens there are two ways: through autograd (log-probs, objective, and the
gradient in the backward), or with coefficients that are known before the launch, which adds them to its own.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.operands import Modes, Terms
from grpo_fast.ops.policy_loss import policy_loss_fwd
from grpo_fast.ops.sequence_loss import sequence_loss_fwd
from grpo_fast.ops.top_entropy import top_entropy_mask
from grpo_fast.records import Rewards, Sequences, Tokens
from grpo_fast.torch_kernels.reduction_weights import total_of
from grpo_fast.torch_kernels.terms import weigh


class Batch(NamedTuple):
    """Tokens of a batch, checked and flat, for an objective on their log-probs."""

    mask: Tensor | None  # (N,) bool: tokens that count; None for all
    tokens: Tokens
    rewards: Rewards
    sequences: Sequences


class Values(NamedTuple):
    """What an objective makes of log-probs; all (N,), `kl` (0,) where there is no reference."""

    loss: Tensor  # weighed
    dlogp: Tensor  # its derivative; not differentiable itself
    kl: Tensor
    clip: Tensor
    entropy_weight: Tensor | None  # None: the tokens' weight


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
    return Values(loss, *found[1:], tokens.entropy_weight)


def _keep_top_entropy(batch: Batch, entropy: Tensor, terms: Terms) -> Tokens:
    """Tokens whose surrogate and bonus count only where the entropy is among the highest."""
    tokens, share = batch.tokens, batch.sequences.share
    live = torch.ones_like(entropy, dtype=torch.bool) if batch.mask is None else batch.mask
    kept = top_entropy_mask(entropy, live, terms.number("top_entropy_quantile"))
    # An entropy that is NaN decides nothing: it comes out.
    chosen = torch.where(live & entropy.isnan(), torch.nan, kept.float())
    importance = chosen if tokens.importance is None else tokens.importance * chosen
    weight = tokens.weight
    if terms.modes.entropy_reduction == "token_mean":
        assert tokens.entropy_weight is not None
        # A mean over all live tokens becomes one over those kept.
        weighs = live if share is None else share
        total, rest = (total_of(x, weight.dtype) for x in (weighs, weighs * kept))
        weight = tokens.entropy_weight * (total / rest)
    return tokens._replace(importance=importance, entropy_weight=torch.where(kept, weight, 0))


def entropy_gradient(tokens: Tokens, terms: Terms, found: Values) -> Tensor | None:
    """dloss/dentropy of each token; None without an entropy bonus."""
    if not terms.modes.has_bonus:
        return None
    weight = tokens.weight if found.entropy_weight is None else found.entropy_weight
    return -terms.number("entropy_coef") * weight


def known_on_policy(old_logp: Tensor | None, modes: Modes) -> bool:
    """Whether `coefficient_on_policy` has an answer."""
    by_kl = modes.has_kl and modes.kl == "k3_unbiased" and modes.through_mean
    return old_logp is None and not by_kl and not modes.by_entropy


def coefficient_on_policy(batch: Batch, terms: Terms) -> Tensor | None:
    """The surrogate's part of dloss/dlogp, (N,), where that is known before any log-prob is; else None.

    On policy every ratio is 1, that of a sequence as well, so it is for all objectives on sequences; unless
    the KL comes back through the mean of the sequence, or entropies choose the tokens.
    """
    tokens = batch.tokens
    if not known_on_policy(tokens.old_logp, terms.modes):
        return None
    logp = torch.zeros_like(tokens.weight)
    alone = terms._replace(modes=terms.modes.surrogate_alone())
    known = tokens._replace(ref_logp=None)
    return sequence_loss_fwd(logp, batch.mask, known, batch.sequences, alone).dlogp


def with_coefficients(tokens: Tokens, c: Tensor, terms: Terms) -> tuple[Tokens, Terms]:
    """What a launch computes itself where the surrogate's coefficients are given: KL and entropy bonus."""
    tokens = tokens._replace(
        advantages=torch.zeros_like(tokens.weight),
        old_logp=None,
        importance=None,
        score=None,
        coefficient=c,
    )
    return tokens, terms._replace(modes=terms.modes.without_surrogate())


class WithGradientOf(torch.autograd.Function):
    """`WithGradientOf.apply(x, value)` is `value` with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, dvalue: Tensor) -> tuple[Tensor, None]:
        return dvalue, None
