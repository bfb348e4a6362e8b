"""Importance weights: how far the policy that sampled is from the one before the update."""

import torch
from torch import Tensor

from grpo_fast import checks
from grpo_fast.checks import check_number
from grpo_fast.operands import bound
from grpo_fast.sequences import per_sequence
from grpo_fast.spelling import check_choice
from grpo_fast.weights.live_tokens import gap_of, live_tokens, mask_weights

LEVELS = ("token", "sequence", "geometric")
MODES = ("truncate", "mask", "gate")
UNDEFINED = ("one", "zero")


@torch.no_grad()
def importance_weights(
    old_logps: Tensor,
    sampling_logps: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    level: str = "token",
    mode: str = "truncate",
    low: float | None = None,
    high: float | None = None,
    undefined: str = "one",
) -> Tensor:
    """The ratio rho of the trainer's policy to the one that sampled, kept within bounds.

    Equivalent, at the level "token", to `(old_logps - sampling_logps).exp().clamp(low, high)`; for
    `importance_weights=`. With the modes "truncate" and "mask" at the levels "token" and "sequence" these are
    the four modes of TRL's `vllm_importance_sampling_mode`.

    Args:
        old_logps: (B, T) or (N,), by the trainer, of the weights that sampled.
        sampling_logps: the same shape, by the inference engine.
        mask: the same shape; a masked token counts as a difference of 0. A floating mask weighs the
            differences in sums and means over a sequence.
        cu_seqlens: (num_seqs + 1,) boundaries of packed tokens. Without it they are one sequence.
        level: rho of each "token"; of the "sequence", exp of the sum of the differences; "geometric", exp
            of their mean.
        mode: "truncate" clamps rho to the bounds, "mask" makes it 0 outside of them, "gate" is 1 inside
            and 0 outside.
        low, high: the bounds, both within; None: none.
        undefined: a difference that is NaN (a missing log-prob; -inf from both) makes rho "one", at the other
            levels counts as 0. With "zero", rho is 0 where it is NaN or infinite, and the bounds come after
            that (NeMo-RL).

    Returns:
        Float32, of the shape of `old_logps`; at the other levels one weight per sequence, (B, 1) padded or
        (num_seqs,) packed.

    Raises:
        ValueError, TypeError: shapes that do not fit, an unknown choice, bounds that are negative or in the
            wrong order, a gate without bounds.
    """
    op = "importance_weights"
    check_choice("level", level, LEVELS, op)
    check_choice("mode", mode, MODES, op)
    check_choice("undefined", undefined, UNDEFINED, op)
    _check_bounds(op, low, high)
    if mode == "gate" and low is None and high is None:
        raise ValueError(f"{op}: mode='gate' has no effect without low or high")
    live, old, sampling = live_tokens(op, mask, old_logps=old_logps, sampling_logps=sampling_logps)
    gap = gap_of(old, sampling) if undefined == "one" else old - sampling
    if cu_seqlens is not None:
        checks.check_cu_seqlens(op, cu_seqlens, old_logps)
    share = mask_weights(mask, live)
    if level == "token":
        gap = gap.view(old_logps.shape)
    elif level == "sequence":
        gap = per_sequence(gap * share, old_logps, cu_seqlens)
    else:
        gap = _mean(gap * share, share, old_logps, cu_seqlens)
    rho = gap.exp().float()
    if undefined == "zero":
        rho = rho.nan_to_num(nan=0.0, posinf=0.0)
    return _bounded(rho, mode, low, high)


def truncated_importance(
    old_logps: Tensor,
    sampling_logps: Tensor,
    cap: float,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    level: str = "token",
) -> Tensor:
    """Truncated importance sampling (TIS): `importance_weights` with `mode="truncate"`, `high=cap`.

    Equivalent to `(old_logps - sampling_logps).exp().clamp(max=cap)`. Yao et al. 2025, "Your Efficient RL
    Framework Secretly Brings You Off-Policy RL Training".
    """
    check_number("truncated_importance", "cap", cap)
    return importance_weights(
        old_logps, sampling_logps, mask=mask, cu_seqlens=cu_seqlens, level=level, high=cap
    )


def icepop(
    old_logps: Tensor,
    sampling_logps: Tensor,
    low: float,
    high: float,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """IcePop (Ring-1T, arXiv 2510.18855): `importance_weights` with `mode="mask"`, per token.

    Equivalent to `torch.where((low <= rho) & (rho <= high), rho, 0)` with
    `rho = (old_logps - sampling_logps).exp()`.
    """
    return importance_weights(old_logps, sampling_logps, mask=mask, mode="mask", low=low, high=high)


@torch.no_grad()
def geometric_mean(
    weights: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """One weight per sequence: the geometric mean of those of its tokens, 1 without any.

    Equivalent to `(weights + eps).log().mean(-1, keepdim=True).exp()`. For objectives whose ratio is such a
    mean, too: GMPO, as verl's "geo_mean" weighs it.

    Args:
        weights: (B, T) or (N,), at least 0.
        mask: the same shape; where it is 0 nothing is read, and a floating one weighs the logs.
        cu_seqlens: as in `importance_weights`.
        eps: added to each; with 0, one weight of 0 makes that of its sequence 0.

    Returns:
        Float32, (B, 1) padded or (num_seqs,) packed.
    """
    op = "geometric_mean"
    check_number(op, "eps", eps)
    live, given = live_tokens(op, mask, weights=weights)
    if cu_seqlens is not None:
        checks.check_cu_seqlens(op, cu_seqlens, weights)
    share = mask_weights(mask, live)
    logs = torch.where(live, (given + eps).log(), 0) * share
    return _mean(logs, share, weights, cu_seqlens).exp().float()


def _mean(x: Tensor, live: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Means of (N,), 0 where masked, over the sequences of `like`, as `per_sequence` sums them."""
    count = per_sequence(live, like, cu_seqlens)
    return per_sequence(x, like, cu_seqlens) / count.where(count != 0, 1)


def _bounded(rho: Tensor, mode: str, low: float | None, high: float | None) -> Tensor:
    if mode == "truncate":
        return rho if low is None and high is None else rho.clamp(bound(low, rho), bound(high, rho))
    outside = torch.zeros_like(rho, dtype=torch.bool)
    if low is not None:
        outside = outside | (rho < low)
    if high is not None:
        outside = outside | (rho > high)
    return torch.where(outside, 0, rho if mode == "mask" else torch.ones_like(rho))


def _check_bounds(op: str, low: float | None, high: float | None) -> None:
    if low is not None:
        check_number(op, "low", low)
    if high is not None:
        check_number(op, "high", high, minimum=low or 0.0)
