"""`check_invariance`: planted operators that depend on the batch are found, and nothing else is blamed."""

import dataclasses

import pytest
import torch
from torch import nn

from grpo_fast import check_invariance
from grpo_fast.invariance.places import Place

V, D = 40, 16
FEW = {"batch_sizes": (3,), "verbose": False}


class Model(nn.Module):
    """An embedding, a part that may depend on the batch, and a head without products."""

    def __init__(self, part):
        super().__init__()
        self.embedding, self.part = nn.Embedding(V, V), part

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.part(self.embedding(input_ids)).log_softmax(-1)


class Rows(nn.Module):
    def forward(self, x):
        return x.softmax(-1) + x


class Mean(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class Largest(nn.Module):
    """The order of the rows does not matter, their company does."""

    def forward(self, x):
        return x - x.amax(0, keepdim=True)


class Sums(nn.Module):
    """The first row is right."""

    def forward(self, x):
        return x.cumsum(0)


class Turn(nn.Module):
    def forward(self, x):
        return x + x.roll(1, 0)


class Product(nn.Module):
    """Rounds otherwise from three rows on."""

    def __init__(self, n=V):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, n))

    def forward(self, x):
        if len(x) < 3:
            return x @ self.weight
        return x[..., ::2] @ self.weight[::2] + x[..., 1::2] @ self.weight[1::2]


@torch.library.custom_op("grpo_fast_tests::scaled", mutates_args=())
def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + 1e-6 * len(x))


class Operator(nn.Module):
    def forward(self, x):
        return scaled(x)


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.numpy() * (1 + 1e-6 * len(x)))  # no operator multiplies


class Unseen(nn.Module):
    def forward(self, x):
        return Custom.apply(x)


class Capacity(nn.Module):
    """Drops the tokens that come last to an expert."""

    def forward(self, x):
        flat = x.flatten(0, 1)
        chosen = nn.functional.one_hot(flat[:, :2].argmax(1), 2)
        place = (chosen.cumsum(0) * chosen).sum(1)
        return torch.where(place[:, None] < 20, flat * 2, 0).view_as(x)


class Noise(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=True)


def found(model, **options):
    """The report, and what it blames: (names, module) in order."""
    report = check_invariance(model, **FEW | options)
    return report, [(x.names, x.module) for x in report.operators]


def test_a_model_that_treats_rows_alone():
    report, blamed = found(Model(Rows()))
    assert report.invariant
    assert report.deterministic
    assert report.fixed_shape
    assert blamed == []
    assert report.log_ratio == 0
    assert report.helps == ()
    assert list(report.forwards) == [
        "the same call again",
        "batch of 3",
        "last row, batch of 3",
        "other company, batch of 3",
        "right padding of 5",
        "left padding of 5",
    ]
    assert "float32, cpu): invariant" in str(report)


@pytest.mark.parametrize(
    "part, names, place, mixes",
    [
        (Mean(), ("mean",), "part", True),
        (Largest(), ("amax",), "part", True),
        (Sums(), ("cumsum",), "part", True),
        (Turn(), ("roll",), "part", True),
        (Product(), ("mm", "add"), "part", False),
        (Unseen(), (), "part", False),
        (nn.Sequential(Operator(), Rows(), Operator()), ("scaled",), "part.*", False),
        (Capacity(), ("cumsum",), "part", True),
        (nn.Sequential(Rows(), Mean(), Rows()), ("mean",), "part.1", True),
    ],
    ids=[
        "mean",
        "largest",
        "sums",
        "turn",
        "product",
        "unseen",
        "operators",
        "capacity",
        "in between",
    ],
)
def test_a_planted_operator_is_named(part, names, place, mixes):
    report, blamed = found(Model(part))
    assert not report.invariant
    assert report.deterministic
    assert report.fixed_shape != mixes
    assert blamed == [(names, place)]
    (operator,) = report.operators
    assert operator.mixes_rows == mixes
    assert operator.calls == (2 if place == "part.*" else 1)
    assert "last row, batch of 3" in operator.forwards
    assert "the same call again" not in operator.forwards
    assert report.log_ratio > 0
    assert (report.log_ratio > 1e-3) == mixes
    assert (" or ".join(names) or "no operator of PyTorch") in str(report)
    assert mixes == any("mixes rows" in x for x in report.helps)
    assert mixes != any("equal shapes" in x for x in report.helps)


def test_a_report_without_an_operator():
    """A compiler may compute otherwise than the operators that it is given."""
    report = dataclasses.replace(found(Model(Rows()))[0], invariant=False, forwards={"x": 1e-3})
    assert "no operator of the model, uncompiled" in str(report)
    assert "up to 1.0e-03 from it" in str(report)
    report = dataclasses.replace(report, forwards={"x": 1e-3, "y": float("nan")})
    assert report.log_ratio != report.log_ratio
    assert "nan" in str(report)


def test_a_model_that_draws_numbers():
    report, _ = found(Model(Noise()))
    assert not report.deterministic
    assert "the same call again" in report.operators[0].forwards
    (operator,) = report.operators
    assert operator.module == "part"
    assert not operator.mixes_rows
    assert "the same call twice differs" in str(report)


def test_what_it_leaves_behind():
    """Modes, buffers, hooks, gradients and random numbers are as before; also behind an error."""
    model = Model(nn.Sequential(nn.BatchNorm1d(24), nn.Dropout(0.5), nn.Dropout(0.5)))
    model.part[1].eval()
    model.part.register_buffer("calls", torch.zeros(1))

    def counted(module, *_):
        module.calls += 1 + 0 * torch.rand(1)

    model.part.register_forward_hook(counted)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    modes = [x.training for x in model.modules()]
    numbers = torch.get_rng_state()

    def unchanged():
        assert [x.training for x in model.modules()] == modes
        for name, x in model.state_dict().items():
            torch.testing.assert_close(x, state[name], rtol=0, atol=0)
        torch.testing.assert_close(torch.get_rng_state(), numbers, rtol=0, atol=0)
        assert all(x.grad is None for x in model.parameters())
        hooks = [len(x._forward_hooks) + len(x._forward_pre_hooks) for x in model.modules()]
        assert sum(hooks) == 1
        assert torch.is_grad_enabled()

    ids = torch.randint(V, (3, 24), generator=torch.Generator().manual_seed(0))
    model.forward = lambda x: Model.forward(model, x)  # no mask: no padding
    report, _ = found(model, input_ids=ids)
    assert len(report.forwards) == 4
    assert report.forwards["the same call again"] == 0  # no dropout
    unchanged()

    def refuse(module, args):
        if len(args[0]) == 3:
            raise RuntimeError("three rows")

    handle = model.part.register_forward_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="three rows"):
        found(model, input_ids=ids)
    handle.remove()
    unchanged()


LARGE = nn.Sequential(nn.Embedding(99, 9))  # more ids than logits
SHARDED = type("FullyShardedDataParallel", (nn.Sequential,), {})(nn.Embedding(V, 4))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": 3}, "model: want a torch.nn.Module, got int"),
        ({"model": nn.Embedding(V, 4, _weight=None).weight}, "model: want a torch.nn.Module"),
        ({"model": nn.Flatten()}, "input_ids: want them, as the model has no nn.Embedding"),
        (
            {"model": nn.Sequential(nn.Embedding(V, 4), nn.Flatten())},
            r"model: want logits \(B, T, V\)",
        ),
        (
            {"model": nn.LSTM(3, 3), "input_ids": [[1, 2], [3]]},
            "input_ids: want sequences of equal",
        ),
        ({"input_ids": torch.ones(1, 9).long()}, r"input_ids: want \(n, T\).*got \(1, 9\)"),
        ({"input_ids": torch.ones(3, 9)}, "input_ids: want integers, got torch.float32"),
        (
            {"input_ids": [[1, 77]] * 2, "padding": 1, "model": LARGE},
            r"input_ids: want ids in \[0, 9",
        ),
        ({"input_ids": [[1, 2, -1]] * 2}, r"input_ids: want ids that the model has, got \[-1, 2\]"),
        ({"model": SHARDED}, "model: its weights are sharded"),
        ({"batch_sizes": (1, 2)}, r"batch_sizes: want .*got \(1, 2\)"),
        ({"padding": 24}, r"padding: want an integer in \[1, 23\].* got 24"),
        ({"model": nn.Sequential(nn.Embedding(V, 4)), "packed": True}, "packed: want False"),
    ],
    ids=lambda x: "" if isinstance(x, str) else " ".join(x),
)
def test_errors_name_the_argument(arguments, message):
    arguments = {"model": Model(Rows()), **FEW, **arguments}
    with pytest.raises((ValueError, TypeError), match=f"check_invariance: {message}"):
        check_invariance(**arguments)


def test_a_short_sequence_has_less_padding():
    """The default fits any sequence of two tokens or more."""
    report = check_invariance(Model(Rows()), torch.tensor([[1, 2, 3]] * 4), verbose=False)
    assert "right padding of 2" in report.forwards


def test_places():
    """Where the part of a sequence is: rows, columns, tokens, and heads of rows."""
    x = torch.arange(3 * 7).view(3, 7)
    place = Place(length=5, rows=3, width=7, row=1, before=2)
    own = x[1:2, 2:]
    assert place.part(x, own.shape).equal(own)
    assert place.part(x.flatten(), torch.Size([5])).equal(own[0])
    heads = torch.arange(3 * 4).view(12, 1)
    assert place.part(heads, torch.Size([4, 1])).equal(heads[4:8])
    assert place.part(x, torch.Size([2, 5])) is None
    assert place.part(x, torch.Size([5])) is None
    assert place.has_own(x, own.shape)
    assert not place.has_own(x[:1], own.shape)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the models are Hugging Face's")


def llama(transformers, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "sdpa"}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads | options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_operator_of_a_language_model(dtype, transformers):
    """It is found in both layers. What follows it is not blamed."""
    model = llama(transformers).to(dtype)
    for layer in model.model.layers:
        layer.mlp.act_fn = Product(48).to(dtype)
    report = check_invariance(model, packed=True, **FEW)
    planted = [x for x in report.operators if "batch of 3" in x.forwards]
    assert [(x.names, x.module) for x in planted] == [(("mm", "add"), "model.layers.*.mlp.act_fn")]
    assert planted[0].calls == 2  # the second got the recorded bits again
    rest = [x for x in report.operators if x not in planted]
    assert all("attention" in name for x in rest for name in x.names)
    assert 0 < report.forwards["batch of 3"] < (1e-4 if dtype == torch.float32 else 0.3)
    assert "packed" in report.forwards


def test_experts(transformers, capsys):
    """Tokens are sorted by experts: rows in another order are no difference."""
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "attn_implementation": "eager"}
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**sizes, **heads, **experts)
    report = check_invariance(transformers.Qwen3MoeForCausalLM(config), batch_sizes=[3])
    assert capsys.readouterr().out == f"{report}\n"
    assert all(x.relative < 1e-5 for x in report.operators)
    assert {x.module.split(".")[-1] for x in report.operators} <= {"experts"}
    assert report.log_ratio < 1e-4


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_a_compiled_model_is_looked_into_as_an_eager_one():
    report, blamed = found(torch.compile(Model(Mean()), backend="eager", dynamic=True))
    assert blamed == [(("mean",), "_orig_mod.part")]
    assert not report.fixed_shape
    assert "left padding of 5" in report.forwards


class Wrapper(nn.Module):
    """As DDP is: it takes whatever the model inside takes."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **kwargs):
        return self.module(*inputs, **kwargs)


def test_the_arguments_of_a_wrapped_model():
    report, _ = found(Wrapper(Model(Rows())))
    assert report.invariant
    assert "left padding of 5" in report.forwards
