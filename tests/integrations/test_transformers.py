"""Hidden states and head of real architectures, held against their own logits."""

import importlib.util

import pytest
import torch
from torch import nn

from grpo_fast import Objective
from grpo_fast.integrations.transformers import (
    causal_lm,
    check_head,
    head_of,
    hidden_states,
    inside_forward,
    with_head,
)
from grpo_fast.loss import grpo_loss, linear_grpo_loss
from grpo_fast.ops import logprob
from tests.support import ranks
from tests.support.architectures import COMMON, MODELS, batch, build, config_of, spread_out

transformers = pytest.importorskip("transformers", reason="the models are Hugging Face's")
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="the adapters are PEFT's"
)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model(name):
    model = build(name)
    ids, mask = batch()
    want = model(input_ids=ids, attention_mask=mask).logits
    head = head_of(model)
    got = head.logits(hidden_states(model, ids, mask))
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-5, atol=1e-6)
    assert head.weight is model.get_output_embeddings().weight
    assert (want.max() - want.min()) > 1e-2
    check_head(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("name", ["Granite", "Gemma2"])
def test_half_precision_passes_the_check(name):
    check_head(build(name).bfloat16())


@pytest.mark.parametrize("name", ["Qwen2", "Qwen2-tied", "Gemma2", "Cohere", "Phi"])
def test_gradients_are_those_of_the_model(name):
    model = build(name)
    ids, mask = batch()
    T = 4

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    upstream = torch.randn(3, T, 61)
    want = gradients(
        (model(input_ids=ids, attention_mask=mask).logits[:, -T - 1 : -1] * upstream).sum()
    )
    got = gradients(
        with_head(model, lambda h, head: (head.logits(h) * upstream).sum(), ids, mask, last=T)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_the_fused_loss_trains_the_model_alike(name):
    """Loss and gradients of all parameters, head and embedding included, as from the model's own logits."""
    model = build(name)
    ids, mask = batch()
    T = 4
    completions, live = ids[:, -T:], mask[:, -T:]
    given = {
        "advantages": torch.tensor([1.0, -0.5, 2.0]),
        "mask": live,
        "ref_logps": torch.full((3, T), -4.0),
        "objective": Objective(beta=0.1, entropy_coef=0.05),
    }
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -T - 1 : -1]
        given["old_logps"] = logprob(logits, completions) + 0.3 * torch.randn(3, T)

    def trained(loss):
        model.zero_grad()
        loss.backward()
        return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    whole = model(input_ids=ids, attention_mask=mask).logits[:, -T - 1 : -1]
    plain = grpo_loss(whole, completions, **given).loss
    want = trained(plain)

    def function(hidden, head):
        return linear_grpo_loss(hidden, head.weight, completions, **head.options, **given).loss

    fused = with_head(model, function, ids, mask, last=T)
    got = trained(fused)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    assert got.keys() == want.keys() == {key for key, _ in model.named_parameters()}
    for key, x in want.items():
        # A key's bias moves all scores of a softmax alike: what is left of its gradient is rounding.
        scale = max(x.abs().max().item(), 1e-3)
        assert (got[key] - x).abs().max() <= 1e-5 * scale, key


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_text_part_of_a_vision_language_model(softcap):
    config = transformers.Gemma3Config(
        text_config=COMMON | {"final_logit_softcapping": softcap},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=58,
        eoi_token_index=59,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    spread_out(model)
    if softcap is not None:  # transformers 5.23 has it in the configuration, but does not apply it
        with pytest.raises(ValueError, match="Gemma3ForConditionalGeneration: its logits are not"):
            check_head(model)
        return
    ids, mask = batch()
    ids = ids.clamp(max=57)
    want = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    head = head_of(model)
    check_head(model)
    got = head.logits(hidden_states(model, ids, mask))[mask.bool()]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


class Wrapper(nn.Module):
    """A wrapper like DDP: it calls the module inside, and does something besides."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


def test_runs_inside_the_forwards_of_wrappers_and_head():
    model = build("Qwen2")
    outer = Wrapper(model)
    ids, mask = batch()
    seen = []
    for name, module in (("model", model), ("head", model.lm_head)):
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(f"before {name}"))
        module.register_forward_hook(lambda *_, name=name: seen.append(f"after {name}"))

    def function(hidden, head):
        seen.append("function")
        return head.logits(hidden), {"hidden": hidden}

    logits, rest = with_head(outer, function, ids, mask, last=3)
    assert seen == ["before model", "before head", "function", "after head", "after model"]
    assert outer.calls == 1
    assert rest["hidden"].shape == (3, 3, 32)
    torch.testing.assert_close(
        logits, model(input_ids=ids, attention_mask=mask).logits[:, -4:-1], rtol=1e-5, atol=1e-6
    )
    assert causal_lm(outer) is model


def test_the_forward_comes_back_after_an_error():
    model = build("Qwen2")
    ids, mask = batch()
    with pytest.raises(ZeroDivisionError):
        with_head(model, lambda hidden, head: 1 / 0, ids, mask)
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.lm_head)
    replaced = model.forward = lambda *args, **kwargs: None  # someone else's, on the instance
    assert inside_forward(model, lambda lm: "ours") == "ours"
    assert model.forward is replaced


def test_accelerate_hooks_stay_in_place():
    """A model spread over devices: the hooks that move tensors still run."""
    hooks = pytest.importorskip("accelerate.hooks", reason="the hooks are accelerate's")
    model = build("Qwen2")
    ids, mask = batch()
    want = model(input_ids=ids, attention_mask=mask).logits
    moved = []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            moved.append(type(module).__name__)
            return args, kwargs

    hooks.add_hook_to_module(model, Hook())
    hooks.add_hook_to_module(model.lm_head, Hook())
    got = with_head(model, lambda hidden, head: head.logits(hidden), ids, mask)
    assert moved == ["Qwen2ForCausalLM", "Linear"]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_hyperclovax_multiplies():
    model = build("Granite")
    model.config.model_type = "hyperclovax"
    assert head_of(model).logit_scale == 6.0


class TestRefused:
    def test_a_factor_that_the_configuration_does_not_tell(self):
        model = build("Qwen2").train()
        model.model.norm.eval()
        model.config.logit_scale = 1.01  # as if Qwen2 had left it out
        with pytest.raises(ValueError, match="its logits are not those of its last hidden states"):
            check_head(model)
        assert model.training  # as it was
        assert not model.model.norm.training

    def test_a_head_that_is_not_linear(self):
        model = build("Qwen2")
        model.set_output_embeddings(nn.Sequential(model.lm_head))
        with pytest.raises(TypeError, match=r"head that is a torch\.nn\.Linear"):
            head_of(model)

    def test_something_else(self):
        with pytest.raises(TypeError, match="want a Hugging Face causal LM"):
            head_of(nn.Linear(2, 2))

    def test_no_backbone(self):
        model = build("GPT2")
        model.base_model_prefix = ""
        with pytest.raises(TypeError, match="no backbone"):
            hidden_states(model, *batch())

    def test_a_backbone_under_its_usual_name(self):
        """Llama 4's text model names another attribute, which only the multimodal model has."""
        model, inputs = build("Qwen2"), batch()
        want = hidden_states(model, *inputs)
        model.base_model_prefix = "language_model"
        torch.testing.assert_close(hidden_states(model, *inputs), want, rtol=0, atol=0)

    @pytest.mark.parametrize("last", [0, 9])
    def test_tokens_without_a_predecessor(self, last):
        with pytest.raises(ValueError, match=f"last={last}"):
            with_head(build("Qwen2"), lambda hidden, head: hidden, *batch(), last=last)


@needs_peft
@pytest.mark.filterwarnings("ignore")
class TestPeft:
    def lora(self, model, **options):
        import peft

        lora = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **options))
        return lora.eval()

    @pytest.mark.parametrize("name", ["Qwen2", "Gemma2", "GPT2"])
    def test_logits_are_those_of_the_adapted_model(self, name):
        model = build(name)
        ids, mask = batch()
        plain = model(input_ids=ids, attention_mask=mask).logits
        adapted = self.lora(model)
        want = adapted(input_ids=ids, attention_mask=mask).logits
        assert (want - plain).abs().max() > 1e-3
        head = head_of(adapted)
        assert not head.weight.requires_grad
        got = head.logits(hidden_states(adapted, ids, mask))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        with adapted.disable_adapter():
            got = with_head(adapted, lambda hidden, head: head.logits(hidden), ids, mask)
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-6)

    def test_a_trainable_copy_of_the_head(self):
        adapted = self.lora(build("Qwen2"), modules_to_save=["lm_head"])
        with torch.no_grad():
            adapted.get_base_model().lm_head.modules_to_save["default"].weight.mul_(-2)
        ids, mask = batch()
        want = adapted(input_ids=ids, attention_mask=mask).logits
        assert head_of(adapted).weight.requires_grad
        got = with_head(adapted, lambda hidden, head: head.logits(hidden), ids, mask)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        with adapted.disable_adapter():
            want = adapted(input_ids=ids, attention_mask=mask).logits
            got = with_head(adapted, lambda hidden, head: head.logits(hidden), ids, mask)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning", "PromptEncoder"])
    def test_virtual_tokens(self, kind):
        import peft

        size = {"encoder_hidden_size": 8} if kind == "PromptEncoder" else {}
        config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=3, **size)
        model = build("Qwen2")
        ids, mask = batch()
        plain = model(input_ids=ids, attention_mask=mask).logits
        adapted = peft.get_peft_model(model, config).eval()
        want = adapted(input_ids=ids, attention_mask=mask).logits[:, -4:-1]
        assert (want - plain[:, -4:-1]).abs().max() > 1e-3
        got = with_head(adapted, lambda hidden, head: head.logits(hidden), ids, mask, last=3)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        with adapted.disable_adapter():
            got = with_head(adapted, lambda hidden, head: head.logits(hidden), ids, mask)
            held = adapted.forward
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-6)
        assert held == model.forward
        assert "forward" not in vars(model)

    def test_an_adapter_on_the_head_is_refused(self):
        adapted = self.lora(build("Qwen2"), target_modules=["q_proj", "lm_head"])
        with pytest.raises(TypeError, match="an adapter on the head"):
            head_of(adapted)


def shard_on_a_rank(tied):
    """FSDP2 in two processes: gradients are those of one process on the whole batch."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    ranks.join()
    rank = dist.get_rank()
    torch.manual_seed(0)
    config = config_of("Qwen2", {"tie_word_embeddings": tied})
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids, upstream = torch.randint(2, 61, (4, 9)), torch.randn(4, 3, 61)

    def loss_of(rows):
        def loss(hidden, head):
            assert type(head.weight) is not DTensor
            assert head.weight.shape == (61, 32)
            return (head.logits(hidden) * upstream[rows]).sum()

        return with_head(model, loss, ids[rows], last=3)

    (loss_of(slice(0, 4)) / 2).backward()  # FSDP takes the mean over processes
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for layer in model.model.layers:
        fully_shard(layer)
    if not tied:
        fully_shard(model.lm_head)  # a group of its own: gathered by the head's own hooks
    fully_shard(model)
    with pytest.raises(ValueError, match="the head's weight is sharded"):
        head_of(model)
    for _ in range(2):  # also once the first forward has set FSDP up
        model.zero_grad()
        loss_of(slice(2 * rank, 2 * rank + 2)).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad.full_tensor(), want[name], rtol=1e-4, atol=1e-6)


def test_sharded_over_two_processes():
    """Heads that are tied, and not."""
    ranks.run_each("tests.integrations.test_transformers:shard_on_a_rank", 2, [[False], [True]])
