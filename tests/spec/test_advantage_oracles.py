"""`group_advantage` against the trainers' own code: TRL's statements, verl's functions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from grpo_fast.ops import group_advantage
from tests.support.oracles import run_of_trl, verl_core_algos

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL's imports


def trl(rewards, group_size, scale, aggregation, weights):
    """TRL's advantages of (B, K) rewards with NaN where a function returned None."""
    trainer = SimpleNamespace(
        multi_objective_aggregation=aggregation,
        reward_weights=weights,
        scale_rewards=scale,
        reward_funcs=[None] * rewards.shape[1],
    )
    scope = {
        "self": trainer,
        "rewards_per_func": rewards,
        "num_generations": group_size,
        "device": rewards.device,
    }
    first, last = "unscorable_mask =", "advantages = torch.nan_to_num"
    return run_of_trl(first, last, scope)["advantages"]


def missing_at_random(B, K, device):
    """Rewards with everything TRL treats apart: missing ones, unscorable rows, groups of one or none."""
    rewards = torch.randn(B, K, device=device, dtype=torch.float64)
    rewards[torch.rand(B, K, device=device) < 0.2] = torch.nan
    rewards[1] = torch.nan  # an unscorable completion
    rewards[4:7] = torch.nan  # one left in its group
    rewards[8:12] = torch.nan  # a group without any
    rewards[12:16, 0] = 0.5  # a column that does not differ
    return rewards


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(
    "aggregation, scale",
    [
        ("sum_then_normalize", "group"),
        ("sum_then_normalize", "batch"),
        ("sum_then_normalize", "none"),
        ("normalize_then_sum", "group"),
    ],
)
@pytest.mark.parametrize("K", [1, 3])
def test_trl(K, aggregation, scale, missing, backend, device):
    rewards = torch.randn(24, K, device=device, dtype=torch.float64)
    if missing:
        rewards = missing_at_random(24, K, device)
    weights = torch.tensor([1.0, 0.5, -2.0], device=device)[:K]
    truth = trl(rewards.clone(), 4, scale, aggregation, weights.double())
    assert truth.abs().max() > 0.1
    ours = group_advantage(
        rewards,
        group_size=4,
        weights=weights,
        scale=scale,
        aggregation=aggregation,
        nan="skip" if missing else "error",
    )
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    if missing:
        assert (ours[rewards.isnan().all(1)] == 0).all()


def verl(name, rewards, labels, **options):
    """verl's outcome advantages, from rewards on the only token of each response."""
    mask = torch.ones(len(rewards), 1, dtype=torch.float64)
    function = getattr(verl_core_algos(), name)
    index = np.array([str(label) for label in labels.tolist()])
    return function(rewards[:, None].double(), mask, index, **options)[0][:, 0]


LABELS = torch.tensor([3, 1, 1, 3, 3, 8, 1, 5, 5, 2])  # 8 and 2 are alone


@pytest.mark.parametrize("scale", ["group", "none"])
def test_verl_grpo(scale, backend):
    rewards = torch.randn(10, dtype=torch.float64)
    options = {"norm_adv_by_std_in_grpo": scale == "group"}
    truth = verl("compute_grpo_outcome_advantage", rewards, LABELS, **options)
    ours = group_advantage(rewards, group_ids=LABELS, scale=scale, eps=1e-6, singleton="raw")
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, singleton",
    [
        ("compute_rloo_outcome_advantage", "raw"),
        ("compute_rloo_vectorized_outcome_advantage", "zero"),
    ],
)
def test_verl_rloo(name, singleton, backend):
    rewards = torch.randn(10, dtype=torch.float64)
    truth = verl(name, rewards, LABELS)
    ours = group_advantage(
        rewards, group_ids=LABELS, baseline="leave_one_out", scale="none", singleton=singleton
    )
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_verl_gdpo(scale, backend):
    """verl whitens over tokens: the same where every response is as long as the others."""
    rewards, weights = torch.randn(10, 2), torch.tensor([1.0, 0.25])
    truth = verl(
        "compute_gdpo_outcome_advantage",
        rewards[:, 0],
        LABELS,
        norm_adv_by_std_in_grpo=scale == "group",
        config={"gdpo_reward_keys": ["a", "b"], "gdpo_reward_weights": weights.tolist()},
        non_tensor_batch={"a": rewards[:, 0].numpy(), "b": rewards[:, 1].numpy()},
        batch={"prompts": torch.zeros(10, 2), "attention_mask": torch.ones(10, 3).long()},
    )
    ours = group_advantage(
        rewards,
        group_ids=LABELS,
        weights=weights,
        aggregation="normalize_then_sum",
        scale=scale,
        eps=1e-6,
        singleton="raw",
    )
    torch.testing.assert_close(ours.double(), truth.double(), rtol=1e-4, atol=1e-5)
