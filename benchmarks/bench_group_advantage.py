"""Time advantages from rewards: a few kilobytes, so launches are all that costs."""

from typing import Any

from benchmarks.inputs import shapes
from benchmarks.measuring.measure import Case, cases, measure


@cases("group_advantage", [(shape, "full") for shape in shapes.TOKENS])
def bench_forward(benchmark: Any, case: Case) -> None:
    measure(benchmark, case, backward=False)
