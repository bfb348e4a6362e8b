"""Advantages from rewards: a few kilobytes, so launches are all that costs."""

from typing import Any

import pytest
from torch import Tensor

from benchmarks import measure, shapes

CASES = [(shape, "full") for shape in shapes.TOKENS]
# A reward read, an advantage written; the rest of the group is in the cache.
BYTES_PER_SEQUENCE = 4 + 4


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
        nbytes=lambda batch: BYTES_PER_SEQUENCE * batch.shape.B,
    )
