"""From logits to the loss and its gradient: the live logits are read once, the gradient is written once."""

from typing import Any

import pytest
from torch import Tensor

from benchmarks.inputs import shapes
from benchmarks.inputs.batches import Batch
from benchmarks.measuring import measure, traffic


@pytest.mark.parametrize("shape, variant, provider", measure.parameters(shapes.cases(), "grpo"))
def bench_forward_backward(benchmark: Any, shape: str, variant: str, provider: str) -> None:
    def setup(batch: Batch) -> tuple[Any, ...]:
        leaf, logits = measure.logits_setup(batch, provider)
        return leaf, logits, batch

    def call(fn: Any) -> measure.Call:
        def both(leaf: Tensor, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
            loss, grad = measure.value_and_grad(
                fn, leaf, logits, batch.ids, objective=batch.objective, **batch.arguments
            )
            return loss, measure.without_extra_row(grad, batch)

        return both

    measure.measure(
        benchmark,
        stem="grpo",
        provider=provider,
        shape_name=shape,
        variant=variant,
        setup=setup,
        call=call,
        nbytes=lambda batch: (
            traffic.grpo(batch.shape.N, batch.live, batch.moving, *measure.row_of(batch)).least
        ),
    )
