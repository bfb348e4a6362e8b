"""Detached weights for the losses: what the sampling policy's drift costs a token, and which tokens count.

Each function returns float32 (`kl_cov` a bool), to be given to `grpo_fast.loss` as `importance_weights`,
which weigh the policy term alone, as `token_weights`, which weigh everything a token contributes, or
multiplied into `mask`, which takes tokens out of the denominators too. Which trainer does which:
docs/weights.md.

Tokens are padded (B, T), or packed (N,) with `cu_seqlens` where sequences matter. A masked token is never
read, it may hold NaN. Nothing is differentiated, and nothing waits for the GPU.
"""

import torch
from torch import Tensor

from grpo_fast import reference_terms
from grpo_fast._names import check_choice
from grpo_fast._operands import bound
from grpo_fast._selected import clip_cov, kl_cov, m2po, top_entropy, varied_groups
from grpo_fast.ops import _arguments
from grpo_fast.ops._selection import (
    check_number,
    gap_of,
    live_tokens,
    mask_weights,
    per_sequence,
)

__all__ = [
    "binary_divergence",
    "clip_cov",
    "geometric_mean",
    "icepop",
    "importance_weights",
    "kl_cov",
    "kpop",
    "m2po",
    "top_entropy",
    "truncated_importance",
    "varied_groups",
]

LEVELS = ("token", "sequence", "geometric")
MODES = ("truncate", "mask", "gate")
UNDEFINED = ("one", "zero")
DIVERGENCES = ("kl", "tv")


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
        _arguments.check_cu_seqlens(op, cu_seqlens, old_logps)
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
        _arguments.check_cu_seqlens(op, cu_seqlens, weights)
    share = mask_weights(mask, live)
    logs = torch.where(live, (given + eps).log(), 0) * share
    return _mean(logs, share, weights, cu_seqlens).exp().float()


@torch.no_grad()
def kpop(
    old_logps: Tensor, sampling_logps: Tensor, delta: float, *, mask: Tensor | None = None
) -> Tensor:
    """1 where the KLs of the two-outcome distributions (this token, any other) are within `delta`, else 0.

    Equivalent to `torch.maximum(kl(old, sampling), kl(sampling, old)) <= delta` with
    `kl(p, q) = p (log p - log q) + (1 - p) (log(1 - p) - log(1 - q))`. A missing (NaN) log-prob is within.

    Args:
        old_logps, sampling_logps, mask: as in `importance_weights`.
        delta: in nats.

    Returns:
        Float32, of the shape of `old_logps`; 0 where masked.
    """
    op = "kpop"
    check_number(op, "delta", delta)
    live, old, sampling = live_tokens(op, mask, old_logps=old_logps, sampling_logps=sampling_logps)
    old, sampling = (x.double().clamp(max=0) for x in (old, sampling))  # of rounding, above 0
    missing = (old - sampling).isnan()
    kl = torch.maximum(
        reference_terms.binary_kl(old, sampling), reference_terms.binary_kl(sampling, old)
    )
    return (live & ((kl <= delta) | missing)).float().view(old_logps.shape)


@torch.no_grad()
def binary_divergence(
    logps: Tensor,
    other_logps: Tensor,
    *,
    kind: str = "kl",
    mask: Tensor | None = None,
    floor: float = 0.0,
) -> Tensor:
    """How far two policies are apart at each token, as distributions of "this token" and "any other".

    Equivalent to `(p - q).abs()` for "tv", `p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()` for
    "kl", with `p, q = logps.exp(), other_logps.exp()`. Not a weight itself: compare it with a threshold.

    Args:
        logps, other_logps: (B, T) or (N,), of p and q.
        kind: "kl", in nats, or "tv", the total variation.
        mask: the same shape; where it is 0 nothing is read.
        floor: p and q are clamped to [floor, 1 - floor].

    Returns:
        Float32, of the shape of `logps`; 0 where masked, NaN where a log-prob is.
    """
    op = "binary_divergence"
    check_choice("kind", kind, DIVERGENCES, op)
    check_number(op, "floor", floor, high=0.5)
    live, *both = live_tokens(op, mask, logps=logps, other_logps=other_logps)
    p, q = (x.double().exp() for x in both)
    least = bound(floor, p)
    p, q = p.clamp(least, 1 - least), q.clamp(least, 1 - least)
    if kind == "tv":
        found = (p - q).abs()
    else:  # terms of probability 0 are 0
        others = [(-x.double().expm1()).clamp(least, 1 - least) for x in both]
        pairs = ((p, q), (others[0], others[1]))
        found = sum((a.xlogy(a) - a.xlogy(b) for a, b in pairs), torch.zeros_like(p))
    return torch.where(live, found, 0).float().view(logps.shape)


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
