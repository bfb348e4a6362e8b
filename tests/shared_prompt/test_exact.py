"""Log-probs and gradients with shared prompts, held against the model's own logits of each sequence."""

import functools

import pytest
import torch

from grpo_fast.shared_prompt import plan, routes
from tests.support import shared as support

CASES = [(name, route) for name in support.MODELS for route in support.routes_of(name)]


@pytest.mark.parametrize("name, route", CASES)
def test_every_route_is_exact(name, route):
    model, shared, want = support.truth(name, torch.float32)
    support.assert_same(support.through(model, shared, route), want, 1e-5)


@pytest.mark.parametrize("name, route", CASES)
def test_the_error_is_that_of_rounding(name, route):
    """In float64 the difference is that of float64, so nothing but rounding differs in float32."""
    with support.in_double():
        model, shared, want = support.truth(name, torch.float64)
        support.assert_same(support.through(model, shared, route), want, 1e-10)


@pytest.mark.parametrize("name", support.MODELS)
def test_the_padded_batch_gives_the_same(name):
    """Padding changes nothing: not in the model's own forward, nor in the route without sharing."""
    model, shared, want = support.truth(name, torch.float32)
    own = support.graded(model, shared, support.padded(model, support.batch()))
    support.assert_same(own, want, 1e-5)
    support.assert_same(support.through(model, shared, "unshared"), want, 1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "qwen3_next"])
def test_tokens_of_other_completions_would_show(name):
    """The tests of this file notice if a token sees a sibling: the models are not insensitive."""
    model, shared, want = support.truth(name, torch.float32)
    given = support.batch()
    seen = torch.cat([given["prompt_ids"][:1], given["completion_ids"][5:6, :1]], 1)
    ids = torch.cat([seen, given["completion_ids"][:1]], 1)
    logits = model(input_ids=ids).logits[0, -8:-1].log_softmax(-1)
    other = logits.gather(1, given["completion_ids"][0, :, None])[:, 0]
    assert (other - want.log_probs[:7]).abs().min() > 1e-3
    assert shared.targets[:7].tolist() == given["completion_ids"][0].tolist()


SOME = ["llama", "mistral", "gemma2", "gpt2", "gpt_oss", "mixtral", *support.HYBRID]
SOME_CASES = [(name, route) for name in SOME for route in support.routes_of(name)]


@pytest.mark.parametrize("name, route", SOME_CASES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_recomputed_layers(name, route, training):
    model, shared, want = support.truth(name, torch.float32)
    model.train(training)
    try:
        got = support.through(model, shared, route, recompute=True)
    finally:
        model.eval()
    support.assert_same(got, want, 1e-5)
    assert not any("forward" in vars(x) for x in model.modules())


@pytest.mark.parametrize("name, route", SOME_CASES)
def test_gradient_checkpointing_of_transformers(name, route):
    """A model that is set to checkpoint does so in every route, and says nothing of a cache."""
    model, (_, shared, want) = support.build(name), support.truth(name, torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    support.assert_same(support.through(model, shared, route), want, 1e-5)
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("route", support.ROUTES)
def test_layers_that_are_not_recomputed_on_request(route):
    """`recompute=False` overrules the setting of the model."""
    model, (_, shared, want) = support.build("llama"), support.truth("llama", torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    support.through(model, shared, route)  # the first time tries the route
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    support.assert_same(support.through(model, shared, route, recompute=False), want, 1e-5)
    plain = len(calls)
    support.through(model, shared, route)
    again = 1 if route == "bounded" else plain  # of bounded only the prompts were not recomputed
    assert len(calls) == 2 * plain + again


@functools.cache
def _eager(name):
    return support.build(name, attn_implementation="eager")


@pytest.mark.parametrize("route", support.ROUTES[1:])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "phi3", "gpt2"])
def test_eager_attention(name, route):
    model, (_, shared, want) = _eager(name), support.truth(name, torch.float32)
    assert model.config._attn_implementation == "eager"
    support.assert_same(support.through(model, shared, route), want, 1e-5)


@pytest.mark.parametrize("route", support.ROUTES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_heads_that_share_the_embedding(tied, route):
    model = support.build("qwen2", tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    given = support.batch()
    shared = support.plan(**given)
    want = support.graded(model, shared, support.alone(model, given))
    support.assert_same(support.through(model, shared, route), want, 1e-5)


@pytest.mark.parametrize(
    "name, route", [x for x in SOME_CASES if x[0] in ("llama", "gpt2", "lfm2")]
)
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_lora(name, route):
    """Adapters on attention and MLP: exact with them, and without them inside `disable_adapter`."""
    peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
    targets = {
        "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        "gpt2": ["c_attn", "c_fc", "c_proj"],
        "lfm2": ["q_proj", "in_proj", "out_proj", "w1", "w2"],
    }
    config = peft.LoraConfig(
        r=4, lora_alpha=32, init_lora_weights=False, target_modules=targets[name]
    )
    model = peft.get_peft_model(support.build(name), config).train()
    given = support.batch()
    shared = support.plan(**given)
    want = support.graded(model, shared, support.alone(model, given))
    assert all("lora" in key for key in want.gradient)
    support.assert_same(support.through(model, shared, route), want, 1e-5)
    with torch.no_grad(), model.disable_adapter():
        plain = support.alone(model, given)
        assert (plain - want.log_probs).abs().max() > 1e-2
        if route != "backward":
            got = support.log_probs(model, shared, route)
            torch.testing.assert_close(got, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, route", [x for x in SOME_CASES if x[0] in ("mistral", "falcon_h1")])
def test_the_side_of_the_padding(name, route):
    """Padding on the other side, and more of it, whatever its ids are."""
    model, shared, want = support.truth(name, torch.float32)
    given = support.batch()
    moved = {}
    for part, to in (("prompt", 0), ("completion", 3)):
        ids, mask = given[f"{part}_ids"], given[f"{part}_mask"]
        B, width = ids.shape
        moved[f"{part}_ids"] = torch.full((B, width + 3), -100)
        moved[f"{part}_mask"] = torch.zeros(B, width + 3, dtype=torch.long)
        for b in range(B):
            own = ids[b][mask[b]]
            at = slice(to, to + len(own)) if part == "prompt" else slice(width + 3 - len(own), None)
            moved[f"{part}_ids"][b, at] = own
            moved[f"{part}_mask"][b, at] = 1
    other = support.plan(**moved)
    support.assert_same(support.through(model, other, route), want, 1e-5)
    assert other.prompt_ids.tolist() == shared.prompt_ids.tolist()


@pytest.mark.parametrize("name, route", [x for x in CASES if x[1] != "backward"])
def test_without_gradients(name, route):
    model, shared, want = support.truth(name, torch.float32)
    with torch.no_grad():
        got = support.log_probs(model, shared, route)
    assert not got.requires_grad
    torch.testing.assert_close(got, want.log_probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("route", support.ROUTES)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_positions_that_start_elsewhere(name, route):
    """As the model called with these positions; rotations see only differences of positions."""
    model, _, plain = support.truth(name, torch.float32)
    given = support.batch()
    positions = (given["prompt_mask"].cumsum(1) - 1 + 20) * given["prompt_mask"]
    shared = support.plan(**given, prompt_positions=positions)
    want = support.graded(model, shared, support.alone(model, given, offset=20))
    support.assert_same(support.through(model, shared, route), want, 1e-5)
    error = (want.log_probs - plain.log_probs).abs().max()
    assert error > 1e-2 if name == "gpt2" else error < 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention(name):
    """FlexAttention on a CPU, where it runs uncompiled and has no backward."""
    model = support.build(name, attn_implementation="flex_attention")
    _, shared, want = support.truth(name, torch.float32)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        got = support.log_probs(model, shared, "flex")
    torch.testing.assert_close(got, want.log_probs, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="route='flex': FlexAttention has no backward on cpu"):
        support.log_probs(model, shared, "flex")


def in_rows(monkeypatch, per_row):
    """Let a fork put this number of completions into a row; the calls that put several into one."""
    calls, several = [], routes._several
    monkeypatch.setattr(routes, "_several", lambda *x: calls.append(1) or several(*x))
    monkeypatch.setattr(routes, "least_work", lambda *_: per_row)
    return calls


FORKS = [(name, x) for name in support.ATTENTION for x in ("fork", "bounded", "backward")]


@pytest.mark.parametrize("name, route", FORKS)
def test_completions_of_a_prompt_in_one_row(name, route, monkeypatch):
    """They share the keys and values of the prompt, also where a layer keeps those of a window only."""
    calls = in_rows(monkeypatch, 8)
    model, shared, want = support.truth(name, torch.float32)
    support.assert_same(support.through(model, shared, route), want, 1e-5)
    assert calls
    with support.in_double():
        model, shared, want = support.truth(name, torch.float64)
        support.assert_same(support.through(model, shared, route), want, 1e-10)
    model, shared, want = support.truth(name, torch.float32)
    support.assert_same(support.through(model, shared, route, recompute=True), want, 1e-5)


@functools.cache
def twice(name, dtype):
    """The model, the plan of groups twice as large with other tokens, and what is true."""
    model, _, _ = support.truth(name, dtype)
    given = support.batch()
    other = given | {"completion_ids": given["completion_ids"].flip(0)}
    given = {key: torch.cat([x, other[key]]) for key, x in given.items()}
    shared = support.plan(**given)
    return model, shared, support.graded(model, shared, support.alone(model, given))


@pytest.mark.parametrize("name, route", FORKS)
def test_completions_of_a_prompt_in_rows_of_at_most_three(name, route, monkeypatch):
    """The first prompt has four completions of more than one token: they are in two rows of two."""
    calls = in_rows(monkeypatch, 3)
    model, shared, want = twice(name, torch.float32)
    assert shared.split(3)[1].tolist() == [0, 0, 1, 1, 2, 3]
    support.assert_same(support.through(model, shared, route), want, 1e-5)
    assert calls
    with support.in_double():
        model, shared, want = twice(name, torch.float64)
        support.assert_same(support.through(model, shared, route), want, 1e-10)


@pytest.mark.parametrize("name, route", FORKS)
def test_completions_of_a_prompt_in_a_row_each(name, route, monkeypatch):
    model, shared, want = support.truth(name, torch.float32)
    support.through(model, shared, route)  # the first time tries rows of two as well
    calls = in_rows(monkeypatch, 1)
    support.assert_same(support.through(model, shared, route), want, 1e-5)
    assert not calls


@pytest.mark.parametrize("name", support.HYBRID)
def test_recurrent_layers_have_a_row_for_each_completion(name, monkeypatch):
    calls = in_rows(monkeypatch, 8)
    model, shared, want = support.truth(name, torch.float32)
    support.assert_same(support.through(model, shared, "fork"), want, 1e-5)
    assert not calls


def test_rows_of_the_least_work():
    """Copies of long prompts cost more than masked pairs; masked pairs of long completions cost more."""
    for P, T, per_row in ((2000, 5, 8), (2000, 100, 2), (10, 300, 1)):
        shared = plan(torch.full((1, P), 5), torch.full((8, T), 6), group_size=8)
        assert routes.least_work(shared, 64) == per_row
