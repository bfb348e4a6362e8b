import math

import pytest
import torch

from grpo_fast import reference
from grpo_fast.loss import grpo_loss
from grpo_fast.ops import logprob
from grpo_fast.testing import assert_as_accurate
from tests.support.cases import batch, by_dtype, in_other_company
from tests.support.properties import given, settings, st

# One tile, several, an odd end; 40,000 and 65,537 are shared by several programs.
SHAPES = [
    (1, 1),
    (3, 2),
    (3, 255),
    (2, 1024),
    (2, 1025),
    (2, 8192),
    (3, 9001),
    (2, 40_000),
    (1, 65_537),
]


def reference_both(logits, ids, temperature=1.0):
    return reference.logprob(logits, ids, temperature), reference.entropy(logits, temperature)


def values_and_grad(fn, logits, *args, upstream=(1.0, 1.0), **kwargs):
    """Both outputs, and the gradient under upstream gradients that differ per row and between outputs."""
    logits = logits.detach().clone().requires_grad_()
    logp, entropy = fn(logits, *args, **kwargs)
    ramp = torch.linspace(-1, 2, logp.numel(), device=logp.device).view(logp.shape).to(logp)
    grads = (upstream[0] * ramp, upstream[1] * (0.5 - ramp))
    (grad,) = torch.autograd.grad((logp, entropy), logits, grads)
    return logp, entropy, grad


def ours(logits, ids, temperature=1.0, **kwargs):
    return logprob(logits, ids, temperature=temperature, return_entropy=True, **kwargs)


def check(logits, ids, temperature=1.0, floor=1e-5):
    actual = values_and_grad(ours, logits, ids, temperature)
    baseline = values_and_grad(reference_both, logits, ids, temperature)
    precise = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    truth = values_and_grad(reference_both, logits.double(), ids, precise)
    for name, a, b, t in zip(("logp", "entropy", "dlogits"), actual, baseline, truth, strict=True):
        # An entropy is a difference of terms of the size of 1: float32 keeps 1e-7 of that.
        assert_as_accurate(a, b, t, floor=floor, scale=0.02 * (name == "entropy"), name=name)


@by_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, backend, device):
    logits = 5 * torch.randn(shape, device=device, dtype=dtype)
    ids = torch.randint(shape[1], shape[:1], device=device)
    check(logits, ids, temperature=0.7)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 4),
    V=st.integers(1, 3000),
    spread=st.floats(0.01, 50),
    temperature=st.floats(0.1, 5),
    seed=st.integers(0, 2**16),
)
def test_any_shape(rows, V, spread, temperature, seed, backend, device):
    torch.manual_seed(seed)
    logits = spread * torch.randn(rows, V, device=device)
    check(logits, torch.randint(V, (rows,), device=device), temperature)


def test_temperature_per_token(backend, device):
    logits = 3 * torch.randn(2, 3, 1500, device=device)
    ids = torch.randint(1500, (2, 3), device=device)
    check(logits, ids, torch.rand(2, 3, device=device) + 0.5)


def test_without_entropy_nothing_changes(backend, device):
    logits = 3 * torch.randn(3, 50_000, device=device)
    ids = torch.randint(50_000, (3,), device=device)
    with_entropy = values_and_grad(ours, logits, ids, upstream=(1, 0))
    x = logits.clone().requires_grad_()
    logp = logprob(x, ids)
    logp.backward(torch.linspace(-1, 2, 3, device=device))
    torch.testing.assert_close(logp, with_entropy[0], rtol=0, atol=0)
    torch.testing.assert_close(x.grad, with_entropy[2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_output_alone(which, backend, device):
    logits = 3 * torch.randn(4, 600, device=device)
    ids = torch.randint(600, (4,), device=device)
    grads = []
    for fn, x in ((ours, logits), (reference_both, logits.double())):
        x = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(fn(x, ids)[which].sum(), x)[0].double())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_int32_ids_and_odd_strides(backend, device):
    base = 3 * torch.randn(3, 5, 701, device=device)
    ids = torch.randint(701, (3, 4), device=device)
    view = base[:, :-1]
    assert not view.is_contiguous()
    packed = values_and_grad(ours, view.contiguous(), ids)
    for a, b in zip(values_and_grad(ours, view, ids.int()), packed, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    columns = torch.randn(6, 1402, device=device)[:, 3:704]  # rows start at odd addresses
    torch.testing.assert_close(
        logprob(columns, ids.flatten()[:6]),
        logprob(columns.contiguous(), ids.flatten()[:6]),
        rtol=0,
        atol=0,
    )


def test_a_row_without_upstream_gradient_passes_none(backend, device):
    """Whatever its logits hold."""
    logits = torch.randn(3, 40, device=device)
    logits[1, 3] = torch.nan
    logits.requires_grad_()
    ids = torch.zeros(3, dtype=torch.int64, device=device)
    logp, entropy = logprob(logits, ids, return_entropy=True)
    upstream = torch.tensor([1.0, 0.0, -2.0], device=device)
    for pair in ((upstream, None), (upstream, upstream)):
        outputs = [x for x, y in zip((logp, entropy), pair, strict=True) if y is not None]
        grads = [y for y in pair if y is not None]
        (grad,) = torch.autograd.grad(outputs, logits, grads, retain_graph=True)
        assert grad[1].eq(0).all()
        assert grad[::2].isfinite().all()


def test_a_sum_that_float16_cannot_hold(backend, device):
    """70,000 equal logits: the sum of their exponentials is beyond 65,504."""
    V = 70_000
    logits = torch.zeros(2, V, dtype=torch.float16, device=device, requires_grad=True)
    ids = torch.tensor([3, V - 1], device=device)
    logp, entropy = logprob(logits, ids, return_entropy=True)
    torch.testing.assert_close(logp.cpu(), torch.full((2,), -math.log(V)))
    torch.testing.assert_close(entropy.cpu(), torch.full((2,), math.log(V)))
    (grad,) = torch.autograd.grad(16 * logp.sum(), logits)
    assert grad.gather(1, ids[:, None]).eq(16).all()
    others = grad[:, 10:-10].float()
    torch.testing.assert_close(others, torch.full_like(others, -16 / V), rtol=1e-3, atol=0)


@pytest.mark.parametrize("elements", [1, 50, 120, 500])
def test_the_pytorch_path_in_blocks_of_any_size(elements, device, monkeypatch):
    """Rows of long vocabularies are taken some at a time: values and gradients are the same bits."""
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    logits, ids, arguments = batch(4, 5, 50, device)
    leaf = logits.nan_to_num(0.1).requires_grad_()
    ids = ids.clamp(min=0)
    temperature = torch.rand(4, 5, device=device) + 0.5
    transposed = leaf.transpose(0, 1)  # no common stride of its rows
    mask = arguments["mask"]

    def computed():
        given = {"temperature": temperature, "mask": mask, "return_entropy": True}
        logp, entropy = logprob(leaf, ids, **given)
        found = [logp, entropy, *torch.autograd.grad((logp.sum(), entropy.sum()), leaf)]
        given = {"temperature": temperature.T, "mask": mask.T}
        logp = logprob(transposed, ids.T, **given)
        found += [logp, *torch.autograd.grad(logp.square().sum(), leaf)]
        for inplace in (False, True):
            x = leaf * 1.0
            loss = grpo_loss(x, ids, **arguments, temperature=temperature, inplace=inplace).loss
            found += [loss, *torch.autograd.grad(3 * loss, leaf)]
        return found

    want = computed()
    monkeypatch.setattr("grpo_fast.torch_kernels.rows.BLOCK_ELEMENTS", elements)
    for a, b in zip(computed(), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("V", [700, 40_000])
def test_banned_tokens(V, backend, device):
    """-inf logits: probability 0, no contribution to the entropy, no gradient, no NaN."""
    logits = 3 * torch.randn(3, V, device=device)
    ids = torch.tensor([5, 6, V - 1], device=device)
    logits[:2, ::2] = -torch.inf
    logits[2, torch.rand(V, device=device) < 0.5] = -torch.inf  # in any place of a tile
    logits.scatter_(1, ids[:, None], 1.0)
    logits[0] = -torch.inf  # the scored token alone is allowed
    logits[0, 5] = -3.0
    check(logits, ids)
    logp, entropy, grad = values_and_grad(ours, logits, ids)
    assert logp[0] == 0
    assert entropy[0] == 0
    assert grad[logits == -torch.inf].eq(0).all()


def test_banned_by_the_smallest_float(backend, device):
    logits = torch.randn(2, 3000, device=device)
    logits[:, 10:] = torch.finfo(torch.float32).min
    check(logits, torch.tensor([3, 4], device=device))


def test_scored_token_banned(backend, device):
    logits = torch.randn(2, 300, device=device)
    logits[0, 7] = -torch.inf
    logp = logprob(logits, torch.tensor([7, 7], device=device))
    assert logp[0] == -torch.inf
    assert logp[1].isfinite()


@pytest.mark.parametrize("V", [900, 40_000])
@pytest.mark.parametrize("margin", [12.0, 20.0, 30.0, 60.0])
def test_confident_token_keeps_its_gradient(margin, V, backend, device):
    """Plain float32 rounds log p to 0 from a margin of about 16 nats on, and the gradient with it."""
    logits = torch.zeros(2, V, device=device)
    ids = torch.tensor([1, V - 2], device=device)
    logits.scatter_(1, ids[:, None], margin)
    logp, entropy, grad = values_and_grad(ours, logits, ids, upstream=(1, 0))
    truth = values_and_grad(reference_both, logits.double(), ids, upstream=(1, 0))
    # In relative terms, which the reference cannot deliver even in float64 by 1 - p.
    rest = (V - 1) * math.exp(-margin)
    torch.testing.assert_close(
        logp.double(), torch.full_like(truth[0], -math.log1p(rest)), rtol=1e-5, atol=0
    )
    ramp = torch.tensor([-1.0, 2.0], dtype=torch.float64, device=device)
    dtarget = ramp * rest / (1 + rest)
    torch.testing.assert_close(
        grad.gather(1, ids[:, None])[:, 0].double(), dtarget, rtol=1e-5, atol=0
    )
    want = math.log1p(rest) + rest * margin / (1 + rest)
    torch.testing.assert_close(entropy.double(), torch.full_like(truth[1], want), rtol=1e-4, atol=0)


def test_log_probs_are_never_positive(backend, device):
    logits = torch.randn(50, 33, device=device) * 30
    assert logprob(logits, logits.argmax(-1)).le(0).all()


def test_large_common_offset(backend, device):
    """Shift invariance, up to what the shifted logits themselves have lost."""
    logits = torch.randn(3, 1000, device=device)
    ids = torch.randint(1000, (3,), device=device)
    for shift in (-3000.0, 3000.0):
        check(logits + shift, ids)
        torch.testing.assert_close(
            logprob(logits + shift, ids), logprob(logits, ids), rtol=0, atol=1e-3
        )


def test_gradient_sums_to_zero_over_the_vocabulary(backend, device):
    logits = 2 * torch.randn(4, 9000, device=device)
    ids = torch.randint(9000, (4,), device=device)
    grad = values_and_grad(ours, logits, ids)[2]
    assert grad.double().sum(-1).abs().max() < 1e-5


def test_masked_rows_are_never_read(backend, device):
    logits = torch.randn(2, 3, 1100, device=device)
    ids = torch.randint(1100, (2, 3), device=device)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]], device=device)
    clean = values_and_grad(ours, logits, ids, mask=mask)
    dirty = values_and_grad(
        ours,
        logits.masked_fill(mask[..., None] == 0, torch.nan),
        ids.masked_fill(mask == 0, -1),
        mask=mask,
    )
    for a, b in zip(dirty, clean, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert dirty[2][mask == 0].eq(0).all()


def test_no_upstream_gradient_means_exact_zeros(backend, device):
    logits = torch.randn(3, 1300, device=device).requires_grad_()
    logp = logprob(logits, torch.tensor([1, 2, 3], device=device))
    logp.backward(torch.tensor([0.0, 1.0, 0.0], device=device))
    assert logits.grad[::2].eq(0).all()
    assert logits.grad[1].ne(0).any()


@pytest.mark.parametrize("V", [776, 40_000])
def test_a_row_does_not_depend_on_the_others(V, backend, device):
    logits = 3 * torch.randn(5, V, device=device)
    ids = torch.randint(V, (5,), device=device)
    whole = values_and_grad(ours, logits, ids)
    order = torch.tensor([3, 1, 4, 0, 2], device=device)
    for i in range(5):
        alone = ours(logits[i : i + 1], ids[i : i + 1])
        for a, b in zip(alone, whole[:2], strict=True):
            torch.testing.assert_close(a[0], b[i], **in_other_company(backend, device))
    for a, b in zip(ours(logits[order], ids[order]), whole[:2], strict=True):
        torch.testing.assert_close(a, b[order], rtol=0, atol=0)
    again = values_and_grad(ours, logits, ids)
    for a, b in zip(again, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_legal_empties(backend, device):
    for shape in ((0,), (0, 4), (4, 0)):
        logits = torch.empty(*shape, 9, device=device).requires_grad_()
        logp, entropy = logprob(
            logits, torch.empty(shape, dtype=torch.int64, device=device), return_entropy=True
        )
        (logp.sum() + entropy.sum()).backward()
        assert logp.shape == shape
        assert logits.grad.shape == logits.shape


@pytest.mark.filterwarnings("ignore")  # PyTorch also warns
def test_double_backward_is_refused(backend, device):
    logits = torch.randn(2, 30, device=device).requires_grad_()
    logp = logprob(logits, torch.tensor([1, 2], device=device))
    (grad,) = torch.autograd.grad(logp.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_backward_twice_through_a_retained_graph(backend, device):
    logits = torch.randn(2, 30, device=device).requires_grad_()
    logp = logprob(logits, torch.tensor([1, 2], device=device))
    (one,) = torch.autograd.grad(logp.sum(), logits, retain_graph=True)
    (two,) = torch.autograd.grad(2 * logp.sum(), logits)
    torch.testing.assert_close(two, 2 * one)


def test_short_strided_sequences(backend, device):
    """Many sequences of few tokens, whose rows have no common stride."""
    base = torch.randn(40, 4, 11, device=device)
    ids = torch.randint(11, (40, 3), device=device)
    view = base[:, :-1]
    want = values_and_grad(ours, view.contiguous(), ids)
    for a, b in zip(values_and_grad(ours, view, ids), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
