"""An assertion about accuracy, for tests/, benchmarks/ and `grpo-fast doctor`."""

from typing import NamedTuple

import torch
from torch import Tensor


def assert_as_accurate(
    actual: Tensor,
    baseline: Tensor,
    truth: Tensor,
    factor: float = 2.0,
    floor: float = 1e-5,
    scale: float = 0.0,
    name: str = "result",
) -> None:
    """Assert that a result is about as accurate as plain PyTorch in the same dtype.

    The errors of `actual` and `baseline` are their largest differences from `truth`. The assertion
    is `error(actual) <= factor * error(baseline) + floor * max(scale, abs(truth).max())`, so that
    the tolerance grows with the problem and nobody has to guess it for each dtype. Infinities must
    be at the same places; a NaN fails.

        >>> x = torch.rand(100)
        >>> truth = x.double().sum()
        >>> assert_as_accurate(x.flip(0).sum(), x.sum(), truth)
        >>> assert_as_accurate(x.sum() + 1, x.sum(), truth)
        Traceback (most recent call last):
        AssertionError: result: error ...

    Args:
        actual: the result under test.
        baseline: the result of the same formula in plain PyTorch, in the dtype under test.
        truth: the float64 result.
        factor, floor: numbers of the formula.
        scale: used in place of max |truth| where it is larger, for results that are small
            differences of larger terms.
        name: what the message calls the result.

    Raises:
        AssertionError: with both errors, and the values at the worst place.
    """
    found = compared(actual, baseline, truth, factor, floor, scale, name)
    assert found.error <= found.allowed, f"{name}: {found.words}"


class Comparison(NamedTuple):
    """The largest error of a result, that of plain PyTorch, and what is allowed."""

    error: float
    plain: float
    allowed: float
    got: float = 0.0
    want: float = 0.0

    @property
    def words(self) -> str:
        """Return all five numbers in words."""
        return (
            f"error {self.error:.3e} (got {self.got:.9g}, want {self.want:.9g}), plain PyTorch has "
            f"{self.plain:.3e}, allowed {self.allowed:.3e}"
        )


def compared(
    actual: Tensor,
    baseline: Tensor,
    truth: Tensor,
    factor: float = 2.0,
    floor: float = 1e-5,
    scale: float = 0.0,
    name: str = "result",
) -> Comparison:
    """Return the errors that `assert_as_accurate` compares, with the same arguments.

    Raises:
        AssertionError: another shape, infinities that are not at the same places, or a NaN; also under
            `python -O`, which the command `grpo-fast doctor` may run under.
    """
    if actual.shape != truth.shape:
        raise AssertionError(f"{name}: shape {actual.shape}, want {truth.shape}")
    nothing = Comparison(0.0, 0.0, 0.0)
    if not truth.numel():
        return nothing
    actual, baseline, truth = (x.detach().double().cpu() for x in (actual, baseline, truth))
    assert not truth.isnan().any(), f"{name}: the truth itself holds NaN"
    finite = truth.isfinite()
    matches = torch.where(finite, actual.isfinite(), actual == truth)
    if not matches.all():
        place = matches.logical_not().nonzero()[0].tolist()
        raise AssertionError(f"{name}: not finite (or not infinite) at {place}")
    truth, actual, baseline = truth[finite], actual[finite], baseline[finite]
    if not truth.numel():
        return nothing
    errors = (actual - truth).abs()
    # Where plain PyTorch returns NaN or inf, its error must not excuse one here.
    expected = (baseline - truth).abs().nan_to_num(nan=0.0, posinf=0.0).max().item()
    # The last term is the rounding of float64 next to 1.
    allowed = factor * expected + floor * max(truth.abs().max().item(), scale) + 1e-15
    worst = int(errors.argmax())
    return Comparison(
        errors.max().item(), expected, allowed, actual[worst].item(), truth[worst].item()
    )
