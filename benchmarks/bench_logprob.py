"""Log-probs from logits. Forward: the live logits are read once; with backward, twice, and written once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.inputs import shapes
from benchmarks.inputs.batches import Batch
from benchmarks.measuring import measure, traffic

CASES = [(shape, "full") for shape in shapes.logits_shapes()]
by_case = pytest.mark.parametrize("shape, variant, provider", measure.parameters(CASES, "logprob"))


@by_case
def bench_forward(benchmark: Any, shape: str, variant: str, provider: str) -> None:
    def call(fn: Any) -> measure.Call:
        def forward(logits: Tensor, ids: Tensor) -> tuple[Tensor, None]:
            with torch.no_grad():
                return fn(logits, ids), None

        return forward

    measure.measure(
        benchmark,
        stem="logprob",
        provider=provider,
        shape_name=shape,
        variant=variant,
        setup=lambda batch: (batch.logits, batch.ids),
        call=call,
        nbytes=lambda batch: traffic.logprob_forward(batch.live, *measure.row_of(batch)).least,
        roof="read",
    )


@by_case
def bench_forward_backward(benchmark: Any, shape: str, variant: str, provider: str) -> None:
    def setup(batch: Batch) -> tuple[Any, ...]:
        leaf, logits = measure.logits_setup(batch, provider)
        return leaf, logits, batch.ids, batch.upstream

    def call(fn: Any) -> measure.Call:
        def both(leaf: Tensor, logits: Tensor, ids: Tensor, dlogp: Tensor) -> tuple[Tensor, Tensor]:
            logp = fn(logits, ids)
            return logp, torch.autograd.grad(logp, leaf, dlogp)[0]

        return both

    measure.measure(
        benchmark,
        stem="logprob",
        provider=provider,
        shape_name=shape,
        variant=variant,
        setup=setup,
        call=call,
        nbytes=lambda batch: (
            traffic.logprob(batch.shape.N, batch.live, *measure.row_of(batch)).least
        ),
    )
