"""Batches with as many packed sequences as tokens: arguments per sequence and per token are told apart."""

import pytest
import torch

from grpo_fast import Objective, reference, weights
from grpo_fast.loss import grpo_loss, linear_grpo_loss, policy_loss
from tests.support.cases import loss_and_grad

N = 4
ENDS = [0, 2, 2, 3, 4]


def batch(device):
    """(hidden (4, 8), weight, ids, cu_seqlens): four sequences of 2, 0, 1 and 1 tokens."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, 8, device=device), torch.randn(20, 8, device=device)
    ids = torch.randint(20, (N,), device=device)
    return hidden, weight, ids, torch.tensor(ENDS, device=device)


def by_hand(x):
    """One per sequence as one per token."""
    return x[[0, 0, 2, 3]]


def losses(device, objective, ours, theirs, **shared):
    """Loss and gradient with two sets of arguments, by all losses; and by the reference."""
    hidden, weight, ids, cu_seqlens = batch(device)
    shared |= {"objective": objective, "old_logps": torch.full((N,), -3.0, device=device)}

    def linear(x, compact=True, **arguments):
        return linear_grpo_loss(x, weight, ids, compact=compact, **arguments)

    def logits(x, fn=grpo_loss, **arguments):
        return fn(x @ weight.T, ids, **arguments)

    def not_compact(x, **arguments):
        return linear(x, compact=False, **arguments)

    def specified(x, **arguments):
        return logits(x, reference.grpo_loss, **arguments)

    for fn in (linear, not_compact, logits, specified):
        got = loss_and_grad(fn, hidden, **shared, cu_seqlens=cu_seqlens, **ours)
        # The empty sequence counts in no reduction that is used here.
        want = loss_and_grad(fn, hidden, **shared, cu_seqlens=None, **theirs)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("surrogate", ["topr", "clip"])
def test_rewards_are_one_per_sequence(surrogate, backend, device):
    rewards = torch.tensor([1.0, -1.0, -2.0, 3.0], device=device)
    objective = Objective(surrogate=surrogate, reduction="token_mean")
    advantages = reference.group_advantage(rewards, group_size=2)
    theirs = {"advantages": by_hand(advantages)}
    if surrogate == "topr":
        theirs["scores"] = by_hand(rewards)
    losses(device, objective, {"rewards": rewards, "group_size": 2}, theirs)


def test_a_column_is_one_per_sequence(backend, device):
    x = torch.tensor([[1.0], [5.0], [-2.0], [3.0]], device=device)
    ours = {"advantages": x, "importance_weights": x.abs(), "scores": x}
    theirs = {name: by_hand(y[:, 0]) for name, y in ours.items()}
    losses(device, Objective(surrogate="topr", reduction="token_mean"), ours, theirs)


@pytest.mark.parametrize("name", ["advantages", "importance_weights", "scores"])
def test_what_cannot_be_told_is_refused(name, backend, device):
    hidden, weight, ids, cu_seqlens = batch(device)
    x = torch.ones(N, device=device)
    objective = Objective(surrogate="topr")
    arguments = {"advantages": x[:, None], "cu_seqlens": cu_seqlens, "objective": objective}
    arguments[name] = x
    logits = hidden @ weight.T
    message = rf"{name}: \(4,\) may be one per token or one per sequence.*\(4, 1\)"
    with pytest.raises(ValueError, match=message):
        grpo_loss(logits, ids, **arguments)
    with pytest.raises(ValueError, match=message):
        policy_loss(logits[:, 0], **arguments)
    for compact in (True, False):
        with pytest.raises(ValueError, match=message):
            linear_grpo_loss(hidden, weight, ids, compact=compact, **arguments)
    with pytest.raises(ValueError, match="one per token or one per sequence"):
        reference.grpo_loss(logits, ids, **arguments)
    vespo = arguments | {"objective": Objective(surrogate="vespo"), "advantages": x[:, None]}
    vespo = {k: y for k, y in vespo.items() if k != "scores"} | {"importance_weights": x}
    for fn in (grpo_loss, reference.grpo_loss):
        with pytest.raises(ValueError, match="one per token or one per sequence"):
            fn(logits, ids, **vespo)


def test_one_token_each_is_both(backend, device):
    hidden, weight, ids, _ = batch(device)
    x = torch.tensor([1.0, -2.0, 3.0, -4.0], device=device)
    ends = torch.arange(N + 1, device=device)
    found = [
        loss_and_grad(grpo_loss, hidden @ weight.T, ids, advantages=y, cu_seqlens=ends)
        for y in (x, x[:, None])
    ]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_selections_refuse_it_too(device):
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0], device=device)
    ends = torch.tensor(ENDS, device=device)
    A = torch.tensor([1.0, 9.0, -2.0, 3.0], device=device)
    with pytest.raises(ValueError, match=r"kl_cov: advantages: .*one per sequence"):
        weights.kl_cov(logps, A, cu_seqlens=ends)
    with pytest.raises(ValueError, match=r"clip_cov: advantages: .*one per sequence"):
        weights.clip_cov(logps, logps, A, cu_seqlens=ends)
    found = weights.kl_cov(logps, A[:, None], cu_seqlens=ends, fraction=0.5)
    want = weights.kl_cov(logps, by_hand(A), fraction=0.5)
    torch.testing.assert_close(found, want, rtol=0, atol=0)


def test_padded_columns(backend, device):
    """(B, 1) is one per sequence for everything that may be."""
    logps = -torch.rand(3, 2, device=device)
    A = torch.tensor([1.0, -2.0, 3.0], device=device)
    found = [loss_and_grad(policy_loss, logps, advantages=y) for y in (A, A[:, None])]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    theirs = reference.policy_loss(logps, advantages=A[:, None])
    torch.testing.assert_close(found[0][0], theirs)
