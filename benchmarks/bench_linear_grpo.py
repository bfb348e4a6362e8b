"""From hidden states to the loss and its gradients: three matrix multiplications on the tokens that move."""

from typing import Any

import pytest

from benchmarks.inputs import shapes
from benchmarks.measuring import measure

STEM = "linear_grpo"
CASES = shapes.hidden_cases()
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
