"""Objectives on whole sequences: the twin of `kernels/sequence_loss.py`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.objective import Objective
from grpo_fast.records import PolicyLoss, Sequences, Tokens
from grpo_fast.sequences import sequence_sums
from grpo_fast.torch_kernels.compiled import TOKENS, call, compiles
from grpo_fast.torch_kernels.terms import Ratio, bounded_log_ratio, masked, policy_terms, weigh


def sequence_loss_fwd(
    logp: Tensor, mask: Tensor | None, tokens: Tokens, sequences: Sequences, objective: Objective
) -> PolicyLoss:
    """Compute `policy_loss_fwd` for objectives in which a token's loss depends on its whole sequence."""
    # Inductor would add up packed sequences in any order.
    padded, T_len = sequences.boundaries is None, sequences.T_len
    if padded and T_len > 1 and compiles(logp, len(logp), TOKENS):
        given = logp, mask, *tokens, sequences.share, sequences.log_importance
        rows = [None if x is None else x.reshape(-1, T_len) for x in given]
        found = call(_of_padded, (objective,), *rows, moving=2)
        if found is not None:
            loss, dlogp, kl, clip = found
            kl = None if kl is None else kl.flatten()
            return PolicyLoss(loss.flatten(), dlogp.flatten(), kl, clip.flatten())
    return of_sequences(logp, mask, tokens, sequences, objective)


def _of_padded(logp: Tensor, mask: Tensor | None, *given: Any) -> PolicyLoss:
    """Compute `sequence_loss_fwd` of (B, T) tensors, the fields of the records."""
    *fields, share, log_importance, objective = given
    sequences = Sequences(None, logp.shape[1], share, log_importance)
    return of_sequences(logp, mask, Tokens(*fields), sequences, objective)


def of_sequences(
    logp: Tensor, mask: Tensor | None, tokens: Tokens, sequences: Sequences, objective: Objective
) -> PolicyLoss:
    """Compute `sequence_loss_fwd` by PyTorch's operators; padded tokens may also be (B, T)."""
    if mask is not None:
        tokens, logp = masked(tokens, mask), torch.where(mask, logp, 0)
    assert tokens.advantages is not None
    weight = tokens.weight
    old = logp if tokens.old_logp is None else tokens.old_logp
    found = ratio_terms(logp - old, tokens.advantages, mask, sequences, objective)
    through_mean = objective.ratio == "sequence" or objective.surrogate == "gmpo"
    own = found.free.to(logp.dtype)
    if through_mean:
        own = torch.where(found.opened, own * found.part, 0)
    tokens = Tokens(  # not `_replace`, which torch 2.8 does not trace
        weight=weight,
        advantages=tokens.advantages,
        old_logp=tokens.old_logp,
        ref_logp=tokens.ref_logp,
        importance=nan_where_undecided(tokens.importance, found),
        score=tokens.score,
        entropy_weight=tokens.entropy_weight,
        coefficient=tokens.coefficient,
    )
    terms = policy_terms(
        logp, tokens, Ratio(found.bounded, own, found.log_w, found.dropped), objective
    )
    through = weigh(weight, torch.where(found.free, terms.by_ratio, 0))
    if through_mean:
        total = _sums(sequences, logp)
        through = total(through)
        if objective.beta and objective.kl == "k3_unbiased":
            assert terms.kl is not None
            mine = weigh(weight, torch.where(found.free, objective.beta * terms.kl, 0))
            # Only the part of the other tokens: a token's own part is in `by_logp` already, without
            # cancellation.
            through = through + torch.where(mine.isinf(), 0, total(mine) - mine)
        through = torch.where(found.opened, through * found.part, 0)
    dlogp = weigh(weight, terms.by_logp) + through
    return PolicyLoss(weigh(weight, terms.loss), dlogp, terms.kl, terms.clip)


def _sums(sequences: Sequences, like: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that sums values over sequences: (N,), or of padded tokens (B, T) as (B, 1)."""
    if like.ndim == 1:
        return sequence_sums(sequences.boundaries, sequences.T_len, len(like))
    return lambda x: x.sum(-1, keepdim=True, dtype=torch.float64).to(x.dtype)


class Ratios(NamedTuple):
    """The importance ratio of each token, and the values of its sequence that the objective needs."""

    log_ratio: Tensor  # before the clamp
    bounded: Tensor  # after the clamp
    free: Tensor  # whether the clamp lets a gradient through
    opened: Tensor  # whether the token counts, and its d is inside GMPO's bounds
    part: Tensor  # share of the token in a mean over its sequence
    log_w: Tensor | None  # VESPO's log sequence weight
    dropped: Tensor | None  # whether `off_policy_threshold` drops the token
    undecided: Tensor | None  # a NaN in the sequence leaves `dropped` open


def nan_where_undecided(importance: Tensor | None, found: Ratios) -> Tensor | None:
    """Return importance weights that are NaN where nobody can tell whether the token is dropped."""
    if found.undecided is None:
        return importance
    importance = torch.ones_like(found.log_ratio) if importance is None else importance
    return torch.where(found.undecided & (importance != 0), torch.nan, importance)


def ratio_terms(
    own: Tensor,
    advantage: Tensor,
    mask: Tensor | None,
    sequences: Sequences,
    objective: Objective,
) -> Ratios:
    """Compute the ratio of each token from the tokens' own log-ratios, which are 0 where masked."""
    share, log_importance = sequences.share, sequences.log_importance
    total = _sums(sequences, own)
    live = torch.ones_like(own, dtype=torch.bool) if mask is None else mask
    weighs = live.to(own.dtype) if share is None else share
    padded = own.ndim == 2
    count = own.new_full((), own.shape[1]) if padded and mask is None else total(weighs)
    part = weighs / count.where(count != 0, 1)
    d, opened = own, live

    def mean(x: Tensor) -> Tensor:
        return total(x if share is None else share * x) / count.where(count != 0, 1)

    if objective.surrogate == "gmpo":
        up, down = d.clamp(max=objective.epsilon_high), d.clamp(min=-objective.epsilon_low)
        d = torch.where(advantage > 0, up, torch.where(advantage < 0, down, 0))
        opened = live & (advantage != 0)
        opened &= ~torch.where(
            advantage > 0, own > objective.epsilon_high, own < -objective.epsilon_low
        )
    if objective.surrogate == "gmpo" or objective.ratio != "token":
        d = mean(d)
    bounded, free = bounded_log_ratio(d, objective)
    log_w = dropped = undecided = None
    if objective.surrogate == "vespo":
        logs = own.clamp(-20, 20) if share is None else share * own.clamp(-20, 20)
        log_w = total(logs if log_importance is None else logs + log_importance)
    if objective.off_policy_threshold is not None:
        drift = mean(-own)
        dropped = (drift > objective.off_policy_threshold) & (advantage < 0)
        undecided = drift.isnan() & (advantage < 0)
    return Ratios(d, bounded, free, opened, part, log_w, dropped, undecided)
