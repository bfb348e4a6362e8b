"""Rows of hidden states into a chunk, and of their gradient out of one, in one launch."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from grpo_fast.kernels import chunks
from grpo_fast.ops.backend import run
from grpo_fast.records import Incoming, Outgoing

C, N = 5, 9
ROWS = [7, 0, 3, 8]


@pytest.mark.parametrize("D", [7, chunks.BLOCK + 3])
@pytest.mark.parametrize("indexed", [False, True], ids=["first rows", "indexed"])
@pytest.mark.parametrize("masked", [False, True], ids=["all live", "masked"])
@pytest.mark.parametrize("ways", ["in", "out", "in and out"])
def test_move_rows(ways, masked, indexed, D, backend, device):
    """n_out = 3, n_in = 4; what counts for nothing holds NaN, in rows that are live elsewhere."""
    stage, old = torch.randn(C, D, device=device), torch.randn(N, D, device=device)
    hidden = torch.randn(D, 2 * N, device=device).half().T[::2]  # no stride is 1
    rows = torch.tensor(ROWS, device=device) if indexed else None
    live = torch.tensor([True, False, True, True], device=device) if masked else None
    index = torch.tensor(ROWS if indexed else range(4), device=device)
    want_h = torch.zeros(C, D, device=device)
    want_h[:4] = hidden[index].float()
    if masked:
        want_h[1] = 0
        hidden[index[1]] = torch.nan
    want_dhidden = old.half()
    want_dhidden[index[:3]] = stage[:3].half()
    dhidden, h = old.half(), torch.full((C, D), torch.nan, device=device)
    to = None if rows is None else rows[:3]
    outgoing = Outgoing(stage, dhidden, to, 3) if "out" in ways else None
    incoming = Incoming(hidden, rows, live, 4, h) if "in" in ways else None
    run("chunks.move_rows", hidden, outgoing, incoming)
    if "out" in ways:
        torch.testing.assert_close(dhidden, want_dhidden, rtol=0, atol=0)
    if "in" in ways:
        torch.testing.assert_close(h, want_h, rtol=0, atol=0)
