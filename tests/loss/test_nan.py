"""A NaN that decides a comparison reaches the result: a missing number is never hidden."""

import sys

import pytest
import torch

from grpo_fast import Objective, reference, weights
from grpo_fast.diagnostics import token_diagnostics
from grpo_fast.loss import grpo_loss, policy_loss
from grpo_fast.metrics import STATISTICS
from grpo_fast.ops.policy_loss import token_statistics
from grpo_fast.records import Outputs
from tests.support.cases import batch, loss_and_grad
from tests.support.objectives import by_objective


def arguments_of(objective, device):
    """(log-probs (2, 4), arguments), every advantage other than 0, every token live."""
    torch.manual_seed(3)
    logps = -torch.rand(2, 4, device=device) - 0.5
    arguments = {
        "advantages": torch.tensor(
            [[1.0, 0.5, -1.0, 2.0], [-1.0, -0.5, -2.0, -0.5]], device=device
        ),
        "old_logps": logps + 0.02,
        "ref_logps": logps - 0.1,
        "importance_weights": torch.rand(2, 4, device=device) + 0.5,
        "objective": objective,
    }
    if objective.needs_entropy:
        # The token that is missing is among the chosen ones.
        arguments["entropy"] = torch.tensor(
            [[2.0, 1.0, 1.0, 1.0], [2.0, 1.0, 1.0, 1.0]], device=device
        )
    if objective.surrogate == "topr":
        arguments["scores"] = torch.tensor([1.0, -1.0], device=device)
    return logps, arguments


def losses(logps, arguments):
    ours = policy_loss(logps, **arguments)
    doubled = {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}
    return ours.loss, reference.policy_loss(logps.double(), **doubled)


def depends_on_old(objective, device):
    """Whether the specification has another loss with other old log-probs."""
    logps, arguments = arguments_of(objective, device)
    moved = arguments | {"old_logps": arguments["old_logps"] - 0.5}
    return losses(logps, arguments)[1] != losses(logps, moved)[1]


NAMES = ("old_logps", "ref_logps", "advantages", "importance_weights", "scores", "entropy")


@by_objective
def test_a_missing_number_makes_the_loss_nan(objective, backend, device):
    unused = {
        "ref_logps": not objective.beta,
        "entropy": not objective.needs_entropy,
        "scores": objective.surrogate != "topr",
        "old_logps": not depends_on_old(objective, device),
    }
    for name in NAMES:
        if not unused.get(name):
            check_missing(name, objective, device)


def check_missing(name, objective, device):
    # The second one's tokens are pushed down: off policy they may be dropped, whatever their weights.
    for place in ((0, 0), (1, 0))[: 1 if name == "importance_weights" else 2]:
        logps, arguments = arguments_of(objective, device)
        assert all(x.isfinite() for x in losses(logps, arguments))
        if name == "scores":
            arguments["scores"][place[0]] = torch.nan
        else:
            arguments[name][place] = torch.nan
        if name == "old_logps" and objective.surrogate == "topr" and place == (0, 0):
            continue  # a good sequence's weight is a constant
        ours, theirs = losses(logps, arguments)
        assert ours.isnan(), (name, place, ours)
        assert theirs.isnan(), (name, place, theirs)


@by_objective
def test_a_missing_log_prob_makes_loss_and_gradient_nan(objective, backend, device):
    logps, arguments = arguments_of(objective, device)
    logps[1, 0] = torch.nan
    loss, grad = loss_and_grad(policy_loss, logps, **arguments)
    assert loss.isnan()
    if objective.surrogate in ("clip", "sapo", "gmpo", "dro", "ipo"):
        assert grad[1, 0].isnan()


@by_objective
def test_a_nan_among_the_logits_makes_the_loss_nan(objective, backend, device):
    logits, ids, arguments = batch(3, 4, 20, device, garbage=False)
    arguments |= {"mask": None, "objective": objective, "advantages": torch.ones(3, device=device)}
    if objective.surrogate in ("vespo", "gmpo") or objective.ratio != "token":
        arguments["importance_weights"] = torch.ones(3, 1, device=device)
    logits[1, 2, 7] = torch.nan
    for with_grad in (True, False):
        assert grpo_loss(logits.requires_grad_(with_grad), ids, **arguments).loss.isnan()
    assert reference.grpo_loss(logits, ids, **arguments).isnan()


@pytest.mark.parametrize("above", [1e-7, 1e-6, 1e-4])
@pytest.mark.parametrize("dppo_value", ["logp", "ratio"])
def test_a_log_prob_just_above_0_is_kept(above, dppo_value, backend, device):
    """Inference engines round: verl and SkyRL compare so that a NaN divergence keeps the token."""
    objective = Objective(surrogate="dppo_kl", reduction="sequence_sum", dppo_value=dppo_value)
    old = torch.full((1, 1), above, device=device)
    for A in (1.0, -1.0):
        for logp in (-1e-4, 0.0, above):
            x = torch.full((1, 1), logp, device=device)
            arguments = {"advantages": torch.tensor([A], device=device), "old_logps": old}
            loss, grad = loss_and_grad(policy_loss, x, **arguments, objective=objective)
            assert grad.item() == pytest.approx(-A, abs=1e-3)
            assert loss.isfinite()
            wide = {k: y.double() for k, y in arguments.items()}
            want = loss_and_grad(reference.policy_loss, x.double(), **wide, objective=objective)
            assert want[1].item() == pytest.approx(grad.item(), abs=1e-6)


def test_divergences_of_confident_tokens(backend, device):
    """1 - p of a token whose probability rounds to 1 in float32: the divergence is not rounding noise."""
    old = torch.tensor([[-1e-8, -1e-7, -1e-9, -2e-8]], device=device)
    logps = torch.tensor([[-2e-3, -1e-8, -3e-8, -1e-8]], device=device)
    for threshold in (1e-9, 1e-8, 1e-7, 1e-3):
        objective = Objective(surrogate="dppo_kl", epsilon_low=threshold, epsilon_high=threshold)
        for A in (1.0, -1.0):
            arguments = {"advantages": torch.tensor([A], device=device), "old_logps": old}
            grad = loss_and_grad(policy_loss, logps, **arguments, objective=objective)[1]
            wide = {k: y.double() for k, y in arguments.items()}
            want = loss_and_grad(
                reference.policy_loss, logps.double(), **wide, objective=objective
            )[1]
            torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-7)


def test_extremes_of_ratios_with_a_nan(backend, device):
    N = 2500
    d = 0.1 * torch.randn(N, device=device)
    d[1700] = torch.nan
    zeros, clip = torch.zeros(N, device=device), torch.zeros(N, dtype=torch.int8, device=device)
    outputs = Outputs(zeros, d, None, None, clip)
    found, *_ = token_statistics(outputs, None, None, zeros, None)
    found = dict(zip(STATISTICS, found.tolist(), strict=True))
    for name in ("ratio", "k1", "k3", "ratio_min", "ratio_max"):
        assert found[name] != found[name], name


def test_diagnostics_show_the_nan_that_decides(device):
    """The diagnostics are NaN in the whole sequence if the NaN decides whether its tokens are dropped."""
    logps = torch.full((2, 3), -1.0, device=device)
    old = logps + 0.1
    old[0, 1] = torch.nan
    objective = Objective(surrogate="reinforce", off_policy_threshold=0.05)
    A = torch.tensor([[-1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]], device=device)
    found = token_diagnostics(logps, old, A, objective=objective)
    assert found.loss.isnan().tolist() == [[True, True, False], [False, False, False]]
    assert found.dropped.tolist() == [[False] * 3, [True, True, False]]


def test_weights_by_entropy_show_a_nan(device):
    entropy = torch.tensor([[1.0, torch.nan, 3.0, 2.0]], device=device)
    found = weights.top_entropy(entropy, 0.5)
    assert found.isnan().tolist() == [[False, True, False, False]]
    mask = torch.tensor([[1, 0, 1, 1]], device=device)
    assert weights.top_entropy(entropy, 0.5, mask=mask).tolist() == [[0, 0, 1, 1]]


def test_kpop_takes_a_log_prob_just_above_0_for_0(device):
    old = torch.tensor([1e-6, -1e-3, 1e-6, 1e-6], device=device)
    sampled = torch.tensor([-1e-4, 1e-6, 2e-6, -1.0], device=device)
    assert weights.kpop(old, sampled, 0.1).tolist() == [1, 1, 1, 0]


def test_groups_with_a_nan_that_nobody_looked_for(device, monkeypatch):
    """Nobody looks at values on a GPU: a missing reward must not count as an equal one."""
    # By name: `grpo_fast.ops` has a function of the module's name.
    module = sys.modules["grpo_fast.ops.group_advantage"]
    monkeypatch.setattr(module, "check_values", lambda x: False)
    rewards = torch.tensor([1.0, torch.nan, 2.0, 3.0, 4.0, 4.0], device=device)
    found = weights.varied_groups(rewards, group_size=2)
    assert found.isnan().tolist() == [True, True, False, False, False, False]
    assert found[2:].tolist() == [1, 1, 0, 0]
    skipped = weights.varied_groups(rewards, group_size=2, nan="skip")
    assert skipped.tolist() == [0, 0, 1, 1, 0, 0]
