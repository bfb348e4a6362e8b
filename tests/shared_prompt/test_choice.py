"""Which route is taken, and what finds a model that is not exact under it: the trial, and `check`."""

import logging

import pytest
import torch
from torch import nn, tensor

pytest.importorskip("transformers", reason="the models are Hugging Face's")
import transformers

from grpo_fast.shared_prompt import check, choose, forward, passes, routes
from grpo_fast.shared_prompt.grouping import plan
from grpo_fast.shared_prompt.routes import Backbone
from grpo_fast.shared_prompt.trial import try_out
from tests.support import shared as support
from tests.support.traps import EXACT, WRONG, group, most_memory, states


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
    """A backbone that ignores some of its inputs, or raises an error for a mask with a row for each token."""

    ignores_masks = ignores_caches = raises = False

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        **options,
    ):
        if getattr(attention_mask, "ndim", 2) != 2:
            if self.raises:
                raise KeyError("what is this")
            if self.ignores_masks:
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


class Renamed(transformers.LlamaModel):
    """A backbone of transformers 5.24 or newer, where the argument `past_key_values` is `cache`."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, cache=None, **options
    ):
        options.pop("past_key_values", None)  # a LlamaForCausalLM before 5.24 passes None
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            **options,
        )


@pytest.mark.parametrize("route", support.ROUTES)
def test_the_cache_may_have_its_new_name(route, ragged):
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(support.config_of("llama")).eval()
    model.model = Renamed(model.config).eval()
    assert routes.cache_argument(model) == "cache"
    want = support.graded(model, ragged, support.alone(model, support.batch()))
    support.assert_same(support.through(model, ragged, route), want, EXACT)


def deaf(masks=False, caches=False, raises=False):
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(support.config_of("llama")).eval()
    model.model = Deaf(model.config).eval()
    model.model.ignores_masks, model.model.ignores_caches = masks, caches
    model.model.raises = raises
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
        model = deaf(raises=True)
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

    def test_sharded_weights(self, ragged):
        wrapper = type("FullyShardedDataParallel", (nn.DataParallel,), {})
        with pytest.raises(TypeError, match=r"shared_prompt\.check: the weights are sharded"):
            check(wrapper(support.build("llama")), ragged)

    def test_without_a_trainable_parameter(self, ragged):
        model = support.build("llama").requires_grad_(False)
        report = check(model, ragged, route="fork", verbose=False)
        assert report.exact
        assert report.gradient == 0


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
