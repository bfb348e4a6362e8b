"""The mean cross-entropy from hidden states, with gradients: what most fused heads were made for."""

from typing import Any

import pytest

from benchmarks.inputs import shapes
from benchmarks.measuring import measure

STEM = "linear_cross_entropy"
CASES = [(shape, "full") for shape in list(shapes.hidden_shapes())[:1]]
by_case = pytest.mark.parametrize("shape, variant, provider", measure.parameters(CASES, STEM))


@by_case
def bench_forward_backward(benchmark: Any, shape: str, variant: str, provider: str) -> None:
    measure.hidden_measure(
        benchmark,
        stem=STEM,
        provider=provider,
        shape_name=shape,
        variant=variant,
        backward=True,
    )
