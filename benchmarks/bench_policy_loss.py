"""Time the objective on log-probs, with its gradient: launches cost most."""

from typing import Any

from benchmarks.inputs import shapes
from benchmarks.measuring.measure import Case, cases, measure


@cases("policy_loss", [(shape, "full") for shape in shapes.TOKENS])
def bench_forward_backward(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
