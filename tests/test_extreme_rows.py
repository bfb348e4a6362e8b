"""Rows of logits that hold -inf, or numbers at the ends of float32."""

import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.loss import grpo_loss, linear_grpo_loss
from grpo_fast.ops import linear_logprob, logprob
from grpo_fast.testing import assert_as_accurate
from tests.cases import by_dtype, in_double, loss_and_grad
from tests.ranks import needs_gloo, needs_interpreter, run


def banned(V, dtype, device):
    """(logits (5, V), ids): the scored token of rows 0, 1 and 2 has a logit of -inf."""
    logits = torch.randn(5, V, dtype=dtype, device=device)
    ids = torch.tensor([V - 1, 0, V // 2, 1, V - 2], device=device)
    logits[torch.arange(3), ids[:3]] = -torch.inf
    logits[1, V // 2 :] = -torch.inf
    logits[3, 2:] = -torch.inf
    return logits, ids


@by_dtype
@pytest.mark.parametrize("V", [8, 700, 40_000])
def test_entropy_beside_a_banned_scored_token(V, dtype, backend, device):
    """p log p is 0 where p is: no NaN, in any gradient of the row."""
    logits, ids = banned(V, dtype, device)

    def entropy(x):
        return logprob(x, ids, return_entropy=True)[1].sum()

    def want(x):
        return reference.entropy(x).sum()

    actual = loss_and_grad(entropy, logits)
    baseline = loss_and_grad(want, logits)
    truth = loss_and_grad(want, logits.double())
    for name, a, b, t in zip(("entropy", "dlogits"), actual, baseline, truth, strict=True):
        assert_as_accurate(a, b, t, name=name)
    assert actual[1][logits == -torch.inf].eq(0).all()


@by_dtype
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("options", [{}, {"ratio": "sequence"}], ids=str)
def test_entropy_bonus_beside_a_banned_scored_token(options, advantage, dtype, backend, device):
    logits, ids = banned(50, dtype, device)
    arguments = {
        "advantages": torch.full((5,), advantage, device=device),
        "old_logps": torch.full((5, 1), -1.0, device=device),
        "objective": Objective(entropy_coef=0.1, **options),
    }
    given = (logits[:, None], ids[:, None])
    for inplace in (False, True):

        def ours(x, inplace=inplace):
            return grpo_loss(1 * x, given[1], inplace=inplace, **arguments)

        actual = loss_and_grad(ours, given[0])
        baseline = loss_and_grad(reference.grpo_loss, *given, **arguments)
        truth = loss_and_grad(
            reference.grpo_loss, given[0].double(), given[1], **in_double(arguments)
        )
        for name, a, b, t in zip(("loss", "dlogits"), actual, baseline, truth, strict=True):
            assert_as_accurate(a, b, t, name=name)


def check_a_banned_shard(scored):
    """What each process of the test below runs: the second one's logits are all -inf."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    torch.manual_seed(0)
    V, n = 12, 6
    hidden, weight = torch.randn(2, 3, 4), torch.randn(V, 4)
    bias = torch.where(torch.arange(V) < n, 0.0, -torch.inf)
    ids = torch.tensor([[0, 1, 2], [3, 4, scored]])
    objective = Objective(entropy_coef=0.1)
    arguments = {"advantages": torch.tensor([1.0, -2.0]), "objective": objective}
    arguments["old_logps"] = torch.full((2, 3), -2.0)
    mine = slice(rank * n, rank * n + n)
    found = []
    for rows, options in ((slice(V), {}), (mine, {"tp_group": group})):
        h, w = (x.clone().requires_grad_() for x in (hidden, weight[rows]))
        out = linear_grpo_loss(h, w, ids, bias=bias[rows], **arguments, **options)
        out.loss.backward()
        with torch.no_grad():
            values = linear_logprob(h, w, ids, bias=bias[rows], return_entropy=True, **options)
        found.append([out.loss, *values, h.grad, w.grad[mine] if rows == slice(V) else w.grad])
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-6)
    assert found[0][1].isneginf().sum() == (scored >= n)
    assert all(x.isfinite().all() for x in (found[1][0], *found[1][2:]))


@needs_gloo
@pytest.mark.parametrize("scored", [5, 9])
def test_a_part_of_the_vocabulary_that_is_banned_altogether(scored):
    run("tests.test_extreme_rows:check_a_banned_shard", 2, scored)


@needs_gloo
@needs_interpreter
@pytest.mark.parametrize("scored", [5, 9])
def test_a_part_of_the_vocabulary_that_is_banned_altogether_in_the_kernels(scored):
    switches = {"TRITON_INTERPRET": "1", "GRPO_FAST_BACKEND": "triton"}
    run("tests.test_extreme_rows:check_a_banned_shard", 2, scored, **switches)
