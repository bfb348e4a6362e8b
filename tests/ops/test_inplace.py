"""Logits that were overwritten with their gradient: a tensor that shares their memory is refused."""

import pytest
import torch

from grpo_fast import reference
from grpo_fast.integrations.verl.log_probs import logprobs_from_logits
from grpo_fast.loss import grpo_loss
from grpo_fast.ops import logprob
from tests.support.cases import batch


def overwritten(device):
    """(logits with more rows than were overwritten, those that were, ids, arguments, output)."""
    logits, ids, arguments = batch(3, 4, 60, device, garbage=False)
    whole = torch.cat([logits, logits.new_zeros(3, 2, 60)], 1).requires_grad_() * 1
    work = whole[:, 1:5]
    return whole, work, ids, arguments, grpo_loss(work, ids, inplace=True, **arguments)


VIEWS = {
    "the logits": lambda whole, work: work,
    "a view": lambda whole, work: work[:, :],
    "detached": lambda whole, work: work.detach(),
    "some of the rows": lambda whole, work: work.detach()[1:, 3:],
    "the base": lambda whole, work: whole[:, :4],
    "a view of the base": lambda whole, work: whole.detach().view(18, 60)[2:14].view(3, 4, 60),
    "some of the columns": lambda whole, work: work.detach()[..., 7:20],
    "their data": lambda whole, work: work.data,
    "the data of the base": lambda whole, work: whole.data[:, :4],
    "by strides": lambda whole, work: work.detach().as_strided((2, 60), (60, 1), 60),
}


@pytest.mark.parametrize("after_backward", [False, True])
@pytest.mark.parametrize("name", VIEWS)
def test_what_shares_their_memory_is_refused(name, after_backward, backend, device):
    whole, work, _, _, out = overwritten(device)
    if after_backward:
        (2 * out.loss).backward()
    x = VIEWS[name](whole, work)
    scored = torch.zeros(x.shape[:-1], dtype=torch.int64, device=device)
    with (
        pytest.raises(RuntimeError, match="logprob: these logits were overwritten"),
        torch.no_grad(),
    ):
        logprob(x, scored)
    with pytest.raises(RuntimeError, match="grpo_loss: these logits were overwritten"):
        grpo_loss(x, scored, advantages=torch.ones(scored.shape, device=device))
    readers = {
        "grpo_fast.reference": (reference.logprob, reference.entropy, reference.grpo_loss),
        "logprobs_from_logits": (logprobs_from_logits,),
    }
    for name, functions in readers.items():
        for function in functions:
            given = () if function is reference.entropy else (scored,)
            options = {"advantages": 1} if function is reference.grpo_loss else {}
            with (
                pytest.raises(RuntimeError, match=f"{name}: these logits were overwritten"),
                torch.no_grad(),
            ):
                function(x, *given, **options)


def test_what_the_documents_say_of_other_functions(device):
    """PyTorch's own functions are not kept from reading; the docstring says so."""
    _, work, *_ = overwritten(device)
    with torch.no_grad():
        assert work.argmax(-1).shape == work.shape[:-1]
    text = " ".join(grpo_loss.__doc__.split())
    assert "functions cannot be kept from reading: `logits.argmax(-1)`" in text


@pytest.mark.parametrize("name", ["the logits", "a view", "the base", "some of the columns"])
def test_a_gradient_through_them_raises(name, backend, device):
    whole, work, *_ = overwritten(device)
    x = work[..., 7:20] if name == "some of the columns" else VIEWS[name](whole, work)
    with pytest.raises(RuntimeError, match="overwritten"):
        x.sum().backward()


def test_rows_that_were_not_overwritten_can_be_read(backend, device):
    whole, *_ = overwritten(device)
    for rows in (whole[:, :1], whole[:, 5:]):
        ids = torch.zeros(rows.shape[:-1], dtype=torch.int64, device=device)
        want = rows.detach().clone().log_softmax(-1)[..., 0]
        torch.testing.assert_close(logprob(rows.detach(), ids), want, rtol=1e-5, atol=1e-6)


def test_a_buffer_with_new_logits_can_be_used(backend, device):
    new = torch.randn(3, 4, 60, device=device)
    _, work, ids, arguments, _ = overwritten(device)
    want = grpo_loss(new, ids, **arguments).loss
    with torch.no_grad():
        work.copy_(new)
    for x in (work.detach(), work.data):
        torch.testing.assert_close(grpo_loss(x, ids, **arguments).loss, want, rtol=0, atol=0)
    _, work, ids, arguments, _ = overwritten(device)
    want = grpo_loss(new, ids, **arguments).loss
    data = work.data
    data.copy_(new)
    torch.testing.assert_close(grpo_loss(data, ids, **arguments).loss, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    "strides",
    [(60, 60, 1), (200, 40, 1), (120, 30, 1), (50, 200, 1)],
    ids=lambda s: f"{s[0]}-{s[1]}",
)
def test_rows_that_overlap_are_refused(strides, backend, device):
    _, ids, arguments = batch(3, 4, 60, device)
    buffer = torch.randn(2000, device=device).requires_grad_() * 1
    with pytest.raises(
        ValueError, match=rf"do not overlap, got strides \({strides[0]}, {strides[1]}"
    ):
        grpo_loss(buffer.as_strided((3, 4, 60), strides), ids, inplace=True, **arguments)


@pytest.mark.parametrize("strides", [(60, 180, 1), (60, 200, 1), (301, 71, 1)], ids=str)
def test_rows_in_any_order_are_taken(strides, backend, device):
    logits, ids, arguments = batch(3, 4, 60, device, garbage=False)
    buffer = torch.zeros(2000, device=device)
    buffer.as_strided((3, 4, 60), strides).copy_(logits)
    leaf = buffer.requires_grad_()
    work = (leaf * 1).as_strided((3, 4, 60), strides)
    grpo_loss(work, ids, inplace=True, **arguments).loss.backward()
    plain = logits.requires_grad_()
    (want,) = torch.autograd.grad(grpo_loss(plain, ids, **arguments).loss, plain)
    torch.testing.assert_close(leaf.grad.as_strided((3, 4, 60), strides), want)


@pytest.mark.parametrize("inplace", [False, True])
def test_inference_mode(inplace, backend, device):
    """Inference tensors have no version counter."""
    logits, ids, arguments = batch(3, 4, 60, device)
    want = grpo_loss(logits, ids, **arguments)
    with torch.inference_mode():
        out = grpo_loss(logits * 1, ids, inplace=inplace, **arguments)
        logp = logprob(logits * 1, ids, mask=arguments["mask"])
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(logp, want.logps)
