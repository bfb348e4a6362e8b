"""Heads that are wrapped, compiled or quantised, and heads of another dtype than the hidden states."""

import importlib.util
import warnings

import pytest
import torch
from torch import nn

from grpo_fast import notices
from grpo_fast.integrations.transformers import check_head, head_of, hidden_states, with_head
from grpo_fast.ops import linear_logprob
from grpo_fast.testing import assert_as_accurate
from tests.support.architectures import T, batch, build, fused_loss, gradients, spread_out

transformers = pytest.importorskip("transformers", reason="the models are Hugging Face's")
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="the adapters are PEFT's"
)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    notices.forget()
    yield
    torch._dynamo.reset()


def assert_trains_alike(wrapped, plain):
    """Loss, gradients and log-probs are those of the model that is not wrapped; nothing stays replaced."""
    ids, mask = batch()
    loss, want = (fused_loss(model, ids, mask) for model in (wrapped, plain))
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-7)
    got, grads = gradients(wrapped, loss), gradients(plain, want)
    assert len(got) == len(grads)
    for a, b in zip(got.values(), grads.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    check_head(wrapped)
    with torch.no_grad():
        logits = wrapped(input_ids=ids, attention_mask=mask).logits
        mine = head_of(wrapped).logits(hidden_states(wrapped, ids, mask))
    torch.testing.assert_close(mine[mask.bool()], logits[mask.bool()], rtol=1e-5, atol=1e-6)


class TestCompiled:
    """`torch.compile` on the head, the whole model or each region, as a new module or in place."""

    def pair(self):
        plain = build("Qwen2")
        model = build("Qwen2")
        model.load_state_dict(plain.state_dict())
        return model, plain

    def counted(self):
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        return backend, graphs

    def test_the_head_alone(self):
        model, plain = self.pair()
        model.lm_head = torch.compile(model.lm_head, backend="eager")
        compiled = vars(model.lm_head)["forward"]
        assert_trains_alike(model, plain)
        assert vars(model.lm_head)["forward"] is compiled

    def test_the_head_in_place(self):
        model, plain = self.pair()
        model.lm_head.compile(backend="eager")
        compiled = model.lm_head._compiled_call_impl
        assert_trains_alike(model, plain)
        assert model.lm_head._compiled_call_impl is compiled

    def test_a_compiled_copy_of_the_head(self):
        peft = pytest.importorskip("peft", reason="the copy is PEFT's")
        model, plain = self.pair()
        options = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
        model, plain = (peft.get_peft_model(x, peft.LoraConfig(**options)) for x in (model, plain))
        plain.load_state_dict(model.state_dict())
        lm = model.get_base_model()
        lm.lm_head = torch.compile(lm.lm_head, backend="eager")
        assert_trains_alike(model.eval(), plain.eval())

    @pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo's own
    def test_regions(self):
        utils = pytest.importorskip("accelerate.utils", reason="the regions are Accelerate's")
        model, plain = self.pair()
        backend, graphs = self.counted()
        model = utils.compile_regions(model, backend=backend)
        assert type(model.lm_head).__name__ == "OptimizedModule"
        assert_trains_alike(model, plain)
        assert graphs

    @pytest.mark.parametrize("fullgraph", [False, True])
    @pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "in a wrapper"])
    def test_the_whole_model_runs_its_backbone_compiled(self, wrapped, fullgraph):
        """The backend and the options are the model's, and it is compiled once for all calls."""
        model, plain = self.pair()
        backend, graphs = self.counted()
        compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)

        class Wrapper(nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

            def forward(self, *args, **kwargs):
                return self.module(*args, **kwargs)

        outer = Wrapper(compiled) if wrapped else compiled
        ids, mask = batch()
        for _ in range(3):
            got = gradients(model, fused_loss(outer, ids, mask))
        first = len(graphs)
        assert first >= 1
        with torch.no_grad():
            hidden_states(outer, ids, mask)
        want = gradients(plain, fused_loss(plain, ids, mask))
        for name, grad in want.items():
            torch.testing.assert_close(got[name], grad, rtol=1e-5, atol=1e-7)
        assert first == 1, "compiled anew in each call"
        torch.testing.assert_close(  # the compiled model itself still is one
            compiled(input_ids=ids, attention_mask=mask).logits,
            plain(input_ids=ids, attention_mask=mask).logits,
        )
        assert len(graphs) > first

    def test_in_place_says_what_to_do(self):
        model, plain = self.pair()
        model.compile(backend="eager")
        with pytest.warns(UserWarning, match=r"Qwen2ForCausalLM was compiled in place.*base_model"):
            fused_loss(model, *batch())
        with warnings.catch_warnings():  # once
            warnings.filterwarnings("error", "grpo_fast")
            assert_trains_alike(model, plain)

    def test_a_backbone_in_place_is_compiled(self):
        model, plain = self.pair()
        backend, graphs = self.counted()
        model.base_model.compile(backend=backend)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "grpo_fast")
            assert_trains_alike(model, plain)
        assert graphs


def test_a_parametrised_head():
    """The weight is computed anew in each forward; gradients reach what it is computed from."""
    from torch.nn.utils import parametrizations

    model = build("Qwen2")
    parametrizations.weight_norm(model.lm_head)
    ids, mask = batch()
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -T - 1 : -1]
    logps = logits.log_softmax(-1).gather(-1, ids[:, -T:, None])[..., 0]
    live = mask[:, -T:]
    advantages = torch.tensor([[1.0], [-0.5], [2.0]])
    plain = -((logps - logps.detach()).exp() * advantages * live).sum(1) / live.sum(1)
    want = gradients(model, plain.mean())
    got = gradients(model, fused_loss(model, ids, mask))
    assert any("parametrizations" in name for name in got)
    assert got.keys() == want.keys()
    for name, grad in want.items():
        scale = max(grad.abs().max().item(), 1e-3)
        assert (got[name] - grad).abs().max() <= 1e-5 * scale, name
    check_head(model)


def test_a_checkpointed_head():
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

    plain, model = build("Qwen2"), build("Qwen2")
    model.load_state_dict(plain.state_dict())
    model.lm_head = checkpoint_wrapper.checkpoint_wrapper(model.lm_head)
    assert_trains_alike(model, plain)


class TestRefused:
    """Errors name the reason, and say what to do."""

    def refused(self, head, match, error=TypeError):
        model = build("Qwen2")
        model.set_output_embeddings(head)
        with pytest.raises(error, match=match):
            head_of(model)
        with pytest.raises(error, match=match):
            with_head(model, lambda hidden, head: hidden, *batch())

    def test_integer_weights(self):
        """bitsandbytes and GPTQ have such weights."""
        head = nn.Linear(32, 61, bias=False)
        head.weight = nn.Parameter(torch.zeros(61, 32, dtype=torch.int8), requires_grad=False)
        self.refused(
            head, r"Linear with a Parameter of torch.int8.*it is quantised; leave the head out"
        )

    def test_packed_weights(self):
        """4 bits, two to a byte, bytes called bfloat16: what bitsandbytes does under FSDP."""
        head = nn.Linear(32, 61, bias=False)
        head.weight = nn.Parameter(torch.zeros(488, 1, dtype=torch.bfloat16))
        self.refused(head, r"torch.bfloat16 \(488, 1\): it is quantised.*llm_int8_skip_modules")

    def test_a_forward_of_its_own(self):
        """bitsandbytes' Linear8bitLt and torchao's Float8Linear have one."""

        class Float8Linear(nn.Linear):
            def forward(self, x):
                return super().forward(x.to(torch.float8_e4m3fn).to(x.dtype))

        self.refused(
            Float8Linear(32, 61), r"Float8Linear, whose forward is its own.*plain torch.nn.Linear"
        )

    def test_quantisation_aware_training(self):
        from torch.ao.nn.qat import Linear
        from torch.ao.quantization import get_default_qat_qconfig

        head = Linear(32, 61, qconfig=get_default_qat_qconfig())
        self.refused(head, r"qat.*Linear, whose forward is its own")

    def test_weights_that_are_tensors_of_another_kind(self):
        """torchao has such tensors: a subclass that says it is float32 and holds something else."""

        class Quantised(torch.Tensor):
            @staticmethod
            def __new__(cls, inner):
                return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

            def __init__(self, inner):
                self.inner = inner

            @classmethod
            def __torch_dispatch__(cls, function, types, args, kwargs=None):
                if function is torch.ops.aten.detach.default:
                    return cls(args[0].inner)
                raise NotImplementedError

            def __repr__(self):
                return "Quantised()"

        head = nn.Linear(32, 61, bias=False)
        head.weight = nn.Parameter(Quantised(torch.zeros(61, 32)), requires_grad=False)
        self.refused(head, r"with a Quantised of torch.float32 \(61, 32\): it is quantised")

    def test_a_wrapper_of_another_library(self):
        class Scaled(nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

            def forward(self, x):
                return 2 * self.module(x)

        self.refused(Scaled(nn.Linear(32, 61)), r"Scaled: .*has to come off for training")

    @needs_peft
    @pytest.mark.filterwarnings("ignore")
    def test_trainable_tokens_on_a_tied_head(self):
        import peft

        options = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}
        adapted = peft.get_peft_model(build("Qwen2-tied"), peft.LoraConfig(**options))
        with pytest.raises(TypeError, match=r"adapter on the head.*trainable_token_indices.*untie"):
            head_of(adapted)
        with pytest.raises(TypeError, match="adapter on the head"):
            fused_loss(adapted, *batch())
        untied = peft.get_peft_model(build("Qwen2"), peft.LoraConfig(**options))  # the advice
        check_head(untied)


MAMBA = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 8}


def mamba(dtype):
    config = transformers.MambaConfig(**MAMBA, time_step_rank=4)
    model = transformers.MambaForCausalLM(config)
    spread_out(model)
    return model.to(dtype).eval()


class TestDtypes:
    """The states reach the head in the dtype in which the model's own head takes them."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_wider_backbone(self, dtype):
        model = mamba(dtype)
        ids = batch()[0]
        assert hidden_states(model, ids).dtype is torch.float32  # residual_in_fp32
        kinds = []
        with torch.no_grad():
            want = model(input_ids=ids, use_cache=False).logits

        def function(hidden, head):
            kinds.append((hidden.dtype, head.weight.dtype))
            torch.testing.assert_close(head.logits(hidden).float(), want, rtol=0, atol=0)
            logps = linear_logprob(hidden[:, :-1], head.weight, ids[:, 1:], **head.options)
            exact = hidden.double() @ head.weight.double().T
            return logps, exact[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]

        got, exact = with_head(model, function, ids)
        assert kinds == [(dtype, dtype)]
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            head_of(model).logits(hidden_states(model, ids)).float(), want, rtol=0, atol=0
        )
        check_head(model)

    @pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
    def test_autocast(self, weights, autocast):
        """Both operands are autocast's, whatever the checkpoint is."""
        model = build("Qwen2").to(weights)
        ids, mask = batch()
        with torch.autocast("cpu", autocast):
            want = model(input_ids=ids, attention_mask=mask).logits

            def function(hidden, head):
                assert hidden.dtype == autocast
                torch.testing.assert_close(head.logits(hidden), want, rtol=0, atol=0)
                logps = linear_logprob(hidden[:, :-1], head.weight, ids[:, 1:], **head.options)
                exact = hidden.double() @ head.weight.to(autocast).double().T
                return logps, exact[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]

            got, exact = with_head(model, function, ids, mask)
            check_head(model)
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("autocast", [False, True])
    def test_float64(self, autocast):
        """Autocast leaves float64 alone; so do we, gradients included."""
        model = build("Qwen2").double()
        ids, mask = batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = fused_loss(model, ids, mask)
            logits = model(input_ids=ids, attention_mask=mask).logits[:, -T - 1 : -1]
        assert loss.dtype == logits.dtype == torch.float64
        logps = logits.log_softmax(-1).gather(-1, ids[:, -T:, None])[..., 0]
        live = mask[:, -T:]
        advantages = torch.tensor([[1.0], [-0.5], [2.0]])
        plain = -((logps - logps.detach()).exp() * advantages * live).sum(1) / live.sum(1)
        torch.testing.assert_close(loss, plain.mean(), rtol=1e-12, atol=1e-14)
        got, want = gradients(model, loss), gradients(model, plain.mean())
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-12)

    def test_a_dtype_of_ones_own(self):
        """float32 products of a head in bfloat16: nothing is rounded on the way."""
        model = mamba(torch.bfloat16)
        ids = batch()[0]
        seen = hidden_states(model, ids)

        def function(hidden, head):
            torch.testing.assert_close(hidden, seen, rtol=0, atol=0)
            assert head.weight.dtype is torch.bfloat16
            return linear_logprob(hidden[:, :-1], head.weight, ids[:, 1:], **head.options)

        got = with_head(model, function, ids, dtype=torch.float32)
        weight = model.lm_head.weight.double()
        exact = (seen.double() @ weight.T)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        torch.testing.assert_close(got.double(), exact[..., 0], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32])
    def test_a_head_kept_in_float32(self, hidden_dtype):
        """Under a half-precision backbone the states are widened, not the weight rounded."""
        model = build("Qwen2").to(hidden_dtype)
        model.lm_head.float()
        ids, mask = batch()
        hidden = hidden_states(model, ids, mask).float()
        want = nn.functional.linear(hidden, model.lm_head.weight)
        got = with_head(model, lambda hidden, head: head.logits(hidden), ids, mask)
        torch.testing.assert_close(got, want, rtol=0, atol=0)

    def test_gradients_are_as_near_as_the_models_own(self):
        """A backbone in float32 with a head in bfloat16, against float64."""
        model = mamba(torch.bfloat16).train()
        ids, mask = batch()
        ids, live = ids[:, :8], mask[:, -T:] * 0 + 1
        advantages = torch.tensor([[1.0], [-0.5], [2.0]])

        def own(model):
            logits = model(input_ids=ids, use_cache=False).logits[:, -T - 1 : -1].to(kind)
            logps = logits.log_softmax(-1).gather(-1, ids[:, -T:, None])[..., 0]
            return (-((logps - logps.detach()).exp() * advantages).mean(1)).mean()

        kind = torch.float32
        plain = gradients(model, own(model))
        ones = torch.ones_like(ids)
        got = gradients(model, fused_loss(model, ids, torch.cat([ones[:, :-T], live], 1)))
        kind = torch.float64
        exact = mamba(torch.float64)
        exact.load_state_dict({k: x.double() for k, x in model.state_dict().items()})
        truth = gradients(exact, own(exact))
        assert got.keys() == plain.keys()
        for name, grad in truth.items():
            assert_as_accurate(got[name], plain[name], grad, name=name)
