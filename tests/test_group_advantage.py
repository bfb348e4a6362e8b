import pytest
import torch

from grpo_fast import reference
from grpo_fast.ops import group_advantage
from grpo_fast.testing import assert_as_accurate
from tests.properties import given, settings, st

by_scale = pytest.mark.parametrize("scale", ["group", "batch", "none"])


def check(rewards, **options):
    actual = group_advantage(rewards, **options)
    baseline = reference.group_advantage(rewards.float(), **options)
    truth = reference.group_advantage(rewards.double(), **options)
    assert actual.dtype == torch.float32
    assert_as_accurate(actual, baseline, truth)


@by_scale
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("group_size", [1, 2, 7, 64])
def test_uniform_groups(group_size, unbiased, scale, backend, device):
    rewards = torch.randn(group_size * 3, device=device)
    check(rewards, group_size=group_size, scale=scale, unbiased=unbiased)


def test_a_group_larger_than_one_block(backend, device, monkeypatch):
    if backend == "triton":
        monkeypatch.setattr("grpo_fast.kernels.group_advantage.MAX_BLOCK", 16)
    rewards = torch.randn(80, device=device)
    check(rewards, group_size=40)
    check(rewards, group_ids=torch.arange(80, device=device) % 3, scale="batch")


@by_scale
def test_labelled_groups_in_any_order(scale, backend, device):
    labels = torch.tensor([7, -2, 7, 7, 10**12, -2, 7, 3], device=device)
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.5, 9.0, 1.0, 0.25, 4.0], device=device)
    check(rewards, group_ids=labels, scale=scale)
    advantages = group_advantage(rewards, group_ids=labels, scale=scale)
    assert advantages[4] == advantages[7] == 0  # alone
    assert advantages[1] == advantages[5] == 0  # equals


@settings(max_examples=15)
@given(
    size=st.integers(1, 9),
    groups=st.integers(1, 8),
    offset=st.floats(-1e3, 1e3),
    scale=st.sampled_from(["group", "batch", "none"]),
    seed=st.integers(0, 2**16),
)
def test_any_batch(size, groups, offset, scale, seed, backend, device):
    torch.manual_seed(seed)
    rewards = torch.randint(0, 4, (size * groups,), device=device) * 0.25 + offset
    check(rewards, group_size=size, scale=scale)
    labels = torch.randint(0, groups, (size * groups,), device=device)
    check(rewards, group_ids=labels, scale=scale)


def test_labels_and_sizes_agree(backend, device):
    rewards = torch.randn(24, device=device)
    labels = torch.arange(24, device=device) // 4
    by_label = group_advantage(rewards, group_ids=labels)
    torch.testing.assert_close(by_label, group_advantage(rewards, group_size=4))


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1])
def test_equal_rewards_give_exactly_zero(value, backend, device):
    """The mean of equal floats may round to another number; the advantage must not show it."""
    rewards = torch.full((7 * 3,), value, device=device)
    for scale in ("group", "batch", "none"):
        assert group_advantage(rewards, group_size=7, scale=scale).eq(0).all()


def test_a_large_common_offset_costs_nothing(backend, device):
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0], device=device)
    torch.testing.assert_close(
        group_advantage(rewards + 4096, group_size=4), group_advantage(rewards, group_size=4)
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64, torch.bfloat16], ids=str)
def test_any_real_dtype(dtype, backend, device):
    rewards = torch.tensor([0, 1, 1, 0, 1, 1], device=device).to(dtype)
    want = group_advantage(rewards.float(), group_size=3)
    torch.testing.assert_close(group_advantage(rewards, group_size=3), want, rtol=0, atol=0)


def test_empty(backend, device):
    assert group_advantage(torch.zeros(0, device=device), group_size=4).shape == (0,)
    labels = torch.zeros(0, dtype=torch.int64, device=device)
    assert group_advantage(torch.zeros(0, device=device), group_ids=labels).shape == (0,)
