"""The functions of `grpo_fast.weights` that choose which tokens, or which groups, count."""

import math

import torch
from torch import Tensor

from grpo_fast.checks import check_number
from grpo_fast.operands import bound
from grpo_fast.ops.group_advantage import MISSING, check_groups, check_rewards
from grpo_fast.ops.top_entropy import top_entropy_mask
from grpo_fast.sequences import per_token_advantages
from grpo_fast.spelling import check_choice
from grpo_fast.weights.live_tokens import (
    count_of,
    gap_of,
    live_tokens,
    mask_weights,
    rank_of,
)


@torch.no_grad()
def m2po(
    old_logps: Tensor, sampling_logps: Tensor, threshold: float, *, mask: Tensor | None = None
) -> Tensor:
    """Return 1 for the tokens that stay when the second moment of the log-ratio is bounded, else 0.

    The tokens with the largest `(old_logps - sampling_logps) ** 2` are dropped until the mean over
    the rest is below `threshold`. One token always stays.

        >>> old = torch.tensor([[0.1, -0.2, 0.9]])
        >>> m2po(old, torch.zeros(1, 3), 0.1).tolist()
        [[1.0, 1.0, 0.0]]

    Args:
        old_logps, sampling_logps, mask: as in `importance_weights`. The mean is over the tokens of
            this call that count.
        threshold: at least 0.

    Returns:
        Float32, of the shape of `old_logps`; 0 where masked.

    Source: M2PO, arXiv 2510.01161; AReaL's `m2_threshold`.
    """
    op = "m2po"
    check_number(op, "threshold", threshold)
    live, old, sampling = live_tokens(op, mask, old_logps=old_logps, sampling_logps=sampling_logps)
    moment = torch.where(live, gap_of(old, sampling).double().square(), math.inf)
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
    """Return 1 for the `fraction` of the tokens with the highest entropy, else 0.

        >>> entropy, mask = torch.rand(2, 5), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        >>> threshold = torch.quantile(entropy[mask == 1], 1 - 0.2)
        >>> want = ((entropy >= threshold) & (mask == 1)).float()
        >>> torch.testing.assert_close(top_entropy(entropy, 0.2, mask=mask), want)

    `torch.quantile` takes at most 2^24 values; this function takes any number.

    Args:
        entropy: (B, T) or (N,), in nats.
        fraction: in [0, 1].
        mask: the same shape.
        group: processes whose tokens are ranked together; each may have another number of tokens.
            Default: this process alone.

    Returns:
        Float32, of the shape of `entropy`; 0 where masked, NaN where the entropy is NaN.

    Source: arXiv 2506.01939; TRL's `top_entropy_quantile`.
    """
    op = "top_entropy"
    check_number(op, "fraction", fraction, high=1.0)
    live, values = live_tokens(op, mask, entropy=entropy)
    kept = top_entropy_mask(values, live, fraction, group)
    return torch.where(values.isnan(), values, kept.float()).view(entropy.shape)


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
    """Return 0 for a few random tokens of high covariance of advantage and log-prob, else 1.

    The covariance of a token is `(A - mean(A)) * (logp - mean(logp))`, with means over the tokens
    that count. From the tokens whose covariance is in (low, high) and whose PPO clip does not bind,
    max(1, fraction * n) are drawn, or all if there are fewer.

        >>> logps, A = torch.tensor([[-4.0, -0.1, -1.0]]), torch.tensor([[-2.0, 2.0, 0.0]])
        >>> cov = (A - A.mean()) * (logps - logps.mean())
        >>> keep = clip_cov(logps, logps, A, low=1.0, high=5.0, fraction=1.0)
        >>> torch.testing.assert_close(keep, 1 - ((cov > 1) & (cov < 5)).float())

    It is meant for `importance_weights=`, as in verl's "clip_cov".

    Args:
        logps, old_logps: (B, T) or (N,).
        advantages: (B,) or (B, 1), with `cu_seqlens` (num_seqs,) or (num_seqs, 1), or one per
            token.
        mask: the same shape; a floating mask weighs the means and n.
        cu_seqlens: (num_seqs + 1,) boundaries of packed tokens. Without it they are one sequence.
        fraction: share of the n tokens that count.
        low, high: bounds of the covariance, exclusive.
        epsilon_low, epsilon_high: bounds of the PPO clip.
        generator: on the device of `logps`. Default: the default generator of that device.

    Returns:
        Float32, of the shape of `logps`; 0 where masked.

    Source: arXiv 2505.22617.
    """
    op = "clip_cov"
    check_number(op, "fraction", fraction, high=1.0)
    check_number(op, "low", low, minimum=-math.inf)
    check_number(op, "high", high, minimum=low)
    check_number(op, "epsilon_low", epsilon_low)
    check_number(op, "epsilon_high", epsilon_high)
    advantages = per_token_advantages(op, advantages, logps, cu_seqlens)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator: want a torch.Generator, got {generator!r}")
    if generator is not None and generator.device.type != logps.device.type:
        raise ValueError(f"{op}: generator is on {generator.device}, logps on {logps.device}")
    live, logp, old, A = live_tokens(
        op, mask, logps=logps, old_logps=old_logps, advantages=advantages
    )
    ratio = (logp - old).exp()
    below, above = 1 - bound(epsilon_low, ratio), 1 + bound(epsilon_high, ratio)
    clipped = -A * ratio.clamp(below, above) > -A * ratio
    share = mask_weights(mask, live)
    covariance = _covariance(A, logp, share)
    candidate = live & ~clipped & (covariance > low) & (covariance < high)
    draw = torch.rand(logp.shape, generator=generator, device=logp.device, dtype=torch.float32)
    rank = rank_of(torch.where(candidate, draw, math.inf).argsort())
    drawn = candidate & (rank < count_of(share, fraction))
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
    """Return whether a token is among those with the largest covariance of advantage and log-prob.

    The covariance is that of `clip_cov`; the largest max(1, fraction * n) are chosen. These tokens
    get a penalty k * abs(logp - old_logp), through
    `ref_logps=torch.where(selected, old_logps, logps.detach())` with `Objective(kl="abs", beta=k)`,
    as in verl's "kl_cov".

        >>> logps, A = torch.tensor([[-4.0, -0.1, -1.0]]), torch.tensor([[-2.0, 2.0, 0.0]])
        >>> cov = (A - A.mean()) * (logps - logps.mean())
        >>> torch.testing.assert_close(kl_cov(logps, A, fraction=0.4), cov == cov.max())

    Args:
        logps, advantages, mask, cu_seqlens, fraction: as in `clip_cov`, but the values of a
            floating mask do not weigh: a token counts, or does not.

    Returns:
        Bool, of the shape of `logps`; False where masked.

    Source: arXiv 2505.22617.
    """
    op = "kl_cov"
    check_number(op, "fraction", fraction, high=1.0)
    advantages = per_token_advantages(op, advantages, logps, cu_seqlens)
    live, logp, A = live_tokens(op, mask, logps=logps, advantages=advantages)
    covariance = torch.where(live, _covariance(A, logp, live), -math.inf)
    rank = rank_of(covariance.argsort(descending=True, stable=True))
    return (live & (rank < count_of(live, fraction))).view(logps.shape)


@torch.no_grad()
def varied_groups(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    nan: str = "error",
) -> Tensor:
    """Return 1 for the sequences of groups whose rewards differ, else 0.

    DAPO's dynamic sampling keeps these.

        >>> rewards = torch.tensor([0.0, 1.0, 2.0, 2.0])
        >>> r = rewards.view(-1, 2)
        >>> want = (r.amax(1) > r.amin(1)).float().repeat_interleave(2)
        >>> torch.testing.assert_close(varied_groups(rewards, group_size=2), want)

    The advantages of the other sequences are 0. `mask * keep[:, None]` also takes them out of the
    denominators and out of the KL and entropy terms.

    Args:
        rewards, group_size, group_ids, nan: as in `grpo_fast.ops.group_advantage`, with rewards
            (B,). They need not be the rewards that are optimised.

    Returns:
        (B,) float32.

    Source: DAPO, arXiv 2503.14476.
    """
    op = "varied_groups"
    check_choice("nan", nan, MISSING, op)
    rewards = check_rewards(op, rewards, group_size, skip_nan=nan == "skip")
    labels = check_groups(op, rewards, group_size, group_ids)
    position = torch.arange(len(rewards), device=rewards.device)
    if labels is None:
        group = position // (group_size or 1)
    else:  # groups are numbered in the order of the labels; torch.unique would wait for the GPU
        ascending, order = labels.sort()
        new = torch.zeros_like(order)
        new[1:] = (ascending[1:] != ascending[:-1]).long()
        group = torch.empty_like(order).scatter(0, order, new.cumsum(0))
    missing = rewards.isnan() & (nan == "skip")
    extremes = [
        torch.full_like(rewards, other).scatter_reduce(
            0, group, rewards.masked_fill(missing, other), reduction
        )
        for reduction, other in (("amax", -math.inf), ("amin", math.inf))
    ]
    # On a GPU nobody looks for a NaN. One that is not skipped makes its group NaN.
    unknown = extremes[0].isnan() | extremes[1].isnan()
    return torch.where(unknown, torch.nan, (extremes[0] > extremes[1]).float())[group]


def _covariance(A: Tensor, logp: Tensor, weight: Tensor) -> Tensor:
    """Return the covariance of advantage and log-prob at each token, about their weighted means."""
    A, logp, weight = A.double(), logp.double(), weight.double()
    n = weight.sum()
    n = n.where(n != 0, 1)
    return (A - (A * weight).sum() / n) * (logp - (logp * weight).sum() / n)
