"""Time log-probs from hidden states: one product, 2 N D V; with the backward pass three."""

from typing import Any

from benchmarks.inputs import shapes
from benchmarks.measuring.measure import Case, cases, measure

CASES = [(next(iter(shapes.hidden_shapes())), "full")]


@cases("linear_logprob", CASES)
def bench_forward(benchmark: Any, case: Case) -> None:
    measure(benchmark, case, backward=False)


@cases("linear_logprob", CASES)
def bench_forward_backward(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
