"""The objective on log-probs where it looks at whole sequences (`grpo_fast.kernels.sequence_loss`)."""

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast import reference
from grpo_fast._operands import Modes
from grpo_fast.objective import Objective
from grpo_fast.ops._backend import launch, use_triton
from grpo_fast.ops._terms import bounded_log_ratio, policy_terms, weigh
from grpo_fast.ops.policy_loss import backward, fake, setup_context


class Segments(NamedTuple):
    """The sequences of (N,) tokens: every `T_len` of them, or as `of_token` says."""

    T_len: int
    of_token: Tensor | None = None
    number: int = 0  # of sequences, with `of_token`

    @staticmethod
    def of(N: int, boundaries: Tensor | None, T_len: int) -> "Segments":
        """Of `boundaries` (num_sequences + 1,), or of `T_len` tokens each where they are None."""
        if boundaries is None:
            return Segments(T_len)
        of_token = reference.sequence_of_token(boundaries, N)
        return Segments(T_len, of_token, len(boundaries) - 1)

    def sum(self, x: Tensor) -> Tensor:
        """Per token: the sum over its sequence. Masked tokens must hold 0."""
        # In float32 thousands of tokens, added one by one, would lose what a sum in pairs keeps.
        if self.of_token is None:
            rows = x.view(-1, max(self.T_len, 1))
            total = rows.sum(-1, keepdim=True, dtype=torch.float64)
            return total.to(x.dtype).expand(rows.shape).reshape(-1)
        total = x.new_zeros(self.number, dtype=torch.float64)
        return total.index_add_(0, self.of_token, x.double()).to(x.dtype)[self.of_token]


def sequence_policy_terms(
    logp: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantage: Tensor,
    score: Tensor | None,
    importance: Tensor | None,
    log_importance: Tensor | None,
    live: Tensor,
    share: Tensor | None,
    weight: Tensor,
    segments: Segments,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Weighted (loss, dloss/dlogp), KL or None, clip flags: the twin of `_sequence_loss_kernel`."""
    old = logp if old_logp is None else old_logp
    found = ratio_terms(logp - old, advantage, log_importance, live, share, segments, objective)
    through_mean = objective.ratio == "sequence" or objective.surrogate == "gmpo"
    own = found.free.to(logp.dtype)
    if through_mean:
        own = torch.where(found.opened, own * found.part, 0)
    importance = poisoned(importance, found)
    terms = policy_terms(
        *(logp, old, ref_logp, found.bounded, own, found.log_w, found.dropped),
        *(advantage, score, importance, objective),
    )
    through = weigh(weight, torch.where(found.free, terms.by_ratio, 0))
    if through_mean:
        through = segments.sum(through)
        if objective.beta and objective.kl == "k3_unbiased":
            assert terms.kl is not None
            mine = weigh(weight, torch.where(found.free, objective.beta * terms.kl, 0))
            # Of the others: a token's own is in `by_logp` already, without the cancellation.
            through = through + torch.where(mine.isinf(), 0, segments.sum(mine) - mine)
        through = torch.where(found.opened, through * found.part, 0)
    dlogp = weigh(weight, terms.by_logp) + through
    clip = torch.where(live, terms.clip, 0)
    return weigh(weight, terms.loss), dlogp, terms.kl, clip


class Ratios(NamedTuple):
    """Of tokens, what their sequences make of them."""

    log_ratio: Tensor  # before its clamp
    bounded: Tensor  # after it
    free: Tensor  # the clamp lets a gradient through
    opened: Tensor  # live, and not bounded before the mean is taken (GMPO)
    part: Tensor  # of the token in a mean over its sequence
    log_w: Tensor | None  # VESPO's log sequence weight
    dropped: Tensor | None  # by `off_policy_threshold`
    undecided: Tensor | None  # whether to drop them cannot be told: the sequence has a NaN


def poisoned(importance: Tensor | None, found: Ratios) -> Tensor | None:
    """Importance weights that are NaN where it is undecided whether a token counts: that comes out."""
    if found.undecided is None:
        return importance
    importance = torch.ones_like(found.log_ratio) if importance is None else importance
    return torch.where(found.undecided & (importance != 0), torch.nan, importance)


def ratio_terms(
    own: Tensor,
    advantage: Tensor,
    log_importance: Tensor | None,
    live: Tensor,
    share: Tensor | None,
    segments: Segments,
    objective: Objective,
) -> Ratios:
    """The ratio of each token, from the tokens' own log-ratios, 0 where masked.

    share: the weight of a token in means and sums over its sequence; None: 1.
    """
    weighs = live.to(own.dtype) if share is None else share
    count = segments.sum(weighs)
    part = weighs / count.where(count != 0, 1)
    d, opened = own, live

    def mean(x: Tensor) -> Tensor:
        return segments.sum(x if share is None else share * x) / count.where(count != 0, 1)

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
        total = own.clamp(-20, 20) if share is None else share * own.clamp(-20, 20)
        log_w = segments.sum(total if log_importance is None else total + log_importance)
    if objective.off_policy_threshold is not None:
        drift = mean(-own)
        dropped = (drift > objective.off_policy_threshold) & (advantage < 0)
        undecided = drift.isnan() & (advantage < 0)
    return Ratios(d, bounded, free, opened, part, log_w, dropped, undecided)


@torch.library.custom_op("grpo_fast::sequence_loss", mutates_args=())
def sequence_loss_fwd(
    logp: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    importance: Tensor | None,
    score: Tensor | None,
    log_importance: Tensor | None,
    share: Tensor | None,
    boundaries: Tensor | None,
    T_len: int,
    modes: str,
    numbers: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted loss, its derivative in logp, KL ((0,) without ref_logp), clip flags; all (N,).

    Args:
        log_importance: (N,) what VESPO adds to the log sequence weight, masked tokens included.
        share: (N,) the weight of a token in means and sums over its sequence, 0 where masked. None: 1.
        boundaries: (num_sequences + 1,) int64, or None where every `T_len` tokens are a sequence.
    """
    objective = Objective.from_terms(Modes.of(modes), numbers)
    if use_triton(logp):
        from grpo_fast.kernels import sequence_loss as kernels

        loss, dlogp, kl, clip = launch(
            kernels.sequence_loss_fwd,
            logp,
            *(logp, mask, weight, advantages, old_logp, ref_logp, importance, score),
            *(log_importance, share, boundaries, T_len, objective),
        )
        return loss, dlogp, logp.new_empty(0) if kl is None else kl, clip
    segments = Segments.of(len(logp), boundaries, T_len)
    live = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask

    def kept(x: Tensor) -> Tensor:
        return torch.where(live, x, 0)

    loss, dlogp, kl, clip = sequence_policy_terms(
        kept(logp),
        None if old_logp is None else kept(old_logp),
        None if ref_logp is None else kept(ref_logp),
        kept(advantages),
        None if score is None else kept(score),
        None if importance is None else kept(importance),
        log_importance,
        live,
        share,
        kept(weight),
        segments,
        objective,
    )
    return loss, dlogp, logp.new_empty(0) if kl is None else kl, clip


sequence_loss_fwd.register_fake(fake)
sequence_loss_fwd.register_autograd(backward, setup_context=setup_context)
