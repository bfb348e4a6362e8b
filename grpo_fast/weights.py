"""Detached weights for the losses: what the sampling policy's drift costs a token, and which tokens count.

Each function returns float32 (`kl_cov` a bool), to be given to `grpo_fast.loss` as `importance_weights`,
which weigh the policy term alone, as `token_weights`, which weigh everything a token contributes, or
multiplied into `mask`, which takes tokens out of the denominators too. Which trainer does which:
docs/weights.md.

Tokens are padded (B, T), or packed (N,) with `cu_seqlens` where sequences matter. A masked token is never
read, it may hold NaN. Nothing is differentiated, and nothing waits for the GPU.
"""

import math

import torch
from torch import Tensor

from grpo_fast import reference_terms
from grpo_fast.ops import _arguments
from grpo_fast.ops._selection import (
    live_tokens,
    per_sequence,
    per_token_advantages,
    rank_of,
    share_of,
    top_entropy_mask,
)
from grpo_fast.ops.group_advantage import check_groups, check_rewards

__all__ = [
    "clip_cov",
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
MISSING = ("error", "skip")


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
) -> Tensor:
    """The ratio rho of the trainer's policy to the one that sampled, kept within bounds.

    Equivalent, at the level "token", to `(old_logps - sampling_logps).exp().clamp(low, high)`; for
    `importance_weights=`. With the modes "truncate" and "mask" at the levels "token" and "sequence" these are
    the four modes of TRL's `vllm_importance_sampling_mode`.

    Args:
        old_logps: (B, T) or (N,), by the trainer, of the weights that sampled.
        sampling_logps: the same shape, by the inference engine. A difference that is NaN counts as 0.
        mask: the same shape; a masked token counts as a difference of 0.
        cu_seqlens: (num_seqs + 1,) boundaries of packed tokens. Without it they are one sequence.
        level: rho of each "token"; of the "sequence", exp of the sum of the differences; "geometric", exp
            of their mean.
        mode: "truncate" clamps rho to the bounds, "mask" makes it 0 outside of them, "gate" is 1 inside
            and 0 outside.
        low, high: the bounds, both within; None: none.

    Returns:
        Float32, of the shape of `old_logps`; at the other levels one weight per sequence, (B, 1) padded or
        (num_seqs,) packed.

    Raises:
        ValueError, TypeError: shapes that do not fit, an unknown level or mode, bounds that are negative or
            in the wrong order, a gate without bounds.
    """
    op = "importance_weights"
    _check_choice(op, "level", level, LEVELS)
    _check_choice(op, "mode", mode, MODES)
    _check_bounds(op, low, high)
    if mode == "gate" and low is None and high is None:
        raise ValueError(f"{op}: mode='gate' has no effect without low or high")
    live, old, sampling = live_tokens(op, mask, old_logps=old_logps, sampling_logps=sampling_logps)
    gap = _gap(old, sampling)
    if cu_seqlens is not None:
        _arguments.check_cu_seqlens(op, cu_seqlens, old_logps)
    if level == "token":
        gap = gap.view(old_logps.shape)
    else:
        total = per_sequence(gap, old_logps, cu_seqlens)
        if level == "geometric":
            total = total / per_sequence(live, old_logps, cu_seqlens).clamp(min=1)
        gap = total
    return _bounded(gap.exp().float(), mode, low, high)


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
    _check_number(op, "delta", delta)
    live, old, sampling = live_tokens(op, mask, old_logps=old_logps, sampling_logps=sampling_logps)
    old, sampling = old.double(), sampling.double()
    missing = (old - sampling).isnan()
    kl = torch.maximum(
        reference_terms.binary_kl(old, sampling), reference_terms.binary_kl(sampling, old)
    )
    return (live & ((kl <= delta) | missing)).float().view(old_logps.shape)


@torch.no_grad()
def m2po(
    old_logps: Tensor, sampling_logps: Tensor, threshold: float, *, mask: Tensor | None = None
) -> Tensor:
    """1 for the tokens left when the second moment of the log ratio is held below `threshold`, else 0.

    The tokens with the largest `(old_logps - sampling_logps) ** 2` are dropped until the mean over the rest
    is less than `threshold`; one token is always left. M2PO (arXiv 2510.01161), as AReaL's `m2_threshold`.

    Args:
        old_logps, sampling_logps, mask: as in `importance_weights`. The mean is over the tokens given.

    Returns:
        Float32, of the shape of `old_logps`; 0 where masked.
    """
    op = "m2po"
    _check_number(op, "threshold", threshold)
    live, old, sampling = live_tokens(op, mask, old_logps=old_logps, sampling_logps=sampling_logps)
    moment = torch.where(live, _gap(old, sampling).double().square(), math.inf)
    ascending, order = moment.sort(stable=True)  # masked tokens come last
    count = torch.arange(1, len(moment) + 1, device=moment.device)
    kept = (ascending.cumsum(0) / count < threshold).sum().clamp(min=1)
    return (live & (rank_of(order) < kept)).float().view(old_logps.shape)


@torch.no_grad()
def top_entropy(
    entropy: Tensor,
    fraction: float,
    *,
    mask: Tensor | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """1 for the `fraction` of the tokens with the highest entropy, else 0 (arXiv 2506.01939).

    Equivalent to `entropy >= torch.quantile(entropy[mask], 1 - fraction)`, for any number of tokens. TRL's
    `top_entropy_quantile`.

    Args:
        entropy: (B, T) or (N,), in nats.
        fraction: in [0, 1].
        mask: the same shape.
        group: processes whose tokens count together, each with as many as it has. Default: this one's.

    Returns:
        Float32, of the shape of `entropy`; 0 where masked.
    """
    op = "top_entropy"
    _check_number(op, "fraction", fraction, high=1.0)
    live, values = live_tokens(op, mask, entropy=entropy)
    kept = top_entropy_mask(values, live, fraction, group)
    return kept.float().view(entropy.shape)


@torch.no_grad()
def clip_cov(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """0 for a few tokens drawn from those whose covariance is within (low, high), else 1 (arXiv 2505.22617).

    The covariance of a token is `(A - mean(A)) * (logp - mean(logp))`, means over the live tokens. Of the
    tokens within that the PPO clip does not bind, max(1, fraction * n) are drawn, or all if there are fewer.
    For `importance_weights=`; as in verl's "clip_cov".

    Args:
        logps, old_logps: (B, T) or (N,).
        advantages: (B,), (num_seqs,) with `cu_seqlens`, or per token.
        fraction: of the n live tokens.
        low, high: bounds of the covariance, exclusive.
        epsilon_low, epsilon_high: of the clip.
        generator: on the device of `logps`. Default: that device's own.

    Returns:
        Float32, of the shape of `logps`; 0 where masked.
    """
    op = "clip_cov"
    _check_number(op, "fraction", fraction, high=1.0)
    _check_number(op, "low", low, minimum=-math.inf)
    _check_number(op, "high", high, minimum=low)
    _check_number(op, "epsilon_low", epsilon_low)
    _check_number(op, "epsilon_high", epsilon_high)
    if generator is not None and generator.device.type != logps.device.type:
        raise ValueError(f"{op}: generator is on {generator.device}, logps on {logps.device}")
    advantages = per_token_advantages(op, advantages, logps, cu_seqlens)
    live, logp, old, A = live_tokens(
        op, mask, logps=logps, old_logps=old_logps, advantages=advantages
    )
    ratio = (logp - old).exp()
    clipped = -A * ratio.clamp(1 - epsilon_low, 1 + epsilon_high) > -A * ratio
    covariance = _covariance(A, logp, live)
    candidate = live & ~clipped & (covariance > low) & (covariance < high)
    draw = torch.rand(logp.shape, generator=generator, device=logp.device)
    rank = rank_of(torch.where(candidate, draw, math.inf).argsort())
    drawn = candidate & (rank < share_of(live, fraction))
    return (live & ~drawn).float().view(logps.shape)


@torch.no_grad()
def kl_cov(
    logps: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    fraction: float = 2e-4,
) -> Tensor:
    """Whether a token is among the max(1, fraction * n) with the largest covariance (arXiv 2505.22617).

    The covariance is that of `clip_cov`. These tokens get a penalty k * abs(logp - old_logp):
    `ref_logps=torch.where(selected, old_logps, logps.detach())` with `Objective(kl="abs", beta=k)`. As in
    verl's "kl_cov".

    Args:
        logps, advantages, mask, cu_seqlens, fraction: as in `clip_cov`.

    Returns:
        Bool, of the shape of `logps`; False where masked.
    """
    op = "kl_cov"
    _check_number(op, "fraction", fraction, high=1.0)
    advantages = per_token_advantages(op, advantages, logps, cu_seqlens)
    live, logp, A = live_tokens(op, mask, logps=logps, advantages=advantages)
    covariance = torch.where(live, _covariance(A, logp, live), -math.inf)
    rank = rank_of(covariance.argsort(descending=True, stable=True))
    return (live & (rank < share_of(live, fraction))).view(logps.shape)


@torch.no_grad()
def varied_groups(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    nan: str = "error",
) -> Tensor:
    """1 for the sequences whose group has rewards that differ, else 0 (DAPO, arXiv 2503.14476).

    Equivalent to `(r.amax(1) > r.amin(1)).float().repeat_interleave(group_size)` with
    `r = rewards.view(-1, group_size)`. The advantages of the others are 0; `mask * keep[:, None]` takes them
    out of the denominators and out of the KL and entropy terms as well.

    Args:
        rewards, group_size, group_ids, nan: as in `grpo_fast.ops.group_advantage`, rewards (B,); what a
            group is to differ in need not be the reward that is optimised.

    Returns:
        (B,) float32.
    """
    op = "varied_groups"
    _check_choice(op, "nan", nan, MISSING)
    rewards = check_rewards(op, rewards, group_size, skip_nan=nan == "skip")
    labels = check_groups(op, rewards, group_size, group_ids)
    position = torch.arange(len(rewards), device=rewards.device)
    if labels is None:
        group = position // (group_size or 1)
    else:  # numbered in the order of the labels; torch.unique would wait for the GPU
        ascending, order = labels.sort()
        new = torch.zeros_like(order)
        new[1:] = (ascending[1:] != ascending[:-1]).long()
        group = torch.empty_like(order).scatter(0, order, new.cumsum(0))
    missing = rewards.isnan()
    extremes = [
        torch.full_like(rewards, other).scatter_reduce(
            0, group, rewards.masked_fill(missing, other), reduction
        )
        for reduction, other in (("amax", -math.inf), ("amin", math.inf))
    ]
    return (extremes[0] > extremes[1])[group].float()


def _gap(old: Tensor, sampling: Tensor) -> Tensor:
    """`old - sampling`, 0 where one is missing, finite everywhere."""
    return torch.nan_to_num(old - sampling, nan=0.0)


def _bounded(rho: Tensor, mode: str, low: float | None, high: float | None) -> Tensor:
    if mode == "truncate":
        return rho if low is None and high is None else rho.clamp(low, high)
    outside = torch.zeros_like(rho, dtype=torch.bool)
    if low is not None:
        outside = outside | (rho < low)
    if high is not None:
        outside = outside | (rho > high)
    return torch.where(outside, 0, rho if mode == "mask" else 1.0)


def _covariance(A: Tensor, logp: Tensor, live: Tensor) -> Tensor:
    """Each token's share of the covariance of advantage and log-prob, times n."""
    n = live.sum().clamp(min=1)
    A, logp = A.double(), logp.double()
    return (A - A.sum() / n) * (logp - logp.sum() / n)


def _check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name}={value!r} is unknown; choose from {', '.join(choices)}")


def _check_number(
    op: str, name: str, value: float, minimum: float = 0.0, high: float = math.inf
) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name}: want a number, got {value!r}")
    if not (minimum <= value <= high and math.isfinite(value)):
        raise ValueError(f"{op}: {name}: want a number in [{minimum}, {high}], got {value}")


def _check_bounds(op: str, low: float | None, high: float | None) -> None:
    if low is not None:
        _check_number(op, "low", low)
    if high is not None:
        _check_number(op, "high", high, minimum=low or 0.0)
