"""Objectives that look at whole sequences, from logits and from log-probs."""

import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.loss import grpo_loss, policy_loss
from tests.support.cases import batch, check, in_double, loss_and_grad
from tests.support.objectives import OBJECTIVES

SEQUENCES = [x for x in OBJECTIVES.values() if x.needs_sequences]


@pytest.mark.parametrize("objective", SEQUENCES, ids=lambda x: f"{x.surrogate}-{x.ratio}")
@pytest.mark.parametrize("policy", ["on", "off"])
def test_sequence_objectives_with_every_argument(objective, policy, backend, device):
    """Advantages and importance weights per token and per sequence, several blocks of tokens a sequence."""
    for per_token in (True, False):
        logits, ids, arguments = batch(4, 9, 12, device)
        arguments |= {"objective": objective, "token_weights": torch.rand(4, 9, device=device)}
        shape = (4, 9) if per_token else (4,)
        arguments["advantages"] = torch.randn(shape, device=device)
        arguments["advantages"][..., ::3] = 0  # of single tokens, or of whole sequences
        arguments["importance_weights"] = torch.rand(shape, device=device) + 0.3
        if policy == "on" and objective.off_policy_threshold is None:
            del arguments["old_logps"]
        check(logits, ids, arguments, upstream=2.0)


@pytest.mark.parametrize("objective", SEQUENCES, ids=lambda x: f"{x.surrogate}-{x.ratio}")
def test_sequences_of_one_token(objective, backend, device):
    logits, ids, arguments = batch(5, 1, 12, device)
    check(logits, ids, {**arguments, "objective": objective})


def test_an_unbiased_kl_beyond_the_bound_of_its_ratio(backend, device):
    """A clamped ratio passes no gradient to the KL term of the other tokens either."""
    logits, ids, arguments = batch(6, 7, 20, device)
    bounded = Objective(ratio="sequence", kl="k3_unbiased", beta=0.3, log_ratio_max=0.01)
    check(logits, ids, {**arguments, "objective": bounded})


@pytest.mark.parametrize("far", [20.5, 21.0, 30.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_vespo_bounds_the_log_ratio_of_a_token(sign, far, backend, device):
    """The bounds are -20 and 20, before the log-ratios are added up."""
    logps = torch.full((1, 3), -30.0, device=device)
    old = logps - sign * torch.tensor([[far, -12.0, -8.0]], device=device)
    arguments = {"old_logps": old, "advantages": torch.ones(1, device=device)}
    arguments["objective"] = Objective(surrogate="vespo")
    loss, grad = loss_and_grad(policy_loss, logps, **arguments)
    assert grad.ne(0).all()
    want = loss_and_grad(reference.policy_loss, logps.double(), **in_double(arguments))
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(grad.double(), want[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("objective", SEQUENCES, ids=lambda x: f"{x.surrogate}-{x.ratio}")
def test_on_policy_takes_one_launch(objective, backend, device, monkeypatch):
    """The coefficients are known before the log-probs: no pass for these alone."""

    def read(*_):
        raise AssertionError("the logits were read for their log-probs alone")

    monkeypatch.setattr("grpo_fast.loss.from_logits.logprob_fwd", read)
    logits, ids, arguments = batch(3, 5, 20, device)
    arguments["objective"] = objective
    if objective.off_policy_threshold is not None:
        with pytest.raises(ValueError, match="old_logps: needed"):
            grpo_loss(logits, ids, **{**arguments, "old_logps": None})
        return
    del arguments["old_logps"]
    through_mean = objective.ratio == "sequence" and objective.kl == "k3_unbiased"
    if (objective.beta and through_mean) or objective.top_entropy_quantile < 1:
        with pytest.raises(AssertionError, match="alone"):
            check(logits, ids, arguments)
        return
    check(logits, ids, arguments)


def test_sequence_objectives_of_long_sequences(backend, device, monkeypatch):
    """More tokens than one block of the kernel holds."""
    if backend == "triton":
        monkeypatch.setattr("grpo_fast.kernels.sequence_loss.BLOCK", 8)
    for objective in SEQUENCES:
        logits, ids, arguments = batch(3, 20, 5, device)
        check(logits, ids, {**arguments, "objective": objective})


def test_gspo_and_gspo_token_agree_where_the_paper_says_so(backend, device):
    logits, ids, arguments = batch(4, 6, 20, device)
    grads = [
        loss_and_grad(grpo_loss, logits, ids, **arguments, objective=Objective(ratio=ratio))[1]
        for ratio in ("sequence", "sequence_token")
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-8)


def test_a_stale_sequence_is_dropped_where_it_would_be_pushed_down(backend, device):
    """Mean of old - new 0.5: above the threshold its tokens with A < 0 lose their surrogate, not their KL."""
    logps = torch.full((1, 4), -2.0, device=device)
    arguments = {
        "old_logps": logps + 0.5,
        "ref_logps": logps + 0.1,
        "advantages": torch.tensor([[1.0, -1.0, 0.5, -0.5]], device=device),
    }
    for threshold, dropped in ((0.4, True), (0.6, False)):
        objective = Objective(off_policy_threshold=threshold, reduction="sequence_sum")
        grad = loss_and_grad(policy_loss, logps, **arguments, objective=objective)[1]
        want = -arguments["advantages"] * torch.exp(torch.tensor(-0.5))
        want[:, 1::2] = 0  # below the clip range they have none anyway
        torch.testing.assert_close(grad, want)
        loss = policy_loss(logps, **arguments, objective=objective).loss
        up = -1.5 * torch.exp(torch.tensor(-0.5))
        torch.testing.assert_close(loss.cpu(), up if dropped else up + 1.5 * 0.8)


def test_empty_sequences_among_others(backend, device):
    logps = torch.randn(5, device=device) - 2
    boundaries = torch.tensor([0, 0, 2, 2, 2, 5, 5, 5, 5, 5], device=device)
    for objective in SEQUENCES:
        arguments = {
            "advantages": torch.randn(9, device=device),
            "old_logps": logps + 0.1,
            "ref_logps": logps,
            "cu_seqlens": boundaries,
            "objective": objective,
            "entropy": torch.ones(5, device=device),
        }
        loss, grad = loss_and_grad(policy_loss, logps, **arguments)
        want = loss_and_grad(reference.policy_loss, logps.double(), **in_double(arguments))
        torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double(), want[1], rtol=1e-4, atol=1e-6)
