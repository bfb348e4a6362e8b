"""Time the objective on log-probs where the ratio is a sequence's (GSPO), with its gradient."""

from benchmarks.inputs import shapes
from benchmarks.measuring.measure import cases

bench_forward_backward = cases("sequence_loss", [(shape, "gspo") for shape in shapes.TOKENS])
