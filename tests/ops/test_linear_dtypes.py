"""Hidden states and a head of any dtypes: the meaning of each mixture, and its accuracy."""

import itertools
import warnings

import pytest
import torch

from grpo_fast import Objective, notices, reference
from grpo_fast.loss import linear_grpo_loss
from grpo_fast.ops import linear_logprob
from grpo_fast.ops.head import chunk_length, chunked, products
from grpo_fast.testing import assert_as_accurate
from tests.support.ranks import run

HALVES = (torch.bfloat16, torch.float16)
SINGLE = (torch.float32, *HALVES)
B, T, D, V = 3, 5, 16, 33
BONUS = Objective(entropy_coef=0.1, beta=0.1)


def name(dtype):
    return str(dtype).removeprefix("torch.")


def inputs(hidden_dtype, head_dtype, device, extras=True):
    """Hidden states and head, leaves; ids and the arguments of a loss."""

    def leaf(*shape, dtype, scale=0.3):
        return (scale * torch.randn(*shape, device=device)).to(dtype).requires_grad_()

    leaves = [
        leaf(B, T, D, dtype=hidden_dtype, scale=1.0),
        *(leaf(*shape, dtype=head_dtype) for shape in ((V, D), (V,), (2, D), (V, 2))),
    ]
    ids = torch.randint(V, (B, T), device=device)
    given = {
        "advantages": torch.randn(B, device=device),
        "ref_logps": torch.full((B, T), -3.5, device=device),
        "mask": torch.rand(B, T, device=device) < 0.8,
        "objective": BONUS,
    }
    return leaves if extras else leaves[:2], ids, given


def computed(functions, leaves, ids, given, dtype=None):
    """[loss, log-probs, entropy], then the gradients of the loss, then those of the log-probs.

    dtype: to convert the leaves to, where plain PyTorch would have to.
    """
    loss, log_probs = functions
    hidden, weight, *rest = leaves if dtype is None else [x.to(dtype) for x in leaves]
    head = {}
    if rest:
        bias, a, b = rest
        head = {"bias": bias, "lora": (a, b, 0.5), "softcap": 4.0}
    value = loss(hidden, weight, ids, **head, **given)
    value = getattr(value, "loss", value)
    logp, entropy = log_probs(
        hidden, weight, ids, mask=given["mask"], return_entropy=True, temperature=0.7, **head
    )
    live = given["mask"]
    logp, entropy = torch.where(live, logp, 0), torch.where(live, entropy, 0)
    upstream = torch.linspace(-1, 1, logp.numel(), device=logp.device).view_as(logp)
    total = (logp * upstream).sum() + (entropy * upstream.flip(0)).sum()
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves)
    return [value.detach(), logp.detach(), entropy.detach(), *first, *second]


OURS = (linear_grpo_loss, linear_logprob)
PLAIN = (reference.linear_grpo, reference.linear_logprob)


@pytest.mark.parametrize(
    ("hidden_dtype", "head_dtype"), itertools.product(SINGLE, SINGLE), ids=name
)
def test_products_are_of_the_dtype_of_hidden(hidden_dtype, head_dtype, backend, device):
    """They are as accurate as plain PyTorch with operands of one dtype. Every gradient has its own dtype."""
    if backend == "triton" and device == "cpu" and torch.bfloat16 in (hidden_dtype, head_dtype):
        pytest.skip("Triton's interpreter truncates to bfloat16 where hardware rounds")
    leaves, ids, given = inputs(hidden_dtype, head_dtype, device)
    got = computed(OURS, leaves, ids, given)
    plain = computed(OURS, leaves, ids, given, hidden_dtype)
    exact = [x.detach().to(hidden_dtype).double().requires_grad_() for x in leaves]
    exact[2] = leaves[2].detach().double().requires_grad_()  # the bias is added to float32 logits
    truth = computed(PLAIN, exact, ids, given)
    assert [x.dtype for x in got[3:8]] == [x.dtype for x in got[8:]] == [x.dtype for x in leaves]
    for a, b, t in zip(got, plain, truth, strict=True):
        assert_as_accurate(a, b, t)


@pytest.mark.parametrize("double", ["hidden", "head", "bias", "all"])
@pytest.mark.parametrize("other", SINGLE, ids=name)
def test_float64_rounds_nothing(double, other, backend, device):
    """Values and gradients are those of the specification in float64, whatever the rest is."""
    wide = torch.float64
    leaves, ids, given = inputs(
        wide if double in ("hidden", "all") else other,
        wide if double in ("head", "all") else other,
        device,
    )
    if double == "bias":
        leaves[2] = leaves[2].detach().to(wide).requires_grad_()
    got = computed(OURS, leaves, ids, given)
    truth = computed(PLAIN, [x.detach().to(wide).requires_grad_() for x in leaves], ids, given)
    assert [x.dtype for x in got[:3]] == [wide] * 3
    for a, t, x in zip(got, truth, [*[got[0]] * 3, *leaves, *leaves], strict=True):
        assert a.dtype == x.dtype
        torch.testing.assert_close(a, t.to(a.dtype), rtol=1e-12, atol=1e-14)


def test_float64_by_differences(device):
    leaves, ids, _ = inputs(torch.float64, torch.float64, device, extras=False)
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, ids), leaves)

    rewards = torch.tensor([0.0, 1.0, 3.0], device=device)
    old = linear_logprob(*leaves, ids).detach() + 0.05

    def loss(*leaves):
        return linear_grpo_loss(*leaves, ids, rewards=rewards, group_size=3, old_logps=old).loss

    assert torch.autograd.gradcheck(loss, leaves)


class TestFloat64:
    OBJECTIVES = (
        Objective(),
        Objective(surrogate="topr"),
        Objective(surrogate="vespo"),
        Objective(ratio="sequence", reduction="token_mean"),
        Objective(top_entropy_quantile=0.5, entropy_coef=0.1, entropy_reduction="token_mean"),
    )

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("objective", OBJECTIVES, ids=range(len(OBJECTIVES)))
    def test_every_argument_counts(self, objective, packed, device):
        leaves, ids, _ = inputs(torch.float64, torch.float64, device, extras=False)
        given = {
            "rewards": torch.tensor([0.0, 1.0, 3.0], device=device),
            "group_size": 3,
            "mask": torch.rand(B, T, device=device) < 0.8,
            "old_logps": torch.full((B, T), -3.5, device=device),
            "importance_weights": torch.rand(B, T, device=device) + 0.5,
            "token_weights": torch.rand(B, T, device=device),
            "temperature": torch.rand(B, T, device=device) + 0.5,
            "objective": objective,
        }
        hidden = leaves[0]
        if packed:
            flat = {k: x.reshape(-1) for k, x in given.items() if getattr(x, "shape", 0) == (B, T)}
            given |= flat | {"cu_seqlens": torch.arange(0, B * T + 1, T, device=device)}
            hidden, ids = hidden.view(B * T, D), ids.view(-1)
        hidden = torch.where(given["mask"][..., None], hidden, torch.nan)  # padding is not read
        ids = ids.masked_fill(~given["mask"], -100)
        out = linear_grpo_loss(hidden, leaves[1], ids, chunk_size=4, return_entropy=True, **given)
        want = reference.linear_grpo(hidden, leaves[1], ids, **given)
        torch.testing.assert_close(out.loss, want, rtol=1e-12, atol=1e-14)
        got = torch.autograd.grad(out.loss, leaves, retain_graph=True)
        for a, b in zip(got, torch.autograd.grad(want, leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
        single = linear_grpo_loss(
            hidden.float(), leaves[1].float(), ids, return_entropy=True, compact=False, **given
        )
        assert out.logps.shape == out.entropy.shape == ids.shape
        assert out.metrics.keys() == single.metrics.keys()
        for key, value in single.metrics.items():
            torch.testing.assert_close(out.metrics[key], value, rtol=1e-3, atol=1e-5, msg=key)

    @pytest.mark.parametrize("scored", ["advantages", "rewards"])
    def test_compiled_as_one_graph(self, scored, device):
        leaves, ids, _ = inputs(torch.float64, torch.float64, device, extras=False)
        given = {scored: torch.tensor([0.0, 1.0, 3.0], device=device)}
        given |= {"group_size": 3} if scored == "rewards" else {}

        def loss(*leaves):
            return linear_grpo_loss(*leaves, ids, **given).loss + linear_logprob(*leaves, ids).sum()

        want = loss(*leaves)
        torch._dynamo.reset()
        got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        grads = (torch.autograd.grad(x, leaves) for x in (got, want))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)

    def test_nothing_to_score(self, device):
        weight = torch.randn(V, D, dtype=torch.float64, device=device, requires_grad=True)
        hidden = torch.zeros(0, T, D, dtype=torch.float64, device=device, requires_grad=True)
        ids = torch.zeros(0, T, dtype=torch.int64, device=device)
        out = linear_grpo_loss(hidden, weight, ids, advantages=torch.zeros(0, device=device))
        assert out.loss == 0
        out.loss.backward()
        assert weight.grad.abs().max() == 0
        assert linear_logprob(hidden, weight, ids).shape == (0, T)

    def test_keeps_one_chunk_of_logits(self, device):
        """Logits of 4 rows at a time: nothing of the size of 33 x V is saved for the backward."""
        hidden = torch.randn(V, D, dtype=torch.float64, device=device, requires_grad=True)
        weight = torch.randn(50, D, dtype=torch.float64, device=device)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: saved.append(x.shape) or x, lambda x: x
        ):
            linear_logprob(hidden, weight, torch.zeros(V, dtype=torch.int64, device=device))
        assert (V, 50) not in saved


def float64_with_a_shared_vocabulary():
    import torch.distributed as dist

    dist.init_process_group("gloo")
    hidden, ids = torch.zeros(2, D).double(), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"tp_group with float64 operands.*convert"):
        linear_logprob(hidden, torch.zeros(V, D), ids, tp_group=dist.group.WORLD)


def test_float64_with_a_shared_vocabulary_is_refused():
    run("tests.ops.test_linear_dtypes:float64_with_a_shared_vocabulary", 1)


class TestWithoutMixedProducts:
    """ROCm before PyTorch 2.10: `mm` of halves with a float32 result raises."""

    @pytest.fixture
    def rocm(self, monkeypatch):
        """CPU tensors that pass for a GPU's, and operators that refuse what theirs would."""
        real_mm, real_addmm = torch.mm, torch.addmm

        def mm(a, b, **options):
            assert "out_dtype" not in options, "output type float is not supported for ROCm"
            return real_mm(a, b, **options)

        def addmm(*arguments, **options):
            assert "out_dtype" not in options, "output type float is not supported for ROCm"
            return real_addmm(*arguments, **options)

        monkeypatch.setattr(torch, "mm", mm)
        monkeypatch.setattr(torch, "addmm", addmm)
        for module in (chunked, products):
            monkeypatch.setattr(module, "on_gpu", lambda x: True)
        monkeypatch.setattr(products, "MIXED_MM", False)
        monkeypatch.setattr(chunk_length, "processors", lambda x: 4)
        monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
        notices.forget()
        yield
        notices.forget()

    @pytest.mark.parametrize("logits_dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize("dtype", HALVES, ids=name)
    @pytest.mark.filterwarnings("ignore:grpo_fast. the head")
    def test_float32_copies_are_multiplied(self, rocm, dtype, logits_dtype):
        leaves, ids, given = inputs(dtype, dtype, "cpu")

        def ours(function):
            return lambda *args, **kwargs: function(*args, logits_dtype=logits_dtype, **kwargs)

        got = computed([ours(f) for f in OURS], leaves, ids, given)
        truth = computed(PLAIN, [x.detach().double().requires_grad_() for x in leaves], ids, given)
        plain = computed(PLAIN, leaves, ids, given)
        for a, b, t in zip(got, plain, truth, strict=True):
            assert_as_accurate(a, b, t)
        if logits_dtype == "fp32":
            torch.testing.assert_close(got[1].double(), truth[1], rtol=1e-5, atol=1e-5)

    def test_says_so_once(self, rocm):
        (hidden, weight), ids, _ = inputs(torch.bfloat16, torch.bfloat16, "cpu", extras=False)
        with pytest.warns(UserWarning, match=r"multiplied in float32.*2\.10.*logits_dtype"):
            linear_logprob(hidden, weight, ids)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            linear_logprob(hidden, weight, ids)
            notices.forget()
            linear_logprob(hidden, weight, ids, logits_dtype="bf16")
            linear_logprob(hidden.float(), weight, ids)

    @pytest.mark.parametrize(
        ("version", "hip", "mixed"),
        [
            ("2.9.1+rocm6.4", "6.4", False),
            ("2.10.0+rocm7.0", "7.0", True),
            ("2.8.0+cu128", None, True),
            ("2.13.0a0+git1", "7.1", True),
        ],
    )
    def test_which_builds(self, version, hip, mixed):
        assert products.mixed_products_of(version, hip) is mixed
