"""Assertions shared by tests/ and benchmarks/."""

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
    """Assert `error(actual) <= factor * error(baseline) + floor * max |truth|`, errors against `truth`.

    `truth` is the float64 result and `baseline` the same formula in plain PyTorch in the dtype under test,
    so that the tolerance scales with the problem instead of being guessed per dtype. Infinities must
    coincide; a NaN fails. `scale` is the least that max |truth| is taken for, where a result is a small
    difference of larger terms.

    Raises:
        AssertionError: with both errors and the place of the worst one.
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
    # Where plain PyTorch has no answer at all, its error excuses nothing.
    expected = (baseline - truth).abs().nan_to_num(nan=0.0, posinf=0.0).max().item()
    # The last term: what float64 itself rounds away next to 1.
    allowed = factor * expected + floor * max(truth.abs().max().item(), scale) + 1e-15
    worst = int(errors.argmax())
    assert errors.max().item() <= allowed, (
        f"{name}: error {errors.max().item():.3e} (got {actual[worst].item():.9g}, want "
        f"{truth[worst].item():.9g}), plain PyTorch has {expected:.3e}, allowed {allowed:.3e}"
    )
