"""Time advantages from rewards: a few kilobytes, so launches are all that costs."""

from benchmarks.inputs import shapes
from benchmarks.measuring.measure import cases

bench_forward = cases(
    "group_advantage", [(shape, "full") for shape in shapes.TOKENS], backward=False
)
