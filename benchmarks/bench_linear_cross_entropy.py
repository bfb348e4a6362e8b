"""Time the mean cross-entropy from hidden states: what most fused heads were made for."""

from benchmarks.inputs import shapes
from benchmarks.measuring.measure import cases

bench_forward_backward = cases(
    "linear_cross_entropy", [(next(iter(shapes.hidden_shapes())), "full")]
)
