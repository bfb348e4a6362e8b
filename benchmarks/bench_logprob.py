"""Time log-probs from logits: the forward pass reads them once; with the backward pass, twice."""

from typing import Any

from benchmarks.inputs import shapes
from benchmarks.measuring.measure import Case, cases, measure

CASES = [(shape, "full") for shape in shapes.logits_shapes()]


@cases("logprob", CASES)
def bench_forward(benchmark: Any, case: Case) -> None:
    measure(benchmark, case, backward=False)


@cases("logprob", CASES)
def bench_forward_backward(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
