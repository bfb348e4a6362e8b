"""Rows of logits that start and end anywhere: odd vocabularies, slices, strides."""

import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.loss import grpo_loss
from grpo_fast.operands import operand
from grpo_fast.ops import logprob
from grpo_fast.ops.grpo import Arguments, fill
from grpo_fast.ops.logprob import read_rows, write_rows
from grpo_fast.records import Rewards, SoftCap, Targets, Tokens
from grpo_fast.testing import assert_as_accurate
from grpo_fast.torch_kernels import rows
from tests.support.cases import batch, held, in_double, loss_and_grad

# Nothing but edges; edges and a few units; a tile and a rest; several programs.
SIZES = [1, 7, 8, 9, 23, 2051, 33_003]
# The first row so many entries into its memory, and gaps of so many between rows.
PLACES = [(5, 3), (0, 0), (0, 2)]
CAP = (20.0, 0.7)

by_size = pytest.mark.parametrize("V", SIZES)


def places(V):
    return PLACES[: {8: 2, 23: 3}.get(V, 1)]


def small_batch(V, device):
    """Scored columns at the ends of rows, where the edges are."""
    logits, ids, arguments = batch(4 if V < 100 else 3, 2, V, device)
    ends = [[0, min(6, V - 1)], [0, 0], [V - 1, 0], [max(V - 9, 0), V - 1]]
    columns = torch.tensor(ends, device=device)[: len(ids)]
    return logits, torch.where(arguments["mask"], columns, ids), arguments


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@by_size
def test_the_loss_of_rows_anywhere(V, entropy, backend, device):
    logits, ids, arguments = small_batch(V, device)
    arguments["objective"] = Objective(beta=0.1, entropy_coef=0.02 if entropy else 0.0)
    truth = loss_and_grad(reference.grpo_loss, logits.double(), ids, **in_double(arguments))
    plain = loss_and_grad(reference.grpo_loss, logits, ids, **arguments)
    for before, gap in places(V):
        x = held(logits, before, gap).requires_grad_()
        out = grpo_loss(x, ids, **arguments)
        (grad,) = torch.autograd.grad(0.5 * out.loss, x)
        assert_as_accurate(out.loss, plain[0], truth[0], scale=1.0)
        assert_as_accurate(grad, 0.5 * plain[1], 0.5 * truth[1], scale=1.0)
        assert not grad[~arguments["mask"]].any()


@by_size
def test_log_probs_of_rows_anywhere(V, backend, device):
    logits, ids, arguments = small_batch(V, device)
    mask = arguments["mask"]
    upstream = torch.randn(ids.shape, device=device)

    def with_gradient(logp, entropy, x):
        total = (upstream * (logp + 0.3 * entropy)).masked_fill(~mask, 0).sum()
        values = (y.masked_fill(~mask, 0) for y in (logp, entropy))
        return [*values, *torch.autograd.grad(total, x)]

    def plain(x):
        x = torch.where(mask[..., None], x, 0).requires_grad_()
        logp = reference.logprob(x, torch.where(mask, ids, 0))
        return with_gradient(logp, reference.entropy(x), x)

    truth, baseline = plain(logits.double()), plain(logits)
    for before, gap in places(V):
        x = held(logits, before, gap).requires_grad_()
        found = with_gradient(*logprob(x, ids, mask=mask, return_entropy=True), x)
        for got, want, true in zip(found, baseline, truth, strict=True):
            assert_as_accurate(got, want, true, scale=1.0)


@pytest.mark.parametrize(("V", "cap"), [*((V, ()) for V in SIZES[:-1]), (9, CAP), (33_003, CAP)])
def test_where_the_gradient_is_written(V, cap, device, monkeypatch):
    """In place, with its rows like those of the logits and unlike them: the same bits."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    logits, ids, arguments = small_batch(V, device)
    ids, mask = ids.flatten(), arguments["mask"].flatten()
    ones = torch.ones(len(ids), device=device)
    dlogp = torch.where(mask, torch.randn(len(ids), device=device), 0)
    targets, softcap = Targets(ids, mask, None, operand(1.0)), SoftCap(*cap) if cap else None
    tokens = Tokens(ones, ones, *[None] * 6)
    given = Arguments(targets, tokens, Rewards(), False, Objective().terms)
    monkeypatch.setenv("GRPO_FAST_BACKEND", "triton")

    def both(source, *gradients):
        """What two kernels write into `gradients`; None: that one does not run."""
        statistics = read_rows(source, targets, False, softcap)
        first, second = gradients
        if first is not None:
            fill(source, given, first, softcap)
        if second is not None:
            write_rows(dlogp, None, source, targets, statistics, second, softcap)
        return gradients

    for before, gap in places(V):
        x = held(logits, before, gap)
        want = both(x, rows.new_gradient(x), rows.new_gradient(x))
        unlike = held(torch.full_like(logits, 7), 2, 1), held(torch.full_like(logits, 7), 0, 5)
        for got, expected in zip(both(x, *unlike), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
        first, _ = both(x := held(logits, before, gap), x, None)
        torch.testing.assert_close(first, want[0], rtol=0, atol=0)
        _, second = both(x := held(logits, before, gap), None, x)
        torch.testing.assert_close(second, want[1], rtol=0, atol=0)


def test_a_last_segment_that_holds_edges_alone(device, monkeypatch):
    """It has no statistics of its own, and those that other rows have left in its memory are not taken."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    from grpo_fast.kernels import schedules

    meeting_point = schedules.Reading.meeting_point

    def of_other_rows(self, *given):
        found = meeting_point(self, *given)
        found.partial.fill_(5.0)
        return found

    monkeypatch.setattr(schedules.Reading, "meeting_point", of_other_rows)
    monkeypatch.setenv("GRPO_FAST_BACKEND", "triton")
    V = 5 * 8192 + 1
    x = held(torch.randn(1, 1, V, device=device), 5, 0)
    ids = torch.tensor([[3]], device=device)
    logp, entropy = logprob(x, ids, return_entropy=True)
    torch.testing.assert_close(logp, reference.logprob(x, ids))
    torch.testing.assert_close(entropy, reference.entropy(x))
    advantages = torch.ones(1, device=device)
    out = grpo_loss(x.requires_grad_(), ids, advantages=advantages, return_entropy=True)
    torch.testing.assert_close(out.logps, logp)
    torch.testing.assert_close(out.entropy, entropy)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("V", [8, 24, 701])
def test_a_new_gradient_has_rows_like_those_of_the_logits(V, place):
    x = held(torch.zeros(3, 3, V), *place)
    y = rows.new_gradient(x)
    assert y.shape == x.shape
    assert y.untyped_storage().nbytes() - x.numel() * 4 <= 4 * 7 * (2 + 3 * 3)
    if V % 8 == 0:
        assert y.is_contiguous()
        return
    starts = [z[b, t].storage_offset() % 8 for z in (x, y) for b in range(3) for t in range(3)]
    assert starts[:9] == starts[9:]
    if place == (0, 0):
        assert y.is_contiguous()


def test_what_the_kernels_are_told_of_rows():
    pytest.importorskip("triton", reason="the kernels need Triton")
    from grpo_fast.kernels import edges

    assert edges.UNIT.value == rows.UNIT

    def told(x, dx=None):
        rows = edges.rows_of("logits", x)
        return (
            rows["ROWS"],
            rows["before"],
            edges.gradient_of(rows, x if dx is None else dx)["SAME_ROWS"],
        )

    x = torch.zeros(2, 4, 160, dtype=torch.bfloat16)
    assert told(x) == ("aligned", 0, True)
    assert told(x[:, 1:]) == ("aligned", 0, True)
    assert told(x[..., :152]) == ("units", 0, True)
    assert told(x[..., :153]) == ("anywhere", 0, True)
    assert told(x[..., 3:]) == ("anywhere", 3, True)
    assert told(x[..., 8:]) == ("units", 0, True)
    y = torch.zeros(2, 4, 161, dtype=torch.bfloat16)
    assert told(y) == ("anywhere", 0, True)
    assert told(y[:, 1:]) == ("anywhere", 1, True)
    assert told(y[:, 1:], torch.zeros(2, 3, 161)) == ("anywhere", 1, False)
    assert told(y[:, 1:], rows.new_gradient(y[:, 1:])) == ("anywhere", 1, True)
    assert told(x, torch.zeros(2, 4, 161)[..., :160]) == ("aligned", 0, False)
    assert told(x, torch.zeros(2, 4, 168)[..., :160]) == ("aligned", 0, False)
    assert told(x, torch.zeros(2, 4, 176)[..., :160]) == ("aligned", 0, True)
    # Memory that does not reach back to where a unit starts.
    assert (
        told(torch.frombuffer(bytearray(330), dtype=torch.bfloat16, offset=2).view(1, 4, 41))[1]
        == 0
    )
