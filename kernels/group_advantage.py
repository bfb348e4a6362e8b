"""Group-relative advantages: each reward's z-score among the rewards of its group.

    A_b = (R_b - mean of R over the group of b) / (std + eps),  0 where the rewards do not differ

std over the group, over the whole batch, or no division. A group is `G` consecutive sequences, or all
sequences with the same label. Two passes (mean, then squares), so that a large common offset of the rewards
costs nothing. Variants, each a compile-time flag: the mean of the others instead of the mean, NaN for a
reward that is missing, a reward alone in its group left as it is. Several rewards per sequence become one
in a launch of their own (`combine_rewards_fwd`).

One program owns one sequence and reads its group twice: 2 G + 1 rewards per sequence, 2 B + 1 (and as many
labels) with labels, 2 B more for the std of the batch. Combining K rewards reads K and K weights per
sequence; where each reward is normalised first, K times 2 G + 1, or 2 B + 1. The sums run in a fixed order;
every member of a group computes the same bits.
"""

import torch
import triton
import triton.language as tl

from grpo_fast.kernels.tiles import standard_score

MAX_BLOCK = 1024


def block_size(n: int) -> int:
    """How many rewards are read at once."""
    return min(triton.next_power_of_2(max(n, 1)), MAX_BLOCK)


@triton.jit
def load_members(
    rewards_ptr, labels_ptr, label, base, stop, stride, SKIP_NAN: tl.constexpr, BLOCK: tl.constexpr
):
    """(rewards, which of them belong to the group) from `base` on."""
    offs = base + tl.arange(0, BLOCK)
    member = offs < stop
    rewards = tl.load(rewards_ptr + offs * stride, mask=member, other=0.0)
    if labels_ptr is not None:
        member = member & (tl.load(labels_ptr + offs, mask=member, other=0) == label)
    if SKIP_NAN:
        member = member & (rewards == rewards)
    return rewards, member


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
    """(mean, sum of squared deviations, count, whether they differ) of the rewards of a group."""
    count = 0.0
    total = 0.0
    highest = -float("inf")
    lowest = float("inf")
    for base in range(start, stop, BLOCK):
        rewards, member = load_members(
            rewards_ptr, labels_ptr, label, base, stop, stride, SKIP_NAN, BLOCK
        )
        count += tl.sum(member.to(tl.float32), axis=0)
        total += tl.sum(tl.where(member, rewards, 0.0), axis=0)
        highest = tl.maximum(highest, tl.max(tl.where(member, rewards, -float("inf")), axis=0))
        lowest = tl.minimum(lowest, tl.min(tl.where(member, rewards, float("inf")), axis=0))
    mean = total / count
    squares = 0.0
    for base in range(start, stop, BLOCK):
        rewards, member = load_members(
            rewards_ptr, labels_ptr, label, base, stop, stride, SKIP_NAN, BLOCK
        )
        deviation = tl.where(member, rewards - mean, 0.0)
        squares += tl.sum(deviation * deviation, axis=0)
    return mean, squares, count, highest != lowest


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
    """`group_moments` of the group that sequence b belongs to."""
    if labels_ptr is not None:
        label = tl.load(labels_ptr + b)
        moments = group_moments(rewards_ptr, labels_ptr, label, 0, B, BLOCK_B, stride, SKIP_NAN)
    else:
        first = b // G * G
        moments = group_moments(rewards_ptr, None, 0, first, first + G, BLOCK_G, stride, SKIP_NAN)
    return moments


@triton.jit
def relative_reward(
    reward,
    mean,
    squares,
    count,
    differ,
    LEAVE_ONE_OUT: tl.constexpr,
    RAW_SINGLETONS: tl.constexpr,
):
    """(reward less its baseline, sum of squares, whether it is other than 0) of a member of a group."""
    centred = reward - mean
    if LEAVE_ONE_OUT:  # r - mean of the others
        centred = centred * (count / tl.maximum(count - 1.0, 1.0))
    if RAW_SINGLETONS:  # mean 0, std 1
        alone = count == 1.0
        centred = tl.where(alone, reward, centred)
        squares = tl.where(alone, 1.0, squares)
        differ = differ | alone
    return centred, squares, differ


@triton.jit(do_not_specialize=["B", "G"])
def _group_advantage_kernel(
    rewards_ptr,  # (B,) fp32
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
    mean, squares, count, differ = moments_around(
        b, rewards_ptr, labels_ptr, B, G, 1, SKIP_NAN, BLOCK_G, BLOCK_B
    )
    centred, squares, differ = relative_reward(
        reward, mean, squares, count, differ, LEAVE_ONE_OUT, RAW_SINGLETONS
    )
    if SCALE == "none":
        advantage = tl.where(differ, centred, 0.0)
    else:
        if SCALE == "batch":
            _, squares, count, _ = group_moments(rewards_ptr, None, 0, 0, B, BLOCK_B, 1, SKIP_NAN)
        advantage = standard_score(centred, 0.0, squares, count, differ, eps, UNBIASED)
    if SKIP_NAN:
        advantage = tl.where(reward == reward, advantage, 0.0)
    tl.store(advantages_ptr + b, advantage)


@triton.jit(do_not_specialize=["B", "K", "G"])
def _combine_rewards_kernel(
    rewards_ptr,  # (B, K) fp32
    weights_ptr,  # (K,) fp32, or None: 1
    labels_ptr,  # (B,) int64, or None
    combined_ptr,  # (B,) fp32
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
    total = 0.0
    present = 0
    for k in range(K):
        reward = tl.load(rewards_ptr + b * K + k)
        value = reward
        if NORMALIZE:
            mean, squares, count, differ = moments_around(
                b, rewards_ptr + k, labels_ptr, B, G, K, SKIP_NAN, BLOCK_G, BLOCK_B
            )
            value, squares, differ = relative_reward(
                reward, mean, squares, count, differ, False, RAW_SINGLETONS
            )
            if SCALE == "none":
                value = tl.where(differ, value, 0.0)
            else:
                value = standard_score(value, 0.0, squares, count, differ, eps, UNBIASED)
        if weights_ptr is not None:
            value = value * tl.load(weights_ptr + k)
        if SKIP_NAN:
            value = tl.where(reward == reward, value, 0.0)
            present += (reward == reward).to(tl.int32)
        total += value
    if SKIP_NAN:
        total = tl.where(present > 0, total, float("nan"))
    tl.store(combined_ptr + b, total)


def group_advantage_fwd(
    rewards,
    group_size,
    labels,
    scale,
    eps,
    unbiased,
    leave_one_out=False,
    skip_nan=False,
    raw_singletons=False,
):
    """Launch the kernel: rewards (B,) fp32, labels (B,) int64 or None -> advantages (B,) fp32."""
    B = len(rewards)
    advantages = torch.empty(B, device=rewards.device, dtype=torch.float32)
    if B:
        _group_advantage_kernel[(B,)](
            rewards_ptr=rewards,
            labels_ptr=labels,
            advantages_ptr=advantages,
            B=B,
            G=group_size,
            eps=eps,
            SCALE=scale,
            UNBIASED=unbiased,
            LEAVE_ONE_OUT=leave_one_out,
            SKIP_NAN=skip_nan,
            RAW_SINGLETONS=raw_singletons,
            BLOCK_G=block_size(group_size),
            BLOCK_B=block_size(B),
            num_warps=4,
        )
    return advantages


def combine_rewards_fwd(
    rewards,
    weights,
    group_size,
    labels,
    normalize,
    scale,
    eps,
    unbiased,
    skip_nan=False,
    raw_singletons=False,
):
    """Launch the kernel: rewards (B, K) fp32, weights (K,) fp32 or None -> their weighted sums (B,) fp32.

    With `normalize` it is the K group scores that are summed. A sum without any reward is NaN.
    """
    B, K = rewards.shape
    combined = torch.empty(B, device=rewards.device, dtype=torch.float32)
    if B:
        _combine_rewards_kernel[(B,)](
            rewards_ptr=rewards,
            weights_ptr=weights,
            labels_ptr=labels,
            combined_ptr=combined,
            B=B,
            K=K,
            G=group_size,
            eps=eps,
            NORMALIZE=normalize,
            SCALE=scale,
            UNBIASED=unbiased,
            SKIP_NAN=skip_nan,
            RAW_SINGLETONS=raw_singletons,
            BLOCK_G=block_size(group_size),
            BLOCK_B=block_size(B),
            num_warps=4,
        )
    return combined
