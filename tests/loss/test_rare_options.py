"""Rare combinations of options: clamps of the KL on policy, weights of packed sequences, banned tokens."""

import dataclasses

import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.loss import grpo_loss, linear_grpo_loss, policy_loss
from grpo_fast.ops import group_advantage, logprob
from grpo_fast.testing import assert_as_accurate
from tests.support import hidden_cases as from_hidden
from tests.support.cases import batch, check, in_double, loss_and_grad

KLS = {
    "k1, gradient of k2": {"kl": "k1", "kl_gradient": "k2"},
    "abs, gradient of k2": {"kl": "abs", "kl_gradient": "k2"},
    "k2": {"kl": "k2"},
    "k3, gap clamped": {"kl_gap_clip": 0.2},
    "k3, value clamped": {"kl_value_clip": 0.02},
    "k3, clamped, gradient of k2": {"kl_gap_clip": 0.2, "kl_value_clip": 0.1, "kl_gradient": "k2"},
    "k3, gradient of k2 inside": {"kl_gap_clip": 0.2, "kl_gradient": "k2_clipped"},
    "k3_unbiased, clamped": {"kl": "k3_unbiased", "kl_gap_clip": 0.2, "kl_value_clip": 0.1},
}
ON_SEQUENCES = {
    "gspo-token": {"ratio": "sequence_token"},
    "gspo": {"ratio": "sequence"},
    "vespo": {"surrogate": "vespo"},
    "gmpo": {"surrogate": "gmpo"},
}


@pytest.mark.parametrize("kl", KLS.values(), ids=KLS)
@pytest.mark.parametrize("options", ON_SEQUENCES.values(), ids=ON_SEQUENCES)
@pytest.mark.parametrize("start", ["logits", "hidden"])
def test_the_kl_on_policy_keeps_its_clamps_and_gradient(start, options, kl, backend, device):
    """A launch computes the KL by itself if the coefficient of the surrogate is known before."""
    objective = Objective(beta=0.7, entropy_coef=0.05, **options, **kl)
    make, compare = (batch, check) if start == "logits" else (from_hidden.batch, from_hidden.check)
    *given, arguments = make(3, 5, 12, device)
    gap = reference_gap(start, given, arguments)
    assert (gap > 0.2).any()
    assert (gap < 0.2).any()
    del arguments["old_logps"]
    compare(*given, {**arguments, "objective": objective})


def reference_gap(start, given, arguments):
    """|reference - policy| of the live tokens: clamps act where it is large."""
    mask = arguments["mask"]
    if start == "logits":
        logits, ids = given
        logp = reference.logprob(logits[mask], ids[mask])
    else:
        tensors, _, ids = given
        logp = reference.logprob(tensors["hidden"][mask] @ tensors["weight"].T, ids[mask])
    return (arguments["ref_logps"][mask] - logp).abs()


@pytest.mark.parametrize(
    "boundaries", [(0, 3, 7), (0, 0, 3, 3, 7, 7), (0, 7), (0, 1, 2, 7)], ids=str
)
@pytest.mark.parametrize("policy", ["on", "off"])
def test_vespo_takes_a_weight_per_packed_sequence_once(policy, boundaries, backend, device):
    """Each sequence has its own weight, also if empty sequences lie between."""
    logits, ids, arguments = batch(1, 7, 12, device, garbage=False)
    packed = {name: x[0] for name, x in arguments.items() if name in ("old_logps", "ref_logps")}
    if policy == "on":
        del packed["old_logps"]
    count = len(boundaries) - 1
    packed["cu_seqlens"] = torch.tensor(boundaries, device=device)
    packed["advantages"] = torch.linspace(-1, 1.5, count).to(device)
    packed["importance_weights"] = torch.linspace(0.5, 1.7, count).to(device)
    packed["objective"] = Objective(surrogate="vespo", beta=0.1)
    check(logits[0], ids[0], packed)
    # The same as one factor of its first token.
    per_token = torch.ones(7, device=device)
    for low, high, weight in zip(
        boundaries[:-1], boundaries[1:], packed["importance_weights"], strict=True
    ):
        if high > low:
            per_token[low] = weight
    spread = packed | {"importance_weights": per_token}
    want = grpo_loss(logits[0], ids[0], **spread).loss
    torch.testing.assert_close(grpo_loss(logits[0], ids[0], **packed).loss, want)


@pytest.mark.parametrize("T", [1, 4])
def test_vespo_takes_a_weight_per_padded_sequence_once(T, backend, device):
    logits, ids, arguments = batch(3, T, 12, device, garbage=False)
    arguments["mask"] = torch.ones_like(arguments["mask"])
    arguments["importance_weights"] = torch.tensor([[0.5], [1.2], [1.7]], device=device)
    arguments["objective"] = Objective(surrogate="vespo", beta=0.1)
    check(logits, ids, arguments)
    per_token = torch.ones(3, T, device=device)
    per_token[:, 0] = arguments["importance_weights"][:, 0]
    spread = arguments | {"importance_weights": per_token}
    want = grpo_loss(logits, ids, **spread).loss
    torch.testing.assert_close(grpo_loss(logits, ids, **arguments).loss, want)


@pytest.mark.parametrize(
    "options",
    [{}, {"top_entropy_quantile": 0.5}, {"ratio": "sequence"}, {"surrogate": "gmpo"}],
    ids=str,
)
@pytest.mark.parametrize("start", ["logits", "hidden", "logps"])
def test_nan_in_the_weights_of_masked_tokens(start, options, backend, device):
    """Not read, neither by the policy's mean nor by the entropy's own."""
    *given, arguments = (from_hidden.batch if start == "hidden" else batch)(3, 5, 12, device)
    mask = arguments["mask"]
    arguments["objective"] = Objective(entropy_coef=0.3, entropy_reduction="token_mean", **options)
    if start == "logps":
        given = [arguments["old_logps"] + 0.1]
        arguments["entropy"] = torch.where(mask, 1 + torch.rand(3, 5, device=device), torch.nan)
    weights = torch.rand(3, 5, device=device) + 0.1
    results = []
    for padding in (0.0, 7.0, torch.nan, torch.inf):
        arguments["token_weights"] = torch.where(mask, weights, padding)
        if start == "hidden":
            found = from_hidden.loss_and_grads(linear_grpo_loss, *given, arguments)
            results.append(tuple(found.values()))
        else:
            fn = grpo_loss if start == "logits" else policy_loss
            results.append(loss_and_grad(fn, *given, **arguments))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
    assert all(x.isfinite().all() for x in results[0])
    if start != "logps":
        (check if start == "logits" else from_hidden.check)(*given, arguments)


@pytest.mark.parametrize("scale", [0.4, 2.5])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_temperature_per_token_with_a_scaled_head(softcap, scale, backend, device):
    """The scale comes before the cap, the temperature after it, each token's own."""
    head = {"logit_scale": scale} | ({} if softcap is None else {"softcap": softcap})
    tensors, options, ids, arguments = from_hidden.batch(3, 5, 30, device, head)
    arguments["objective"] = Objective(beta=0.1, entropy_coef=0.1)
    arguments["temperature"] = torch.linspace(0.4, 2.0, 15).view(3, 5).to(device)
    from_hidden.check(tensors, options, ids, arguments, chunk_size=4)


@pytest.mark.parametrize("V", [5, 300, 9001])
def test_entropy_of_a_row_whose_scored_token_is_banned(V, backend, device):
    """That of the others, 0 log 0 being 0; and its gradient, exactly 0 at the banned token."""
    logits = torch.randn(3, V, device=device)
    logits[0, 3] = -torch.inf
    logits[1] = -torch.inf
    logits[1, :2] = 0.5  # two tokens are left
    ids = torch.full((3,), 3, device=device)

    def entropies(x):
        return logprob(x, ids, return_entropy=True)[1].sum()

    def want(x):
        return reference.entropy(x.masked_fill(x == -torch.inf, -1e4)).sum()

    found = loss_and_grad(entropies, logits)
    for name, *values in zip(
        ("entropy", "dlogits"),
        found,
        loss_and_grad(want, logits),
        loss_and_grad(want, **in_double({"x": logits})),
        strict=True,
    ):
        assert_as_accurate(*values, name=name)
    assert (found[1][logits == -torch.inf] == 0).all()
    one = logprob(logits, ids, return_entropy=True)[1]
    assert one[1].item() == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-6)


@pytest.mark.parametrize("policy", ["on", "off"])
@pytest.mark.parametrize("objective", [Objective(), Objective(ratio="sequence_token")], ids=repr)
def test_a_banned_token_leaves_the_entropy_bonus_finite(objective, policy, backend, device):
    """With a weight or an advantage of 0 its surrogate is left out, and the bonus of its row is not."""
    logits, ids, arguments = batch(3, 4, 20, device, garbage=False)
    del arguments["ref_logps"]
    logits[0, 0, ids[0, 0]] = -torch.inf
    arguments["mask"][0, 0] = True
    arguments["advantages"][0] = 0
    if policy == "on":
        del arguments["old_logps"]
    objective = dataclasses.replace(objective, entropy_coef=0.1)
    loss, grad = loss_and_grad(grpo_loss, logits, ids, **arguments, objective=objective)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert (grad[0, 0] != 0).any()


@pytest.mark.parametrize("start", ["logits", "logps"])
def test_metrics_without_a_live_token(start, backend, device):
    """Fractions and means are those of no tokens: ratios and weights 1, everything else 0."""
    logits, ids, arguments = batch(3, 4, 20, device)
    arguments["mask"] = torch.zeros_like(arguments["mask"])
    ones = {"importance_weights": torch.ones(3, 4, device=device)}
    if start == "logits":
        metrics = grpo_loss(logits, ids, **arguments, **ones).metrics
    else:
        metrics = policy_loss(arguments["old_logps"], **arguments, **ones).metrics
    of_ratios = ("ratio_mean", "ratio_min", "ratio_max", "importance_weight_mean")
    for name, value in metrics.items():
        assert value == (name in (*of_ratios, "effective_sample_size")), name


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("policy", ["on", "off"])
def test_the_loss_alone_is_differentiable(policy, ratio, inplace, backend, device):
    logits, ids, arguments = batch(3, 4, 20, device)
    if policy == "on":
        del arguments["old_logps"]
    logits = (logits.requires_grad_() * 1.0) if inplace else logits.requires_grad_()
    objective = Objective(ratio=ratio, beta=0.1)
    out = grpo_loss(logits, ids, **arguments, objective=objective, inplace=inplace)
    assert out.loss.requires_grad
    others = [x for x in (*out[1:], *out.metrics.values()) if isinstance(x, torch.Tensor)]
    assert len(others) > 10
    assert not any(x.requires_grad for x in others)
    hidden = torch.randn(3, 4, 5, device=device, requires_grad=True)
    weight = torch.randn(20, 5, device=device)
    out = linear_grpo_loss(
        hidden, weight, ids, **arguments, objective=objective, return_entropy=True
    )
    assert out.loss.requires_grad
    others = [x for x in (*out[1:], *out.metrics.values()) if isinstance(x, torch.Tensor)]
    assert not any(x.requires_grad for x in others)
    logps = (arguments["ref_logps"] + 0.1).requires_grad_()
    out = policy_loss(logps, **arguments, objective=objective)
    others = [x for x in out[1:] if isinstance(x, torch.Tensor) and x is not logps]
    assert not any(x.requires_grad for x in (*others, *out.metrics.values()))


@pytest.mark.parametrize("group_size", [4, 7, 8])
def test_equal_rewards_next_to_a_missing_one_are_exactly_0(group_size, backend, device):
    """Not what rounding leaves of reward - mean, times 1 / eps."""
    rewards = torch.randn(40, 1, device=device).repeat(1, group_size)
    rewards[:, 0] = torch.nan
    found = group_advantage(rewards.view(-1), group_size=group_size, eps=1e-12, nan="skip")
    assert (found[~rewards.view(-1).isnan()] == 0).all()


@pytest.mark.parametrize("options", [{"dual_clip": 1.5}, {"delta": 1.5}], ids=str)
def test_the_dual_flag_is_for_advantages_below_0(options, backend, device):
    """Three tokens are above the bound; the bound is for the one that is pushed down."""
    d = torch.tensor([[0.6, 0.6, 0.1, -0.6], [0.6, 0.1, -0.6, -0.1]], device=device)
    advantages = torch.tensor([[1.0], [-1.0]], device=device).expand(2, 4)
    logps = torch.full((2, 4), -1.0, device=device)
    metrics = policy_loss(
        logps, advantages=advantages, old_logps=logps - d, objective=Objective(**options)
    ).metrics
    assert metrics["clip_fraction_dual"].item() == 1 / 8
    assert metrics["clip_fraction_low"].item() == 1 / 8
    assert metrics["clip_fraction_high"].item() == 2 / 8
