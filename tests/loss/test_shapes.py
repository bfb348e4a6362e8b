"""One value per sequence as (B,) or (B, 1), groups of one, and masks that are made for something else."""

import inspect

import pytest
import torch

from grpo_fast import Objective, checks, weights
from grpo_fast.diagnostics import token_diagnostics
from grpo_fast.loss import grpo_loss, linear_grpo_loss, policy_loss
from grpo_fast.ops import group_advantage, linear_logprob, logprob

B, T, D, V = 4, 3, 5, 11
TOPR = Objective(surrogate="topr")
R = torch.tensor([0.0, 1.0, 2.0, 4.0])
LOGPS = -torch.rand(B, T, generator=torch.Generator().manual_seed(0))
CU = torch.tensor([0, 2, 2, 7, B * T])


def of(function, packed=False):
    """The positional arguments of a loss."""
    torch.manual_seed(1)
    ids = torch.randint(V, (B, T))
    given = {
        grpo_loss: (torch.randn(B, T, V), ids),
        linear_grpo_loss: (torch.randn(B, T, D), torch.randn(V, D), ids),
        policy_loss: (LOGPS,),
    }[function]
    if not packed:
        return given
    flat = [x.flatten(0, 1) if x.shape[:2] == (B, T) else x for x in given]
    return tuple(flat)


PER_SEQUENCE = ["advantages", "importance_weights", "scores", "rewards"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", PER_SEQUENCE)
@pytest.mark.parametrize("function", [grpo_loss, linear_grpo_loss, policy_loss])
def test_a_column_is_one_value_per_sequence(function, name, packed):
    if name not in inspect.signature(function).parameters:
        pytest.skip("no such argument")
    given = {"advantages": R - 1.5, "objective": TOPR, "old_logps": LOGPS, name: R}
    if name == "rewards":
        given |= {"advantages": None, "group_size": 2}
    if packed:
        given |= {"cu_seqlens": CU, "old_logps": LOGPS.flatten()}
    want = function(*of(function, packed), **given)
    got = function(*of(function, packed), **given | {name: R[:, None]})
    torch.testing.assert_close(got.loss, want.loss, rtol=0, atol=0)
    assert want.loss != 0


def test_a_column_elsewhere():
    flat, column = R, R[:, None]
    for function in (weights.varied_groups, group_advantage):
        want = function(flat, group_size=2)
        torch.testing.assert_close(function(column, group_size=2), want)
        labels = torch.tensor([0, 1, 0, 1])
        want = function(flat, group_ids=labels)
        torch.testing.assert_close(function(column, group_ids=labels[:, None]), want)
    for function in (
        lambda A: weights.kl_cov(LOGPS, A, fraction=0.3),
        lambda A: weights.clip_cov(LOGPS, LOGPS, A, low=-9, fraction=1.0),
        lambda A: token_diagnostics(LOGPS, LOGPS - 0.1, A).loss,
    ):
        torch.testing.assert_close(function(column), function(flat))
        torch.testing.assert_close(function(column), function(column.expand(B, T)))
    packed = (LOGPS.flatten(), LOGPS.flatten() - 0.1)
    for A in (flat, column):
        found = token_diagnostics(*packed, A, cu_seqlens=CU).loss
        want = token_diagnostics(*packed, flat.repeat_interleave(CU.diff()), cu_seqlens=CU).loss
        torch.testing.assert_close(found, want)


def test_what_is_per_token_says_how_to_spread():
    for name in ("token_weights", "temperature"):
        for x in (R + 1, R[:, None] + 1):
            with pytest.raises(ValueError, match=rf"{name}: want \(4, 3\).*expand\(4, 3\)"):
                grpo_loss(*of(grpo_loss), advantages=R, **{name: x})


@pytest.mark.parametrize("function", [grpo_loss, linear_grpo_loss])
def test_a_group_of_one_is_refused(function):
    with pytest.raises(
        ValueError, match=rf"{function.__name__}: group_size=1 .*advantages=rewards"
    ):
        function(*of(function), rewards=R, group_size=1)
    with pytest.raises(ValueError, match="varied_groups: group_size=1 leaves every reward alone"):
        weights.varied_groups(R, group_size=1)


ADDITIVE = {"-inf": -torch.inf, "the lowest float": torch.finfo().min, "-1": -1.0}
MASKED = {
    "grpo_loss": lambda m: grpo_loss(*of(grpo_loss), advantages=R, mask=m).loss,
    "linear_grpo_loss": lambda m: (
        linear_grpo_loss(*of(linear_grpo_loss), advantages=R, mask=m, compact=False).loss
    ),
    "policy_loss": lambda m: policy_loss(LOGPS, advantages=R, mask=m).loss,
    "logprob": lambda m: logprob(*of(grpo_loss), mask=m),
    "linear_logprob": lambda m: linear_logprob(*of(linear_grpo_loss), mask=m),
    "token_diagnostics": lambda m: token_diagnostics(LOGPS, LOGPS, R, mask=m),
    "importance_weights": lambda m: weights.importance_weights(LOGPS, LOGPS, mask=m),
    "top_entropy": lambda m: weights.top_entropy(-LOGPS, 0.5, mask=m),
}


@pytest.mark.parametrize("value", ADDITIVE.values(), ids=ADDITIVE)
@pytest.mark.parametrize("name", MASKED)
def test_additive_masks_are_refused(name, value):
    mask = torch.zeros(B, T)
    mask[1, 2] = mask[3] = value
    with pytest.raises(ValueError, match=rf"{name}: mask: .* at \(1, 2\).*additive.*mask == 0"):
        MASKED[name](mask)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "sequence_sum"])
@pytest.mark.parametrize("value", ADDITIVE.values(), ids=ADDITIVE)
def test_where_nobody_looks_an_additive_mask_gives_nan(value, reduction, backend, monkeypatch):
    """Nobody looks at values on a GPU, where this would be a host sync."""
    monkeypatch.setattr(checks, "check_values", lambda x: False)
    mask = torch.zeros(B, T)
    mask[1, 2] = value
    given = {"advantages": R, "mask": mask, "objective": Objective(reduction=reduction)}
    for function in (grpo_loss, policy_loss):
        assert function(*of(function), **given).loss.isnan()


MASKS = {
    "4-D": (torch.zeros(B, 1, 1, T), "a mask of the attention.*one entry per scored token"),
    "with prompts": (torch.ones(B, 7 + T), r"pass mask\[:, -3:\], the completions' part"),
    "per sequence": (torch.ones(B), r"pass mask\[:, None\].expand\(4, 3\)"),
    "a column": (torch.ones(B, 1), r"pass mask.expand\(4, 3\)"),
}


@pytest.mark.parametrize(("mask", "hint"), MASKS.values(), ids=MASKS)
def test_masks_of_another_shape(mask, hint):
    for name in ("grpo_loss", "logprob", "token_diagnostics"):
        with pytest.raises(ValueError, match=rf"{name}: mask: want \(4, 3\), got .*{hint}"):
            MASKED[name](mask)
    with pytest.raises(ValueError, match=r"mask: want \(12,\), got \(4, 3\); pass mask.flatten"):
        policy_loss(LOGPS.flatten(), advantages=R[:1], mask=torch.ones(B, T))


def test_logits_of_the_prompts_too_are_told_what_to_leave_out():
    logits, ids = torch.zeros(2, 9, 7), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"logits\[:, -5:-1\].*logits_to_keep=4"):
        grpo_loss(logits, ids, advantages=torch.ones(2))
