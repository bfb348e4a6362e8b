"""One row without padding: its layout, its masks, and that other uses of attention do not change."""

import pytest
import torch
from torch.nn.attention.bias import CausalBias
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo_fast.shared_prompt import choose, forward, packing, plan
from tests.support import shared as support
from tests.support.shared import assert_same, build, through, truth


@pytest.fixture
def row():
    return packing.row_of(plan(**support.batch()))


def calls_of_attention(monkeypatch):
    """The shapes of queries and keys, and the mask, of each attention that is computed."""
    calls = []

    def noted(module, query, key, value, mask, **options):
        calls.append((tuple(query.shape), tuple(key.shape), mask))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    packing.take_apart()
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping,
        "sdpa",
        lambda *x, **y: packing._attention(noted, *x, **y),
    )
    assert hasattr(own, packing.TAKES_APART)
    return calls


def test_the_row_has_no_padding(row):
    """Each prompt once, and each completion without its last token, from which nothing is predicted."""
    given = support.batch()
    shared = plan(**given)
    want = []
    for k in range(4):
        want += shared.prompt_ids[k, shared.prompt_mask[k]].tolist()
        for b in (shared.prompt_of == k).nonzero()[:, 0]:
            want += shared.completion_ids[b, shared.completion_mask[b]][:-1].tolist()
    assert row.ids[0].tolist() == want
    assert row.ids.shape[1] == sum(row.sizes) == shared.prompt_lengths.sum() + shared.fed.sum()
    # After each predictor comes its target, if both are of one completion.
    after = row.ids[0].roll(-1)[row.predictors]
    follows = row.positions[0].roll(-1)[row.predictors] == row.positions[0][row.predictors] + 1
    inside = torch.ones_like(follows).index_fill(0, shared.cu_seqlens[:-1].long().unique(), False)
    inside &= torch.cat([row.predictors.diff() == 1, torch.tensor([False])])
    assert inside.sum() > 5
    assert follows[inside].all()
    assert after[inside].equal(shared.targets[inside])


def test_prompts_without_completions_are_left_out():
    shared = plan(**support.batch())
    part = shared.completions(torch.tensor([1, 4]))
    assert len(part.prompt_ids) == 4
    assert packing.row_of(part).sizes == [6, 2, 4]


def test_completions_of_one_length_are_computed_together(monkeypatch):
    given = support.batch()
    given["completion_mask"] = torch.arange(7) < torch.tensor([7, 3, 7, 4, 5, 2, 1, 7])[:, None]
    model = build("llama")
    shared = plan(**given)
    want = support.graded(model, shared, support.alone(model, given))
    through(model, shared, "packed")  # the first time compares the route with the unshared one
    calls = calls_of_attention(monkeypatch)
    assert_same(through(model, shared, "packed"), want, 1e-5)
    prompts = [(1, 9), (1, 6), (1, 1), (1, 3)]  # sequences, and tokens of each
    completions = [
        (3, 6),
        (1, 1),
        (1, 2),
        (1, 4),
        (1, 3),
    ]  # three of seven tokens, whose last is left out
    layers = 2
    assert sorted(x[0][::2] for x in calls) == sorted(layers * (prompts + completions))


def test_full_attention_needs_no_mask_of_a_prompt(monkeypatch):
    """PyTorch takes its fastest kernels for causal attention without a mask."""
    given, (llama, mistral) = plan(**support.batch()), map(build, ("llama", "mistral"))
    for model in (llama, mistral):
        forward(
            model, given, route="packed"
        )  # the first time compares the route with the unshared one
    calls = calls_of_attention(monkeypatch)
    forward(llama, given, route="packed")
    assert len(calls) == 2 * (4 + 5)
    masks = [mask for query, _, mask in calls if mask is not None]
    assert len(masks) == 2 * 4  # all completions of more than one token
    assert len({x.untyped_storage().data_ptr() for x in masks}) == 1
    calls.clear()
    forward(mistral, given, route="packed")  # with a window
    assert all(mask is not None for *_, mask in calls)


@pytest.mark.parametrize("before, length", [(0, 4), (3, 1), (3, 4), (9, 6), (1, 6)])
def test_masks(row, before, length):
    """True of two places in a sequence, of which the second is seen, or 0 and minus infinity."""
    query = torch.zeros(1, 1, length, 2)
    places = torch.arange(before + length)
    seen = places[before:, None] >= places
    found = packing.Layout(row, causal_mask_function).mask(before, length, query)
    if found is None:
        assert before == 0 or seen.all()
    else:
        assert found.expand(1, 1, *seen.shape)[0, 0].exp().bool().equal(seen)
    near = seen & (places[before:, None] - places < 3)
    windowed = packing.Layout(row, sliding_window_causal_mask_function(3))
    assert windowed.mask(before, length, query)[0, 0].exp().bool().equal(near)


def test_lower_right_bias_of_pytorch(monkeypatch):
    """What a GPU takes instead of a mask, so that FlashAttention runs."""
    model, shared, want = truth("llama", torch.float32)
    made = []

    def mask(self, before, length, query):
        if before == 0 or length == 1:
            return None
        made.append(packing.causal_lower_right(length, before + length))
        return made[-1]

    monkeypatch.setattr(packing.Layout, "mask", mask)
    assert_same(through(model, shared, "packed"), want, 1e-5)
    assert all(isinstance(x, CausalBias) for x in made)
    assert made


def test_attention_without_a_row_is_that_of_transformers():
    """The function that is registered passes on what it does not know, with all of its arguments."""
    forward(build("llama"), plan(**support.batch()), route="packed")
    found = ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert found is not sdpa_attention_forward
    packing.take_apart()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is found
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    module = build("llama").model.layers[0].self_attn
    module.num_key_value_groups = 1
    mask = torch.rand(2, 1, 5, 5) < 0.7
    mask |= torch.eye(5).bool()
    for given in (None, mask):
        got, want = (
            f(module, q, k, v, given, scaling=0.3) for f in (found, sdpa_attention_forward)
        )
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=0)


def test_a_mark_that_is_lost_shows_nothing(row):
    """A model that changes its mask sees no token, and the comparison of a few tokens finds it."""
    mark = packing.marked(row, causal_mask_function)
    S = row.ids.shape[1]
    assert mark.shape == (1, 1, S, S)
    assert mark.untyped_storage().nbytes() == 1
    assert not mark.clone().any()
    assert not hasattr(mark[:, :, :, :S], packing.LAYOUT)


def test_a_bias_of_positions_is_refused(row):
    mark = packing.marked(row, causal_mask_function)
    x = torch.randn(1, 2, row.ids.shape[1], 4)
    with pytest.raises(ValueError, match="a bias for each pair of positions"):
        packing._attention(
            sdpa_attention_forward, None, x, x, x, mark, position_bias=torch.zeros(1)
        )


@pytest.mark.parametrize("part", ["whole", "in place", "layer"])
def test_compiled_models_take_another_route(part):
    """Segments of other lengths would be another graph for each batch."""
    model, shared = build("llama"), plan(**support.batch())
    given = model
    if part == "whole":
        given = torch.compile(model, backend="eager")
    elif part == "in place":
        model.model.compile(backend="eager")
    else:
        model.model.layers[1].compile(backend="eager")
    with pytest.raises(ValueError, match="route='packed': the model is compiled"):
        forward(given, shared, route="packed")
    assert choose(given, shared).route in ("mask", "fork")


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
def test_memory_of_a_ragged_batch(recompute):
    """It is less than that of a mask for all pairs of tokens, and than that of a fork, which pads."""
    from tests.shared_prompt.test_traps import most_memory

    draw = torch.Generator().manual_seed(2)
    shared = plan(
        torch.randint(3, 60, (2, 40), generator=draw),
        torch.randint(3, 60, (16, 60), generator=draw),
        completion_mask=torch.arange(60) < torch.randint(4, 61, (16, 1), generator=draw),
        group_size=8,
    )
    model, used = build("llama"), {}
    for route in ("packed", "mask", "fork"):
        through(model, shared, route)
        used[route] = most_memory(
            lambda route=route: through(model, shared, route, recompute=recompute)
        )
    assert used["packed"] < 0.9 * min(used["mask"], used["fork"]), used
