"""The arguments that `grpo_loss` and `policy_loss` share: checked, spread over tokens, flattened."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast._operands import LARGEST, SMALLEST, hint, operand
from grpo_fast.objective import Objective
from grpo_fast.ops import _arguments
from grpo_fast.ops._backend import check_values
from grpo_fast.ops.group_advantage import check_rewards
from grpo_fast.ops.reduction_weights import weights_of


class Tokens(NamedTuple):
    """The arguments that both losses share, checked and flattened to (N,)."""

    mask: Tensor | None
    weight: Tensor
    advantages: Tensor | None
    rewards: Tensor | None
    group_size: int
    sequence: Tensor | None
    old_logp: Tensor | None
    ref_logp: Tensor | None
    importance: Tensor | None
    score: Tensor | None  # TOPR's; None: the advantages
    entropy_weight: Tensor | None  # None: weight


class Sequences(NamedTuple):
    """What objectives that look at whole sequences take besides."""

    log_importance: Tensor | None  # (N,) VESPO's part of the log sequence weight
    share: Tensor | None  # (N,) what a floating mask weighs a token with; None: 1
    boundaries: Tensor | None  # (num_sequences + 1,) int64, or None:
    T_len: int  # tokens of each sequence


def check_tokens(
    op: str,
    like: Tensor,
    mask: Tensor | None,
    floating: Tensor | None,
    advantages: Tensor | None,
    rewards: Tensor | None,
    group_size: int | None,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    importance_weights: Tensor | None,
    token_weights: Tensor | None,
    scores: Tensor | None,
    num_items: float | Tensor | None,
    cu_seqlens: Tensor | None,
    loss_scale: float | Tensor | None,
    objective: Objective,
) -> tuple[Tokens, Sequences]:
    """Check what the losses have in common; `like` has one entry per token.

    mask, floating: from `_arguments.check_mask` and `_arguments.floating_mask`.
    """
    check_objective(op, objective)
    if cu_seqlens is not None:
        cu_seqlens = _arguments.check_cu_seqlens(op, cu_seqlens, like)
    # Packed tokens without boundaries are one sequence.
    rows = like[None] if like.ndim == 1 and cu_seqlens is None else like
    num_sequences = len(rows) if cu_seqlens is None else len(cu_seqlens) - 1
    if (advantages is None) == (rewards is None):
        raise ValueError(
            f"{op}: give either advantages or rewards with group_size, "
            f"got {'neither' if advantages is None else 'both'}"
        )
    if rewards is not None:
        if group_size is None:
            raise ValueError(f"{op}: group_size: needed with rewards")
        _arguments.check_constant(op, "rewards", rewards)
        rewards = check_rewards(op, rewards, group_size)
        _arguments.check_shape(op, "rewards", rewards, ((num_sequences,),))
        _arguments.check_device(op, "rewards", rewards, like)
    elif group_size is not None:
        raise ValueError(f"{op}: group_size={group_size} has no effect with advantages")
    _check_needed(op, objective, old_logps, ref_logps, scores)
    for name, factor in (
        ("advantages", advantages),
        ("importance_weights", importance_weights),
        ("token_weights", token_weights),
        ("scores", scores),
        ("num_items", num_items),
        ("loss_scale", loss_scale),
    ):
        _arguments.check_constant(op, name, factor)
        if name in ("num_items", "loss_scale"):
            _arguments.check_held(op, name, factor, like)

    found = weights_of(
        like.detach(),
        mask,
        floating,
        _arguments.per_token(op, "token_weights", token_weights, like),
        cu_seqlens,
        _check_num_items(op, num_items, objective),
        _check_loss_scale(op, loss_scale),
        objective,
    )
    sequence = found.sequence

    def spread(name: str, x: Tensor | None) -> Tensor | None:
        """A per-sequence or per-token argument as (N,)."""
        if x is None:
            return None
        x = _arguments.spread(op, name, x, like, cu_seqlens, sequence)
        return _arguments.per_token(op, name, x, like)

    if rewards is not None and scores is None and objective.surrogate == "topr":
        scores = rewards[:, None]  # one per sequence, however many tokens there are
    importance = spread("importance_weights", importance_weights)
    log_importance = None
    if objective.surrogate == "vespo" and importance is not None:
        # It enters the sequence weight: one per sequence once, at its first token.
        live = torch.ones_like(importance, dtype=torch.bool) if mask is None else mask
        counts, weighs = live, live if found.share is None else found.share
        if importance_weights is not None and importance_weights.shape != like.shape:
            counts = first_of_sequence(rows, sequence)
            weighs = counts
        logs = weighs * importance.log().clamp(math.log(1e-8), 20)
        log_importance, importance = torch.where(counts, logs, 0), None
    tokens = Tokens(
        mask,
        found.weight,
        spread("advantages", advantages),
        rewards,
        group_size or 1,
        sequence,
        _arguments.per_token(op, "old_logps", old_logps, like),
        _arguments.per_token(op, "ref_logps", ref_logps, like),
        importance,
        spread("scores", scores),
        found.by_tokens,
    )
    boundaries = None
    if cu_seqlens is not None and objective.needs_sequences:
        boundaries = cu_seqlens.long().contiguous()
    return tokens, Sequences(log_importance, found.share, boundaries, rows.shape[-1])


def check_objective(op: str, objective: object) -> None:
    """Refuse what is no objective, before its options are read."""
    if not isinstance(objective, Objective):
        raise TypeError(
            f"{op}: objective: want an Objective, such as Objective.preset(name), got {objective!r}"
        )


def _check_needed(
    op: str,
    objective: Objective,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    scores: Tensor | None,
) -> None:
    """Arguments that the objective cannot do without, or does not use."""
    modes = objective.terms.modes
    if modes.has_kl and ref_logps is None:
        raise ValueError(f"{op}: ref_logps: needed, since objective.beta={objective.beta}")
    if scores is not None and objective.surrogate != "topr":
        raise ValueError(
            f"{op}: scores have no effect with surrogate={objective.surrogate!r}; they belong to 'topr'"
        )
    reason = None
    if modes.drops_stale:
        reason = "off_policy_threshold"
    elif modes.surrogate == "rollout_is":
        reason = "surrogate"
    elif modes.has_penalty:
        reason = "quadratic_coef"
    if reason and old_logps is None:
        option = f"{reason}={getattr(objective, reason)!r}"
        raise ValueError(
            f"{op}: old_logps: needed, since {option} measures the distance to the policy that "
            "sampled; on the first update pass that policy's log-probs all the same"
        )


def first_of_sequence(rows: Tensor, sequence: Tensor | None) -> Tensor:
    """(N,) bool: whether a token is the first of its sequence."""
    if sequence is not None:
        before = torch.nn.functional.pad(sequence, (1, 0), value=-1)[:-1]
        return sequence != before
    position = torch.arange(rows.numel(), device=rows.device)
    return position % max(rows.shape[-1], 1) == 0


def _check_num_items(
    op: str, num_items: float | Tensor | None, objective: Objective
) -> Tensor | None:
    if num_items is None:
        return None
    if objective.reduction != "token_mean":
        raise ValueError(
            f"{op}: num_items is the denominator of reduction='token_mean' and has no effect with "
            f"{objective.reduction!r}"
        )
    return _check_number(
        op, "num_items", num_items, 0, "a finite number >= 0 that float32 can hold"
    )


def _check_loss_scale(op: str, loss_scale: float | Tensor | None) -> Tensor | None:
    if loss_scale is None:
        return None
    return _check_number(
        op, "loss_scale", loss_scale, -LARGEST, "a finite number that float32 can hold"
    )


def _check_number(op: str, name: str, x: float | Tensor, low: float, wanted: str) -> Tensor:
    """A number or a 0-dim tensor as an operator takes it: where it is, if nobody may look at it."""
    if isinstance(x, Tensor):
        if x.ndim:
            raise ValueError(
                f"{op}: {name}: want a number or a 0-dim tensor, got {_arguments.shape_of(x)}"
            )
        if x.dtype == torch.bool or x.dtype.is_complex:
            raise TypeError(f"{op}: {name}: want a real number, got a tensor of {x.dtype}")
        if not check_values(x):
            return x.detach()
        given, x = x.detach(), x.item()
    else:
        given = None
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{op}: {name}: want a number or a 0-dim tensor, got {x!r}{hint(name, x)}")
    if not low <= x <= LARGEST or (low < 0 < abs(x) < SMALLEST):
        raise ValueError(f"{op}: {name}: want {wanted}, got {x}")
    return operand(float(x)) if given is None else given
