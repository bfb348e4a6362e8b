"""Group-relative advantages (kernel: `grpo_fast.kernels.group_advantage`)."""

import math

import torch
from torch import Tensor

from grpo_fast._names import check_choice, keywords_explained
from grpo_fast._operands import LARGEST, hint, operand
from grpo_fast.ops import _arguments
from grpo_fast.ops._backend import check_values, launch, use_triton

SCALES = ("group", "batch", "none")
BASELINES = ("mean", "leave_one_out")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
MISSING = ("error", "skip")
SINGLETONS = ("zero", "raw")
# What float32 holds without rounding.
NARROW = {torch.float32, torch.float16, torch.bfloat16}
NARROW |= {torch.bool, torch.uint8, torch.int8, torch.int16}


@torch.library.custom_op("grpo_fast::group_advantage", mutates_args=())
def group_advantage_fwd(
    rewards: Tensor,
    group_size: int,
    labels: Tensor | None,
    scale: str,
    eps: Tensor,
    unbiased: bool,
    leave_one_out: bool = False,
    skip_nan: bool = False,
    raw_singletons: bool = False,
) -> Tensor:
    """(B,) fp32 advantages of (B,) fp32 or fp64 rewards."""
    options = (scale, eps.item(), unbiased, leave_one_out, skip_nan, raw_singletons)
    if use_triton(rewards):
        from grpo_fast.kernels import group_advantage as kernels

        return launch(kernels.group_advantage_fwd, rewards, rewards, group_size, labels, *options)
    return group_scores(rewards, group_size, labels, *options).float()


@group_advantage_fwd.register_fake
def _(
    rewards: Tensor,
    group_size: int,
    labels: Tensor | None,
    scale: str,
    eps: Tensor,
    unbiased: bool,
    leave_one_out: bool = False,
    skip_nan: bool = False,
    raw_singletons: bool = False,
) -> Tensor:
    return torch.empty_like(rewards, dtype=torch.float32)


@torch.library.custom_op("grpo_fast::combine_rewards", mutates_args=())
def combine_rewards_fwd(
    rewards: Tensor,
    weights: Tensor | None,
    group_size: int,
    labels: Tensor | None,
    normalize: bool,
    scale: str,
    eps: Tensor,
    unbiased: bool,
    skip_nan: bool,
    raw_singletons: bool,
) -> Tensor:
    """(B,) weighted sums of (B, K) fp32 or fp64 rewards, or of their scores (`normalize`), in `wide`."""
    if use_triton(rewards):
        from grpo_fast.kernels import group_advantage as kernels

        return launch(
            kernels.combine_rewards_fwd,
            rewards,
            *(rewards, weights, group_size, labels, normalize, scale, eps.item(), unbiased),
            *(skip_nan, raw_singletons),
        )
    values = rewards.to(wide(rewards))
    if normalize:
        values = group_scores(
            *(rewards, group_size, labels, scale, eps.item(), unbiased),
            *(False, skip_nan, raw_singletons),
        )
    if weights is not None:
        values = values * weights
    if not skip_nan:
        return values.sum(1)
    missing = rewards.isnan()
    return torch.where(missing, 0, values).sum(1).masked_fill(missing.all(1), torch.nan)


@combine_rewards_fwd.register_fake
def _(
    rewards: Tensor,
    weights: Tensor | None,
    group_size: int,
    labels: Tensor | None,
    normalize: bool,
    scale: str,
    eps: Tensor,
    unbiased: bool,
    skip_nan: bool,
    raw_singletons: bool,
) -> Tensor:
    return rewards.new_empty(len(rewards), dtype=wide(rewards))


def wide(x: Tensor) -> torch.dtype:
    """The dtype to add rewards up in: float64, which some devices do not have."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def group_scores(
    rewards: Tensor,
    group_size: int,
    labels: Tensor | None,
    scale: str,
    eps: float,
    unbiased: bool,
    leave_one_out: bool,
    skip_nan: bool,
    raw_singletons: bool,
) -> Tensor:
    """The kernel's values by PyTorch's operators, for (B,) rewards or each column of (B, K), in `wide`."""
    rewards = rewards.to(wide(rewards))
    if rewards.numel() == 0:
        return torch.empty_like(rewards)
    if labels is None:
        group = torch.arange(len(rewards), device=rewards.device) // group_size
    else:
        group = labels.unique(return_inverse=True)[1]
    shape = (int(group.max()) + 1, *rewards.shape[1:])
    present = ~rewards.isnan() if skip_nan else torch.ones_like(rewards, dtype=torch.bool)

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
    if leave_one_out:  # r - mean of the others
        centred = centred * (count / (count - 1).clamp(min=1))
    if raw_singletons:  # mean 0, std 1
        alone = count == 1
        centred = torch.where(alone, rewards, centred)
        squares, unit = torch.where(alone, 1, squares), torch.where(alone, 1, unit)
        differ = differ | alone
    if scale == "batch":
        count = present.sum(0).to(rewards.dtype)
        bounds = (torch.where(present, rewards, x) for x in (-math.inf, math.inf))
        u, of_batch = from_lowest(rewards, next(bounds).amax(0), next(bounds).amin(0))
        mean = torch.where(present, u, 0).sum(0) / count
        squares = torch.where(present, u - mean, 0).square().sum(0)
        centred, unit = centred * (unit / of_batch), of_batch
    if scale == "none":
        centred = centred * unit
    else:
        freedom = (count - 1).clamp(min=1) if unbiased else count
        centred = centred / ((squares / freedom).sqrt() + eps / unit)
    return torch.where(differ & present, centred, 0)


def from_lowest(rewards: Tensor, highest: Tensor, lowest: Tensor) -> tuple[Tensor, Tensor]:
    """(how far rewards are above the lowest, the power of two that this is in units of): in [0, 2).

    So neither a large common offset nor a size that cannot be squared costs anything. By halves, which do
    not overflow.
    """
    half = (highest / 2 - lowest / 2).clamp(min=torch.finfo(rewards.dtype).tiny)
    unit = torch.ldexp(torch.ones_like(half), torch.frexp(half).exponent - 1)
    return (rewards / 2 - lowest / 2) / unit, unit * 2


def check_rewards(
    op: str,
    rewards: Tensor,
    group_size: int | None,
    columns: bool = False,
    skip_nan: bool = False,
    alone: bool = False,
) -> Tensor:
    """(B,) rewards, or (B, K) with `columns`, fp32, or fp64 where they are or need it.

    B a multiple of `group_size` where there is one. `alone`: it may be 1.
    """
    _arguments.check_tensor(op, "rewards", rewards)
    if not columns:
        rewards = _arguments.one_per_sequence(rewards)
    if rewards.ndim != 1 and not (columns and rewards.ndim == 2 and rewards.shape[1]):
        wanted = "(B,) or (B, K)" if columns else "(B,)"
        raise ValueError(f"{op}: rewards: want {wanted}, got {_arguments.shape_of(rewards)}")
    _arguments.check_real(op, "rewards", rewards)
    if group_size is not None:
        if isinstance(group_size, bool) or not isinstance(group_size, int):
            raise TypeError(f"{op}: group_size: want an int, got {group_size!r}")
        if group_size < 1 or len(rewards) % group_size:
            raise ValueError(
                f"{op}: group_size: want a positive divisor of the {len(rewards)} rewards, "
                f"got {group_size}"
            )
        if group_size == 1 and not alone:
            raise ValueError(
                f"{op}: group_size=1 leaves every reward alone in its group, where its advantage is 0 "
                "and nothing is learned; sample at least 2 completions per prompt, or give the losses "
                "advantages=rewards - baseline (group_advantage has singleton='raw' for the rewards as they "
                "are)"
            )
    if check_values(rewards):
        bad = rewards.isinf() if skip_nan else ~rewards.isfinite()
        if bool(bad.any()):
            where = bad.nonzero()[0].tolist()
            value = rewards[tuple(where)].item()
            hint = " (nan='skip' leaves missing ones out)" if columns and value != value else ""
            place = where[0] if rewards.ndim == 1 else tuple(where)
            raise ValueError(f"{op}: rewards: {value} at {place}, want finite rewards{hint}")
    return kept_whole(rewards)


def kept_whole(rewards: Tensor) -> Tensor:
    """The same in float32 if that holds them, else in `wide`."""
    dtype = torch.float32 if rewards.dtype in NARROW else wide(rewards)
    return rewards.detach().to(dtype).contiguous()


def check_groups(
    op: str, rewards: Tensor, group_size: int | None, group_ids: Tensor | None
) -> Tensor | None:
    """(B,) int64 labels, or None where `group_size` says it."""
    if (group_size is None) == (group_ids is None):
        raise ValueError(
            f"{op}: give either group_size or group_ids, got {group_size=}, {group_ids=}"
        )
    if group_ids is None:
        return None
    _arguments.check_tensor(op, "group_ids", group_ids)
    group_ids = _arguments.one_per_sequence(group_ids)
    if group_ids.shape != rewards.shape[:1]:
        raise ValueError(
            f"{op}: group_ids: want {tuple(rewards.shape[:1])}, got {_arguments.shape_of(group_ids)}"
        )
    if group_ids.is_floating_point() or group_ids.is_complex():
        raise TypeError(f"{op}: group_ids: want integers, got {group_ids.dtype}")
    _arguments.check_device(op, "group_ids", group_ids, rewards)
    return group_ids.to(torch.int64).contiguous()


@keywords_explained()
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
    """Each reward's z-score among the rewards of its group: GRPO's advantages (arXiv 2402.03300).

    Equivalent, with `r = rewards.view(-1, group_size)`, to
    `((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)).flatten()`, and exactly 0 where the
    rewards of a group do not differ (which includes a group of one in `group_ids`). Not differentiable.

    Args:
        rewards: (B,), any real dtype, finite; or (B, K), one column per reward function. Float64 is centred
            before it is rounded. Across ranks, gather them first.
        group_size: sequences per prompt, at least 2 (1 with `singleton="raw"`); the sequences of a prompt
            are consecutive. Or:
        group_ids: (B,) or (B, 1) int labels; equal labels form a group, of any size, in any order.
        scale: divide by the std of the "group", of the whole "batch", or by nothing ("none", Dr. GRPO).
        eps: added to the std.
        unbiased: n - 1 in the denominator of the variance.
        baseline: what is subtracted, the "mean" of the group or, "leave_one_out", that of its other
            members: with `scale="none"` RLOO (arXiv 2402.14740).
        weights: (K,), of the columns of (B, K) rewards. Default: 1 each.
        aggregation: of (B, K) rewards. "sum_then_normalize": the weighted sum is the reward.
            "normalize_then_sum" (GDPO, arXiv 2601.05242): each column is scored on its own, with the std
            of the "group" or with "none"; the weighted sums of these scores are z-scored over the batch.
        nan: "error", or "skip": a NaN is a reward that is missing. It is left out of sums, means and
            stds; a sequence without any reward has advantage 0.
        singleton: the advantage of a reward alone in its group, "zero" or "raw" (mean 0, std 1: verl);
            "raw" goes with the scales "group" and "none".

    Returns:
        (B,) float32.

    Raises:
        ValueError, TypeError: neither or both of `group_size` and `group_ids`, a size that does not
            divide B, an unknown choice, one without effect on these rewards, a negative eps.
    """
    op = "group_advantage"
    for name, value, choices in (
        ("scale", scale, SCALES),
        ("baseline", baseline, BASELINES),
        ("aggregation", aggregation, AGGREGATIONS),
        ("nan", nan, MISSING),
        ("singleton", singleton, SINGLETONS),
    ):
        check_choice(name, value, choices, op)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps: want a number, got {eps!r}{hint('eps', eps)}")
    if not 0 <= eps <= LARGEST:
        raise ValueError(f"{op}: eps: want a finite number >= 0 that float32 can hold, got {eps}")
    skip_nan, raw = nan == "skip", singleton == "raw"
    rewards = check_rewards(op, rewards, group_size, columns=True, skip_nan=skip_nan, alone=raw)
    labels = check_groups(op, rewards, group_size, group_ids)
    if raw and scale == "batch":
        raise ValueError(f"{op}: singleton='raw' goes with scale='group' or 'none', got 'batch'")
    size, added = group_size or 1, operand(eps)
    leave_one_out = baseline == "leave_one_out"
    if rewards.ndim == 2:
        normalize = aggregation == "normalize_then_sum"
        if normalize and scale == "batch":
            raise ValueError(
                f"{op}: scale='batch' has no effect with aggregation='normalize_then_sum', which "
                "ends with the std of the batch; choose 'group' or 'none' for each reward's own"
            )
        if normalize and leave_one_out:
            raise ValueError(
                f"{op}: baseline='leave_one_out' has no effect with aggregation='normalize_then_sum'"
            )
        rewards = combine_rewards_fwd(
            rewards,
            _check_weights(op, weights, rewards),
            *(size, labels, normalize, scale, added, unbiased, skip_nan, raw),
        )
        if normalize:
            whole = max(len(rewards), 1)
            return group_advantage_fwd(
                rewards, whole, None, "group", added, unbiased, False, skip_nan
            )
    elif weights is not None:
        raise ValueError(f"{op}: weights: has no effect with rewards (B,), want rewards (B, K)")
    elif aggregation != "sum_then_normalize":
        raise ValueError(
            f"{op}: aggregation={aggregation!r} has no effect with rewards (B,), want rewards (B, K)"
        )
    return group_advantage_fwd(
        rewards, size, labels, scale, added, unbiased, leave_one_out, skip_nan, raw
    )


def _check_weights(op: str, weights: Tensor | None, rewards: Tensor) -> Tensor | None:
    if weights is None:
        return None
    _arguments.check_tensor(op, "weights", weights)
    if weights.shape != rewards.shape[1:]:
        raise ValueError(
            f"{op}: weights: want {tuple(rewards.shape[1:])}, one per column of rewards "
            f"{_arguments.shape_of(rewards)}, got {_arguments.shape_of(weights)}"
        )
    _arguments.check_real(op, "weights", weights)
    _arguments.check_device(op, "weights", weights, rewards)
    if check_values(weights) and not bool(weights.isfinite().all()):
        raise ValueError(f"{op}: weights: want finite weights, got {weights.tolist()}")
    return weights.detach().to(wide(weights)).contiguous()
