"""The arguments that all losses share: their checks, and their values per token."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast import checks
from grpo_fast.checks import (
    check_constant,
    check_held,
    check_values,
    constant,
    per_token,
    shaped_as_tokens,
)
from grpo_fast.objective import Objective
from grpo_fast.operands import LARGEST, SMALLEST, hint, operand, replaced
from grpo_fast.ops.coefficients import Batch, PerToken
from grpo_fast.ops.group_advantage import check_rewards
from grpo_fast.ops.reduction_weights import weights_of
from grpo_fast.records import Rewards, Sequences, Tokens, Weighing, Weights
from grpo_fast.sequences import (
    check_spread,
    first_of_sequence,
    one_per_sequence,
    spread_argument,
)
from grpo_fast.surrogates import SURROGATES


class LossArguments(NamedTuple):
    """The arguments that all losses share; `grpo_loss` explains them."""

    objective: Objective
    advantages: Tensor | None = None
    rewards: Tensor | None = None
    group_size: int | None = None
    mask: Tensor | None = None
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    importance_weights: Tensor | None = None
    token_weights: Tensor | None = None
    scores: Tensor | None = None
    num_items: float | Tensor | None = None
    loss_scale: float | Tensor | None = None
    cu_seqlens: Tensor | None = None

    def here(self, device: torch.device) -> "LossArguments":
        """Move the arguments that may be on the CPU to `device`, without a host sync."""
        names = ("advantages", "rewards", "token_weights", "scores", "cu_seqlens")
        moved = {name: to_device(getattr(self, name), device) for name in names}
        return replaced(self, **moved)


def to_device(x: Any, device: torch.device) -> Any:
    """Return a CPU tensor on `device`, without a host sync; return anything else unchanged."""
    return x.to(device, non_blocking=True) if isinstance(x, Tensor) and x.is_cpu else x


def check_batch(
    op: str,
    like: Tensor,
    mask: Tensor | None,
    given: LossArguments,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Check the arguments of a loss; return them as records of flat tensors.

    Args:
        like: one entry per token, (B, T) or packed (N,).
        mask: (N,) bool, from `checks.check_mask`.
        dtype: the dtype of the tensors per token, float32 or float64.
    """
    objective = given.objective
    rewards, weighing = _check_weighing(op, like, mask, given, dtype)
    boundaries = weighing.boundaries
    # Packed tokens without boundaries are one sequence.
    rows = like[None] if like.ndim == 1 and boundaries is None else like
    found = weights_of(
        torch.empty_like(like, dtype=dtype) if dtype == torch.float64 else like.detach(),
        weighing,
        objective,
    )
    takes_scores = SURROGATES[objective.surrogate].takes_scores
    if rewards is not None and given.scores is None and takes_scores:
        # (B, 1) is per sequence even where B equals the number of tokens
        given = replaced(given, scores=rewards[:, None])
    check = functools.partial(per_token, op, like=like, dtype=dtype)
    places = boundaries, found.sequence
    spread = functools.partial(_spread, op, like=like, places=places, dtype=dtype)
    each = _check_per_token(given, check, spread)
    importance, log_importance = each.importance, None
    if objective.surrogate == "vespo" and importance is not None:
        by_sequence = given.importance_weights.shape != like.shape  # type: ignore[union-attr]
        first = first_of_sequence(rows, found.sequence) if by_sequence else None
        log_importance = _log_importance(importance, mask, found, first)
        importance = None
    tokens = Tokens(
        weight=found.weight,
        advantages=each.advantages,
        old_logp=each.old_logp,
        ref_logp=each.ref_logp,
        importance=importance,
        score=each.score,
        entropy_weight=found.entropy_weight,
        coefficient=None,
    )
    if boundaries is not None:
        boundaries = boundaries.long().contiguous() if objective.needs_sequences else None
    return Batch(
        mask,
        tokens,
        Rewards(rewards, given.group_size or 1, found.sequence),
        Sequences(boundaries, rows.shape[-1], found.share, log_importance),
    )


def check_unweighed(
    op: str, like: Tensor, mask: Tensor | None, given: LossArguments
) -> tuple[Weighing, PerToken]:
    """Check the arguments as `check_batch` does, of padded tokens; leave the weights to the caller.

    Values are fp32: per token (B, T), and per sequence (B,), where copying them to (B, T) would take
    as long as a tenth of the loss.
    """
    _, weighing = _check_weighing(op, like, mask, given, torch.float32)
    each = functools.partial(_each, op, like=like)
    spread = functools.partial(_each_or_per_sequence, op, like=like)
    return weighing, _check_per_token(given, each, spread)


def _each(op: str, name: str, x: Tensor | None, like: Tensor) -> Tensor | None:
    return None if x is None else shaped_as_tokens(op, name, x, like)


def _each_or_per_sequence(op: str, name: str, x: Tensor | None, like: Tensor) -> Tensor | None:
    if x is None or x.shape == like.shape:
        return _each(op, name, x, like)
    check_spread(op, name, x, like, None)
    return constant(op, name, x, like, torch.float32).reshape(-1)


def _check_weighing(
    op: str, like: Tensor, mask: Tensor | None, given: LossArguments, dtype: torch.dtype
) -> tuple[Tensor | None, Weighing]:
    """Check the arguments, except the values of `PerToken`; return the rewards, and what weighs tokens."""
    cu_seqlens, sequences = given.cu_seqlens, len(like) if like.ndim == 2 else 1
    if cu_seqlens is not None:
        cu_seqlens = checks.check_cu_seqlens(op, cu_seqlens, like)
        sequences = len(cu_seqlens) - 1
    rewards = _check_rewards(op, like, given, sequences)
    _check_needed(op, given)
    _check_constants(op, like, given)
    return rewards, Weighing(
        mask,
        checks.floating_mask(given.mask, like),
        per_token(op, "token_weights", given.token_weights, like, dtype),
        cu_seqlens,
        _check_num_items(op, given.num_items, given.objective),
        _check_loss_scale(op, given.loss_scale),
    )


def _check_per_token(
    given: LossArguments, each: Callable[..., Any], spread: Callable[..., Any]
) -> PerToken:
    """Check the values of tokens and of sequences; return them per token.

    Args:
        each: checks an argument per token, given its name; returns what it becomes.
        spread: the same for an argument that may also be per sequence.
    """
    importance = spread("importance_weights", given.importance_weights)
    return PerToken(
        advantages=spread("advantages", given.advantages),
        old_logp=each("old_logps", given.old_logps),
        ref_logp=each("ref_logps", given.ref_logps),
        importance=importance,
        score=spread("scores", given.scores),
    )


def _spread(
    op: str,
    name: str,
    x: Tensor | None,
    like: Tensor,
    places: tuple[Tensor | None, Tensor | None],
    dtype: torch.dtype,
) -> Tensor | None:
    """Return an argument that is given per sequence or per token as (N,).

    Args:
        places: the boundaries of packed sequences, and the sequence of each packed token.
    """
    if x is None:
        return None
    return per_token(op, name, spread_argument(op, name, x, like, *places), like, dtype)


def _log_importance(
    importance: Tensor, mask: Tensor | None, weights: Weights, first: Tensor | None
) -> Tensor:
    """Return what VESPO adds to the log of the sequence weight, (N,).

    A value per sequence counts once, at the `first` token of the sequence; None: one per token.
    """
    live = torch.ones_like(importance, dtype=torch.bool) if mask is None else mask
    counts, weighs = live, live if weights.share is None else weights.share
    if first is not None:
        counts = weighs = first
    return torch.where(counts, weighs * importance.log().clamp(math.log(1e-8), 20), 0)


def _check_rewards(
    op: str, like: Tensor, given: LossArguments, num_sequences: int
) -> Tensor | None:
    """Check that either advantages or rewards are given; return the rewards."""
    advantages, rewards, group_size = given.advantages, given.rewards, given.group_size
    if (advantages is None) == (rewards is None):
        raise ValueError(
            f"{op}: give either advantages or rewards with group_size, "
            f"got {'neither' if advantages is None else 'both'}"
        )
    if rewards is None:
        if group_size is not None:
            raise ValueError(f"{op}: group_size={group_size} has no effect with advantages")
        return None
    if group_size is None:
        raise ValueError(f"{op}: group_size: needed with rewards")
    check_constant(op, "rewards", rewards)
    rewards = check_rewards(op, one_per_sequence(rewards), group_size)
    checks.check_shape(op, "rewards", rewards, ((num_sequences,),))
    checks.check_device(op, "rewards", rewards, like)
    return rewards


def _check_constants(op: str, like: Tensor, given: LossArguments) -> None:
    """Check that no constant argument requires grad: it would get no gradient."""
    for name in ("advantages", "importance_weights", "token_weights", "scores"):
        check_constant(op, name, getattr(given, name))
    for name in ("num_items", "loss_scale"):
        check_constant(op, name, getattr(given, name))
        check_held(op, name, getattr(given, name), like)


def _check_needed(op: str, given: LossArguments) -> None:
    """Check that the arguments the objective needs are given, and that the others have an effect."""
    objective, old_logps, ref_logps = given.objective, given.old_logps, given.ref_logps
    scores, modes = given.scores, objective.terms.modes
    if modes.has_kl and ref_logps is None:
        raise ValueError(f"{op}: ref_logps: needed, since objective.beta={objective.beta}")
    row = SURROGATES[objective.surrogate]
    if scores is not None and not row.takes_scores:
        users = ", ".join(repr(name) for name, row in SURROGATES.items() if row.takes_scores)
        raise ValueError(
            f"{op}: scores have no effect with surrogate={objective.surrogate!r}; they belong to {users}"
        )
    reason = None
    if modes.drops_stale:
        reason = "off_policy_threshold"
    elif row.needs_old_logps:
        reason = "surrogate"
    elif modes.has_penalty:
        reason = "quadratic_coef"
    if reason and old_logps is None:
        option = f"{reason}={getattr(objective, reason)!r}"
        raise ValueError(
            f"{op}: old_logps: needed, since {option} measures the distance to the policy that "
            "sampled; on the first update pass that policy's log-probs all the same"
        )


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
    """Check a number or a 0-dim tensor; return a 0-dim tensor.

    A tensor stays on its device, and its value is not read where that would be a host sync.
    """
    if isinstance(x, Tensor):
        if x.ndim:
            raise ValueError(
                f"{op}: {name}: want a number or a 0-dim tensor, got {checks.shape_of(x)}"
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
