"""Time log-probs from logits: the forward pass reads them once; with the backward pass, twice."""

from benchmarks.inputs import shapes
from benchmarks.measuring.measure import cases

CASES = [(shape, "full") for shape in shapes.logits_shapes()]
bench_forward = cases("logprob", CASES, backward=False)
bench_forward_backward = cases("logprob", CASES)
