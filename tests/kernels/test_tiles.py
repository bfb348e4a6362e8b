"""The maths of `kernels/tiles.py` by itself, on numbers that no batch of logits would pick."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

import triton
import triton.language as tl

from grpo_fast.kernels import tiles


@triton.jit
def log2_1p_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tiles.log2_1p(tl.load(x_ptr + offs)))


def test_log2_1p_of_triton_is_accurate_for_small_and_large_numbers(device):
    """A confident token's log-prob is this of what the others hold: 3 units in the last place."""
    small = torch.logspace(-38, -2, 500)
    x = torch.cat([small, torch.linspace(0.01, 0.26, 500), torch.logspace(-0.5, 5, 24)])
    x = x.to(device)
    found = torch.empty_like(x)
    log2_1p_kernel[(1,)](x, found, BLOCK=len(x))
    want = x.double().log1p() / torch.tensor(2.0, dtype=torch.float64).log()
    error = ((found - want) / want).abs().max()
    assert error <= 3 * 2.0**-23
