"""A half-precision gradient over the float32 logits that it comes from: the same bits as beside them."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from grpo_fast.kernels import grpo, logprob, schedules
from grpo_fast.objective import Objective
from grpo_fast.records import Rewards, RowStatistics, SoftCap, Targets, Tokens

CAP = SoftCap(5.0, 0.5)
# V, soft cap, entropy, dtype of the gradient: one column, one tile and strips, tiles and strips of one
# program, segments of several programs with the last of them not full.
CASES = [
    (1, None, False, torch.bfloat16),
    (1031, CAP, True, torch.float16),
    (9001, None, True, torch.bfloat16),
    (41_001, None, False, torch.float16),
]

by_case = pytest.mark.parametrize(("V", "cap", "entropy", "half"), CASES)


def batch(V, device):
    """Logits as the head has them, and ids, mask and weights: live, masked, without weight, no id."""
    ids = torch.tensor([0, V // 2, V - 1, V // 3, 0, -1], device=device)
    mask = torch.tensor([True, True, True, False, True, True], device=device)
    weight = torch.tensor([1.0, 2.0, -0.5, 1.0, 0.0, 1.0], device=device)
    work = torch.full((8, -(-V // 64) * 64), torch.nan, device=device)
    work[:6, :V] = 3 * torch.randn(6, V, device=device)
    work[3, :V] = torch.nan  # masked: not read
    return work, ids, mask, weight


def both(work, V, half):
    """(logits, their gradient) beside each other, and one over the other."""
    aside, over = work.clone(), work.clone()
    gradient = torch.full((8, work.shape[1]), torch.nan, dtype=half, device=work.device)
    return [
        (aside[:6, :V][None], gradient[:6, :V][None]),
        (over[:6, :V][None], over.view(half)[:6, :V][None]),
    ]


def assert_same(found):
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)


@by_case
def test_grpo(V, cap, entropy, half, device):
    work, ids, mask, weight = batch(V, device)
    objective = Objective(entropy_coef=0.1 if entropy else 0.0)
    found = []
    for logits, gradient in both(work, V, half):
        assert schedules.overlaps(logits, gradient) == (len(found) == 1)
        given = (logits, Targets(ids, mask, None, 0.7), Tokens(weight, weight), Rewards())
        out = grpo.grpo_fwd_bwd(*given, entropy, objective, gradient, cap)
        found.append([*(x for x in out if x is not None), gradient.clone()])
    assert_same(found)
    assert found[0][-1][0, 3:5].abs().max() == 0
    assert V == 1 or found[0][-1][0, :3].abs().amax(1).min() > 0


@by_case
def test_logprob(V, cap, entropy, half, device):
    work, ids, mask, dlogp = batch(V, device)
    found = []
    for logits, gradient in both(work, V, half):
        targets = Targets(ids, mask, None, 0.7)
        statistics = logprob.logprob_fwd(logits, targets, entropy, cap)
        dentropy = -dlogp if entropy else None
        logprob.logprob_bwd(dlogp, dentropy, logits, targets, statistics, gradient, cap)
        found.append([statistics.logp, gradient.clone()])
    assert_same(found)
    assert found[0][-1][0, 3:5].abs().max() == 0
    assert V == 1 or found[0][-1][0, :3].abs().amax(1).min() > 0


def test_which_tensors_overlap(device):
    x = torch.zeros(2, 4, 64, device=device)
    half = x.view(torch.bfloat16)
    assert schedules.overlaps(x, half[..., :64])
    assert schedules.overlaps(x[:, 1:, :33], half[:, 1:, :33])
    assert not schedules.overlaps(x, x)
    assert not schedules.overlaps(x[:, :, 3:], x[:, :, 3:])
    assert not schedules.overlaps(x, torch.zeros_like(half[..., :64]))
    assert not schedules.overlaps(x[:1], half[1:, :, :64])  # pieces of one buffer
    assert not schedules.overlaps(x[:0], half[:0, :, :64])


@pytest.mark.parametrize(
    "other",
    [
        lambda x, half: half[..., 64:],  # the second half of each row
        lambda x, half: half.view(2, 8, 64)[:, :4],  # rows closer together
        lambda x, half: half.as_strided((2, 4, 64), (256, 128, 1)),  # sequences closer together
        lambda x, half: half[..., ::2],  # gaps between the elements
        lambda x, half: half[:, 1:, :64],
        lambda x, half: half[..., :32],
        lambda x, half: x[:, 1:],
        lambda x, half: x.view(torch.float64)[..., :32],
    ],
)
@pytest.mark.parametrize("kernel", ["grpo", "logprob"])
def test_any_other_overlap_is_refused(kernel, other, device):
    x = torch.zeros(2, 4, 64, device=device)
    wrong = other(x, x.view(torch.bfloat16))
    ids = torch.zeros(8, dtype=torch.int64, device=device)
    ones = torch.ones(8, device=device)
    if kernel == "grpo":
        given = (x, Targets(ids), Tokens(ones, ones), Rewards(), False, Objective(), wrong)
        launcher = grpo.grpo_fwd_bwd
    else:
        given = (ones, None, x, Targets(ids), RowStatistics(ones, None, ones, ones), wrong)
        launcher = logprob.logprob_bwd
    with pytest.raises(ValueError, match=r"dlogits shares memory with logits: .*offset"):
        launcher(*given)


def test_rows_that_start_anywhere_are_refused(device):
    """What is before the first multiple of 8 entries would be overwritten before it is read."""
    x = torch.zeros(2, 4, 66, device=device)
    with pytest.raises(ValueError, match=r"dlogits lies over logits: .*multiples of 8.*66"):
        schedules.overlaps(x, x.view(torch.bfloat16)[..., :66])
