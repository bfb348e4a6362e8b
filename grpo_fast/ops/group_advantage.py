"""Advantages of rewards relative to their group, as operators and as the public function."""

import math
from typing import Any

import torch
from torch import Tensor

from grpo_fast import checks, sequences
from grpo_fast.checks import check_values
from grpo_fast.notices import logged, note, noting, setting
from grpo_fast.operands import LARGEST, hint, operand, replaced
from grpo_fast.ops.backend import path_and_reason, run
from grpo_fast.ops.operator import operator, watched
from grpo_fast.records import Z_SCORE, Grouping, Standardization
from grpo_fast.spelling import check_choice, keywords_explained
from grpo_fast.torch_kernels.group_advantage import plain_scores, wide

SCALES = ("group", "batch", "none")
BASELINES = ("mean", "leave_one_out")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
MISSING = ("error", "skip")
SINGLETONS = ("zero", "raw")
# Dtypes whose values float32 holds without rounding.
NARROW = {torch.float32, torch.float16, torch.bfloat16}
NARROW |= {torch.bool, torch.uint8, torch.int8, torch.int16}


FORWARD = "group_advantage.group_advantage_fwd"


@logged("operator group_advantage", inner=True)
def _group_advantage(
    rewards: Tensor, grouping: Grouping, standardization: Standardization
) -> Tensor:
    """Return the advantages (B,) fp32 of rewards (B,) fp32 or fp64."""
    standardization = standardization._replace(eps=standardization.eps.item())
    found: Tensor = run(FORWARD, rewards, rewards, grouping, standardization)
    return found


def _fake_advantage(rewards: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(rewards, dtype=torch.float32)


group_advantage_op = operator(
    "group_advantage",
    _group_advantage,
    {"rewards": Tensor, "grouping": Grouping, "standardization": Standardization},
    "Tensor",
    fake=_fake_advantage,
)


def group_advantage_fwd(
    rewards: Tensor, grouping: Grouping, standardization: Standardization
) -> Tensor:
    """Return the advantages (B,) fp32 of rewards (B,) fp32 or fp64; `standardization.eps` is a number."""
    if not watched(rewards, grouping.labels):
        # The operator takes eps as a tensor, which costs as much as two operations on a few rewards.
        return run(FORWARD, rewards, rewards, grouping, standardization)
    return group_advantage_op(
        rewards, grouping, replaced(standardization, eps=operand(standardization.eps))
    )


def z_scores(rewards: Tensor, group_size: int) -> Tensor:
    """Return the advantages that the losses use, within consecutive groups.

    They are `(r - mean) / (std + 1e-4)`.
    """
    return group_advantage_fwd(rewards, Grouping(group_size, None), Z_SCORE)


def _combine_rewards(
    rewards: Tensor,
    weights: Tensor | None,
    grouping: Grouping,
    normalize: bool,
    standardization: Standardization,
) -> Tensor:
    """Return one reward per sequence, (B,) in the dtype `wide`, from rewards (B, K) fp32 or fp64.

    It is the weighted sum of the K rewards, or with `normalize` of their scores.
    """
    standardization = standardization._replace(eps=standardization.eps.item())
    found: Tensor = run(
        "group_advantage.combine_rewards_fwd",
        rewards,
        rewards,
        weights,
        grouping,
        normalize,
        standardization,
    )
    return found


def _fake_combined(rewards: Tensor, weights: Tensor | None, *arguments: Any) -> Tensor:
    return rewards.new_empty(len(rewards), dtype=wide(rewards))


combine_rewards_op = operator(
    "combine_rewards",
    _combine_rewards,
    {
        "rewards": Tensor,
        "weights": Tensor | None,
        "grouping": Grouping,
        "normalize": bool,
        "standardization": Standardization,
    },
    "Tensor",
    fake=_fake_combined,
)


def check_rewards(
    op: str,
    rewards: Tensor,
    group_size: int | None,
    columns: bool = False,
    skip_nan: bool = False,
    alone: bool = False,
) -> Tensor:
    """Check rewards; return them as (B,), or (B, K) with `columns`.

    They are float32, or float64 where float32 would round.

    Args:
        group_size: must divide B, and be at least 2, or 1 with `alone`; None: not checked.
    """
    checks.check_tensor(op, "rewards", rewards)
    if not columns:
        rewards = sequences.one_per_sequence(rewards)
    if rewards.ndim != 1 and not (columns and rewards.ndim == 2 and rewards.shape[1]):
        wanted = "(B,) or (B, K)" if columns else "(B,)"
        raise ValueError(f"{op}: rewards: want {wanted}, got {checks.shape_of(rewards)}")
    checks.check_real(op, "rewards", rewards)
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
        # A finite sum has finite terms, and costs a third of the rest.
        bad = None if math.isfinite(rewards.sum().item()) else _not_finite(rewards, skip_nan)
        if bad is not None and bool(bad.any()):
            where = bad.nonzero()[0].tolist()
            value = rewards[tuple(where)].item()
            hint = " (nan='skip' leaves missing ones out)" if columns and value != value else ""
            place = where[0] if rewards.ndim == 1 else tuple(where)
            raise ValueError(f"{op}: rewards: {value} at {place}, want finite rewards{hint}")
    return without_rounding(rewards)


def _not_finite(rewards: Tensor, skip_nan: bool) -> Tensor:
    return rewards.isinf() if skip_nan else ~rewards.isfinite()


def without_rounding(rewards: Tensor) -> Tensor:
    """Return the rewards in float32 if that holds them exactly, else in the dtype `wide`."""
    dtype = torch.float32 if rewards.dtype in NARROW else wide(rewards)
    return rewards.detach().to(dtype).contiguous()


def check_groups(
    op: str, rewards: Tensor, group_size: int | None, group_ids: Tensor | None
) -> Tensor | None:
    """Check the groups; return the labels (B,) int64, or None where `group_size` defines the groups."""
    if (group_size is None) == (group_ids is None):
        raise ValueError(
            f"{op}: give either group_size or group_ids, got {group_size=}, {group_ids=}"
        )
    if group_ids is None:
        return None
    checks.check_tensor(op, "group_ids", group_ids)
    group_ids = sequences.one_per_sequence(group_ids)
    if group_ids.shape != rewards.shape[:1]:
        raise ValueError(
            f"{op}: group_ids: want {tuple(rewards.shape[:1])}, got {checks.shape_of(group_ids)}"
        )
    if group_ids.is_floating_point() or group_ids.is_complex():
        raise TypeError(f"{op}: group_ids: want integers, got {group_ids.dtype}")
    checks.check_device(op, "group_ids", group_ids, rewards)
    return group_ids.to(torch.int64).contiguous()


# The options of `group_advantage` unless they are given, in the order of its signature.
DEFAULTS = ("group", Z_SCORE.eps, True, "mean", "sum_then_normalize", "error", "zero")


def _of_few(rewards: Tensor, group_size: int | None) -> Tensor | None:
    """Return the z-scores of a usual call on the CPU; None: the call has to be looked at more closely.

    A batch has few rewards, so that the checks take longer than the arithmetic. Here are as few as
    show that all of them would pass.
    """
    if (
        type(rewards) is not Tensor
        or rewards.layout != torch.strided
        or rewards.is_nested
        or type(group_size) is not int
        or rewards.ndim != 1
        or rewards.dtype != torch.float32
        or not rewards.is_cpu
        or group_size < 2
        or not len(rewards)
        or len(rewards) % group_size
        or watched(rewards)
        or setting("GRPO_FAST_BACKEND") == "triton"
    ):
        return None
    if rewards.requires_grad:
        rewards = rewards.detach()
    if not math.isfinite(rewards.dot(rewards).item()):  # or their squares are too large for it
        return None
    if noting():
        note(path_and_reason(rewards), "group_advantage_fwd")
    return plain_scores(rewards, group_size, Z_SCORE)


@logged("group_advantage")
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
    """Return GRPO's advantages (arXiv 2402.03300): the z-score of each reward in its group.

        >>> rewards = torch.tensor([0.0, 1.0, 1.0, 3.0, 2.0, 2.0, 2.0, 2.0])
        >>> r = rewards.view(2, 4)
        >>> want = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
        >>> torch.testing.assert_close(group_advantage(rewards, group_size=4), want.flatten())
        >>> labels = torch.tensor([7, 7, 7, 7, 0, 0, 0, 0])
        >>> torch.testing.assert_close(group_advantage(rewards, group_ids=labels), want.flatten())

    It is exactly 0 where the rewards of a group do not differ, which includes a group of one in
    `group_ids`. It is not differentiable.

    Args:
        rewards: (B,), any real dtype, finite; or (B, K), one column per reward function. Float64
            rewards are centred before they are rounded. Across ranks, gather them first.
        group_size: sequences per prompt, at least 2 (1 with `singleton="raw"`). The sequences of a
            prompt are consecutive. Give either this or `group_ids`.
        group_ids: (B,) or (B, 1) int labels. Equal labels form a group, of any size, in any order.
        scale: divide by the std of the "group", of the whole "batch", or by nothing: "none" (Dr.
            GRPO).
        eps: added to the std.
        unbiased: divide the variance by n - 1 instead of n.
        baseline: subtract the "mean" of the group, or with "leave_one_out" the mean of its other
            members. The latter with `scale="none"` is RLOO (arXiv 2402.14740).
        weights: (K,), factors of the columns of (B, K) rewards. Default: 1 each.
        aggregation: how (B, K) rewards become one. "sum_then_normalize": their weighted sum is the
            reward. "normalize_then_sum" (GDPO, arXiv 2601.05242): each column is scored on its own,
            with the `scale` "group" or "none", and the weighted sums of these scores are z-scored
            over the batch.
        nan: whether a NaN is an "error", or a missing reward to "skip". A missing reward is left
            out of sums, means and stds; a sequence without any reward has advantage 0.
        singleton: the advantage of a reward alone in its group: "zero", or "raw" (mean 0 and std 1,
            as in verl). "raw" goes with the scales "group" and "none".

    Returns:
        (B,) float32.

    Raises:
        ValueError, TypeError: neither or both of `group_size` and `group_ids`, a size that does not
            divide B, an unknown choice, a choice without effect on these rewards, a negative eps.
    """
    op = "group_advantage"
    # Without tensors, whose comparison torch 2.8 cannot trace.
    options = scale, eps, unbiased, baseline, aggregation, nan, singleton
    plain = weights is None and group_ids is None
    if type(eps) is float and options == DEFAULTS and plain:
        scores = _of_few(rewards, group_size)
        if scores is not None:
            return scores
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
    grouping = Grouping(group_size or 1, labels)
    standardization = Standardization(
        scale, eps, unbiased, baseline == "leave_one_out", skip_nan, raw
    )
    if rewards.ndim == 2:
        rewards, whole = _combined(op, rewards, weights, aggregation, grouping, standardization)
        if whole:
            grouping = Grouping(max(len(rewards), 1), None)
            standardization = replaced(standardization, scale="group", raw_singletons=False)
    elif weights is not None:
        raise ValueError(f"{op}: weights: has no effect with rewards (B,), want rewards (B, K)")
    elif aggregation != "sum_then_normalize":
        raise ValueError(
            f"{op}: aggregation={aggregation!r} has no effect with rewards (B,), want rewards (B, K)"
        )
    return group_advantage_fwd(rewards, grouping, standardization)


def _combined(
    op: str,
    rewards: Tensor,
    weights: Tensor | None,
    aggregation: str,
    grouping: Grouping,
    standardization: Standardization,
) -> tuple[Tensor, bool]:
    """Combine rewards (B, K) into (B,); return them and whether the batch is their group."""
    normalize = aggregation == "normalize_then_sum"
    if normalize and standardization.scale == "batch":
        raise ValueError(
            f"{op}: scale='batch' has no effect with aggregation='normalize_then_sum', which "
            "ends with the std of the batch; choose 'group' or 'none' for each reward's own"
        )
    if normalize and standardization.leave_one_out:
        raise ValueError(
            f"{op}: baseline='leave_one_out' has no effect with aggregation='normalize_then_sum'"
        )
    weights = _check_weights(op, weights, rewards)
    standardization = replaced(
        standardization, eps=operand(standardization.eps), leave_one_out=False
    )
    return combine_rewards_op(rewards, weights, grouping, normalize, standardization), normalize


def _check_weights(op: str, weights: Tensor | None, rewards: Tensor) -> Tensor | None:
    if weights is None:
        return None
    checks.check_tensor(op, "weights", weights)
    if weights.shape != rewards.shape[1:]:
        raise ValueError(
            f"{op}: weights: want {tuple(rewards.shape[1:])}, one per column of rewards "
            f"{checks.shape_of(rewards)}, got {checks.shape_of(weights)}"
        )
    checks.check_real(op, "weights", weights)
    checks.check_device(op, "weights", weights, rewards)
    if check_values(weights) and not bool(weights.isfinite().all()):
        raise ValueError(f"{op}: weights: want finite weights, got {weights.tolist()}")
    return weights.detach().to(wide(weights)).contiguous()
