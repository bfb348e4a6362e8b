"""Log-probs from hidden states. Forward: one matrix multiplication, 2 N D V; with backward three."""

from typing import Any

import pytest

from benchmarks.inputs import shapes
from benchmarks.measuring import measure

STEM = "linear_logprob"
CASES = [(shape, "full") for shape in list(shapes.hidden_shapes())[:1]]
by_case = pytest.mark.parametrize("shape, variant, provider", measure.parameters(CASES, STEM))


@by_case
def bench_forward(benchmark: Any, shape: str, variant: str, provider: str) -> None:
    measure.hidden_measure(
        benchmark,
        stem=STEM,
        provider=provider,
        shape_name=shape,
        variant=variant,
        backward=False,
    )


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
