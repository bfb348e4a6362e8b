"""Long rows: their statistics are the same bits, however many segments a program reads at a time."""

import types

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from grpo_fast.kernels import grpo, logprob, schedules
from grpo_fast.objective import Objective
from grpo_fast.records import Rewards, Targets, Tokens

# Full segments and tiles, an end inside a tile, an end inside a strip, one segment of a second program.
SIZES = [32_784, 40_001, 40_960, 65_536, 73_744]
SIDES = [1, 2, 4]


def batch(V, device):
    """Rows whose scored entry is at the start, in and at the end of segments, and nowhere."""
    ids = [0, 1023, 4096, V - 17, V - 1, -1]
    if SIZES.index(V) == 0:
        ids = [*ids[:-1], 1, 1024, 4095, 8191, 8192, 20_000, 32_767, -1]
    ids = torch.tensor(ids, device=device)
    logits = 4 * torch.randn(1, len(ids), V, device=device)
    logits[0, 2, 1::2] = -torch.inf  # every other entry is banned
    return logits, ids


def launch(logits, ids, side, monkeypatch):
    def reading(V, size, capped, _, together):
        return schedules.reading(V, size, capped, side, together and side == 1)

    monkeypatch.setattr(grpo, "reading", reading)
    ones = torch.ones(len(ids), device=logits.device)
    out = torch.empty_like(logits)
    given = (logits, Targets(ids), Tokens(ones, ones), Rewards(), False, Objective(), out)
    loss, logp, *_ = grpo.grpo_fwd_bwd(*given)
    return loss, logp, out


@pytest.mark.parametrize("V", SIZES)
def test_segments_side_by_side_change_no_bit(V, device, monkeypatch):
    logits, ids = batch(V, device)
    alone = logprob.logprob_fwd(logits, Targets(ids), False).logp
    assert alone[:-1].isfinite().all()
    assert alone[-1].isnan()
    results = [launch(logits, ids, side, monkeypatch) for side in SIDES]
    for loss, logp, out in results:
        torch.testing.assert_close(logp, alone, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(loss, results[0][0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(out, results[0][2], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", SIZES[::2])
def test_who_writes_a_row_changes_no_bit(V, dtype, inplace, device, monkeypatch):
    """The last program of a row writes it alone, or the parts of those that have left; or none has left."""
    logits, ids = batch(V, device)
    logits = logits.to(dtype)
    weight = torch.ones(len(ids), device=device)
    weight[0] = 0  # no gradient
    met = []  # the same for all launches, so that the statistics are there before programs arrive
    meeting_point = schedules.Reading.meeting_point

    def meet(plan, N, device, arrived=None):
        if not met:
            met.append(meeting_point(plan, N, device)._replace(arrived=None))
        start = torch.full((N,), started, dtype=torch.int32, device=device)
        return met[0]._replace(arrived=start)

    def launch():
        x = logits.clone()
        out = x if inplace else torch.full_like(x, 7)
        given = (x, Targets(ids), Tokens(weight, weight), Rewards(), False, Objective(), out)
        loss, logp, *_ = grpo.grpo_fwd_bwd(*given)
        return loss, logp, out

    monkeypatch.setattr(schedules.Reading, "meeting_point", meet)
    parts = schedules.reading(V, logits.element_size(), together=True).parts
    assert parts > 1
    started = 0
    results = [launch()]
    # The first program takes itself for the last, and the others find that all have arrived.
    started = parts - 1
    if not inplace:
        results.append(launch())
    started = 0
    monkeypatch.setattr(schedules, "POLLS", 0)
    monkeypatch.setattr(schedules, "INTERPRETED_POLLS", 0)
    met.clear()
    results.append(launch())
    for result in results[1:]:
        for one, two in zip(results[0], result, strict=True):
            torch.testing.assert_close(two, one, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("V", [1, 1024, 1025, 32_768, *SIZES, 152_064, 262_144, 1_000_003])
def test_segments_cover_a_row_once(V, itemsize):
    plans = [schedules.reading(V, itemsize, side=side) for side in SIDES]
    for plan in (*plans, schedules.reading(V, itemsize, together=True)):
        assert plan.parts <= schedules.MOST_TOGETHER or not plan.polls
        assert (plan.parts - 1) * plan.columns < V <= plan.parts * plan.columns
        if plan.split:
            size = plan.columns // (plan.groups * plan.side)
            assert size * plan.groups * plan.side == plan.columns
            assert (plan.segments - 1) * size < V <= plan.segments * size
            if plan.side > 1:
                assert size == plan.steps * plan.K * plan.T


@pytest.mark.parametrize("V", [32_769, 40_960, 50_257, 128_256, 152_064, 262_144])
def test_a_program_of_a_long_row_reads_two_tiles_or_more(V):
    """With one tile, a large part of its time would not be spent reading."""
    plan = schedules.reading(V, 2)
    assert plan.split
    assert plan.columns >= 2 * plan.K * plan.T


@pytest.mark.parametrize(
    ("major", "minor", "megabytes", "expected"),
    [(9, 0, 50, 64), (9, 0, 60, 48), (8, 0, 40, None), (10, 0, 126, None)],
)
def test_programs_that_wait_have_the_registers_that_were_measured(
    major, minor, megabytes, expected, monkeypatch
):
    found = types.SimpleNamespace(major=major, minor=minor, L2_cache_size=megabytes << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    registers_to_wait = schedules.registers_to_wait.__wrapped__
    assert registers_to_wait(torch.device("cpu")) is None
    assert registers_to_wait(torch.device("cuda")) == expected
    for itemsize, fewest in ((2, 0), (4, 64)):
        plan = schedules.reading(152_064, itemsize, together=True)
        limit = plan.arguments(waiting=expected).get("maxnreg")
        assert limit == (expected and max(expected, fewest))
        assert "maxnreg" not in schedules.reading(152_064, 2).arguments(waiting=expected)
