"""One row without padding: its layout, its masks, and that other uses of attention do not change."""

import functools

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.attention.bias import CausalBias
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo_fast.shared_prompt import choose, forward, packing, plan
from grpo_fast.shared_prompt.choice import work
from tests.support import shared as support
from tests.support.shared import assert_same, build, through, truth
from tests.support.traps import most_memory


@pytest.fixture
def row():
    return plan(**support.batch()).one_row


def calls_of_attention(monkeypatch):
    """The shapes of queries and keys, and the mask, of each attention that is computed."""
    calls = []

    def noted(module, query, key, value, mask, **options):
        calls.append((tuple(query.shape), tuple(key.shape), mask))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", noted)
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
    assert part.one_row.sizes == [6, 2, 4]


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
    assert all(mask is not None for _, key, mask in calls if key[2] > 5)
    assert all(mask is None for query, key, mask in calls if query[2] == key[2] <= 5)


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


def take_lower_right(monkeypatch):
    """Let attention take PyTorch's mask for this, as on a GPU."""
    made = []

    def mask(self, before, length, query):
        if before == 0 or length == 1:
            return None
        made.append(packing.lower_right(length, before + length))
        return made[-1]

    monkeypatch.setattr(packing.Layout, "mask", mask)
    return made


@pytest.mark.parametrize("shares_heads", [True, False])
def test_lower_right_bias_of_pytorch(monkeypatch, shares_heads):
    """What a GPU takes instead of a mask, so that FlashAttention runs."""
    model, shared, want = truth("llama", torch.float32)
    made = take_lower_right(monkeypatch)
    monkeypatch.setattr(packing, "_shares_heads", lambda *_: shares_heads)
    assert_same(through(model, shared, "packed"), want, 1e-5)
    assert all(isinstance(x, CausalBias) for x in made)
    assert made
    with torch._C.DisableTorchFunctionSubclass():
        assert max(x.untyped_storage().nbytes() for x in made) < 100


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


@pytest.mark.parametrize(
    "use",
    [
        lambda mark: mark[:, :, :, :4],
        lambda mark: mark.clone(),
        lambda mark: mark.detach(),
        lambda mark: mark.to(torch.float32),
        lambda mark: mark & mark,
        lambda mark: torch.where(mark, 0.0, 1.0),
    ],
    ids=["slice", "clone", "detach", "to", "and", "where"],
)
def test_other_uses_of_the_mark_are_errors(row, use):
    """A model that changes its mask does not train on something else."""
    mark = packing.marked(row, causal_mask_function)
    S = row.ids.shape[1]
    assert mark.shape == (1, 1, S, S)
    assert mark.stride() == (0, 0, 0, 0)  # it has no memory
    assert mark.to("cpu") is mark
    assert not mark.is_floating_point()
    with pytest.raises(RuntimeError, match="was called with what stands for the mask of its row"):
        use(mark)


def test_attention_that_does_not_know_the_mark_raises(row):
    mark = packing.marked(row, causal_mask_function)
    x = torch.randn(1, 2, row.ids.shape[1], 4)
    with pytest.raises(RuntimeError, match="take route 'mask' or 'fork'"):
        torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mark)


def test_a_bias_of_positions_is_refused(row):
    mark = packing.marked(row, causal_mask_function)
    x = torch.randn(1, 2, row.ids.shape[1], 4)
    with pytest.raises(ValueError, match="a bias for each pair of positions"):
        ALL_ATTENTION_FUNCTIONS["sdpa"](None, x, x, x, mark, position_bias=torch.zeros(1))


@pytest.fixture
def registry(monkeypatch):
    """The functions of attention that transformers knows; what a test changes is undone."""
    for mapping in ("_global_mapping", "_local_mapping"):
        own = getattr(ALL_ATTENTION_FUNCTIONS, mapping)
        monkeypatch.setattr(
            AttentionInterface if mapping == "_global_mapping" else ALL_ATTENTION_FUNCTIONS,
            mapping,
            dict(own),
        )
    return ALL_ATTENTION_FUNCTIONS


@pytest.mark.parametrize("how", ["registered", "set", "wraps"])
def test_an_attention_of_the_user(registry, how):
    """It computes the segments, whether it is registered, set for all models, or calls the one before."""
    model, shared, want = truth("llama", torch.float32)
    assert_same(through(model, shared, "packed"), want, 1e-5)
    before, calls = registry["sdpa"], []

    def own(module, query, key, value, mask, **options):
        calls.append(query.shape[2])
        found = before if how == "wraps" else sdpa_attention_forward
        return found(module, query, key, value, mask, **options)

    if how == "registered":
        AttentionInterface.register("sdpa", own)
    else:
        registry["sdpa"] = functools.wraps(before)(own) if how == "wraps" else own
    assert_same(through(model, shared, "packed"), want, 1e-5)
    assert max(calls) == 9


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt2"])
@pytest.mark.parametrize("lower_right", [False, True], ids=["", "lower_right"])
def test_autocast(name, lower_right, monkeypatch):
    """Rotations give float32 and the projections bfloat16; what a GPU takes as a mask wants one dtype."""
    if lower_right:
        take_lower_right(monkeypatch)
    model, shared, want = truth(name, torch.float32)
    errors = {}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for route in ("unshared", "packed"):
            got = through(model, shared, route)
            errors[route] = (got.log_probs - want.log_probs).norm().item()
    assert errors["packed"] < 2 * errors["unshared"] < 2


def test_windows_that_are_not_shorter_need_no_mask(monkeypatch):
    """Then the fastest kernels run for windows, too."""
    model, given = build("mistral", sliding_window=20), plan(**support.batch())
    forward(model, given, route="packed")
    calls = calls_of_attention(monkeypatch)
    forward(model, given, route="packed")
    assert all(mask is None for query, key, mask in calls if query[2] == key[2])
    assert len({x.untyped_storage().data_ptr() for *_, x in calls if x is not None}) == 1


def test_auto_does_not_make_large_masks():
    """Of windows: one for each length of prompt and completion."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1500, 2000, (60, 1), generator=draw)
    shared = plan(
        torch.full((1, 2000), 5),
        torch.full((60, 2000), 6),
        completion_mask=torch.arange(2000) < lengths,
        group_size=60,
    )
    assert choose(build("llama", max_position_embeddings=4096), shared).route == "packed"
    model = build("mistral", sliding_window=1000, max_position_embeddings=4096)
    found = choose(model, shared)
    assert found.route != "packed"
    assert "not packed: the masks of its completions would be too large" in found.reason


def test_copies_of_long_prompts_count():
    """Many short completions of a long prompt have a copy of its keys each: a mask, or a fork, has not."""
    for G, T, less in ((64, 16, True), (4, 256, False)):
        shared = plan(torch.full((1, 1024), 5), torch.full((G, T), 6), group_size=G)
        costs = {name: work(shared, name, 512) for name in ("packed", "mask")}
        assert (costs["mask"] < costs["packed"]) == less


@pytest.mark.parametrize("kind", ["transformers", "torch"])
def test_reentrant_checkpointing(kind):
    """It copies the arguments of layers: transformers' own is replaced, and PyTorch's wrapper is refused."""
    model, (_, shared, want) = build("gpt2").train(), truth("gpt2", torch.float32)
    if kind == "transformers":
        model.gradient_checkpointing_enable({"use_reentrant": True})
        assert_same(through(model, shared, "packed"), want, 1e-5)
        return
    wrap = functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrap, check_fn=lambda x: type(x).__name__ == "GPT2Block"
    )
    with pytest.raises(ValueError, match="reentrant checkpointing copies the arguments"):
        forward(model, shared, route="packed")
    assert choose(model, shared).route != "packed"


@pytest.mark.parametrize("part", ["whole", "in place", "layer", "forward", "forward of a layer"])
def test_compiled_models_take_another_route(part):
    """Segments of other lengths would be another graph for each batch."""
    model, shared = build("llama"), plan(**support.batch())
    given = model
    if part == "whole":
        given = torch.compile(model, backend="eager")
    elif part == "in place":
        model.model.compile(backend="eager")
    elif part == "layer":
        model.model.layers[1].compile(backend="eager")
    else:
        layer = model.model if part == "forward" else model.model.layers[1].self_attn
        layer.forward = torch.compile(layer.forward, backend="eager")
    with pytest.raises(ValueError, match="route='packed': the model is compiled"):
        forward(given, shared, route="packed")
    assert choose(given, shared).route in ("mask", "fork")


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
def test_memory_of_a_ragged_batch(recompute):
    """It is less than that of a mask for all pairs of tokens, and than that of a fork, which pads."""
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
