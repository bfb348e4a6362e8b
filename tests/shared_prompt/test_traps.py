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
from grpo_fast.shared_prompt import caches, masks, routes
from grpo_fast.shared_prompt.grouping import plan
from grpo_fast.shared_prompt.routes import Backbone
from tests.support import shared as support
from tests.support.traps import EXACT, WRONG, error, group, refusal, states


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
        with said_by_transformers() as stream:
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
