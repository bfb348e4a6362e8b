"""The specification itself: gradients, closed forms, and loops that do what the formulas say."""

import math

import pytest
import torch

from grpo_fast import Objective, reference, sequences
from grpo_fast.reference import kl_estimate
from tests.support.cases import batch, in_double
from tests.support.objectives import OBJECTIVES

STOPS_GRADIENTS = ("cispo", "dppo_tv", "dppo_kl", "rollout_is", "vespo", "topr")
CHECKED = {  # finite differences see through sg()
    name: x
    for name, x in OBJECTIVES.items()
    if x.variant not in STOPS_GRADIENTS and x.ratio != "sequence_token" and x.kl_gradient == "own"
}


@pytest.mark.parametrize("objective", CHECKED.values(), ids=CHECKED)
def test_gradcheck(objective):
    logits, ids, arguments = batch(3, 3, 6, "cpu", garbage=False)
    arguments = in_double(arguments) | {"objective": objective, "temperature": 0.8}
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference.grpo_loss(x, ids, **arguments), logits)


def test_log_prob_and_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3), -torch.inf]], dtype=torch.float64)
    logp = reference.logprob(logits, torch.tensor([1]))
    torch.testing.assert_close(logp, torch.tensor([math.log(0.75)], dtype=torch.float64))
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    torch.testing.assert_close(
        reference.entropy(logits), torch.tensor([entropy], dtype=torch.float64)
    )
    cold = reference.logprob(logits, torch.tensor([1]), temperature=0.5)
    torch.testing.assert_close(cold, torch.tensor([math.log(0.9)], dtype=torch.float64))


def test_group_advantage_by_hand():
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0], dtype=torch.float64)
    half = 1 / (math.sqrt(2) + 1e-4)
    want = torch.tensor([-half, half, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(reference.group_advantage(rewards, group_size=2), want)
    batch_std = rewards.std().item() + 1e-4
    want = torch.tensor([-1 / batch_std, 1 / batch_std, 0, 0], dtype=torch.float64)
    got = reference.group_advantage(rewards, group_size=2, scale="batch")
    torch.testing.assert_close(got, want)
    got = reference.group_advantage(rewards, group_ids=torch.tensor([0, 1, 0, 0]), scale="none")
    want = torch.tensor([1 - 11 / 3, 0, 5 - 11 / 3, 5 - 11 / 3], dtype=torch.float64)
    torch.testing.assert_close(got, want)
    got = reference.group_advantage(rewards, group_size=4, baseline="leave_one_out", scale="none")
    want = torch.tensor([-10 / 3, -2 / 3, 2, 2], dtype=torch.float64)
    torch.testing.assert_close(got, want)


def test_group_advantage_of_several_rewards_by_hand():
    x, root = torch.nan, math.sqrt(0.5)
    rewards = torch.tensor([[1.0, x], [3.0, 2.0], [x, 4.0], [x, x]], dtype=torch.float64)
    options = {"group_size": 4, "nan": "skip", "eps": 0.0}
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    # Rewards 1, 4, 2 and none at all.
    got = reference.group_advantage(rewards, weights=weights, scale="none", **options)
    want = torch.tensor([-4 / 3, 5 / 3, -1 / 3, 0], dtype=torch.float64)
    torch.testing.assert_close(got, want)
    # Scores (-1, 1) and (-1, 1) over sqrt(2) each; their sums over the std of the sums.
    sums = torch.tensor([-root, root - root, root], dtype=torch.float64)
    want = torch.cat([(sums - sums.mean()) / sums.std(), torch.zeros(1, dtype=torch.float64)])
    got = reference.group_advantage(rewards, aggregation="normalize_then_sum", **options)
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="NaN"):
        reference.group_advantage(rewards, group_size=4)


@pytest.mark.parametrize("A", [1.5, -1.5])
@pytest.mark.parametrize("d", [-0.5, -0.1, 0.0, 0.15, 0.5, 1.5])
def test_clip_by_cases(A, d):
    """-min(r A, clip(r) A): gradient -r A inside, 0 where the clip binds."""
    logp = torch.tensor([d], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(1, dtype=torch.float64)
    advantage = torch.tensor([A], dtype=torch.float64)
    loss = reference.policy_terms(logp, advantage, Objective(), old)
    (grad,) = torch.autograd.grad(loss, logp)
    r = math.exp(d)
    bound = (A > 0 and r > 1.2) or (A < 0 and r < 0.8)
    edge = 1.2 if A > 0 else 0.8
    assert loss.item() == pytest.approx(-A * (edge if bound else r))
    assert grad.item() == pytest.approx(0 if bound else -A * r)


@pytest.mark.parametrize("A", [1.5, -1.5])
@pytest.mark.parametrize("d", [-0.5, -0.1, 0.15, 0.5])
def test_the_other_surrogates_by_hand(A, d):
    """Loss and coefficient dl/dlogp of one token with logp -1, as the papers write them."""
    y, old = -1.0, -1.0 - d
    r, change = math.exp(d), math.exp(y) - math.exp(old)
    mu, pi = math.exp(old), math.exp(y)
    kl = mu * math.log(mu / pi) + (1 - mu) * math.log((1 - mu) / (1 - pi))
    tau = 1.0 if A > 0 else 1.5
    gate = 1 / (1 + math.exp(-tau * (r - 1)))
    w_cispo = min(max(r, 0.9), 1.3)
    w_tv = min(r, 1.2) * (change <= 0.04 if A > 0 else change >= -0.03)
    held = (d > 0 and kl > 0.01) if A > 0 else (d < 0 and kl > 0.02)
    w_kl = 0 if held else r
    w_is = r if 0.9 < r < 1.2 else 0
    inside = -0.03 <= change <= 0.04
    tv, bounds = {"epsilon_low": 0.03, "epsilon_high": 0.04}, {"epsilon_low": 0.1}
    cases = [
        ({"surrogate": "reinforce"}, -A * y, -A),
        ({"surrogate": "cispo", "epsilon_high": 0.3, **bounds}, -w_cispo * A * y, -w_cispo * A),
        (
            {"surrogate": "sapo", "tau_neg": 1.5},
            -A * 4 / tau * gate,
            -4 * A * gate * (1 - gate) * r,
        ),
        ({"surrogate": "dppo_tv", "ratio_cap": 1.2, **tv}, -w_tv * A * y, -w_tv * A),
        (
            {"surrogate": "dppo_kl", "epsilon_low": 0.02, "epsilon_high": 0.01},
            -w_kl * A * y,
            -w_kl * A,
        ),
        ({"surrogate": "rollout_is", **bounds}, -w_is * A * y, -w_is * A),
        (
            {"surrogate": "ipo", "quadratic_coef": 0.3, **tv},
            -A * r * inside + 0.3 * d * d,
            -A * r * inside + 0.6 * d,
        ),
        ({"surrogate": "dro", "quadratic_coef": 0.3}, -A * y + 0.15 * d * d, -A + 0.3 * d),
    ]
    for options, value, slope in cases:
        logp = torch.tensor([y], dtype=torch.float64, requires_grad=True)
        was = torch.tensor([old], dtype=torch.float64)
        advantage = torch.tensor([A], dtype=torch.float64)
        loss = reference.policy_terms(logp, advantage, Objective(**options), was)
        (grad,) = torch.autograd.grad(loss, logp)
        assert loss.item() == pytest.approx(value, abs=1e-6), options
        assert grad.item() == pytest.approx(slope, abs=1e-6), options


def test_a_k3_value_clamp_of_10_kills_the_gradient_from_2_611_nats_on():
    for gap, alive in ((2.610, True), (2.612, False)):
        logp = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
        kl = kl_estimate(logp, logp.detach() + gap, logp.exp(), Objective(kl_value_clip=10))
        (grad,) = torch.autograd.grad(kl, logp)
        assert (grad.item() != 0) == alive


@pytest.mark.parametrize(
    ("kl", "value", "slope"),
    [
        ("k1", lambda q: -q, lambda q: 1),
        ("abs", abs, lambda q: -math.copysign(1, q)),
        ("k2", lambda q: q * q / 2, lambda q: -q),
        ("k3", lambda q: math.exp(q) - q - 1, lambda q: 1 - math.exp(q)),
        # differentiated through the ratio, which is 1 on policy: d/dlogp [r k3] = -q
        ("k3_unbiased", lambda q: math.exp(q) - q - 1, lambda q: -q),
    ],
)
@pytest.mark.parametrize("q", [-1.0, 0.3])
def test_kl_estimators_by_hand(kl, value, slope, q):
    logp = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    ratio = (logp - logp.detach()).exp()
    estimate = kl_estimate(logp, logp.detach() + q, ratio, Objective(kl=kl))
    (grad,) = torch.autograd.grad(estimate, logp)
    assert estimate.item() == pytest.approx(value(q))
    assert grad.item() == pytest.approx(slope(q))


def test_k3_is_an_unbiased_estimate_of_the_kl():
    torch.manual_seed(0)
    logits, other = torch.randn(2, 8, dtype=torch.float64)
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    for kl in ("k1", "k3"):
        expected = (p.exp() * kl_estimate(p, q, torch.ones_like(p), Objective(kl=kl))).sum()
        torch.testing.assert_close(expected, exact)


def test_weights_of_packed_and_padded_sequences_agree():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    cu_seqlens = torch.tensor([0, 3, 6, 9])
    for reduction in ("sequence_mean", "token_mean", "sequence_sum"):
        objective = Objective(reduction=reduction)
        padded = reference.reduction_weights(mask, objective)
        packed = reference.reduction_weights(mask.flatten(), objective, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(packed, padded.flatten())
        assert padded[~mask].eq(0).all()
    assert sequences.sequence_of_token(torch.tensor([0, 0, 2, 2, 5]), 5).tolist() == [1, 1, 3, 3, 3]
