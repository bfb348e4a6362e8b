"""The fused head where it is used unusually: no tokens at all."""

import pytest
import torch

from grpo_fast import Objective
from grpo_fast.loss import linear_grpo_loss

B, T, D, V = 3, 4, 8, 20
GSPO = Objective(ratio="sequence")


@pytest.mark.parametrize("shape", [(0, T), (B, 0), (0,)], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("objective", [Objective(), GSPO], ids=["token", "sequence"])
def test_no_tokens_at_all(objective, frozen, shape, backend, device):
    hidden = torch.empty(*shape, D, device=device, requires_grad=True)
    weight = torch.randn(V, D, device=device, requires_grad=not frozen)
    ids = torch.empty(shape, dtype=torch.int64, device=device)
    old = torch.empty(shape, device=device)
    advantages = torch.ones(shape[0] if len(shape) > 1 else 1, device=device)
    leaves = [hidden] if frozen else [hidden, weight]
    for compact in (True, False):
        given = {"old_logps": old, "objective": objective, "compact": compact}
        out = linear_grpo_loss(hidden, weight, ids, advantages=advantages, **given)
        assert out.loss == 0
        assert all(g.eq(0).all() for g in torch.autograd.grad(out.loss, leaves))
