"""Time the loss and its gradients from hidden states: three products over the tokens that move."""

from benchmarks.inputs import shapes
from benchmarks.measuring.measure import cases

bench_forward_backward = cases("linear_grpo", shapes.hidden_cases())
