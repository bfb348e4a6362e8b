"""What makes shared prompts wrong, and that the guard against it is needed: without it the result differs."""

import contextlib
import io
import logging

import pytest
import torch
from torch import nn, tensor

pytest.importorskip("transformers", reason="the models are Hugging Face's")
import transformers

from grpo_fast.integrations.transformers import backbone_of
from grpo_fast.shared_prompt import backward, caches, check, choose, forward, masks, passes, routes
from grpo_fast.shared_prompt.plans import plan
from grpo_fast.shared_prompt.routes import ROUTES, Backbone
from grpo_fast.shared_prompt.trial import try_out
from tests.support import shared as support

EXACT, WRONG = 1e-5, 1e-3


def states(model, shared, route):
    """The states of a route without any check of the model."""
    return ROUTES[route](Backbone(model, backbone_of(model)), shared)


def error(model, shared, route):
    """The largest difference of a state from the forward without sharing."""
    with torch.no_grad():
        found = states(model, shared, route) - states(model, shared, "unshared")
    return found.abs().max().item()


def group(P=30, G=4, T=6, **options):
    """A plan for which sharing pays: one prompt of P tokens with G completions of T."""
    draw = torch.Generator().manual_seed(1)
    ids = [
        torch.randint(3, support.VOCABULARY, (n, width), generator=draw)
        for n, width in ((1, P), (G, T))
    ]
    return plan(*ids, group_size=G, **options)


@pytest.fixture
def ragged():
    return plan(**support.batch())


@pytest.fixture
def fresh(monkeypatch):
    """As if no model had been tried and nothing had been logged."""
    monkeypatch.setattr(passes, "_SAID", set())


class TestMasks:
    @pytest.mark.parametrize("name", ["llama", "gemma2"])
    def test_eager_attention_takes_numbers(self, name, ragged, monkeypatch):
        """It adds the mask to the scores: booleans would hide nothing."""
        model = support.build(name, attn_implementation="eager")
        assert error(model, ragged, "mask") < EXACT
        monkeypatch.setattr(masks, "BOOLEAN", ("sdpa", "eager"))
        assert error(model, ragged, "mask") > WRONG

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_forms_of_a_mask(self, dtype, ragged):
        config = support.config_of("llama")
        config._attn_implementation = "sdpa"
        allowed = masks.masks_for(config, ragged.rows, dtype)
        K, S = ragged.rows.ids.shape
        assert (allowed.shape, allowed.dtype) == ((K, 1, S, S), torch.bool)
        config._attn_implementation = "eager"
        added = masks.masks_for(config, ragged.rows, dtype)
        assert added.dtype == dtype
        zero = torch.zeros((), dtype=dtype)
        want = torch.where(allowed, zero, torch.finfo(dtype).min)
        torch.testing.assert_close(added, want, rtol=0, atol=0)
        assert not hasattr(config, "grpo_fast_attention")
        assert config._attn_implementation == "eager"

    @pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
    def test_the_block_mask_is_the_dense_mask(self, name, ragged):
        """Also with more tokens than a block has."""
        config = support.config_of(name)
        wide = torch.arange(200).view(2, 100) % support.VOCABULARY
        live = torch.arange(100) >= tensor([[0], [80]])
        long = plan(wide, torch.ones(6, 40).long(), group_size=3, prompt_mask=live)
        for shared in (ragged, long):
            dense, blocks = [], []
            for attention, found in (("sdpa", dense), ("flex_attention", blocks)):
                config._attn_implementation = attention
                made = masks.masks_for(config, shared.rows, torch.float32)
                found.extend(made.items() if isinstance(made, dict) else [("all", made)])
            K, S = shared.rows.ids.shape
            index = [
                x.flatten() for x in torch.meshgrid(*map(torch.arange, (K, S, S)), indexing="ij")
            ]
            for (kind, want), (same, block) in zip(dense, blocks, strict=True):
                assert kind == same
                got = block.mask_mod(index[0], torch.zeros_like(index[0]), index[1], index[2])
                torch.testing.assert_close(got.view(K, 1, S, S), want, rtol=0, atol=0)
                tiles = block.to_dense()[:, :1].bool()
                wide = nn.functional.pad(want, (0, -S % 128, 0, -S % 128))
                any_seen = wide.view(K, 1, wide.shape[2] // 128, 128, -1, 128).any(5).any(3)
                torch.testing.assert_close(tiles, any_seen, rtol=0, atol=0)

    @pytest.mark.parametrize("name", support.WINDOWED)
    def test_windows_count_places_in_a_sequence(self, name, ragged):
        """The second completion of a row is far from its prompt in the row, but not in its sequence."""
        model = support.build(name)
        assert error(model, ragged, "mask") < EXACT
        K, S = ragged.rows.ids.shape
        vars(ragged)["rows"] = ragged.rows._replace(depth=torch.arange(S).expand(K, S))
        assert error(model, ragged, "mask") > WRONG

    def test_positions_that_start_elsewhere_do_not_move_windows(self):
        given = support.batch()
        positions = 3 * (given["prompt_mask"].cumsum(1) - 1).clamp(min=0)  # 0, 3, 6, ...
        shared = plan(**given, prompt_positions=positions)
        assert error(support.build("mistral"), shared, "mask") < EXACT

    def test_positions_that_start_again_are_no_new_sequence(self, monkeypatch):
        """transformers takes them for packed sequences, if it has no mask of padding."""
        live = torch.arange(6) < tensor([[2], [6], [6], [6]])
        model, shared = support.build("llama"), group(completion_mask=live)
        assert error(model, shared, "mask") < EXACT
        own = masks.create_masks_for_generate

        def without_padding(config, embeds, padding, *rest):
            return own(config, embeds, None, *rest)

        monkeypatch.setattr(masks, "create_masks_for_generate", without_padding)
        assert error(model, shared, "mask") > WRONG

    def test_completions_do_not_see_each_other(self, ragged):
        model = support.build("llama")
        rows = ragged.rows
        vars(ragged)["rows"] = rows._replace(last=rows.last.clamp(max=4) * 0 + 4)
        assert error(model, ragged, "mask") > WRONG


@contextlib.contextmanager
def said_by_transformers():
    """What transformers logs."""
    logger, stream = logging.getLogger("transformers"), io.StringIO()
    handler, level = logging.StreamHandler(stream), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        yield stream
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class TestCaches:
    @pytest.mark.parametrize("route", ["fork", "bounded"])
    @pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_next"])
    def test_checkpointing_of_transformers_drops_the_cache(self, name, route, ragged, monkeypatch):
        model = support.build(name)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        transformers.utils.logging.warning_once.cache_clear()
        with said_by_transformers() as stream:
            want, got = states(model, ragged, "unshared"), states(model, ragged, route)
        torch.testing.assert_close(got, want, rtol=0, atol=EXACT)
        assert "use_cache" not in stream.getvalue()
        monkeypatch.setattr(routes, "asks_for_recomputation", lambda model: None)
        with said_by_transformers() as stream, contextlib.suppress(Exception):
            found = states(model, ragged, route)
            assert (found - want).abs().max() > WRONG
        assert "use_cache" in stream.getvalue()

    @pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text"])
    def test_states_that_are_overwritten_break_autograd(self, name, ragged, monkeypatch):
        model = support.build(name)
        states(model, ragged, "fork").sum().backward()
        monkeypatch.setattr(caches, "_assign_states", lambda layer: None)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            states(model, ragged, "fork").sum().backward()

    @pytest.mark.parametrize("name", support.MODELS)
    def test_one_token_after_the_prompt(self, name):
        """Completions of two tokens: one of them goes through the model after the cache."""
        given = support.batch()
        given["completion_ids"] = given["completion_ids"][:, :2]
        given["completion_mask"] = given["completion_mask"][:, :2]
        shared, model = plan(**given), support.build(name)
        want = support.graded(model, shared, support.alone(model, given))
        for route in support.routes_of(name):
            support.assert_same(support.through(model, shared, route), want, EXACT)

    def test_the_code_of_models_for_one_token_works_in_place(self, monkeypatch):
        shared, model = group(P=5, G=3, T=2), support.build("falcon_h1")
        states(model, shared, "fork").sum().backward()
        monkeypatch.setattr(routes, "_wide", lambda x, width: x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            states(model, shared, "fork").sum().backward()

    def test_a_cache_is_not_changed_by_completions(self, ragged):
        for name in ("llama", "mistral", *support.HYBRID):
            backbone = Backbone(model := support.build(name), backbone_of(model))
            with torch.no_grad():
                last, cache = routes.prompts(backbone, ragged)
                before = [x.clone() for x in caches.states(cache)]
                first, second = (
                    routes.completions(backbone, ragged, last, cache) for _ in range(2)
                )
            torch.testing.assert_close(first, second, rtol=0, atol=0)
            for x, y in zip(caches.states(cache), before, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=0)
            assert before


def refusal(model, shared, route):
    with pytest.raises(ValueError) as found:
        forward(model, shared, route=route)
    message = str(found.value)
    assert message.startswith(f"shared_prompt: route={route!r}: ")
    return message


class TestRefused:
    @pytest.mark.parametrize("name", support.HYBRID)
    def test_a_mask_for_layers_with_a_state(self, name, ragged):
        model = support.build(name)
        for route in ("mask", "flex"):
            found = refusal(model, ragged, route)
            assert f"{type(model).__name__} has layers with a state" in found
        assert choose(model, group()).route == "fork"
        # And rightly: a state goes on from one completion to the next.
        assert error(model, ragged, "mask") > WRONG

    def test_a_mask_for_flash_attention(self, ragged):
        model = support.build("llama")
        model.config._attn_implementation = "flash_attention_2"
        assert "the model has attn_implementation='flash_attention_2'" in refusal(
            model, ragged, "mask"
        )
        assert "it needs attn_implementation='flex_attention'" in refusal(model, ragged, "flex")
        found = choose(model, group())
        assert found.route == "fork"
        assert "not mask: the model has attn_implementation='flash_attention_2'" in found.reason

    @pytest.mark.parametrize("route", ["mask", "fork", "bounded"])
    @pytest.mark.parametrize(
        "name, options, message",
        [
            (
                "llama",
                {"attention_dropout": 0.1},
                "attention_dropout 0.1 in model.layers.0.self_attn",
            ),
            ("gpt2", {"embd_pdrop": 0.2}, "dropout 0.2 in transformer.drop"),
            ("mixtral", {"router_jitter_noise": 0.01}, "jitter_noise 0.01 in model.layers.0.mlp"),
        ],
    )
    def test_dropout(self, name, options, message, route, ragged):
        """In training only: completions of one prompt would have the same dropout of it."""
        model = support.build(name, **options)
        assert error(model, ragged, route) < EXACT
        assert choose(model, ragged, route).route == route
        model.train()
        assert message in refusal(model, ragged, route)
        found = choose(model, group())
        assert (found.route, message in found.reason) == ("unshared", True)
        with pytest.raises(ValueError, match=f"route='fork': .*{message}"):
            support.streamed(model, ragged)

    def test_dropout_of_adapters(self, ragged):
        peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
        config = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"])
        model = peft.get_peft_model(support.build("llama"), config)
        assert "dropout 0.1 in base_model.model.model.layers.0" in refusal(model, ragged, "mask")
        model.eval()
        forward(model, ragged, route="mask")

    def test_adapters_that_look_for_tokens(self, ragged):
        peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
        options = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [7]}
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], **options)
        model = peft.get_peft_model(support.build("llama"), config).eval()
        for route in ("auto", "unshared", "packed"):
            with pytest.raises(ValueError, match=r"aLoRA .* looks for its invocation tokens"):
                forward(model, ragged, route=route)

    @pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning"])
    def test_virtual_tokens(self, kind, ragged):
        peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
        config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(support.build("llama"), config).eval()
        want = f"{kind}Config puts virtual tokens before the prompt"
        for route in ("mask", "fork", "bounded"):
            assert want in refusal(model, ragged, route)
        assert want in choose(model, group()).reason

    def test_an_auxiliary_loss_of_experts(self, ragged):
        model = support.build("mixtral", output_router_logits=True)
        assert "config.output_router_logits=True" in refusal(model, ragged, "mask")
        model.config.output_router_logits = False
        forward(model, ragged, route="mask")

    def test_positions_beyond_a_table(self):
        model = support.build("gpt2", n_positions=16)
        ids, completions = torch.ones(2, 9).long(), torch.ones(2, 7).long()
        forward(model, plan(ids, completions), route="fork")  # the last is position 15
        positions = torch.arange(1, 10).expand(2, 9)
        found = refusal(model, plan(ids, completions, prompt_positions=positions), "fork")
        assert "position 16 is not among the model's 16 (max_position_embeddings)" in found
        llama = support.build("llama", max_position_embeddings=16)  # rotations go on
        forward(llama, plan(ids, completions, prompt_positions=positions), route="fork")

    @pytest.mark.parametrize("route", ["unshared", *support.ROUTES])
    def test_positions_of_padding_need_no_table(self, route):
        """A long prompt with a short completion, beside a short one with a long one."""
        given = {
            "prompt_ids": torch.arange(3, 23).view(2, 10),
            "prompt_mask": torch.arange(10) >= tensor([[0], [8]]),
            "completion_ids": torch.arange(3, 23).view(2, 10),
            "completion_mask": torch.arange(10) < tensor([[2], [10]]),
        }
        model, shared = support.build("gpt2", n_positions=12), plan(**given)
        want = support.graded(model, shared, support.alone(model, given))
        support.assert_same(support.through(model, shared, route), want, EXACT)

    def test_a_token_beyond_the_vocabulary(self):
        with pytest.raises(ValueError, match="plan: token 61 is not among the model's 61"):
            forward(support.build("llama"), plan(tensor([[5]]), tensor([[61]])))

    def test_another_device(self, ragged):
        class Elsewhere:
            device = torch.device("cuda")

        model = support.build("llama")
        model.get_input_embeddings = lambda: type("E", (), {"weight": Elsewhere})()
        with pytest.raises(ValueError, match="its tensors are on cpu and the model is on cuda"):
            forward(model, ragged)

    def test_other_names(self, ragged):
        model = support.build("llama")
        with pytest.raises(ValueError, match=r"want auto, unshared, packed, mask.*got 'forks'"):
            forward(model, ragged, route="forks")
        with pytest.raises(TypeError, match="plan: want a Plan, got tuple"):
            forward(model, (ragged,))
        for size in (0, True, 1.5):
            with pytest.raises(ValueError, match="micro_batch: want a positive integer"):
                forward(model, ragged, route="bounded", micro_batch=size)

    def test_a_plan_without_completions(self):
        nothing = plan(torch.ones(0, 3).long(), torch.ones(0, 2).long())
        with pytest.raises(ValueError, match="shared_prompt: plan: it has no completions"):
            forward(support.build("llama"), nothing)

    def test_wrappers_that_count_backward_passes(self, ragged):
        model = nn.DataParallel(support.build("llama"))
        with pytest.raises(TypeError, match="DataParallel needs one backward for each forward"):
            backward(model, ragged, lambda hidden, head, part: hidden.sum())


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [4.0, 3.0, 2.0, 1.0],
    "original_max_position_embeddings": 12,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}


class TestRotations:
    """Rotary positions whose frequencies depend on how long the whole sequence is."""

    def batch(self, P, T):
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(3, support.VOCABULARY, (4, P + T), generator=draw)
        given = {"prompt_ids": ids[:1, :P].expand(4, P), "completion_ids": ids[:, P:]}
        return given | {"prompt_mask": torch.ones(4, P), "completion_mask": torch.ones(4, T)}

    def build(self, kind):
        if kind == "longrope":
            return support.build("phi3", rope_parameters=dict(LONGROPE), **PHI3)
        return support.build("llama", rope_parameters=dict(DYNAMIC), max_position_embeddings=12)

    @pytest.mark.parametrize(
        "kind, P, T, possible",
        [
            ("longrope", 5, 7, support.ROUTES),
            ("longrope", 9, 7, ("packed", "mask")),  # more than 12 tokens with the completion only
            ("longrope", 9, 4, ()),  # more than 12 with its last token only
            ("longrope", 12, 4, ("packed", "mask")),
            ("longrope", 13, 6, support.ROUTES),
            ("dynamic", 5, 7, support.ROUTES),
            ("dynamic", 9, 7, ()),
            ("dynamic", 13, 6, ()),
        ],
    )
    def test_the_number_of_tokens(self, kind, P, T, possible):
        """Routes that run fewer tokens at a time are refused where it matters, and the others are exact."""
        given = self.batch(P, T)
        shared = plan(**given)
        model = self.build(kind)
        want = support.graded(model, shared, support.alone(model, given))
        for route in ("unshared", *support.ROUTES):
            model = self.build(kind)  # it keeps the frequencies of the longest sequence so far
            if route in (*possible, "unshared"):
                support.assert_same(support.through(model, shared, route), want, EXACT)
                continue
            found = (
                f"rotary positions of type '{kind}' depend on .* beyond 12: the longest .* {P + T}"
            )
            with pytest.raises(ValueError, match=found):
                support.through(model, shared, route)
            if route != "backward":
                assert error(self.build(kind), shared, route) > WRONG / 5

    def test_a_short_prompt_beside_a_long_one(self):
        """Parts of short sequences would have the short frequencies, with prompts of the long ones."""
        given = self.batch(14, 6)
        given["prompt_mask"] = torch.arange(14) >= tensor([[0], [0], [9], [9]])
        shared = plan(**given)
        model = self.build("longrope")
        for route in ("fork", "bounded"):
            assert "rotary positions of type 'longrope'" in refusal(model, shared, route)
        want = support.graded(model, shared, support.padded(model, given))
        for route in ("packed", "mask"):
            support.assert_same(support.through(model, shared, route), want, EXACT)
        with torch.no_grad():
            found = routes.bounded(Backbone(model, model.model), shared, 2)
            found = found - states(model, shared, "unshared")
        assert found.abs().max() > WRONG


PHI3 = {"original_max_position_embeddings": 12, "max_position_embeddings": 48}


class TestAuto:
    def test_what_is_shared(self):
        model = support.build("llama")
        found = choose(model, group())
        assert found.route == "mask"
        assert "144 tokens padded, 54 different ones" in found.reason
        assert choose(model, group(), "fork") == ("fork", "it was asked for")
        assert choose(support.build("lfm2"), group(P=60)).route == "fork"

    def test_batches_that_share_too_little(self):
        """A row without padding needs less than they do; a mask, or a second pass, is not worth its work."""
        masked = support.build("llama", attn_implementation="eager")
        for shared in (group(P=4, G=8, T=40), group(G=1)):
            found = choose(masked, shared)
            assert found.route == "unshared"
            assert "times the work" in found.reason
        model = support.build("llama")
        assert choose(model, group(P=4, G=8, T=40)).route == "packed"
        assert choose(model, group(G=1)).route == "unshared"

    def test_masks_that_are_too_large(self, monkeypatch):
        model, shared = support.build("llama"), group()
        monkeypatch.setattr("grpo_fast.shared_prompt.choice.LARGEST_MASK", 100)
        assert choose(model, shared).route != "mask"

    def test_short_rows_do_not_take_flex_attention(self, monkeypatch):
        model = support.build("llama", attn_implementation="flex_attention")
        with torch.no_grad():  # it has no backward on a CPU
            assert choose(model, group()).route == "fork"
            monkeypatch.setattr("grpo_fast.shared_prompt.choice.SHORTEST_FLEX", 1)
            assert choose(model, group()).route == "flex"

    def test_a_warning_says_once_why_not(self, fresh, caplog):
        model = support.build("llama", attention_dropout=0.1).train()
        with caplog.at_level(logging.INFO, "grpo_fast.shared_prompt"):
            for P in (30, 31, 31):
                forward(model, group(P=P))
        assert [x.levelname for x in caplog.records] == ["WARNING"]
        assert "shared prompts: unshared: attention_dropout 0.1 in model" in caplog.text
        caplog.clear()
        with caplog.at_level(logging.INFO, "grpo_fast.shared_prompt"):
            for P in (30, 31):
                forward(model.eval(), group(P=P))
        assert [x.levelname for x in caplog.records] == ["INFO"]
        assert "shared prompts: mask: " in caplog.text


class Deaf(transformers.LlamaModel):
    """A backbone that ignores some of its inputs."""

    ignores_masks = ignores_caches = False

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        **options,
    ):
        if self.ignores_masks and getattr(attention_mask, "ndim", 2) != 2:
            attention_mask = None
        if self.ignores_caches and past_key_values is not None:
            past_key_values, attention_mask = None, None
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **options,
        )


class Raising(Deaf):
    """A backbone that raises an error for a mask with a row for each token."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        **options,
    ):
        if getattr(attention_mask, "ndim", 2) != 2:
            raise KeyError("what is this")
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **options)


def deaf(masks=False, caches=False, kind=Deaf):
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(support.config_of("llama")).eval()
    model.model = kind(model.config).eval()
    model.model.ignores_masks, model.model.ignores_caches = masks, caches
    return model


class TestModelsThatDoItOtherwise:
    """A comparison of a few tokens finds models whose own code is not exact under a route."""

    @pytest.mark.parametrize("route", support.ROUTES)
    def test_a_route_that_was_asked_for(self, route, ragged):
        masked = route in ("packed", "mask")
        model = deaf(masks=masked, caches=not masked)
        name = "shared_prompt.backward|route='fork'" if route == "backward" else f"route={route!r}"
        for _ in range(2):  # also when it is known
            with pytest.raises(
                ValueError, match=f"({name}).*LlamaForCausalLM differ from.*not exact"
            ):
                support.through(model, ragged, route)
        other = "fork" if masked else "mask"
        given = support.batch()
        want = support.graded(model, ragged, support.alone(model, given))
        support.assert_same(support.through(model, ragged, other), want, EXACT)

    def test_auto_takes_the_next_route(self, fresh, caplog):
        model, shared = deaf(masks=True), group()
        assert choose(model, shared).route == "mask"
        with torch.no_grad(), caplog.at_level(logging.INFO, "grpo_fast.shared_prompt"):
            got = forward(model, shared)
        torch.testing.assert_close(got, states(model, shared, "unshared"), rtol=0, atol=EXACT)
        assert "shared prompts: fork: " in caplog.text
        assert "not mask: the states of LlamaForCausalLM differ" in choose(model, shared).reason

    def test_auto_gives_up(self, fresh, caplog):
        model, shared = deaf(masks=True, caches=True), group()
        with torch.no_grad(), caplog.at_level(logging.INFO, "grpo_fast.shared_prompt"):
            got = forward(model, shared)
        torch.testing.assert_close(got, states(model, shared, "unshared"), rtol=0, atol=0)
        assert [x.levelname for x in caplog.records] == ["WARNING"]
        assert "differ from those of its unshared forward" in caplog.text

    def test_code_that_raises(self, ragged):
        model = deaf(kind=Raising)
        for route in ("packed", "mask"):
            with pytest.raises(
                ValueError, match="LlamaForCausalLM raises KeyError: 'what is this'"
            ):
                forward(model, ragged, route=route)
        assert choose(model, group()).route == "fork"

    def test_it_is_compared_once(self, ragged):
        model, calls = support.build("llama"), []
        model.model.register_forward_hook(lambda *_: calls.append(1))
        forward(model, ragged, route="mask")
        assert len(calls) == 3
        forward(model, ragged, route="mask")
        assert len(calls) == 4

    def test_flex_attention_may_run_uncompiled(self):
        """It says so, but here it is meant to."""
        model = support.build("llama", attn_implementation="flex_attention")
        assert try_out(Backbone(model, model.model), "flex") is None

    def test_it_changes_nothing(self, ragged):
        """Not the random numbers, nor gradients, nor the configuration."""
        model = support.build("mistral")
        before = model.config.to_dict()
        torch.manual_seed(7)
        want = torch.rand(3)
        torch.manual_seed(7)
        forward(model, ragged, route="mask")
        torch.testing.assert_close(torch.rand(3), want, rtol=0, atol=0)
        assert model.config.to_dict() == before
        assert all(x.grad is None for x in model.parameters())


class TestCheck:
    @pytest.mark.parametrize("route", ["auto", "packed", "mask", "fork", "bounded"])
    def test_an_exact_model(self, route, capsys):
        model, shared = support.build("mistral"), group()
        for x in model.parameters():
            x.grad = torch.ones_like(x)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        report = check(model, shared, route=route)
        assert report.exact
        assert report.cause is None
        assert report.route == (route if route != "auto" else "mask")
        assert capsys.readouterr().out == f"{report}\n"
        assert "within the tolerance of 1.0e-05" in str(report)
        assert max(report.log_prob, report.gradient, report.by_padding) < 1e-5
        for name, x in model.state_dict().items():
            torch.testing.assert_close(x, before[name], rtol=0, atol=0)
        for x in model.parameters():
            torch.testing.assert_close(x.grad, torch.ones_like(x), rtol=0, atol=0)

    def test_a_wrong_model(self, ragged, monkeypatch, capsys):
        """Where the comparison of a few tokens does not find it."""
        monkeypatch.setattr(passes, "try_out", lambda *arguments: None)
        report = check(deaf(caches=True), ragged, route="fork")
        assert not report.exact
        assert min(report.log_prob, report.gradient) > WRONG
        assert report.by_padding < EXACT
        assert report.cause.startswith("unknown: the code of this model")
        assert f"beyond the tolerance of 1.0e-05: {report.cause}" in capsys.readouterr().out

    def test_a_wrong_gradient(self, ragged, monkeypatch):
        """Log-probs that agree do not hide it."""
        own = routes.ROUTES["fork"]

        def half(*given, **options):
            x = own(*given, **options)
            return x / 2 + x.detach() / 2

        monkeypatch.setitem(routes.ROUTES, "fork", half)
        report = check(support.build("llama"), ragged, route="fork", verbose=False)
        assert report.log_prob < EXACT
        assert report.gradient > 0.1
        assert not report.exact

    def test_dropout_is_named(self):
        model = support.build("llama", attention_dropout=0.3).train()
        report = check(model, group(), verbose=False)
        assert (report.route, report.exact) == ("unshared", False)
        assert "dropout 0.3" in report.cause

    def test_rounding_of_half_precision(self, ragged):
        report = check(support.build("llama").bfloat16(), ragged, route="fork", verbose=False)
        assert report.tolerance > 0.1
        assert report.exact

    def test_without_a_target(self):
        empty = plan(tensor([[5]]), tensor([[6]]), completion_mask=tensor([[0]]))
        with pytest.raises(ValueError, match=r"shared_prompt\.check: plan: it has no targets"):
            check(support.build("llama"), empty)

    def test_without_a_trainable_parameter(self, ragged):
        model = support.build("llama").requires_grad_(False)
        report = check(model, ragged, route="fork", verbose=False)
        assert report.exact
        assert report.gradient == 0


def most_memory(function):
    """The most bytes that a function has allocated at a time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    events = [x for x in found.profiler.kineto_results.events() if x.name() == "[memory]"]
    sizes = tensor([x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())])
    return sizes.cumsum(0).max().item()


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
def test_few_completions_at_a_time_need_less_memory(recompute):
    model, shared = support.build("llama"), group(P=16, G=16, T=24)
    used = {}
    for route in ("fork", "bounded", "backward"):
        support.through(model, shared, route)
        used[route] = most_memory(
            lambda route=route: support.through(model, shared, route, recompute=recompute)
        )
    assert used["bounded"] < (0.75 if recompute else 0.5) * used["fork"]
    assert used["backward"] < (0.75 if recompute else 0.5) * used["fork"]
