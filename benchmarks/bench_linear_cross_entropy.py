"""Time the mean cross-entropy from hidden states: what most fused heads were made for."""

from typing import Any

from benchmarks.inputs import shapes
from benchmarks.measuring.measure import Case, cases, measure


@cases("linear_cross_entropy", [(next(iter(shapes.hidden_shapes())), "full")])
def bench_forward_backward(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
