"""Log-probs from hidden states: one matrix product; with backward four, the logits a chunk at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import measure, shapes
from benchmarks.inputs import Batch

CASES = [(shape, "full") for shape in shapes.head_shapes()]
by_case = pytest.mark.parametrize(
    "shape, variant, provider", measure.parameters(CASES, "linear_logprob")
)


@by_case
def bench_forward(benchmark: Any, shape: str, variant: str, provider: str) -> None:
    def call(fn: Any) -> measure.Call:
        def forward(hidden: Tensor, weight: Tensor, batch: Batch) -> tuple[Tensor, None]:
            with torch.no_grad():
                return fn(hidden, weight, batch.ids), None

        return forward

    measure.measure(
        benchmark,
        stem="linear_logprob",
        provider=provider,
        shape_name=shape,
        variant=variant,
        setup=measure.head_setup,
        call=call,
        nbytes=lambda batch: measure.head_bytes(batch, gradients=False),
        roof="read",
    )


@by_case
def bench_forward_backward(benchmark: Any, shape: str, variant: str, provider: str) -> None:
    def call(fn: Any) -> measure.Call:
        def both(hidden: Tensor, weight: Tensor, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
            logp = fn(hidden, weight, batch.ids)
            return logp, torch.autograd.grad(logp, (hidden, weight), batch.upstream)

        return both

    measure.measure(
        benchmark,
        stem="linear_logprob",
        provider=provider,
        shape_name=shape,
        variant=variant,
        setup=measure.head_setup,
        call=call,
        nbytes=lambda batch: measure.head_bytes(batch, gradients=True),
    )
