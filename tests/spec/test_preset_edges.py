"""Edges of the trainers' losses: denominators of 0, unequal bounds, clamps of single weights."""

import pytest
import torch

from grpo_fast import Objective
from grpo_fast.loss import policy_loss
from tests.support.cases import in_double, loss_and_grad


@pytest.mark.parametrize("low, high", [(0.2, 0.4), (0.4, 0.2)])
def test_gmpos_flags_know_which_bound_is_which(low, high, backend, device):
    """Above `epsilon_high` with A > 0, below -`epsilon_low` with A < 0, of the token's own log-ratio."""
    d = torch.tensor([[0.3, 0.5, 0.1, -0.3], [-0.3, -0.5, -0.1, 0.3]], device=device)
    advantages = torch.tensor([[1.0], [-1.0]], device=device).expand(2, 4)
    logps = torch.full((2, 4), -1.0, device=device)
    objective = Objective.preset("verl/geo_mean", epsilon_low=low, epsilon_high=high)

    def formula(x, advantages, old_logps):
        d, sign = x - old_logps, advantages.sign()
        bounded = sign * torch.minimum(sign * d, sign * d.clamp(-low, high))
        return (-advantages * bounded.mean(1, keepdim=True).exp()).mean()

    arguments = {"advantages": advantages, "old_logps": logps - d}
    loss, grad = loss_and_grad(policy_loss, logps, objective=objective, **arguments)
    want, want_grad = loss_and_grad(formula, logps.double(), **in_double(arguments))
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-5, atol=1e-7)
    metrics = policy_loss(logps, objective=objective, **arguments).metrics
    above, below = (d > high) & (advantages > 0), (d < -low) & (advantages < 0)
    assert above.sum() != below.sum()
    assert metrics["clip_fraction_high"].item() == pytest.approx(above.float().mean().item())
    assert metrics["clip_fraction_low"].item() == pytest.approx(below.float().mean().item())


@pytest.mark.parametrize("name", ["vespo", "trl/vespo"])
def test_vespo_clamps_each_importance_weight(name, backend, device):
    """The clamp to [1e-8, e^20] comes before the sum of logs: a large one does not balance a small one."""
    weights = torch.tensor([[1e-12, 1e12, 1.0], [1e-30, 2.0, 1.0], [3.0, 0.5, 0.0]], device=device)
    logps = torch.full((3, 3), -1.0, device=device)
    old, advantages = logps - 0.1, torch.tensor([1.0, 1.0, -1.0], device=device)

    def phi(log_w, k, rate):
        return (rate + k * log_w - rate * log_w.exp()).exp()

    logs = weights.double().log().clamp(torch.tensor(1e-8).double().log().item(), 20).sum(1) + 0.3
    assert logs[0] > 1  # and not 0.3
    log_w = logs.clamp(torch.tensor(1e-8).double().log().item(), 20)
    up = advantages > 0
    factor = torch.where(up, phi(log_w, 2.0, 3.0), phi(log_w, 3.0, 2.0))
    want = (-factor * advantages.double() * 3 * -1.0).sum() / 9
    loss = policy_loss(
        logps,
        advantages=advantages,
        old_logps=old,
        importance_weights=weights,
        objective=Objective.preset(name),
    ).loss
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-12)
