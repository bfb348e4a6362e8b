"""Advantages in plain PyTorch: a part of the specification, see `reference`."""

import torch
from torch import Tensor


def group_advantage(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scale: str = "group",
    eps: float = 1e-4,
    unbiased: bool = True,
    baseline: str = "mean",
    weights: Tensor | None = None,
    aggregation: str = "sum_then_normalize",
    nan: str = "error",
    singleton: str = "zero",
) -> Tensor:
    """`(rewards - mean of the group) / (std + eps)`; 0 where the rewards do not differ.

    Args:
        rewards: (B,); or (B, K), combined by `weights` (K,) as `aggregation` says.
        group_size: sequences per prompt, consecutive; or
        group_ids: (B,) labels; equal labels form a group of any size.
        scale: std of the "group", of the whole "batch", or "none" (no division).
        baseline: the "mean" of the group, or that of the other members, "leave_one_out".
        nan: whether a NaN is an "error" or a missing reward, to "skip".
        singleton: a reward alone in its group has advantage "zero", or mean 0 and std 1: "raw".
    """
    if nan == "error" and rewards.isnan().any():
        raise ValueError("rewards hold NaN")
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    rewards = rewards.double()
    if group_ids is None:
        group_ids = torch.arange(len(rewards), device=rewards.device) // (group_size or 1)
    if rewards.ndim == 2:
        missing, normalize = rewards.isnan(), aggregation == "normalize_then_sum"
        if normalize:
            scores = [
                group_advantage(
                    column,
                    group_ids=group_ids,
                    scale=scale,
                    eps=eps,
                    unbiased=unbiased,
                    nan=nan,
                    singleton=singleton,
                )
                for column in rewards.unbind(1)
            ]
            rewards = torch.stack(scores, 1)
        if weights is not None:
            rewards = rewards * weights
        rewards = rewards.masked_fill(missing, 0).sum(1).masked_fill(missing.all(1), torch.nan)
        if normalize:
            whole = group_advantage(
                rewards, group_size=len(rewards), eps=eps, unbiased=unbiased, nan=nan
            )
            return whole.to(dtype)
    present = ~rewards.isnan()
    advantages = torch.zeros_like(rewards)
    for label in group_ids.unique():
        member = (group_ids == label) & present
        group = rewards[member]
        n = len(group)
        if n == 1 and singleton == "raw":
            advantages[member] = group if scale == "none" else group / (1 + eps)
        elif n > 1 and group.max() > group.min():
            # Without the lowest, which may be all but a common offset.
            group = group - group.min()
            mean = group.mean()
            if baseline == "leave_one_out":
                mean = (group.sum() - group) / (n - 1)
            if scale == "none":
                advantages[member] = group - mean
                continue
            spread = group if scale == "group" else rewards[present] - rewards[present].min()
            size = spread.max()  # in units of which it can be squared
            std = (spread / size).std(unbiased=unbiased)
            advantages[member] = (group - mean) / size / (std + eps / size)
    return advantages.to(dtype)
