"""Advantages of rewards that differ in their last bits, or by more than float32 can square."""

import math

import mpmath
import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.loss import grpo_loss, linear_grpo_loss
from grpo_fast.ops import group_advantage
from grpo_fast.ops.group_advantage import group_advantage_fwd
from grpo_fast.records import Grouping, Standardization
from tests.support.cases import loss_and_grad


def up(x, times=1):
    for _ in range(times):
        x = torch.nextafter(x, torch.tensor(math.inf, dtype=x.dtype))
    return x


def nearly_equal(dtype):
    """Groups of 8 that differ in their last bits."""
    x = torch.tensor(3333.3, dtype=dtype)
    y = torch.tensor(-1e-3, dtype=dtype)
    z = torch.tensor(123456.7, dtype=dtype)
    groups = [
        [x] * 7 + [up(x)],
        [up(y, i % 3) for i in range(8)],
        [z, up(z), up(z, 5)] + [up(z, 2)] * 5,
    ]
    return torch.stack([torch.stack(group) for group in groups]).flatten()


def far_apart(dtype):
    """Groups of 8 whose squares overflow, or vanish."""
    largest = torch.finfo(dtype).max / (64 if dtype == torch.float64 else 1)
    values = [
        [0.0] * 7 + [largest / 2],
        [-largest, largest] * 4,
        [1e-30 * i for i in range(8)],
        [largest * (i / 32) for i in range(8)],
    ]
    return torch.tensor(values, dtype=dtype).flatten()


def exact(rewards, size, scale, baseline, eps):
    """Compute the advantages with 60 digits."""
    values = [mpmath.mpf(float(x)) for x in rewards]
    found = []

    def deviation(group):
        mean = sum(group) / len(group)
        return mpmath.sqrt(sum((x - mean) ** 2 for x in group) / (len(group) - 1))

    for i in range(0, len(values), size):
        group = values[i : i + size]
        for x in group:
            base = sum(group) / size
            if baseline == "leave_one_out":
                base = (sum(group) - x) / (size - 1)
            std = {"group": group, "batch": values}.get(scale)
            found.append((x - base) / (1 if std is None else deviation(std) + eps))
    return found


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", [nearly_equal, far_apart])
@pytest.mark.parametrize("labels", [False, True])
def test_against_60_digits(labels, make, dtype, scale, baseline, backend, device):
    rewards = make(dtype).to(device)
    options = {"scale": scale, "baseline": baseline, "eps": 1e-9 if scale == "group" else 1e-4}
    if labels:
        group = {"group_ids": torch.arange(len(rewards), device=device) // 8}
    else:
        group = {"group_size": 8}
    ours = group_advantage(rewards, **options, **group)
    theirs = reference.group_advantage(rewards, **options, **group)
    with mpmath.workdps(60):
        want = exact(rewards, 8, **options)
        for i, x in enumerate(want):
            spread = max(abs(y) for y in want[i // 8 * 8 : i // 8 * 8 + 8])
            for found, rounding in ((ours, 3e-6), (theirs, 3e-6)):
                if abs(x) > torch.finfo(found.dtype).max:
                    assert abs(found[i].item()) == math.inf
                else:
                    assert abs(found[i].item() - x) <= rounding * spread + 1e-44, (i, float(x))


def test_large_integers_are_centred_before_they_are_rounded(backend, device):
    rewards = torch.tensor([10**9, 10**9 + 1, 10**9, 10**9 + 1], device=device)
    want = torch.tensor([-0.5, 0.5, -0.5, 0.5], device=device)
    torch.testing.assert_close(group_advantage(rewards, group_size=2, scale="none"), want)
    torch.testing.assert_close(group_advantage(rewards.double(), group_size=2, scale="none"), want)
    found = group_advantage(rewards, group_size=2)
    torch.testing.assert_close(found, want / (0.5**0.5 + 1e-4))


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_several_rewards_beside_a_large_one(dtype, aggregation, backend, device):
    """A large constant reward takes nothing from the others."""
    small = torch.tensor([0.0, 0.25, 0.5, 1.0, 1.0, 0.0], dtype=dtype, device=device)
    rewards = torch.stack([torch.full_like(small, 1e7), small], 1)
    options = {"group_size": 3, "aggregation": aggregation}
    found = group_advantage(rewards, **options)
    want = group_advantage(torch.stack([torch.zeros_like(small), small], 1), **options)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    weights = torch.tensor([1.0, 0.1], dtype=torch.float64, device=device)
    found = group_advantage(rewards, weights=weights, **options)
    theirs = reference.group_advantage(rewards.double(), weights=weights, **options)
    torch.testing.assert_close(found, theirs.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("fused", ["logits", "hidden states", "sequences"])
def test_rewards_of_a_loss(fused, dtype, backend, device):
    """The launch scores them as `group_advantage` does, and so does `reference`."""
    rewards = nearly_equal(torch.float32).to(device)[:8]
    if dtype == torch.float64:
        rewards = nearly_equal(torch.float64).to(device)[:8]
    elif dtype == torch.int64:
        rewards = torch.tensor([2**40 + i % 3 for i in range(8)], device=device)
    hidden, weight = torch.randn(8, 3, 16, device=device), torch.randn(40, 16, device=device)
    ids = torch.randint(40, (8, 3), device=device)
    objective = Objective(ratio="sequence") if fused == "sequences" else Objective()
    arguments = {"objective": objective, "old_logps": torch.full((8, 3), -3.0, device=device)}

    def loss(x, **given):
        if fused == "hidden states":
            return linear_grpo_loss(x, weight, ids, **given)
        return grpo_loss(x, ids, **given)

    x = hidden if fused == "hidden states" else hidden @ weight.T
    found = loss_and_grad(loss, x, rewards=rewards, group_size=8, **arguments)
    advantages = group_advantage(rewards, group_size=8)
    assert advantages.abs().max() > 0.01 or dtype != torch.int64
    want = loss_and_grad(loss, x, advantages=advantages, **arguments)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
    logits = (hidden @ weight.T).double()
    wide = arguments | {"old_logps": arguments["old_logps"].double()}
    theirs = reference.grpo_loss(logits, ids, rewards=rewards, group_size=8, **wide)
    torch.testing.assert_close(found[0].double(), theirs, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_nan_among_equal_rewards_comes_out(scale, backend, device):
    """Nobody looks at values on a GPU: its group must not count as one of equal rewards."""
    rewards = torch.tensor([1.0, torch.nan, 1.0, 1.0, 2.0, 3.0], device=device)
    found = group_advantage_fwd(rewards, Grouping(3, None), Standardization(scale, 1e-4))
    assert found[:3].isnan().all()
    assert scale == "batch" or found[3:].isfinite().all()
