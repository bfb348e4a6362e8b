"""Group-relative advantages: each reward's z-score among the rewards of its group.

    A_b = (R_b - mean of R over the group of b) / (std + eps),  0 where the rewards do not differ

The std is that of the group, or of the whole batch, or there is no division. A group is `G` consecutive
sequences, or all sequences with the same label. Rewards are float32 or float64. First the lowest reward of
the group is subtracted, in the dtype of the rewards, and the difference is divided by a power of two. So
neither a large common offset nor a size that float32 cannot square costs accuracy. Then come mean and
squares. Variants, each a compile-time flag: the mean of the others instead of the mean, NaN for a reward that
is missing, a reward alone in its group left as it is. A launch of its own (`combine_rewards_fwd`) makes one
reward of several per sequence.

One program owns one sequence and reads its group three times: 3 G + 1 rewards per sequence, 3 B + 1 (and as
many labels) with labels, 3 B more for the std of the batch. Combining K rewards reads K rewards and K weights
per sequence; where each reward is normalised first, K times 3 G + 1, or 3 B + 1. The sums run in a fixed
order; every member of a group computes the same bits.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from grpo_fast.kernels.schedules import compiled_with
from grpo_fast.kernels.tiles import standard_score

MAX_BLOCK = 1024


def block_size(n: int) -> int:
    """How many rewards are read at once."""
    return min(1 << (max(n, 1) - 1).bit_length(), MAX_BLOCK)


class Moments(NamedTuple):
    """The rewards of a group in numbers; see `group_moments`."""

    lowest: Any
    unit: Any
    inverse: Any  # 1 / unit
    mean: Any
    squares: Any  # the sum of squared deviations from the mean
    count: Any
    differ: Any  # whether the rewards differ


class Centred(NamedTuple):
    """A reward less its baseline; see `relative_reward`."""

    value: Any  # in the unit
    squares: Any  # in the square of the unit
    differ: Any
    unit: Any
    inverse: Any  # 1 / unit


@triton.jit
def load_members(
    rewards_ptr, labels_ptr, label, base, stop, stride, SKIP_NAN: tl.constexpr, BLOCK: tl.constexpr
):
    """(BLOCK rewards from `base` on, which of them belong to the group)."""
    offs = base + tl.arange(0, BLOCK)
    member = offs < stop
    rewards = tl.load(rewards_ptr + offs * stride, mask=member, other=0.0)
    if labels_ptr is not None:
        member = member & (tl.load(labels_ptr + offs, mask=member, other=0) == label)
    if SKIP_NAN:
        member = member & (rewards == rewards)
    return rewards, member


@triton.jit
def power_of_two(x):
    """(the power of two at or below x >= 0, its reciprocal), within the range in which both are finite."""
    if x.dtype == tl.float64:
        e = tl.minimum(tl.maximum((x.to(tl.int64, bitcast=True) >> 52) & 2047, 1), 2045)
        unit = (e << 52).to(tl.float64, bitcast=True)
        inverse = ((2046 - e) << 52).to(tl.float64, bitcast=True)
    else:
        e = tl.minimum(tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 1), 253)
        unit = (e << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - e) << 23).to(tl.float32, bitcast=True)
    return unit, inverse


@triton.jit
def from_lowest(reward, lowest, inverse):
    """Half the distance of a reward from the lowest, in the unit of `group_moments`: float32 in [0, 2)."""
    return ((0.5 * reward - 0.5 * lowest) * inverse).to(tl.float32)


@triton.jit
def group_moments(
    rewards_ptr,
    labels_ptr,
    label,
    start,
    stop,
    BLOCK: tl.constexpr,
    stride=1,
    SKIP_NAN: tl.constexpr = False,
):
    """The `Moments` of the rewards of a group.

    Mean and squares are those of `from_lowest`, which are half distances, so that they do not overflow. The
    unit is a power of two: dividing by it rounds nothing.
    """
    dtype: tl.constexpr = rewards_ptr.dtype.element_ty
    highest = tl.full([], -float("inf"), dtype)
    lowest = tl.full([], float("inf"), dtype)
    count = 0.0
    for base in range(start, stop, BLOCK):
        rewards, member = load_members(
            rewards_ptr, labels_ptr, label, base, stop, stride, SKIP_NAN, BLOCK
        )
        count += tl.sum(member.to(tl.float32), axis=0)
        highest = tl.maximum(highest, tl.max(tl.where(member, rewards, -float("inf")), axis=0))
        lowest = tl.minimum(lowest, tl.min(tl.where(member, rewards, float("inf")), axis=0))
    unit, inverse = power_of_two(tl.maximum(0.5 * highest - 0.5 * lowest, 0.0))
    total = 0.0
    for base in range(start, stop, BLOCK):
        rewards, member = load_members(
            rewards_ptr, labels_ptr, label, base, stop, stride, SKIP_NAN, BLOCK
        )
        total += tl.sum(tl.where(member, from_lowest(rewards, lowest, inverse), 0.0), axis=0)
    mean = total / count
    squares = 0.0
    for base in range(start, stop, BLOCK):
        rewards, member = load_members(
            rewards_ptr, labels_ptr, label, base, stop, stride, SKIP_NAN, BLOCK
        )
        deviation = tl.where(member, from_lowest(rewards, lowest, inverse) - mean, 0.0)
        squares += tl.sum(deviation * deviation, axis=0)
    # A NaN, which hardware's minimum and maximum pass over, makes them differ.
    differ = (highest != lowest) | (total != total)
    return Moments(lowest, unit, inverse, mean, squares, count, differ)


@triton.jit
def moments_around(
    b,
    rewards_ptr,
    labels_ptr,
    B,
    G,
    stride,
    SKIP_NAN: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The `Moments` of the group that sequence b belongs to."""
    if labels_ptr is not None:
        label = tl.load(labels_ptr + b)
        moments = group_moments(rewards_ptr, labels_ptr, label, 0, B, BLOCK_B, stride, SKIP_NAN)
    else:
        first = b // G * G
        moments = group_moments(rewards_ptr, None, 0, first, first + G, BLOCK_G, stride, SKIP_NAN)
    return moments


@triton.jit
def relative_reward(reward, moments, LEAVE_ONE_OUT: tl.constexpr, RAW_SINGLETONS: tl.constexpr):
    """The reward of a member of a group less its baseline (`Centred`)."""
    lowest, unit, inverse, mean, squares, count, differ = moments
    centred = from_lowest(reward, lowest, inverse) - mean
    if LEAVE_ONE_OUT:  # r - mean of the others
        centred = centred * (count / tl.maximum(count - 1.0, 1.0))
    unit = 2.0 * unit
    inverse = 0.5 * inverse
    if RAW_SINGLETONS:  # mean 0, std 1
        alone = count == 1.0
        centred = tl.where(alone, reward.to(tl.float32), centred)
        squares = tl.where(alone, 1.0, squares)
        unit = tl.where(alone, 1.0, unit)
        inverse = tl.where(alone, 1.0, inverse)
        differ = differ | alone
    return Centred(centred, squares, differ, unit, inverse)


@triton.jit(do_not_specialize=["B", "G"])
def _group_advantage_kernel(
    rewards_ptr,  # (B,) fp32 or fp64
    labels_ptr,  # (B,) int64, or None
    advantages_ptr,  # (B,) fp32
    B,
    G,
    eps,
    SCALE: tl.constexpr,
    UNBIASED: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    SKIP_NAN: tl.constexpr,
    RAW_SINGLETONS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    b = tl.program_id(0)
    reward = tl.load(rewards_ptr + b)
    moments = moments_around(
        b, rewards_ptr, labels_ptr, B, G, 1, SKIP_NAN, BLOCK_G=BLOCK_G, BLOCK_B=BLOCK_B
    )
    count = moments.count
    centred, squares, differ, unit, inverse = relative_reward(
        reward, moments, LEAVE_ONE_OUT, RAW_SINGLETONS
    )
    if SCALE == "none":
        advantage = tl.where(differ, (centred * unit).to(tl.float32), 0.0)
    else:
        if SCALE == "batch":
            _, _, of_batch, _, squares, count, _ = group_moments(
                rewards_ptr, None, 0, 0, B, BLOCK_B, 1, SKIP_NAN
            )
            inverse = 0.5 * of_batch
            centred = centred * (unit * inverse).to(tl.float32)
        eps = (eps * inverse).to(tl.float32)
        advantage = standard_score(centred, squares, count, differ, eps, UNBIASED)
    if SKIP_NAN:
        advantage = tl.where(reward == reward, advantage, 0.0)
    tl.store(advantages_ptr + b, advantage)


@triton.jit(do_not_specialize=["B", "K", "G"])
def _combine_rewards_kernel(
    rewards_ptr,  # (B, K) fp32 or fp64
    weights_ptr,  # (K,) fp64, or None: 1
    labels_ptr,  # (B,) int64, or None
    combined_ptr,  # (B,) fp64
    B,
    K,
    G,
    eps,
    NORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    UNBIASED: tl.constexpr,
    SKIP_NAN: tl.constexpr,
    RAW_SINGLETONS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    b = tl.program_id(0)
    total = tl.full([], 0.0, tl.float64)
    present = 0
    for k in range(K):
        reward = tl.load(rewards_ptr + b * K + k)
        value = reward.to(tl.float64)
        if NORMALIZE:
            column_ptr = rewards_ptr + k
            moments = moments_around(
                b, column_ptr, labels_ptr, B, G, K, SKIP_NAN, BLOCK_G=BLOCK_G, BLOCK_B=BLOCK_B
            )
            count = moments.count
            centred, squares, differ, unit, inverse = relative_reward(
                reward, moments, False, RAW_SINGLETONS
            )
            if SCALE == "none":
                value = tl.where(differ, centred.to(tl.float64) * unit.to(tl.float64), 0.0)
            else:
                scaled_eps = (eps * inverse).to(tl.float32)
                score = standard_score(centred, squares, count, differ, scaled_eps, UNBIASED)
                value = score.to(tl.float64)
        if weights_ptr is not None:
            value = value * tl.load(weights_ptr + k)
        if SKIP_NAN:
            value = tl.where(reward == reward, value, 0.0)
            present += (reward == reward).to(tl.int32)
        total += value
    if SKIP_NAN:
        total = tl.where(present > 0, total, float("nan"))
    tl.store(combined_ptr + b, total)


def group_advantage_fwd(rewards, grouping, standardization):
    """Launch the kernel of group-relative advantages.

    Args:
        rewards: (B,) fp32 or fp64.
        grouping, standardization: `Grouping` and `Standardization`.

    Returns:
        Advantages (B,) fp32.
    """
    B = len(rewards)
    advantages = torch.empty(B, device=rewards.device, dtype=torch.float32)
    if B:
        _group_advantage_kernel[(B,)](
            rewards_ptr=rewards,
            labels_ptr=grouping.labels,
            advantages_ptr=advantages,
            B=B,
            G=grouping.group_size,
            eps=standardization.eps,
            SCALE=standardization.scale,
            UNBIASED=standardization.unbiased,
            LEAVE_ONE_OUT=standardization.leave_one_out,
            SKIP_NAN=standardization.skip_nan,
            RAW_SINGLETONS=standardization.raw_singletons,
            BLOCK_G=block_size(grouping.group_size),
            BLOCK_B=block_size(B),
            **compiled_with(4),
        )
    return advantages


def combine_rewards_fwd(rewards, weights, grouping, normalize, standardization):
    """Launch the kernel that makes one reward of the K rewards of each sequence.

    Args:
        rewards: (B, K) fp32 or fp64.
        weights: (K,) fp64; None: 1.
        grouping, standardization: `Grouping` and `Standardization`.
        normalize: sum the K group scores in place of the K rewards.

    Returns:
        Weighted sums (B,) fp64; NaN where a sequence has no reward at all.
    """
    B, K = rewards.shape
    combined = torch.empty(B, device=rewards.device, dtype=torch.float64)
    if B:
        _combine_rewards_kernel[(B,)](
            rewards_ptr=rewards,
            weights_ptr=weights,
            labels_ptr=grouping.labels,
            combined_ptr=combined,
            B=B,
            K=K,
            G=grouping.group_size,
            eps=standardization.eps,
            NORMALIZE=normalize,
            SCALE=standardization.scale,
            UNBIASED=standardization.unbiased,
            SKIP_NAN=standardization.skip_nan,
            RAW_SINGLETONS=standardization.raw_singletons,
            BLOCK_G=block_size(grouping.group_size),
            BLOCK_B=block_size(B),
            **compiled_with(4),
        )
    return combined
