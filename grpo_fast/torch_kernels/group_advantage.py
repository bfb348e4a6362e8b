"""Advantages of rewards relative to their group: the twin of `kernels/group_advantage.py`."""

import math

import torch
from torch import Tensor

from grpo_fast.records import Grouping, Standardization


def group_advantage_fwd(
    rewards: Tensor, grouping: Grouping, standardization: Standardization
) -> Tensor:
    """Return the advantages (B,) fp32 of rewards (B,) fp32 or fp64."""
    if _is_plain(rewards, grouping, standardization):
        return plain_scores(rewards, grouping.group_size, standardization)
    return group_scores(rewards, grouping, standardization).float()


def _is_plain(rewards: Tensor, grouping: Grouping, how: Standardization) -> bool:
    """Tell whether `plain_scores` is exact: float32 rewards in groups of one size, none missing.

    Squares of float32 do not overflow in float64, and its rounding errors are far below those of
    float32, whatever offset the rewards have in common.
    """
    narrow = rewards.dtype == torch.float32 and wide(rewards) == torch.float64
    several = grouping.labels is None and grouping.group_size > 1 and len(rewards) > 0
    rare = how.scale != "group" or how.skip_nan or how.leave_one_out
    return narrow and several and not rare


def plain_scores(rewards: Tensor, group_size: int, how: Standardization) -> Tensor:
    """Compute the z-scores in few operators: each costs 1 to 5 us, and the rewards are few."""
    grouped = rewards.view(-1, group_size).double()
    # The operator has a variance over n, and an eps inside the square root: next to nothing, so that
    # equal rewards, whose mean is exact, get 0 / 1e-150 = 0.
    scores, _, inverse = torch.native_layer_norm(grouped, (group_size,), None, None, 1e-300)
    ratio = math.sqrt(group_size / (group_size - 1)) if how.unbiased else 1.0
    return scores.div_(torch.rsub(inverse, ratio, alpha=-how.eps)).float().view(-1)


def combine_rewards_fwd(
    rewards: Tensor,
    weights: Tensor | None,
    grouping: Grouping,
    normalize: bool,
    standardization: Standardization,
) -> Tensor:
    """Return one reward per sequence, (B,) in the dtype `wide`, from rewards (B, K) fp32 or fp64.

    It is the weighted sum of the K rewards, or with `normalize` of their scores.
    """
    values = (
        group_scores(rewards, grouping, standardization) if normalize else rewards.to(wide(rewards))
    )
    if weights is not None:
        values = values * weights
    if not standardization.skip_nan:
        return values.sum(1)
    missing = rewards.isnan()
    return torch.where(missing, 0, values).sum(1).masked_fill(missing.all(1), torch.nan)


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype in which rewards are added up: float64, or float32 on a device without it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def group_scores(rewards: Tensor, grouping: Grouping, standardization: Standardization) -> Tensor:
    """Return the scores of rewards (B,), or of each column of (B, K), in the dtype `wide`."""
    rewards = rewards.to(wide(rewards))
    if rewards.numel() == 0:
        return torch.empty_like(rewards)
    if grouping.labels is None:
        group = torch.arange(len(rewards), device=rewards.device) // grouping.group_size
        number = -(-len(rewards) // grouping.group_size)
    else:
        labels, group = grouping.labels.unique(return_inverse=True)
        number = len(labels)
    shape = (number, *rewards.shape[1:])
    present = (
        ~rewards.isnan() if standardization.skip_nan else torch.ones_like(rewards, dtype=torch.bool)
    )

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(shape).index_add_(0, group, torch.where(present, x, 0))

    def extreme(reduction: str, other: float) -> Tensor:
        index = group.view(-1, *(1,) * (rewards.ndim - 1)).expand_as(rewards)
        x = torch.where(present, rewards, other)
        return x.new_zeros(shape).scatter_reduce_(0, index, x, reduction, include_self=False)

    count = total(torch.ones_like(rewards))[group]
    highest, lowest = extreme("amax", -math.inf)[group], extreme("amin", math.inf)[group]
    u, unit = from_lowest(rewards, highest, lowest)
    centred = u - total(u)[group] / count
    squares = total(centred.square())[group]
    differ = highest != lowest
    if standardization.leave_one_out:  # equals r - mean of the others
        centred = centred * (count / (count - 1).clamp(min=1))
    if standardization.raw_singletons:  # mean 0, std 1
        alone = count == 1
        centred = torch.where(alone, rewards, centred)
        squares, unit = torch.where(alone, 1, squares), torch.where(alone, 1, unit)
        differ = differ | alone
    if standardization.scale == "batch":
        count = present.sum(0).to(rewards.dtype)
        bounds = (torch.where(present, rewards, x) for x in (-math.inf, math.inf))
        u, of_batch = from_lowest(rewards, next(bounds).amax(0), next(bounds).amin(0))
        mean = torch.where(present, u, 0).sum(0) / count
        squares = torch.where(present, u - mean, 0).square().sum(0)
        centred, unit = centred * (unit / of_batch), of_batch
    if standardization.scale == "none":
        centred = centred * unit
    else:
        freedom = (count - 1).clamp(min=1) if standardization.unbiased else count
        centred = centred / ((squares / freedom).sqrt() + standardization.eps / unit)
    return torch.where(differ & present, centred, 0)


def from_lowest(rewards: Tensor, highest: Tensor, lowest: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance of rewards from the lowest, in [0, 2) times a power of two, and that power.

    So a large common offset costs no digits, and the squares do not overflow. Halves are
    subtracted, because the difference of two rewards may overflow.
    """
    half = (highest / 2 - lowest / 2).clamp(min=torch.finfo(rewards.dtype).tiny)
    unit = torch.ldexp(torch.ones_like(half), torch.frexp(half).exponent - 1)
    return (rewards / 2 - lowest / 2) / unit, unit * 2
