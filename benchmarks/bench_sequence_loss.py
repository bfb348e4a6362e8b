"""The objective on log-probs where the ratio is a sequence's (GSPO), with its gradient."""

from typing import Any

import pytest

from benchmarks.bench_policy_loss import of_log_probs
from benchmarks.inputs import shapes
from benchmarks.measuring import measure, traffic

CASES = [(shape, shapes.SEQUENCE_VARIANT) for shape in shapes.TOKENS]


@pytest.mark.parametrize("shape, variant, provider", measure.parameters(CASES, "sequence_loss"))
def bench_forward_backward(benchmark: Any, shape: str, variant: str, provider: str) -> None:
    def nbytes(N: int) -> int:
        return traffic.sequence_loss(N).most + traffic.policy_loss_backward(N).least

    of_log_probs(benchmark, "sequence_loss", shape, variant, provider, nbytes)
