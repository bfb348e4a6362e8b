"""Importance weights: the ratio of the trainer's policy before the update to the policy that sampled."""

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
    """Return the ratio rho of the trainer's policy to the one that sampled, kept within bounds.

        >>> old, sampling = -torch.rand(2, 3), -torch.rand(2, 3)
        >>> mask, rho = torch.tensor([[1, 1, 1], [1, 1, 0]]), (old - sampling).exp()
        >>> torch.testing.assert_close(importance_weights(old, sampling, high=1.2), rho.clamp(max=1.2))
        >>> of_sequence = importance_weights(old, sampling, mask=mask, level="sequence")
        >>> want = torch.where(mask == 1, rho, 1).prod(1, keepdim=True)
        >>> torch.testing.assert_close(of_sequence, want)

    It is meant for `importance_weights=`. With the modes "truncate" and "mask" at the levels
    "token" and "sequence" these are the four modes of TRL's `vllm_importance_sampling_mode`.

    Args:
        old_logps: (B, T) or (N,), log-probs by the trainer, of the weights that sampled.
        sampling_logps: the same shape, log-probs by the inference engine.
        mask: the same shape. A masked token counts as a difference of 0. A floating mask weighs the
            differences in sums and means over a sequence.
        cu_seqlens: (num_seqs + 1,) boundaries of packed tokens. Without it they are one sequence.
        level: "token": exp of the difference `old_logps - sampling_logps`. "sequence": exp of the
            sum of the differences of a sequence. "geometric": exp of their mean.
        mode: "truncate" clamps rho to the bounds. "mask" makes rho 0 outside of them. "gate"
            returns 1 inside and 0 outside.
        low, high: the bounds; a rho equal to a bound is inside. None: no bound.
        undefined: what happens to a difference that is NaN (a missing log-prob, or -inf from both).
            "one": rho is 1 at the level "token", and the difference counts as 0 at the other
            levels. "zero": a rho that is NaN or infinite becomes 0 before the bounds (NeMo-RL).

    Returns:
        Float32, of the shape of `old_logps`. At the levels "sequence" and "geometric" one weight
        per sequence, (B, 1) padded or (num_seqs,) packed.

    Raises:
        ValueError, TypeError: shapes that do not fit, an unknown choice, bounds that are negative
            or in the wrong order, a gate without bounds.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training".
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
    """Return truncated importance weights (TIS): the ratio of the two policies, at most `cap`.

        >>> old, sampling = -torch.rand(2, 3), -torch.rand(2, 3)
        >>> got = truncated_importance(old, sampling, 1.2)
        >>> torch.testing.assert_close(got, (old - sampling).exp().clamp(max=1.2))

    Args:
        old_logps, sampling_logps, mask, cu_seqlens, level: as in `importance_weights`, which is
            called with `mode="truncate"` and `high=cap`.
        cap: the upper bound, at least 0.

    Returns:
        As `importance_weights`.

    Raises:
        ValueError, TypeError: as in `importance_weights`.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training".
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
    """Return IcePop's importance weights: the ratio where it is within bounds, else 0.

        >>> old, sampling = -torch.rand(2, 3), -torch.rand(2, 3)
        >>> rho = (old - sampling).exp()
        >>> want = torch.where((0.8 <= rho) & (rho <= 1.2), rho, 0)
        >>> torch.testing.assert_close(icepop(old, sampling, 0.8, 1.2), want)

    Args:
        old_logps, sampling_logps, mask: as in `importance_weights`, which is called with
            `mode="mask"`.
        low, high: the bounds; a ratio equal to a bound is inside.

    Returns:
        Float32, of the shape of `old_logps`.

    Raises:
        ValueError, TypeError: as in `importance_weights`.

    Source: Ring-1T, arXiv 2510.18855.
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
    """Return one weight per sequence: the geometric mean of the weights of its tokens.

        >>> w = torch.rand(2, 3)
        >>> torch.testing.assert_close(geometric_mean(w), w.log().mean(-1, keepdim=True).exp())

    It is meant for objectives whose ratio is such a mean, too: GMPO (arXiv 2507.20673), as verl
    weighs its "geo_mean". A sequence without a token that counts has weight 1.

    Args:
        weights: (B, T) or (N,), at least 0.
        mask: the same shape. Where it is 0 nothing is read; a floating mask weighs the logarithms.
        cu_seqlens: as in `importance_weights`.
        eps: added to each weight. With 0, one token of weight 0 makes the weight of its sequence 0.

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
    """Return the means of x (N,), 0 where masked, over the sequences of `like`.

    They have the shape that `per_sequence` returns.
    """
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
