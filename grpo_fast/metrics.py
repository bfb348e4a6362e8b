"""Statistics of a step: how they are folded across micro-batches and ranks, and the metrics they give."""

import torch
from torch import Tensor

from grpo_fast.checks import check_real, check_tensor, shape_of

# The statistics, in this order: sums over the tokens that count, then the least and the largest ratio.
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
# The keys of `metrics_from`, in this order.
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
    """Return the statistics of several micro-batches or ranks together.

        >>> halves = [policy_loss(torch.zeros(1, 3), advantages=torch.ones(1)) for _ in range(2)]
        >>> folded = fold_statistics(torch.stack([half.statistics for half in halves]))
        >>> both = policy_loss(torch.zeros(2, 3), advantages=torch.ones(2))
        >>> torch.testing.assert_close(metrics_from(folded), metrics_from(both.statistics))

    The "loss" entry is summed, like the gradients of losses with a common `num_items`.

    Args:
        gathered: (n, 16), the `LossOutput.statistics` of n calls.

    Returns:
        (16,), of the dtype of `gathered`.

    Raises:
        ValueError, TypeError: another shape, complex numbers, or no tensor.
    """
    check_tensor("fold_statistics", "gathered", gathered)
    if gathered.ndim != 2 or gathered.shape[1] != len(STATISTICS):
        raise ValueError(
            f"fold_statistics: gathered: want (n, {len(STATISTICS)}), got {shape_of(gathered)}"
        )
    check_real("fold_statistics", "gathered", gathered)
    return torch.cat(
        [gathered[:, :-2].sum(0), gathered[:, -2].amin(0, True), gathered[:, -1].amax(0, True)]
    )


def metrics_from(statistics: Tensor) -> dict[str, Tensor]:
    """Return the metrics of a step, by name, from its statistics.

        >>> logps, old = -torch.rand(2, 3), -torch.rand(2, 3)
        >>> out = policy_loss(logps, advantages=torch.ones(2), old_logps=old)
        >>> metrics = metrics_from(out.statistics)
        >>> torch.testing.assert_close(metrics["ratio_mean"], (logps - old).exp().mean())
        >>> torch.testing.assert_close(metrics["approx_kl_k1"], (old - logps).mean())

    The means are over the tokens that count; a floating mask weighs them, and `tokens` is its sum.
    Where no token counts every metric is finite. d = logp - old_logp, r = exp(d), w the importance
    weight:

        tokens: how many tokens count
        ratio_mean, ratio_min, ratio_max: of r; 1 where no token counts
        clip_fraction_low: share of tokens below the bounds of the surrogate, with A < 0
        clip_fraction_high: share of tokens above the bounds of the surrogate, with A > 0
        clip_fraction_dual: share of tokens whose r is above `delta` or `dual_clip`, with A < 0
        approx_kl_k1, approx_kl_k3: mean of -d, mean of r - 1 - d
        kl: to the reference, by the objective's estimator; `LossOutput.metrics` has it only with
        `ref_logps`
        entropy: in nats; `LossOutput.metrics` has it only where it was computed
        importance_weight_mean: mean of w
        importance_weight_out_of_range: share of tokens whose w is outside [1/2, 2]
        effective_sample_size: (sum r w)^2 / (n sum (r w)^2), in (0, 1]; 0 where all r w are 0, NaN
        where a square overflows float32 (r w above 1.8e19)

    Args:
        statistics: (16,), from `LossOutput.statistics` or `fold_statistics`.

    Returns:
        0-dim tensors, of the dtype of `statistics` and on its device.

    Raises:
        ValueError, TypeError: another shape, complex numbers, or no tensor.
    """
    check_tensor("metrics_from", "statistics", statistics)
    if statistics.shape != (len(STATISTICS),):
        raise ValueError(
            f"metrics_from: statistics: want ({len(STATISTICS)},), got {shape_of(statistics)}"
        )
    check_real("metrics_from", "statistics", statistics)
    s = dict(zip(STATISTICS, statistics.unbind(), strict=True))
    tokens = s["tokens"]
    empty = tokens == 0
    count = torch.where(empty, 1, tokens)  # a floating mask may sum to less than 1
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
            s["rho"].square() / (count * torch.where(s["rho_squared"] == 0, 1, s["rho_squared"])),
        ),
    }
