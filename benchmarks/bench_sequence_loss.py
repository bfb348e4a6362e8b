"""The objective on log-probs where the ratio is a sequence's (GSPO), with its gradient."""

from typing import Any

import pytest

from benchmarks import measure, shapes
from benchmarks.bench_policy_loss import BYTES_PER_TOKEN, of_log_probs

CASES = [(shape, shapes.SEQUENCE_VARIANT) for shape in shapes.TOKENS]
# More than `policy_loss`: logp and old again for the sums; for the gradient through the mean dlogp is read
# and written once more.
BYTES_OF_A_SEQUENCE = BYTES_PER_TOKEN + 4 * 4


@pytest.mark.parametrize("shape, variant, provider", measure.parameters(CASES, "sequence_loss"))
def bench_forward_backward(benchmark: Any, shape: str, variant: str, provider: str) -> None:
    of_log_probs(benchmark, "sequence_loss", shape, variant, provider, BYTES_OF_A_SEQUENCE)
