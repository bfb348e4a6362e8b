"""A step's statistics, folded across micro-batches and ranks, as metrics."""

import torch
from torch import Tensor

from grpo_fast.checks import check_tensor, shape_of

# The statistics, in this order: sums over live tokens, then an extreme each.
STATISTICS = (
    "tokens",
    "loss",
    "ratio",
    "k1",
    "k3",
    "clip_low",
    "clip_high",
    "clip_dual",
    "kl",
    "entropy",
    "importance",
    "importance_outside",
    "rho",
    "rho_squared",
    "ratio_min",
    "ratio_max",
)
LOSS = STATISTICS.index("loss")
# What `metrics_from` returns, in this order.
METRICS = (
    "tokens",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "clip_fraction_low",
    "clip_fraction_high",
    "clip_fraction_dual",
    "approx_kl_k1",
    "approx_kl_k3",
    "kl",
    "entropy",
    "importance_weight_mean",
    "importance_weight_out_of_range",
    "effective_sample_size",
)


def fold_statistics(gathered: Tensor) -> Tensor:
    """The statistics of the union of several micro-batches or ranks: (n, 16) -> (16,).

    The "loss" entry is summed, like the gradients of losses normalised by a common `num_items`.
    """
    check_tensor("fold_statistics", "gathered", gathered)
    if gathered.ndim != 2 or gathered.shape[1] != len(STATISTICS):
        raise ValueError(
            f"fold_statistics: gathered: want (n, {len(STATISTICS)}), got {shape_of(gathered)}"
        )
    return torch.cat(
        [gathered[:, :-2].sum(0), gathered[:, -2].amin(0, True), gathered[:, -1].amax(0, True)]
    )


def metrics_from(statistics: Tensor) -> dict[str, Tensor]:
    """The metrics of a step from its statistics: means over live tokens, all finite, also without any.

    A floating mask weighs the means, and `tokens` is its sum.

    tokens; ratio_mean, ratio_min, ratio_max (1 without a live token); clip_fraction_low (ratio below the
    range where A < 0), clip_fraction_high (above it where A > 0), clip_fraction_dual (above `delta` or
    `dual_clip` where A < 0); approx_kl_k1 = E[old - new], approx_kl_k3 = E[r - 1 - log r]; kl (to the
    reference, by the objective's estimator; only with `ref_logps`); entropy (where computed);
    importance_weight_mean; importance_weight_out_of_range: share of weights outside [1/2, 2];
    effective_sample_size: (sum rho)^2 / (n sum rho^2) in (0, 1], rho = ratio * importance weight.

    Args:
        statistics: (16,), from `LossOutput.statistics` or `fold_statistics`.
    """
    check_tensor("metrics_from", "statistics", statistics)
    s = dict(zip(STATISTICS, statistics.unbind(), strict=True))
    tokens = s["tokens"]
    empty = tokens == 0
    count = torch.where(empty, 1, tokens)  # below 1 where a mask weighs so
    return {
        "tokens": tokens,
        "ratio_mean": torch.where(empty, 1, s["ratio"] / count),
        "ratio_min": torch.where(empty, 1, s["ratio_min"]),
        "ratio_max": torch.where(empty, 1, s["ratio_max"]),
        "clip_fraction_low": s["clip_low"] / count,
        "clip_fraction_high": s["clip_high"] / count,
        "clip_fraction_dual": s["clip_dual"] / count,
        "approx_kl_k1": s["k1"] / count,
        "approx_kl_k3": s["k3"] / count,
        "kl": s["kl"] / count,
        "entropy": s["entropy"] / count,
        "importance_weight_mean": torch.where(empty, 1, s["importance"] / count),
        "importance_weight_out_of_range": s["importance_outside"] / count,
        "effective_sample_size": torch.where(
            s["rho_squared"] == 0,
            empty.to(count.dtype),
            s["rho"].square() / (count * s["rho_squared"]).clamp(min=1e-30),
        ),
    }
