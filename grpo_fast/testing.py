"""An assertion about accuracy, for tests/ and benchmarks/."""

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
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, want {truth.shape}"
    if not truth.numel():
        return
    actual, baseline, truth = (x.detach().double().cpu() for x in (actual, baseline, truth))
    assert not truth.isnan().any(), f"{name}: the truth itself holds NaN"
    finite = truth.isfinite()
    matches = torch.where(finite, actual.isfinite(), actual == truth)
    assert matches.all(), (
        f"{name}: not finite (or not infinite) at {matches.logical_not().nonzero()[0].tolist()}"
    )
    truth, actual, baseline = truth[finite], actual[finite], baseline[finite]
    if not truth.numel():
        return
    errors = (actual - truth).abs()
    # Where plain PyTorch returns NaN or inf, its error must not excuse one here.
    expected = (baseline - truth).abs().nan_to_num(nan=0.0, posinf=0.0).max().item()
    # The last term is the rounding of float64 next to 1.
    allowed = factor * expected + floor * max(truth.abs().max().item(), scale) + 1e-15
    worst = int(errors.argmax())
    assert errors.max().item() <= allowed, (
        f"{name}: error {errors.max().item():.3e} (got {actual[worst].item():.9g}, want "
        f"{truth[worst].item():.9g}), plain PyTorch has {expected:.3e}, allowed {allowed:.3e}"
    )
