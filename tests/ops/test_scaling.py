"""Gradients times an upstream gradient: rows of logits in place, and hidden states."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from grpo_fast.kernels import scaling
from tests.support.cases import held

FACTORS = [1.0, 0.5, -3.0, 0.0, math.inf, 1.0, math.nan, 1.5]


# Nothing but edges, units, a tile and edges; several programs per row.
@pytest.mark.parametrize("V", [3, 24, 1031, 33_003])
@pytest.mark.parametrize("many", [False, True], ids=["", "many rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scale_rows(dtype, many, V, monkeypatch, device):
    """Zeros stay zeros, whatever the factor, and nothing is written beside the rows."""
    monkeypatch.setattr(scaling, "MANY_ROWS", 8 if many else 9)
    x = torch.randn(2, 4, V, device=device).to(dtype)
    x[:, :, ::3] = 0
    factor = torch.tensor(FACTORS, device=device).repeat_interleave(2)[::2]  # of stride 2
    want = torch.where(x == 0, 0, x * factor.view(2, 4, 1)).to(dtype)
    for before, gap in ((0, 0), (5, 3)):
        got = held(x, before, gap)
        scaling.scale_rows(factor, got)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_no_rows(device):
    scaling.scale_rows(torch.ones(0, device=device), torch.ones(1, 0, 9, device=device))
