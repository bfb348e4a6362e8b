"""Confidence intervals of means of values that depend on each other within clusters."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % confidence interval, which reaches `half` to both sides; NaN: there is none."""

    mean: float
    half: float
    missing: int = 0  # completions without a value

    def to_dict(self) -> dict[str, Any]:
        """Return the mean and both ends of the interval, which may be outside the range of the values."""
        ends = {"low": self.mean - self.half, "high": self.mean + self.half}
        return {"mean": self.mean, **ends, "missing": self.missing}


@dataclass(frozen=True)
class Deviations:
    """The part that each of K clusters has in the error of a mean.

    Attributes:
        parts: (K,) float64; sum of (x - mean) over the values of a cluster, divided by the number of all
            values.
        present: (K,) bool; clusters that have a value.
    """

    mean: float
    parts: Tensor
    present: Tensor
    missing: int

    @classmethod
    def of(cls, values: Tensor, clusters: Tensor) -> "Deviations":
        """Compute them for values (B,), NaN where missing, whose clusters are numbered from 0."""
        known = ~values.isnan()
        x, where = values[known].double(), clusters[known]
        parts = torch.zeros(int(clusters.max()) + 1, dtype=torch.float64)
        present = torch.zeros(len(parts), dtype=torch.bool)
        present[where] = True
        mean = x.mean()
        parts.index_add_(0, where, (x - mean) / max(len(x), 1))
        return cls(mean.item(), parts, present, int((~known).sum()))

    def minus(self, other: "Deviations") -> "Deviations":
        """Return those of a difference of means over the same clusters."""
        return Deviations(
            self.mean - other.mean,
            self.parts - other.parts,
            self.present | other.present,
            self.missing + other.missing,
        )

    def estimate(self) -> Estimate:
        """Return the mean and its t-interval over the clusters; none for fewer than two."""
        count = int(self.present.sum())
        half = math.nan
        if count > 1 and not math.isnan(self.mean):
            error = math.sqrt(count / (count - 1) * self.parts.square().sum().item())
            half = student(count - 1) * error
        return Estimate(self.mean, half, self.missing)


@functools.cache
def student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution with an integer number of degrees of freedom."""
    low, high = 1.9, 12.8  # the quantiles of infinitely many and of one are between
    for _ in range(60):
        middle = (low + high) / 2
        if _within(middle, freedom) < 0.95:
            low = middle
        else:
            high = middle
    return high


def _within(t: float, freedom: int) -> float:
    """Return the probability of |T| < t: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for i in range(1, freedom // 2):
        term *= (2 * i - 1 + odd) / (2 * i + odd) * math.cos(angle) ** 2
        total += term
    if odd:
        total = angle + math.sin(angle) * (total if freedom > 1 else 0.0)
        return 2 / math.pi * total
    return math.sin(angle) * total
