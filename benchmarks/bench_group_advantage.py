"""Advantages from rewards: a few kilobytes, so launches are all that costs."""

from typing import Any

import pytest
from torch import Tensor

from benchmarks.inputs import shapes
from benchmarks.measuring import measure, traffic

CASES = [(shape, "full") for shape in shapes.TOKENS]


@pytest.mark.parametrize("shape, variant, provider", measure.parameters(CASES, "group_advantage"))
def bench_forward(benchmark: Any, shape: str, variant: str, provider: str) -> None:
    def call(fn: Any) -> measure.Call:
        def forward(rewards: Tensor, group_size: int) -> tuple[Tensor, None]:
            return fn(rewards, group_size), None

        return forward

    measure.measure(
        benchmark,
        stem="group_advantage",
        provider=provider,
        shape_name=shape,
        variant=variant,
        setup=lambda batch: (batch.rewards, batch.shape.G),
        call=call,
        nbytes=lambda batch: traffic.group_advantage(batch.shape.B).least,
    )
