"""The objective on log-probs, with its gradient: a dozen numbers per token, so launches are what costs."""

from typing import Any

import pytest
from torch import Tensor

from benchmarks import measure, shapes
from benchmarks.inputs import Batch

CASES = [(shape, "full") for shape in shapes.TOKENS]
# Forward: logp, weight, advantage, old, ref read; loss, dlogp, kl, clip flag written. Backward: the
# upstream gradient and dlogp read, their product written.
BYTES_PER_TOKEN = 5 * 4 + 3 * 4 + 1 + 3 * 4


def of_log_probs(
    benchmark: Any, stem: str, shape: str, variant: str, provider: str, bytes_per_token: int
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
        nbytes=lambda batch: bytes_per_token * batch.shape.N,
    )


@pytest.mark.parametrize("shape, variant, provider", measure.parameters(CASES, "policy_loss"))
def bench_forward_backward(benchmark: Any, shape: str, variant: str, provider: str) -> None:
    of_log_probs(benchmark, "policy_loss", shape, variant, provider, BYTES_PER_TOKEN)
