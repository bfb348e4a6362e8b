"""Time the loss and its gradients from hidden states: three products over the tokens that move."""

from typing import Any

from benchmarks.inputs import shapes
from benchmarks.measuring.measure import Case, cases, measure


@cases("linear_grpo", shapes.hidden_cases())
def bench_forward_backward(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
