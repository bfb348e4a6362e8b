"""`linear_logprob` from hidden states: values and gradients against the whole logits in float64."""

import pytest
import torch

from grpo_fast import reference
from grpo_fast.ops import linear_logprob, logprob
from grpo_fast.ops.head import chunk_length, chunked, products
from tests.support.cases import in_other_company
from tests.support.heads import (
    HEADS,
    by_head,
    call,
    check_log_probs,
    graded,
    make,
    targets,
    values_and_grads,
)
from tests.support.properties import given, settings, st


@by_head
@pytest.mark.parametrize("compact, chunk_size", [(True, None), (False, 4), (True, 64)])
def test_matches_reference(options, chunk_size, compact, backend, device):
    tensors, options = make(21, 8, 101, device, options)
    ids, mask, upstream = targets(21, 90, device)
    tensors["hidden"][~mask] = torch.nan
    check_log_probs(
        tensors, options, ids, upstream, mask=mask, chunk_size=chunk_size, compact=compact
    )


@pytest.mark.parametrize("V", [1500, 40_000])
@pytest.mark.parametrize("options", [HEADS["plain"], HEADS["everything"]], ids=["plain", "all"])
def test_long_rows(V, options, backend, device):
    """Several tiles per row, and rows shared by several programs; rows of no aligned length."""
    options = {k: x for k, x in options.items() if k != "vocab_size"}
    tensors, options = make(5, 8, V + 1, device, options | {"vocab_size": V})
    ids, mask, upstream = targets(5, V, device)
    temperature = 0.5 + torch.rand(5, device=device)
    check_log_probs(
        tensors, options, ids, upstream, mask=mask, temperature=temperature, chunk_size=3
    )


@settings(max_examples=20)
@given(
    N=st.integers(0, 20),
    D=st.integers(1, 9),
    V=st.integers(2, 300),
    head=st.sampled_from(["plain", "bias", "softcap", "logit_scale", "lora"]),
    chunk_size=st.sampled_from([None, 1, 7, 32]),
    frozen=st.sampled_from([(), ("weight",), ("hidden",), ("weight", "bias", "A", "B")]),
    temperature=st.floats(0.3, 3),
    seed=st.integers(0, 2**16),
)
def test_any_shape(N, D, V, head, chunk_size, frozen, temperature, seed, backend, device):
    torch.manual_seed(seed)
    tensors, options = make(N, D, V, device, HEADS[head])
    ids, mask, upstream = targets(N, V, device)
    check_log_probs(
        tensors,
        options,
        ids,
        upstream,
        frozen=frozen,
        mask=mask,
        temperature=temperature,
        chunk_size=chunk_size,
    )


@by_head
def test_frozen_head_scales_stored_rows(options, backend, device):
    """Only `hidden` wants a gradient: one pass over the logits, whatever gradient comes later."""
    tensors, options = make(21, 8, 101, device, options)
    ids, mask, (upstream, _) = targets(21, 90, device)
    grads = []
    for dtype, fn in ((torch.float64, reference.linear_logprob), (None, linear_logprob)):
        leaves = graded(tensors, dtype, frozen=set(tensors) - {"hidden"})
        logp = call(fn, leaves, options, ids, mask=mask)
        upstream = upstream.to(logp.dtype)
        for _ in range(2):  # the rows are kept as they are: a second backward is right, too
            (grad,) = torch.autograd.grad(logp, leaves["hidden"], upstream, retain_graph=True)
            grads.append(grad)
    torch.testing.assert_close(grads[2].double(), grads[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[3], grads[2], rtol=0, atol=0)
    assert grads[2][~mask].eq(0).all()


def test_a_frozen_head_needs_two_products_of_the_size(monkeypatch, device):
    """Counted: 2 for an unfrozen head, 2 N D V each in the forward, 3 in the backward."""

    products = []
    for name in ("product", "accumulate"):
        real = getattr(chunked, name)

        def counting(*args, real=real, **kwargs):
            products.append(1)
            return real(*args, **kwargs)

        monkeypatch.setattr(chunked, name, counting)

    def count(frozen, **kwargs):
        tensors, options = make(16, 8, 101, device)
        leaves = graded(tensors, frozen=frozen)
        products.clear()
        out = call(linear_logprob, leaves, options, torch.zeros_like(leaves["hidden"][:, 0]).long())
        forward = len(products)
        if out.requires_grad:
            out.sum().backward()
        return forward, len(products) - forward

    assert count(("weight",)) == (2, 0)
    assert count(()) == (1, 3)
    assert count(("hidden",)) == (1, 2)
    assert count(("hidden", "weight")) == (1, 0)


def test_saturated_rows_keep_their_gradient(backend, device):
    """A margin of 30 nats: 1 - p is 5e-12 (known to 1e-4 in float64), and so is the gradient, not 0."""
    D, V = 4, 50
    weight = torch.zeros(V, D, device=device)
    weight[7, 0] = 30.0
    hidden = torch.zeros(3, D, device=device)
    hidden[:, 0] = 1.0
    ids = torch.full((3,), 7, device=device)
    for frozen in (False, True):
        h, W = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        logp = linear_logprob(h, W, ids)
        logp.sum().backward()
        h64, W64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
        truth = reference.linear_logprob(h64, W64, ids)
        truth.sum().backward()
        assert (logp < 0).all()
        torch.testing.assert_close(logp.double(), truth, rtol=1e-3, atol=0)
        torch.testing.assert_close(h.grad.double(), h64.grad, rtol=1e-3, atol=0)
        assert h.grad[:, 0].ne(0).all()
        if not frozen:
            torch.testing.assert_close(W.grad.double(), W64.grad, rtol=1e-3, atol=0)


def test_padded_batches_and_views(backend, device):
    """(B, T, D), and the strided view that drops the last state of each sequence."""
    wide = torch.randn(3, 5, 8, device=device)
    weight = torch.randn(60, 8, device=device)
    ids = torch.randint(60, (3, 4), device=device)
    leaf = wide.clone().requires_grad_()
    logp = linear_logprob(leaf[:, :-1], weight, ids)
    want = logprob(wide[:, :-1] @ weight.T, ids)
    torch.testing.assert_close(logp, want, rtol=1e-6, atol=1e-6)
    logp.sum().backward()
    assert leaf.grad[:, -1].eq(0).all()


def test_rows_do_not_depend_on_the_batch(backend, device):
    """At the same chunk size every product has the same shape: the same bits, in any company."""
    tensors, _ = make(40, 16, 300, device)
    ids = torch.randint(300, (40,), device=device)
    hidden, weight = tensors["hidden"], tensors["weight"]
    whole = linear_logprob(hidden, weight, ids, chunk_size=16)
    for rows in (slice(0, 16), slice(16, 23), slice(32, 40)):
        alone = linear_logprob(hidden[rows], weight, ids[rows], chunk_size=16)
        torch.testing.assert_close(alone, whole[rows], **in_other_company(backend, device))


@pytest.mark.parametrize("limit", [None, 16])
def test_rows_hardly_depend_on_the_batch_by_default(limit, monkeypatch, backend, device):
    """The length of a chunk follows from N: between lengths a dot product is rounded otherwise, no more.

    limit: the most rows of a chunk; None: all are one.
    """
    N, D, V = 40, 16, 300
    if limit:
        room = dict.fromkeys(("cuda", "cpu"), limit * chunk_length.padded(V) * 4)
        monkeypatch.setattr(chunk_length, "WORKSPACE_BYTES", room)
        monkeypatch.setattr(chunk_length, "CPU_WORKSPACE_SHARE", 0)
    heights = []
    real = products.product

    def recorded(a, b, out):
        heights.append((len(a), len(out)))
        real(a, b, out)

    monkeypatch.setattr(chunked, "product", recorded)
    tensors, _ = make(N, D, V, device)
    ids = torch.randint(V, (N,), device=device)
    hidden, weight = tensors["hidden"], tensors["weight"]

    def computed(rows):
        heights.clear()
        logps = linear_logprob(hidden[rows], weight, ids[rows])
        # The workspace has the same shape for every chunk, the last included.
        assert len(set(heights)) == 1
        assert len(heights) == -(-len(logps) // heights[0][0])
        return logps, heights[0][0]

    whole, length = computed(slice(0, N))
    assert length == (limit or N)
    # Of a dot product of length D in float32, in logit and normaliser.
    magnitude = (hidden.double().abs() @ weight.double().abs().T).amax(1)
    bound = 2 * D * torch.finfo(torch.float32).eps * magnitude
    for rows in (slice(0, 1), slice(3, 12), slice(16, 39), slice(1, 40)):
        alone, other = computed(rows)
        assert ((alone - whole[rows]).abs() <= bound[rows]).all()
        if other == length:
            torch.testing.assert_close(alone, whole[rows], **in_other_company(backend, device))
    # The same number of rows: the same length, and the same bits in whatever company.
    hidden = hidden.index_copy(0, torch.arange(20, N, device=device), -2 * hidden[20:])
    torch.testing.assert_close(computed(slice(0, N))[0][:20], whole[:20], rtol=0, atol=0)


def test_run_to_run_the_same_bits(backend, device):
    tensors, options = make(33, 16, 300, device, HEADS["everything"])
    ids, mask, upstream = targets(33, 90, device)
    runs = [
        values_and_grads(linear_logprob, tensors, options, upstream, ids, mask=mask, chunk_size=8)
        for _ in range(2)
    ]
    for name, x in runs[0].items():
        torch.testing.assert_close(x, runs[1][name], rtol=0, atol=0)


@pytest.mark.parametrize("logits_dtype", ["fp32", "bf16"])
def test_half_operands(logits_dtype, backend, device):
    """float16: against plain PyTorch in the same dtype; unrounded logits are better than its own."""
    tensors, options = make(24, 16, 200, device, dtype=torch.float16)
    ids = torch.randint(200, (24,), device=device)
    upstream = torch.randn(2, 24, device=device)
    check_log_probs(tensors, options, ids, upstream, logits_dtype=logits_dtype)
    if logits_dtype == "fp32":
        logp = linear_logprob(tensors["hidden"], tensors["weight"], ids)
        truth = reference.linear_logprob(
            tensors["hidden"].double(), tensors["weight"].double(), ids
        )
        assert (logp - truth).abs().max() < 5e-6


@pytest.mark.parametrize("fresh, alpha", [(True, 1.0), (True, 0.5), (False, 1.0), (False, 2.0)])
def test_sums_of_halves_where_addmm_takes_none(monkeypatch, fresh, alpha):
    """Before torch 2.10: products of slabs, added up in float32."""

    def mixed(a, b, *, out_dtype, out=None):  # a CPU has it not
        found = (a.double() @ b.double()).to(out_dtype)
        return found if out is None else out.copy_(found)

    a, b = torch.randn(37, 50).bfloat16(), torch.randn(50, 7).bfloat16()
    out = torch.full((37, 7), float("nan")) if fresh else torch.randn(37, 7)
    want = alpha * (a.double() @ b.double()) + (0 if fresh else out.double())
    monkeypatch.setattr(products, "SLAB", 16)
    monkeypatch.setattr(torch, "mm", mixed)
    products._accumulate_in_slabs(out, a, b, alpha, fresh)
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-5)
