"""Time the loss and its gradient from logits: live logits are read once, the gradient is written
once.
"""

from typing import Any

from benchmarks.inputs import shapes
from benchmarks.measuring.measure import Case, cases, measure


@cases("grpo", shapes.cases())
def bench_forward_backward(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
