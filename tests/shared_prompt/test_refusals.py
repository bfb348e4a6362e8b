"""Models and inputs that shared prompts refuse: the error names the reason, and `auto` does not share."""

import pytest
import torch
from torch import nn, tensor

pytest.importorskip("transformers", reason="the models are Hugging Face's")

from grpo_fast.shared_prompt import backward, choose, forward
from grpo_fast.shared_prompt.grouping import plan
from tests.support import shared as support
from tests.support.traps import EXACT, WRONG, error, group, refusal


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
