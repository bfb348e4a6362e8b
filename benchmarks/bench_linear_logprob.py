"""Time log-probs from hidden states: one product, 2 N D V; with the backward pass three."""

from benchmarks.inputs import shapes
from benchmarks.measuring.measure import cases

CASES = [(next(iter(shapes.hidden_shapes())), "full")]
bench_forward = cases("linear_logprob", CASES, backward=False)
bench_forward_backward = cases("linear_logprob", CASES)
