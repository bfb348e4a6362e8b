"""Group-relative advantages (kernel: `grpo_fast.kernels.group_advantage`)."""

import math

import torch
from torch import Tensor

from grpo_fast.ops import _arguments
from grpo_fast.ops._backend import check_values, launch, use_triton

SCALES = ("group", "batch", "none")


@torch.library.custom_op("grpo_fast::group_advantage", mutates_args=())
def group_advantage_fwd(
    rewards: Tensor, group_size: int, labels: Tensor | None, scale: str, eps: float, unbiased: bool
) -> Tensor:
    """(B,) fp32 advantages of (B,) fp32 rewards."""
    if use_triton(rewards):
        from grpo_fast.kernels import group_advantage as kernels

        return launch(
            kernels.group_advantage_fwd, rewards, rewards, group_size, labels, scale, eps, unbiased
        )
    if rewards.numel() == 0:
        return torch.empty_like(rewards)
    if labels is None:
        group = torch.arange(len(rewards), device=rewards.device) // group_size
    else:
        group = labels.unique(return_inverse=True)[1]
    num_groups = int(group.max()) + 1

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(num_groups).index_add_(0, group, x)

    count = total(torch.ones_like(rewards))
    centred = rewards - (total(rewards) / count)[group]
    extreme = [
        rewards.new_zeros(num_groups).scatter_reduce_(0, group, rewards, r, include_self=False)
        for r in ("amax", "amin")
    ]
    differ = (extreme[0] != extreme[1])[group]
    if scale == "none":
        return torch.where(differ, centred, 0)
    if scale == "group":
        squares, count = total(centred.square())[group], count[group]
    else:
        count = torch.full_like(rewards, len(rewards))
        squares = (rewards - rewards.mean()).square().sum()
    freedom = (count - 1).clamp(min=1) if unbiased else count
    return torch.where(differ, centred / ((squares / freedom).sqrt() + eps), 0)


@group_advantage_fwd.register_fake
def _(
    rewards: Tensor, group_size: int, labels: Tensor | None, scale: str, eps: float, unbiased: bool
) -> Tensor:
    return torch.empty_like(rewards)


def check_rewards(op: str, rewards: Tensor, group_size: int | None) -> Tensor:
    """(B,) fp32 rewards, B a multiple of `group_size` where there is one."""
    _arguments.check_tensor(op, "rewards", rewards)
    if rewards.ndim != 1:
        raise ValueError(f"{op}: rewards: want (B,), got {_arguments.shape_of(rewards)}")
    _arguments.check_real(op, "rewards", rewards)
    if group_size is not None:
        if isinstance(group_size, bool) or not isinstance(group_size, int):
            raise TypeError(f"{op}: group_size: want an int, got {group_size!r}")
        if group_size < 1 or len(rewards) % group_size:
            raise ValueError(
                f"{op}: group_size: want a positive divisor of the {len(rewards)} rewards, "
                f"got {group_size}"
            )
    if check_values(rewards) and not bool(rewards.isfinite().all()):
        where = int((~rewards.isfinite()).nonzero()[0])
        raise ValueError(f"{op}: rewards: {rewards[where].item()} at {where}, want finite rewards")
    return rewards.detach().to(torch.float32).contiguous()


def group_advantage(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scale: str = "group",
    eps: float = 1e-4,
    unbiased: bool = True,
) -> Tensor:
    """Each reward's z-score among the rewards of its group: GRPO's advantages (arXiv 2402.03300).

    Equivalent, with `r = rewards.view(-1, group_size)`, to
    `((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)).flatten()`, and exactly 0 where the
    rewards of a group do not differ (which includes a group of one). Not differentiable.

    Args:
        rewards: (B,), any real dtype, finite. Across ranks, gather them first.
        group_size: sequences per prompt; the sequences of a prompt are consecutive. Or:
        group_ids: (B,) int labels; equal labels form a group, of any size, in any order.
        scale: divide by the std of the "group", of the whole "batch", or by nothing ("none", Dr. GRPO).
        eps: added to the std.
        unbiased: n - 1 in the denominator of the variance.

    Returns:
        (B,) float32.

    Raises:
        ValueError, TypeError: neither or both of `group_size` and `group_ids`, a size that does not
            divide B, an unknown scale, a negative eps.
    """
    op = "group_advantage"
    if (group_size is None) == (group_ids is None):
        raise ValueError(
            f"{op}: give either group_size or group_ids, got {group_size=}, {group_ids=}"
        )
    rewards = check_rewards(op, rewards, group_size)
    if scale not in SCALES:
        raise ValueError(f"{op}: scale={scale!r} is unknown; choose from {', '.join(SCALES)}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps: want a finite number >= 0, got {eps}")
    if group_ids is not None:
        _arguments.check_tensor(op, "group_ids", group_ids)
        if group_ids.shape != rewards.shape:
            raise ValueError(
                f"{op}: group_ids: want {tuple(rewards.shape)}, "
                f"got {_arguments.shape_of(group_ids)}"
            )
        if group_ids.is_floating_point() or group_ids.is_complex():
            raise TypeError(f"{op}: group_ids: want integers, got {group_ids.dtype}")
        _arguments.check_device(op, "group_ids", group_ids, rewards)
        group_ids = group_ids.to(torch.int64).contiguous()
    return group_advantage_fwd(rewards, group_size or 1, group_ids, scale, float(eps), unbiased)
