"""Ids outside the vocabulary, where a check would be a host sync: NaN, never the number of another entry."""

import pytest
import torch

pytest.importorskip("triton", reason="PyTorch's operators raise an error of their own")

from grpo_fast import Objective, checks
from grpo_fast.loss import grpo_loss, linear_grpo_loss
from grpo_fast.ops import linear_logprob, logprob
from grpo_fast.ops.head.vocab_parallel import combine

OUTSIDE = [-100, -1, "V", "V + 7", 2**31 - 1, 2**32, 2**32 + 1, -(2**32)]
SIZES = [100, 5000, 40_000]  # one tile, several, shared by several programs


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """As on a GPU: values are not looked at, and the kernels run."""
    monkeypatch.setenv("GRPO_FAST_BACKEND", "triton")
    monkeypatch.setattr(checks, "check_values", lambda x: False)


def batch(V, bad, device):
    """(logits (2, 3, V), ids without and with one that is outside), the last row of it."""
    logits = torch.randn(2, 3, V, device=device)
    ids = torch.randint(V, (2, 3), device=device)
    wrong = ids.clone()
    wrong[1, 2] = {"V": V, "V + 7": V + 7}.get(bad, bad)
    return logits, ids, wrong


def same_but_the_last(actual, expected):
    a, b = actual.flatten(), expected.flatten()
    torch.testing.assert_close(a[:-1], b[:-1], rtol=0, atol=0)
    assert a[-1].isnan()


@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("bad", OUTSIDE)
def test_from_logits(V, bad, device):
    logits, ids, wrong = batch(V, bad, device)
    same_but_the_last(logprob(logits, wrong), logprob(logits, ids))
    out = logprob(logits, wrong, return_entropy=True)
    want = logprob(logits, ids, return_entropy=True)
    for a, b in zip(out, want, strict=True):
        same_but_the_last(a, b)
    rewards = torch.tensor([0.0, 1.0], device=device)
    given = {"rewards": rewards, "group_size": 2, "objective": Objective(beta=0.1)}
    given["ref_logps"] = torch.full((2, 3), -3.0, device=device)
    grads = []
    for x in (wrong, ids):
        leaf = logits.clone().requires_grad_()
        loss = grpo_loss(leaf, x, **given)
        grads.append(torch.autograd.grad(loss.loss, leaf)[0])
        assert loss.loss.isnan() == (x is wrong)
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=0, atol=0)


@pytest.mark.parametrize("bad", OUTSIDE)
def test_a_masked_id_is_not_read(bad, device):
    logits, ids, wrong = batch(40_000, bad, device)
    mask = wrong == ids
    given = {"advantages": torch.ones(2, device=device), "mask": mask}
    a, b = (grpo_loss(logits, x, **given) for x in (wrong, ids))
    torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=0)
    assert a.logps.isfinite().all()


@pytest.mark.parametrize("bad", OUTSIDE)
def test_from_hidden_states(bad, device):
    V = 5000
    _, ids, wrong = batch(V, bad, device)
    hidden = torch.randn(2, 3, 16, device=device)
    weight = torch.randn(V, 16, device=device, requires_grad=True)
    same_but_the_last(
        linear_logprob(hidden, weight, wrong).detach(),
        linear_logprob(hidden, weight, ids).detach(),
    )
    out = linear_grpo_loss(hidden, weight, wrong, advantages=torch.ones(2, device=device))
    assert out.loss.isnan()


def test_an_id_that_no_process_has():
    gathered = torch.zeros(2, 3, 4)  # two processes, three tokens: top, total, entropy, log-prob
    gathered[:, :, 1] = 1.0
    gathered[:, :, 3] = torch.tensor([[-1.0, 1.0, 1.0], [1.0, -2.0, 1.0]])
    logp = combine(gathered, 1.0, False)[0]
    assert logp[:2].lt(0).all()
    assert logp[2].isnan()
