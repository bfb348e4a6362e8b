"""The objective on (N,) tokens in the phases that a loss goes through: values, then coefficients.

Where a token's coefficient c = dloss/dlogp depends on its own log-prob alone, one launch does all. Where it
depends on other tokens there are two ways: through autograd (log-probs, objective, and the gradient in the
backward), or with `coefficient`s known beforehand, which a launch adds to what it finds by itself.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast import reference
from grpo_fast._operands import Modes, Terms
from grpo_fast.ops._selection import top_entropy_mask
from grpo_fast.ops._terms import weigh
from grpo_fast.ops._tokens import Sequences, Tokens
from grpo_fast.ops.policy_loss import policy_loss_fwd
from grpo_fast.ops.sequence_loss import sequence_loss_fwd


class Values(NamedTuple):
    """Of tokens; all (N,), `kl` (0,) where there is no reference."""

    loss: Tensor  # weighted
    dlogp: Tensor  # its derivative; not differentiable itself
    kl: Tensor
    clip: Tensor
    entropy_weight: Tensor | None  # None: the tokens' weight


def values(
    logp: Tensor,
    entropy: Tensor | None,
    tokens: Tokens,
    sequences: Sequences,
    terms: Terms,
) -> Values:
    """The objective on log-probs; `loss` is differentiable in `logp` and `entropy`."""
    assert tokens.advantages is not None
    modes, numbers = terms
    if modes.by_entropy:
        assert entropy is not None
        tokens = _keep_top_entropy(tokens, sequences.share, entropy.detach(), terms)
    shared = (
        logp,
        tokens.mask,
        tokens.weight,
        tokens.advantages,
        tokens.old_logp,
        tokens.ref_logp,
        tokens.importance,
        tokens.score,
    )
    if modes.needs_sequences:
        loss, dlogp, kl, clip = sequence_loss_fwd(*shared, *sequences, modes.key, numbers)
    else:
        loss, dlogp, kl, clip = policy_loss_fwd(*shared, modes.key, numbers)
    if modes.has_bonus:
        assert entropy is not None
        weight = tokens.weight if tokens.entropy_weight is None else tokens.entropy_weight
        loss = loss - terms.number("entropy_coef") * weigh(weight, entropy)
    return Values(loss, dlogp, kl, clip, tokens.entropy_weight)


def _keep_top_entropy(
    tokens: Tokens, share: Tensor | None, entropy: Tensor, terms: Terms
) -> Tokens:
    """Tokens whose surrogate and bonus count only where the entropy is among the highest."""
    live = torch.ones_like(entropy, dtype=torch.bool) if tokens.mask is None else tokens.mask
    kept = top_entropy_mask(entropy, live, terms.number("top_entropy_quantile"))
    # An entropy that is NaN decides nothing: it comes out.
    chosen = torch.where(live & entropy.isnan(), torch.nan, kept.float())
    importance = chosen if tokens.importance is None else tokens.importance * chosen
    weight = tokens.weight
    if terms.modes.entropy_reduction == "token_mean":
        assert tokens.entropy_weight is not None
        # A mean over all live tokens becomes one over those kept.
        weighs = live if share is None else share
        total, rest = (reference.total_of(x, torch.float32) for x in (weighs, weighs * kept))
        weight = tokens.entropy_weight * (total / rest)
    return tokens._replace(importance=importance, entropy_weight=torch.where(kept, weight, 0))


def known_on_policy(old_logp: Tensor | None, modes: Modes) -> bool:
    """Whether `coefficient_on_policy` has an answer."""
    by_kl = modes.has_kl and modes.kl == "k3_unbiased" and modes.through_mean
    return old_logp is None and not by_kl and not modes.by_entropy


def coefficient_on_policy(tokens: Tokens, sequences: Sequences, terms: Terms) -> Tensor | None:
    """What dloss/dlogp owes to the surrogate, (N,), where that is known before any log-prob is.

    On policy every ratio is 1, that of a sequence as well, so it is for all objectives on sequences; unless
    the KL comes back through the mean of the sequence, or entropies choose the tokens.
    """
    modes, numbers = terms
    if not known_on_policy(tokens.old_logp, modes):
        return None
    assert tokens.advantages is not None
    logp = torch.zeros_like(tokens.weight)
    shared = (logp, tokens.mask, tokens.weight, tokens.advantages, None, None)
    rest = (tokens.importance, tokens.score, *sequences, modes.surrogate_alone().key, numbers)
    return sequence_loss_fwd(*shared, *rest)[1]


def without_surrogate(tokens: Tokens, terms: Terms) -> tuple[Tokens, Terms]:
    """What is left of a launch when the surrogate's coefficient is given: KL and entropy bonus."""
    nothing = torch.zeros_like(tokens.weight)
    tokens = tokens._replace(
        advantages=nothing, rewards=None, old_logp=None, importance=None, score=None
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
