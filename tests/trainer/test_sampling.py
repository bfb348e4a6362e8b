"""Sampling: exact, and the same for a completion whatever else is sampled with it."""

import math

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from grpo_fast.trainer import rollout
from tests.support.tiny_runs import given_model, setup, tiny


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_follow_the_softmax(temperature):
    """Shares of 100,000 samples: five standard errors."""
    torch.manual_seed(0)
    count, scores = 100_000, torch.randn(1, 12) * 2
    scores[0, 5] = -math.inf
    numbers = torch.rand(count, 1, dtype=torch.float64)
    draw = rollout.Draw(numbers, 1, temperature)
    out = draw(torch.zeros(count, 1, dtype=torch.long), scores.expand(count, 12))
    chosen = out.argmax(-1)
    assert out.isfinite().sum() == count
    expected = (scores[0] / temperature).softmax(0).double()
    found = torch.bincount(chosen, minlength=12) / count
    error = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() <= 5 * error).all()
    assert found[5] == 0


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_chosen(number):
    scores = torch.full((3, 1000), -math.inf)
    scores[:, [10, 20]] = 1.0
    draw = rollout.Draw(torch.full((3, 1), number, dtype=torch.float64), 0, 1.0)
    chosen = draw(torch.zeros(3, 0, dtype=torch.long), scores).argmax(-1)
    assert set(chosen.tolist()) == {10 if number < 0.5 else 20}


def test_weights_that_have_diverged_are_named():
    draw = rollout.Draw(torch.zeros(1, 1, dtype=torch.float64), 0, 1.0)
    with pytest.raises(FloatingPointError, match="NaN or infinite: its weights have diverged"):
        draw(torch.zeros(1, 0, dtype=torch.long), torch.full((1, 4), math.nan))


def test_a_completion_depends_on_its_seed_alone(tmp_path):
    from grpo_fast.trainer import model as models

    policy = models.build(tiny(tmp_path, model=str(given_model(tmp_path))), "")
    prompts = ["1+2=", "111+222=", "3+30=", "1+2="]
    seeds = [rollout.seed_of(0, 1, b) for b in range(4)]
    whole = rollout.sample(policy, prompts, 8, 1.0, seeds=seeds)
    for options in ({"batch_size": 1}, {"batch_size": 3}, {"batch_tokens": 25}):
        found = rollout.sample(policy, prompts, 8, 1.0, seeds=seeds, **options)
        torch.testing.assert_close(found.completion_ids, whole.completion_ids)
    turned = rollout.sample(policy, prompts[::-1], 8, 1.0, seeds=seeds[::-1])
    assert turned.completions == whole.completions[::-1]
    assert whole.completions[0] != whole.completions[3]  # of one prompt
    other = rollout.sample(policy, prompts, 8, 1.0, seeds=[s + 1 for s in seeds])
    assert other.completions != whole.completions


def test_seeds_differ_and_are_those_of_another_day():
    seeds = {rollout.seed_of(0, step, 0, b) for step in range(50) for b in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert rollout.seed_of(0, 1, 2) == 603432347784401458


@pytest.mark.parametrize(
    "size, tokens, expected",
    [
        (None, None, [[1, 3, 0, 2]]),
        (3, None, [[1, 3, 0], [2]]),
        (None, 20, [[1, 3], [0], [2]]),
        (None, 1, [[1], [3], [0], [2]]),
    ],
)
def test_prompts_of_like_length_are_sampled_together(size, tokens, expected):
    assert rollout.batches_by_length([7, 2, 9, 3], 5, size, tokens) == expected


def test_greedy_samples_are_those_of_the_model(tmp_path):
    _, policy = setup(tiny(tmp_path))
    answers = rollout.sample(policy, ["1+2=", "11+22="], 5, 0.0, batch_size=1)
    for b, prompt in enumerate(["1+2=", "11+22="]):
        tokens = policy.tokenizer(prompt, return_tensors="pt")
        out = policy.model.generate(**tokens, max_new_tokens=5, do_sample=False)
        new = out[0, tokens["input_ids"].shape[1] :].tolist()
        assert answers.completion_ids[b][answers.mask[b]].tolist() == new
