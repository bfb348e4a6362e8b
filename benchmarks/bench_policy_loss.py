"""Time the objective on log-probs, with its gradient: launches cost most."""

from benchmarks.inputs import shapes
from benchmarks.measuring.measure import cases

bench_forward_backward = cases("policy_loss", [(shape, "full") for shape in shapes.TOKENS])
