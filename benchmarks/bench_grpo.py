"""Time the loss and its gradient from logits: one read of live logits, one write of the gradient."""

from benchmarks.inputs import shapes
from benchmarks.measuring.measure import cases

bench_forward_backward = cases("grpo", shapes.cases())
