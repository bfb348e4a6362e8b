"""Time the loss and its gradient from logits: one read of live logits, one write of the gradient."""

from typing import Any

from benchmarks.inputs import shapes
from benchmarks.measuring.measure import Case, cases, measure


@cases("grpo", shapes.cases())
def bench_forward_backward(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
