"""No kernel leaves its tensors: every address of awkward launches of all kernels, in the interpreter.

`python -m benchmarks.run.bounds` makes the same launches on a GPU, where a sanitizer can watch them.
"""

import ast
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from benchmarks.run import bounds, launch_inputs, launches_of_tokens
from grpo_fast.kernels import group_advantage, scaling, sequence_loss
from grpo_fast.records import Sequences
from tests.support.guards import OutOfBoundsError, watched

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="looks at the interpreter's addresses"
)

FOLDER = Path(__file__).resolve().parents[2] / "kernels"


def launched(path):
    """The names of the kernels that a file launches: `kernel[grid](...)`."""
    calls = [x.func for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.Call)]
    return {
        x.value.id for x in calls if isinstance(x, ast.Subscript) and isinstance(x.value, ast.Name)
    }


def test_every_kernel_has_launches():
    found = set().union(*map(launched, FOLDER.glob("*.py")))
    assert "_grpo_kernel" in found
    assert found == set(bounds.KERNELS)


@pytest.mark.parametrize("kernel", bounds.KERNELS)
def test_every_access_is_within_the_tensors(kernel, monkeypatch):
    """Of all launches of a kernel; a new kernel needs launches in `bounds.KERNELS`."""
    monkeypatch.setattr(group_advantage, "MAX_BLOCK", 16)  # as many programs as rewards
    monkeypatch.setattr(scaling, "MANY_ROWS", 8)
    launches = list(bounds.KERNELS[kernel]())
    assert launches or kernel == "_on_chip_kernel"  # which some versions of Triton cannot run
    for case, launch in launches:
        with watched() as watch:
            try:
                launch()
            except OutOfBoundsError as error:
                raise OutOfBoundsError(f"{case}: {error}") from None
        assert kernel in watch.kernels, case


def test_tokens_of_no_sequence_get_results_too():
    """Where boundaries are wrong, their weights are NaN. Flags that nobody wrote would not be 0 in tests."""
    N, GSPO = 6, launches_of_tokens.GSPO
    sequences = Sequences(torch.tensor([2, 4]), 0)
    given = launch_inputs.tokens(N, extras=False)._replace(weight=torch.full((N,), torch.nan))
    given.weight[2:4] = 1.0
    out = sequence_loss.sequence_loss_fwd(torch.zeros(N), None, given, sequences, GSPO)
    assert out.loss.isnan().tolist() == [True, True, False, False, True, True]
    assert out.clip.eq(0).all()
