"""From hidden states to the loss and its gradients: three matrix products, the logits a chunk at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import measure, shapes
from benchmarks.inputs import Batch


@pytest.mark.parametrize(
    "shape, variant, provider", measure.parameters(shapes.head_cases(), "linear_grpo")
)
def bench_forward_backward(benchmark: Any, shape: str, variant: str, provider: str) -> None:
    def call(fn: Any) -> measure.Call:
        def both(hidden: Tensor, weight: Tensor, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
            loss = fn(hidden, weight, batch.ids, objective=batch.objective, **batch.arguments)
            return loss, torch.autograd.grad(loss, (hidden, weight))

        return both

    measure.measure(
        benchmark,
        stem="linear_grpo",
        provider=provider,
        shape_name=shape,
        variant=variant,
        setup=measure.head_setup,
        call=call,
        nbytes=lambda batch: measure.head_bytes(batch, gradients=True),
    )
