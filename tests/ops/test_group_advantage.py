import pytest
import torch

from grpo_fast import reference
from grpo_fast.ops import group_advantage
from grpo_fast.testing import assert_as_accurate
from tests.support.properties import given, settings, st

by_scale = pytest.mark.parametrize("scale", ["group", "batch", "none"])


def check(rewards, **options):
    actual = group_advantage(rewards, **options)
    baseline = reference.group_advantage(rewards.float(), **options)
    truth = reference.group_advantage(rewards.double(), **options)
    assert actual.dtype == torch.float32
    assert_as_accurate(actual, baseline, truth)


@by_scale
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("group_size", [2, 7, 64])
def test_uniform_groups(group_size, unbiased, scale, backend, device):
    rewards = torch.randn(group_size * 3, device=device)
    check(rewards, group_size=group_size, scale=scale, unbiased=unbiased)


@by_scale
def test_rewards_alone_in_their_groups(scale, backend, device):
    """Their advantage is 0 with labels, as documented. A size of 1 is an error, unless "raw" is given."""
    rewards = torch.randn(3, device=device)
    labels = torch.arange(3, device=device)
    assert group_advantage(rewards, group_ids=labels, scale=scale).eq(0).all()
    if scale != "batch":
        check(rewards, group_size=1, scale=scale, singleton="raw")
    for options in ({"scale": scale}, {"baseline": "leave_one_out"}):
        with pytest.raises(ValueError, match=r"group_size=1 leaves every reward alone.*at least 2"):
            group_advantage(rewards, group_size=1, **options)


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
    size=st.integers(2, 9),
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


@pytest.mark.parametrize("options", [{"group_size": 3}, {"group_ids": torch.tensor([0, 1, 1] * 6)}])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize(
    "scale, singleton",
    [("group", "zero"), ("none", "zero"), ("batch", "zero"), ("group", "raw"), ("none", "raw")],
)
def test_variants(scale, baseline, singleton, missing, options, backend, device):
    rewards = torch.randn(18, device=device)
    if missing:
        rewards[[0, 1, 3, 4, 5, 8, 17]] = torch.nan
    options = {k: v.to(device) if k == "group_ids" else v for k, v in options.items()}
    options |= {"scale": scale, "baseline": baseline, "singleton": singleton, "eps": 1e-6}
    check(rewards, **options, nan="skip" if missing else "error")


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize(
    "aggregation, scale, singleton",
    [
        ("sum_then_normalize", "group", "zero"),
        ("sum_then_normalize", "batch", "zero"),
        ("normalize_then_sum", "group", "zero"),
        ("normalize_then_sum", "group", "raw"),
        ("normalize_then_sum", "none", "zero"),
    ],
)
def test_several_rewards(
    aggregation, scale, singleton, K, weighted, missing, labels, backend, device
):
    rewards = torch.randn(16, K, device=device) * torch.tensor([1.0, 10.0, 0.1], device=device)[:K]
    if missing:
        rewards[torch.rand(16, K, device=device) < 0.3] = torch.nan
        rewards[:5] = torch.nan
    options = {"aggregation": aggregation, "scale": scale, "singleton": singleton}
    if weighted:
        options["weights"] = torch.tensor([1.0, -0.5, 3.0], device=device)[:K]
    if labels:
        options["group_ids"] = torch.arange(16, device=device) % 5
    else:
        options["group_size"] = 4
    check(rewards, **options, nan="skip" if missing else "error")


def test_leave_one_out_by_hand(backend, device):
    rewards = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 8.0], device=device)
    got = group_advantage(rewards, group_size=3, baseline="leave_one_out", scale="none")
    want = torch.tensor([-3.0, -1.5, 4.5, -1.5, -1.5, 3.0], device=device)
    torch.testing.assert_close(got, want)


def test_one_column_is_one_reward(backend, device):
    rewards = torch.randn(12, device=device)
    want = group_advantage(rewards, group_size=4)
    torch.testing.assert_close(
        group_advantage(rewards[:, None], group_size=4), want, rtol=0, atol=0
    )


def test_a_dominant_reward_drowns_another_unless_each_is_normalised(backend, device):
    """GDPO's point: what is summed first has one value for (0, 10) and (1, 9)."""
    rewards = torch.tensor([[0.0, 10.0], [1.0, 9.0], [0.0, 0.0], [1.0, 0.0]], device=device)
    summed = group_advantage(rewards, group_size=4)
    apart = group_advantage(rewards, group_size=4, aggregation="normalize_then_sum")
    assert summed[0] == summed[1]
    assert apart[0] < apart[1]


def test_missing_rewards_change_nothing_else(backend, device):
    """A missing reward is a sequence that is not there."""
    rewards = torch.randn(9, device=device)
    padded = torch.full((12,), torch.nan, device=device)
    place = torch.tensor([0, 1, 3, 4, 5, 6, 8, 9, 11], device=device)
    padded[place] = rewards
    for scale in ("group", "batch", "none"):
        for baseline in ("mean", "leave_one_out"):
            options = {"scale": scale, "baseline": baseline}
            whole = group_advantage(padded, group_size=4, nan="skip", **options)
            alone = group_advantage(rewards, group_ids=place // 4, **options)
            torch.testing.assert_close(whole[place], alone)
            assert whole[[2, 7, 10]].eq(0).all()


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


@pytest.mark.filterwarnings("error")
def test_rewards_that_ask_for_gradients(backend, device):
    """They get none, and no warning."""
    rewards = torch.tensor([0.0, 1.0, 3.0, 3.0], device=device)
    found = group_advantage(rewards.requires_grad_(), group_size=2)
    assert not found.requires_grad
    torch.testing.assert_close(found, group_advantage(rewards.detach(), group_size=2))


def test_empty(backend, device):
    assert group_advantage(torch.zeros(0, device=device), group_size=4).shape == (0,)
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        several = torch.zeros(0, 3, device=device)
        assert group_advantage(several, group_size=4, aggregation=aggregation).shape == (0,)
    labels = torch.zeros(0, dtype=torch.int64, device=device)
    assert group_advantage(torch.zeros(0, device=device), group_ids=labels).shape == (0,)
