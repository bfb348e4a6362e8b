"""`torch.set_default_dtype` has no effect: the results are the same bits, in the same dtypes."""

import pytest
import torch

from grpo_fast import reference, weights
from grpo_fast.loss import grpo_loss, linear_grpo_loss, policy_loss
from tests.support.calls import CALLS, DIFFERENTIABLE, outputs, tensors
from tests.support.cases import batch, in_double, loss_and_grad
from tests.support.objectives import by_objective


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def changed(request):
    """Sets another default dtype, when called."""
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(before)


def same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@by_objective
@pytest.mark.parametrize("backend", ["torch"], indirect=True)  # kernels have no default dtype
def test_objectives(objective, changed, backend, device):
    logits, ids, arguments = batch(4, 5, 30, device)
    arguments["objective"] = objective
    logps = torch.where(arguments["mask"], arguments["old_logps"] + 0.1, torch.nan)
    entropy = {"entropy": torch.rand(4, 5, device=device)} if objective.needs_entropy else {}
    exact = logits.double(), ids, in_double(arguments)

    def values():
        return (
            *loss_and_grad(grpo_loss, logits, ids, **arguments),
            *loss_and_grad(policy_loss, logps, **arguments, **entropy),
            *loss_and_grad(reference.grpo_loss, *exact[:2], **exact[2]),
        )

    want = values()
    changed()
    same(values(), want)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_public_functions(name, changed, backend, device):
    given = tensors(device)
    for wanted in DIFFERENTIABLE:
        given[wanted].requires_grad_()
    want = outputs(CALLS[name], given)
    changed()
    got = outputs(CALLS[name], given)
    same((*got[0], *got[1]), (*want[0], *want[1]))


def test_numbers_that_no_argument_gives_a_dtype(changed, device):
    """The share of rows skipped where none is, and the draw of `clip_cov`, seeded."""
    hidden, weight = torch.randn(6, 4, device=device), torch.randn(9, 4, device=device)
    ids, A = torch.arange(6, device=device), torch.randn(6, device=device)
    logps = -torch.rand(6, device=device)

    def values():
        out = linear_grpo_loss(hidden, weight, ids, advantages=A, compact=False)
        generator = torch.Generator(device).manual_seed(3)
        drawn = weights.clip_cov(
            *(logps, logps, A), fraction=0.4, low=-9.0, high=9.0, generator=generator
        )
        return out.metrics["skipped_fraction"], drawn

    want = values()
    assert 0 < want[1].sum() < 6
    changed()
    same(values(), want)
