"""Group-relative advantages: each reward's z-score among the rewards of its group.

    A_b = (R_b - mean of R over the group of b) / (std + eps),  0 where the rewards do not differ

std over the group, over the whole batch, or no division. A group is `G` consecutive sequences, or all
sequences with the same label. Two passes (mean, then squares), so that a large common offset of the rewards
costs nothing.

One program owns one sequence and reads its group twice: 2 G + 1 rewards per sequence, 2 B + 1 (and as many
labels) with labels, 2 B more for the std of the batch. The sums run in a fixed order; every member of a group
computes the same bits.
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
def load_members(rewards_ptr, labels_ptr, label, base, stop, BLOCK: tl.constexpr):
    """(rewards, which of them belong to the group) from `base` on."""
    offs = base + tl.arange(0, BLOCK)
    member = offs < stop
    rewards = tl.load(rewards_ptr + offs, mask=member, other=0.0)
    if labels_ptr is not None:
        member = member & (tl.load(labels_ptr + offs, mask=member, other=0) == label)
    return rewards, member


@triton.jit
def group_moments(rewards_ptr, labels_ptr, label, start, stop, BLOCK: tl.constexpr):
    """(mean, sum of squared deviations, count, whether they differ) of the rewards of a group."""
    count = 0.0
    total = 0.0
    highest = -float("inf")
    lowest = float("inf")
    for base in range(start, stop, BLOCK):
        rewards, member = load_members(rewards_ptr, labels_ptr, label, base, stop, BLOCK)
        count += tl.sum(member.to(tl.float32), axis=0)
        total += tl.sum(tl.where(member, rewards, 0.0), axis=0)
        highest = tl.maximum(highest, tl.max(tl.where(member, rewards, -float("inf")), axis=0))
        lowest = tl.minimum(lowest, tl.min(tl.where(member, rewards, float("inf")), axis=0))
    mean = total / count
    squares = 0.0
    for base in range(start, stop, BLOCK):
        rewards, member = load_members(rewards_ptr, labels_ptr, label, base, stop, BLOCK)
        deviation = tl.where(member, rewards - mean, 0.0)
        squares += tl.sum(deviation * deviation, axis=0)
    return mean, squares, count, highest != lowest


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
    BLOCK_G: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    b = tl.program_id(0)
    reward = tl.load(rewards_ptr + b)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + b)
        moments = group_moments(rewards_ptr, labels_ptr, label, 0, B, BLOCK_B)
    else:
        first = b // G * G
        moments = group_moments(rewards_ptr, None, 0, first, first + G, BLOCK_G)
    mean, squares, count, differ = moments
    if SCALE == "none":
        advantage = tl.where(differ, reward - mean, 0.0)
    else:
        if SCALE == "batch":
            _, squares, count, _ = group_moments(rewards_ptr, None, 0, 0, B, BLOCK_B)
        advantage = standard_score(reward, mean, squares, count, differ, eps, UNBIASED)
    tl.store(advantages_ptr + b, advantage)


def group_advantage_fwd(rewards, group_size, labels, scale, eps, unbiased):
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
            BLOCK_G=block_size(group_size),
            BLOCK_B=block_size(B),
            num_warps=4,
        )
    return advantages
