"""Time the objective on log-probs where the ratio is a sequence's (GSPO), with its gradient."""

from typing import Any

from benchmarks.inputs import shapes
from benchmarks.measuring.measure import Case, cases, measure


@cases("sequence_loss", [(shape, "gspo") for shape in shapes.TOKENS])
def bench_forward_backward(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
