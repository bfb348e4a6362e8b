"""The head as on a GPU, where halves are multiplied with a float32 result: accuracy, memory, launches."""

import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.loss import linear_grpo_loss
from grpo_fast.ops import linear_logprob
from grpo_fast.ops.head import chunk_length, chunked
from grpo_fast.ops.head.arguments import Needs
from grpo_fast.testing import assert_as_accurate
from tests.support.cases import in_double
from tests.support.heads import HEADS, check_log_probs, make, targets
from tests.support.hidden_cases import batch, check, loss_and_grads
from tests.support.mixed import mixed_products

HALVES = [torch.float16, torch.bfloat16]
by_head = pytest.mark.parametrize(
    "head", [HEADS["plain"], HEADS["everything"]], ids=["plain", "all"]
)
# Triton's interpreter truncates to bfloat16 where hardware rounds.
PATHS = [("torch", torch.float16), ("torch", torch.bfloat16), ("triton", torch.float16)]
by_path = pytest.mark.parametrize(
    ("backend", "dtype"), PATHS, indirect=["backend"], ids=["fp16", "bf16", "triton"]
)
by_half = pytest.mark.parametrize("dtype", HALVES, ids=["fp16", "bf16"])
SEQUENCES = Objective(ratio="sequence")
BONUS = Objective(beta=0.1, entropy_coef=0.02)


@pytest.fixture
def mixed():
    seen = []
    with mixed_products(seen):
        yield seen


@by_head
@by_path
@pytest.mark.parametrize("compact", [False, True])
def test_loss(head, dtype, compact, mixed, backend, device):
    tensors, options, ids, arguments = batch(3, 4, 101, device, head, dtype=dtype)
    arguments |= {"objective": BONUS, "temperature": 0.8}
    check(tensors, options, ids, arguments, 3.0, compact=compact, chunk_size=4)


@by_half
def test_rounded_logits(dtype, device, monkeypatch):
    """Sums in float32 make nothing worse than products whose results are halves."""
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    tensors, options, ids, arguments = batch(4, 5, 101, device, HEADS["everything"], dtype=dtype)
    given = {"chunk_size": 4, "logits_dtype": "bf16"}
    plain = loss_and_grads(linear_grpo_loss, tensors, options, ids, arguments, **given)
    with mixed_products():
        actual = loss_and_grads(linear_grpo_loss, tensors, options, ids, arguments, **given)
    doubled = {k: x.double() for k, x in tensors.items()}
    truth = loss_and_grads(reference.linear_grpo, doubled, options, ids, in_double(arguments))
    for name, x in actual.items():
        assert_as_accurate(x, plain[name], truth[name], name=name)


@by_path
@pytest.mark.parametrize("objective", [Objective(), SEQUENCES, BONUS])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden",)], ids=str)
def test_ways(objective, frozen, dtype, mixed, backend, device):
    """Each way of `plan`, by tokens and by sequences."""
    if backend == "triton" and (frozen == ("hidden",) or objective is not SEQUENCES):
        pytest.skip("takes long in the interpreter")
    tensors, options, ids, arguments = batch(3, 4, 60, device, dtype=dtype)
    arguments["objective"] = objective
    for size in (3, 5):
        check(tensors, options, ids, arguments, 2.0, frozen, chunk_size=size)


@by_head
@by_path
@pytest.mark.parametrize("compact", [False, True])
def test_log_probs(head, dtype, compact, mixed, backend, device):
    tensors, options = make(10, 8, 101, device, head, dtype)
    ids, mask, upstream = targets(10, 90, device)
    tensors["hidden"][~mask] = torch.nan
    given = {"mask": mask, "compact": compact, "chunk_size": 4}
    check_log_probs(tensors, options, ids, upstream, **given)
    # In the forward already, where a frozen head allows it.
    tensors["hidden"].nan_to_num_(0.0)
    hidden = tensors["hidden"].requires_grad_()
    found = linear_logprob(hidden, tensors["weight"], ids.clamp(min=0), chunk_size=4)
    assert torch.autograd.grad(found.sum(), hidden)[0].isfinite().all()


def test_long_rows(mixed, backend, device):
    """Shared by several programs as they are read, of one program as they are overwritten."""
    V = 40_000
    head = HEADS["softcap"] | {"vocab_size": V}
    tensors, options, ids, arguments = batch(2, 2, V + 1, device, head, dtype=torch.float16)
    arguments |= {"objective": BONUS, "temperature": 0.5 + torch.rand(2, 2, device=device)}
    check(tensors, options, ids, arguments, chunk_size=2)


def head_of(dtype=torch.bfloat16, needs=(True, True, False, False, False), fp32=True, **change):
    tensors, _ = make(24, 16, 100, "cpu", dtype=dtype)
    options = _head_options(fp32=fp32, **change)
    parameters = chunked.Parameters(tensors["weight"], None, None, None)
    return chunked.Head(tensors["hidden"], parameters, options, None, None, Needs(*needs))


def _head_options(V=100, fp32=True, chunk_size=8):
    one = torch.ones((), dtype=torch.float64)
    return chunked.Options(
        lora_scaling=one,
        softcap=None,
        logit_scale=one,
        fp32_logits=fp32,
        vocab_size=V,
        chunk_size=chunk_size,
        tp_group="",
        first_row=0,
        widest=V,
    )


def test_gradient_lies_over_the_logits(mixed):
    """Four bytes an entry, all in all: nothing of the size of a chunk of logits is made for the gradient."""
    head = head_of()
    logits, gradient = head.logits(slice(0, 8))
    assert (logits.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    assert gradient.data_ptr() == logits.data_ptr()
    assert gradient.stride(1) == 2 * logits.stride(1) == 2 * chunk_length.padded(100)
    assert logits.untyped_storage().nbytes() == 8 * chunk_length.padded(100) * 4
    assert [x.numel() for x in head.gradients()] == [24 * 16, 100 * 16, 0, 0, 0]
    assert chunk_length.row_limit(
        head.hidden, _head_options(chunk_size=0)
    ) == chunk_length.row_limit(head.hidden.float(), _head_options(chunk_size=0))


@by_half
@pytest.mark.parametrize("logits_dtype", ["fp32", "bf16"])
def test_sums_that_the_library_splits_are_float32(dtype, logits_dtype, mixed, device):
    """Over the vocabulary, over tokens, or of an adapter's few columns: rounded once, not piece by piece."""
    tensors, _, ids, arguments = batch(4, 5, 101, device, HEADS["lora"], D=24, dtype=dtype)
    check_runs = {"chunk_size": 4, "logits_dtype": logits_dtype}
    leaves = {k: x.nan_to_num(0.0).requires_grad_() for k, x in tensors.items()}
    lora = leaves["A"], leaves["B"], 0.7
    out = linear_grpo_loss(
        *(leaves["hidden"], leaves["weight"], ids), lora=lora, **arguments, **check_runs
    )
    out.loss.backward()
    # hidden x weight, and what the adapter adds to it.
    logits = {(dtype, torch.float32 if logits_dtype == "fp32" else dtype, n) for n in (24, 3)}
    others = {x for x in mixed if x[:2] != (dtype, torch.float32)}
    assert others <= logits
    assert (dtype, torch.float32, 101) in mixed  # dhidden, and the adapter's share of it
    assert (dtype, torch.float32, 24) in mixed  # the adapter's first product
