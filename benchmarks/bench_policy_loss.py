"""The objective on log-probs, with its gradient: a dozen numbers per token, so launches are what costs."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from benchmarks.inputs import shapes
from benchmarks.inputs.batches import Batch
from benchmarks.measuring import measure, traffic

CASES = [(shape, "full") for shape in shapes.TOKENS]


def of_log_probs(
    benchmark: Any, stem: str, shape: str, variant: str, provider: str, nbytes: Callable[[int], int]
) -> None:
    """Measure a loss of log-probs with its gradient."""

    def setup(batch: Batch) -> tuple[Any, ...]:
        return batch.logps.requires_grad_(), batch

    def call(fn: Any) -> measure.Call:
        def both(logps: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
            return measure.value_and_grad(
                fn, logps, logps, objective=batch.objective, **batch.arguments
            )

        return both

    measure.measure(
        benchmark,
        stem=stem,
        provider=provider,
        shape_name=shape,
        variant=variant,
        setup=setup,
        call=call,
        nbytes=lambda batch: nbytes(batch.shape.N),
    )


@pytest.mark.parametrize("shape, variant, provider", measure.parameters(CASES, "policy_loss"))
def bench_forward_backward(benchmark: Any, shape: str, variant: str, provider: str) -> None:
    def nbytes(N: int) -> int:
        return traffic.policy_loss(N).least + traffic.policy_loss_backward(N).least

    of_log_probs(benchmark, "policy_loss", shape, variant, provider, nbytes)
