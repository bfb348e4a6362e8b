"""A prompt is forwarded once for all its completions that are sampled together, where that is exact."""

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from grpo_fast.notices import FallbackError, forget
from grpo_fast.trainer import evaluate, prefill, rollout
from tests.support import models
from tests.support.tiny_runs import setup, tiny

PROMPTS = ["1+2=", "111+222=", "1+2=", "3+30=", "111+222=", "1+2="]
SEEDS = [rollout.seed_of(0, 1, b) for b in range(len(PROMPTS))]


@pytest.fixture
def policy(tmp_path):
    return setup(tiny(tmp_path))[1]


@pytest.fixture
def fed(policy, monkeypatch):
    """The shapes of the ids that the model got."""
    shapes, forward = [], policy.model.forward

    def noted(input_ids=None, **given):
        shapes.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **given)

    monkeypatch.setattr(policy.model, "forward", noted)
    return shapes


def sample(policy, prompts=PROMPTS, tokens=4, **options):
    return rollout.sample(policy, prompts, tokens, 1.0, seeds=SEEDS[: len(prompts)], **options)


def test_the_same_samples_from_fewer_tokens(policy, fed):
    want = sample(policy, share=False)
    assert fed[0] == (6, 8)
    sample(policy)  # finds out that it is exact
    fed.clear()
    got = sample(policy)
    assert fed[:2] == [(3, 7), (6, 1)]  # three prompts without their last tokens; then these
    torch.testing.assert_close(got.completion_ids, want.completion_ids)
    assert got.completions == want.completions


def test_batches_share_what_they_hold(policy, fed):
    """A batch takes prompts of like length: two in the first, and one twice in the second."""
    whole = sample(policy)
    fed.clear()
    found = sample(policy, batch_size=3)
    assert (1, 3) in fed
    torch.testing.assert_close(found.completion_ids, whole.completion_ids)


@pytest.mark.parametrize("prompts", [["1+2=", "3+4=", "111+2="], ["1", "1", "2"]])
def test_nothing_to_share(policy, fed, prompts):
    """No prompt comes twice, or nothing is before the last token."""
    sample(policy, prompts)
    assert fed[0] == (3, max(map(len, prompts)))


def test_padding_does_not_make_prompts_differ():
    """Nor does a mask make those with other tokens the same."""
    ids = torch.tensor([[5, 1, 2], [7, 1, 2], [5, 1, 2], [0, 0, 2]])
    attention = torch.tensor([[0, 1, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]])
    first, of_row = prefill._distinct(ids, attention)
    assert first == [0, 2, 3]
    assert of_row.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_that_goes_on_otherwise(policy, monkeypatch, strict):
    """It is found out, said once, and sampled from as before."""
    want = sample(policy, share=False)
    forked = prefill.forked
    monkeypatch.setattr(prefill, "forked", lambda cache, rows: forked(cache, rows.flip(0)))
    forget()
    if strict:
        monkeypatch.setenv("GRPO_FAST_STRICT", "1")
        with pytest.raises(FallbackError, match="prompts not shared"):
            sample(policy)
        return
    with pytest.warns(UserWarning, match="samples from other logits after the cache of a prompt"):
        got = sample(policy)
    torch.testing.assert_close(got.completion_ids, want.completion_ids)
    calls = []
    monkeypatch.setattr(prefill, "_cache_of", lambda *given: calls.append(given))
    sample(policy)
    assert not calls


# Attention; a window of it; recurrent and attention layers in turns; states alone; other kinds of caches.
@pytest.mark.parametrize(
    "name, shares",
    [("llama", True), ("mistral", True), ("qwen3_next", True), ("mamba", False), ("xlnet", False)],
)
def test_models_of_other_kinds(name, shares):
    model = models.build(name, sliding_window=3)
    model.config.use_cache = model.generation_config.use_cache = True
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))[[0, 1, 0, 2, 1]]
    attention = torch.ones_like(ids)
    attention[[1, 4], :3], attention[3, :8] = 0, 0
    cache = prefill.prefilled(model, ids, attention)
    assert (cache is not None) == shares
    if not shares:
        model.generate = None  # nor is it tried again
        assert prefill.prefilled(model, ids, attention) is None
        return
    given = {"input_ids": ids, "attention_mask": attention, "do_sample": False}
    given |= {"max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}
    given |= {"eos_token_id": None}
    want, got = model.generate(**given), model.generate(**given, past_key_values=cache)
    assert got.sequences.tolist() == want.sequences.tolist()
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-6)


def test_the_option_switches_it_off(policy, fed, tmp_path):
    config = tiny(tmp_path, share_prompts="off", max_new_tokens=4)
    rollout.Sampler(policy, config).sample(PROMPTS, SEEDS)
    assert fed[0] == (6, 8)
    fed.clear()
    rollout.Sampler(policy, tiny(tmp_path, max_new_tokens=4)).sample(PROMPTS, SEEDS)
    assert fed[0] == (3, 7)


@pytest.mark.parametrize("given, shares", [("off", False), ("auto", True)])
def test_the_option_holds_for_an_evaluation(fed, policy, tmp_path, given, shares):
    """Where it takes several samples of a problem."""
    config = tiny(tmp_path, share_prompts=given, max_new_tokens=4)
    task = setup(config)[0]
    rows = [task.heldout[0]] * 3
    evaluate.answered(policy, task, rows, config, 1.0, SEEDS[:3])
    length = len(rows[0]["prompt"])
    assert fed[0] == ((1, length - 1) if shares else (3, length))
