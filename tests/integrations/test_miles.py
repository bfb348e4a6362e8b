"""miles' adapter, on a stand-in for its package: the parts that differ from slime's adapter."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from grpo_fast.integrations import miles
from tests.support.hosts import agrees, clipped, parameters
from tests.support.slime import (
    ARGS,
    FRACTIONS,
    MASKS,
    MILES,
    MILES_CASES,
    PROMPTS,
    RESPONSES,
    TOTALS,
    make_batch,
    reducer,
    scored,
)


@pytest.fixture
def batch(device):
    return make_batch(device)


@pytest.fixture
def host(monkeypatch):
    """The modules of miles that the adapter takes something from."""
    parts = ("parallel", "loss", "loss_hub", "loss_hub.corrections", "loss_hub.math_utils")
    names = ["miles", "miles.backends", miles.UTILS, *(f"{miles.UTILS}.{part}" for part in parts)]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    state = SimpleNamespace(tp=SimpleNamespace(size=1), cp=SimpleNamespace(size=1))
    parallel, home, _, corrections, maths = (sys.modules[f"{miles.UTILS}.{p}"] for p in parts)
    parallel.get_parallel_state = lambda: state

    def get_log_probs_and_entropy(
        logits, *, args, unconcat_tokens, with_entropy, entropy_requires_grad, max_seq_lens, **_
    ):
        logp, entropy = scored(logits, {"unconcat_tokens": unconcat_tokens})
        found = {"log_probs": logp} | ({"entropy": entropy} if with_entropy else {})
        return {name: list(x.split(RESPONSES)) for name, x in found.items()}

    def get_sum_of_sample_mean(
        totals, responses, masks, per_token, qkv_format, max_seq_lens, *, denominators
    ):
        assert len(denominators) == len(masks)
        return reducer(masks)

    def compute_ess_ratio_contribution(
        *,
        ppo_kl,
        loss_masks,
        total_lengths,
        response_lengths,
        qkv_format,
        max_seq_lens,
        calculate_per_token_loss,
    ):
        return (ppo_kl * torch.cat(loss_masks)).sum()[None]

    home.get_log_probs_and_entropy = get_log_probs_and_entropy
    home.get_sum_of_sample_mean = get_sum_of_sample_mean
    maths.compute_ess_ratio_contribution = compute_ess_ratio_contribution
    return SimpleNamespace(state=state, corrections=corrections)


def formula(args, x, b):
    """(loss, metrics) as miles' function computes them, in the dtype of the logits."""
    logp, entropy = scored(x, b)
    name = "rollout_log_probs" if args.use_rollout_logprobs else "log_probs"
    old, ref, A = (torch.cat(b[k]).to(x) for k in (name, "ref_log_probs", "advantages"))
    mask, reduce = torch.cat(b["loss_masks"]).to(x), reducer(b["loss_masks"], b["loss_masks"])

    def finite(y):
        return torch.where(y.isfinite(), y, 0)

    def sequence_mean(y):
        y = torch.where(mask != 0, y, 0) * mask
        parts = zip(y.split(RESPONSES), mask.split(RESPONSES), strict=True)
        return torch.cat([(p.sum() / m.sum().clamp(min=1)).expand_as(p) for p, m in parts])

    stale = torch.zeros_like(A, dtype=torch.bool)
    if args.use_opsm:
        stale = (A < 0) & (sequence_mean(old - logp) > args.opsm_delta)
    A, gap = finite(A), logp - old
    d = finite(sequence_mean(gap) if args.advantage_estimator == "gspo" else gap)
    if args.advantage_estimator == "gspo":  # 0, without a gradient of the others, where any is lost
        d = torch.where(sequence_mean(gap).isfinite(), sequence_mean(finite(gap)), 0)
    high = args.eps_clip if args.eps_clip_high is None else args.eps_clip_high
    r = d.clamp(-20, 20).exp()
    loss = clipped(d.clamp(-20, 20), A, args.eps_clip, high, args.eps_clip_c) * ~stale
    outside = -A * r.clamp(1 - args.eps_clip, 1 + high) > -A * r
    total = reduce(loss)
    if args.entropy_coef:
        total = total - args.entropy_coef * reduce(entropy)
    seen = args.entropy_coef or args.observe_training_entropy
    metrics = {
        "pg_loss": reduce(loss),
        "pg_clipfrac": reduce(outside.to(x)),
        "ppo_kl": reduce(-d),
        "ess_ratio": (-d * mask).sum(),
        "entropy_loss": reduce(entropy) if seen else torch.zeros(()),
    }

    def k3(gap):
        gap = gap.nan_to_num(0, 20, -20).clamp(-20, 20)
        return (gap.exp() - 1 - gap).clamp(max=10)

    if args.use_kl_loss:
        q = ref - logp
        known, q = q.isfinite(), finite(q)
        kl = {"k1": -q, "k2": q**2 / 2, "k3": q.exp() - 1 - q}.get(args.kl_loss_type)
        if kl is None:
            kl, known = k3(ref - logp), True
        if args.use_unbiased_kl:
            known, kl = known & gap.isfinite(), finite(gap).exp() * kl
        metrics["kl_loss"] = reduce(torch.where(torch.as_tensor(known), kl, 0))
        total = total + args.kl_loss_coef * metrics["kl_loss"]
    rollout = torch.cat(b["rollout_log_probs"]).to(x)
    metrics["train_rollout_logprob_abs_diff"] = reduce(finite((old - rollout).abs()))
    metrics["train_rollout_kl"] = reduce(k3(old - rollout))
    return total, metrics | {"loss": total}


@pytest.mark.parametrize("case", MILES_CASES)
def test_loss_and_metrics(case, batch, host, backend):
    args = SimpleNamespace(**ARGS | MILES | MILES_CASES[case])
    if not args.use_unbiased_kl:  # whose ratio miles does not clamp
        batch["log_probs"][0][2] -= 21  # beyond the clamp, where the advantage may pull
    batch["advantages"][0][2] = -1.0
    whole = torch.ones_like(batch["logits"], dtype=torch.bool)
    (metrics,) = agrees(
        lambda x, _: miles.policy_loss(args, batch, 1.0 * x, reducer(MASKS)),
        lambda x, _: formula(args, x, batch)[0],
        SimpleNamespace(logp=batch["logits"], mask=whole),
        until=["CatBackward"] if case == "k2" else (),  # of miles' entropies
    )
    want = formula(args, batch["logits"].double(), batch)[1]
    assert (metrics.pop("opsm_clipfrac", 0) > 0) == args.use_opsm
    assert set(metrics) == set(want)
    for name, value in want.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
        assert not metrics[name].requires_grad


LOST = {
    f"{name} {value}": (name, value)
    for name in ("log_probs", "rollout_log_probs", "ref_log_probs", "advantages")
    for value in (torch.nan, -torch.inf, torch.inf)
}


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("case", MILES_CASES)
def test_what_is_not_finite_counts_as_0(case, lost, batch, host):
    """miles: a log-ratio (of its sequence, for GSPO), an advantage, a KL; none has a gradient there."""
    args = SimpleNamespace(**ARGS | MILES | MILES_CASES[case])
    name, value = LOST[lost]
    batch[name][2][1] = value
    results = []
    for fn, dtype in (
        (lambda x: miles.policy_loss(args, batch, x, reducer(MASKS)), torch.float32),
        (lambda x: formula(args, x, batch), torch.float64),
    ):
        x = batch["logits"].to(dtype).clone().requires_grad_()
        loss, metrics = fn(1.0 * x)
        results.append((loss, torch.autograd.grad(loss, x)[0], metrics))
    (loss, grad, metrics), (want, want_grad, want_metrics) = results
    assert want_grad.isfinite().all()
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-4, atol=1e-6)
    for key, value in want_metrics.items():
        assert metrics[key].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), key


def test_a_scored_token_that_is_banned(batch, host):
    """The log-prob of such a token is -inf, and its log-ratio counts as 0."""
    args = SimpleNamespace(**ARGS | MILES)
    row = sum(TOTALS[:2]) + PROMPTS[2] - 1
    batch["logits"][0, row, batch["unconcat_tokens"][2][PROMPTS[2]]] = -torch.inf
    want, want_metrics = formula(args, batch["logits"].double(), batch)
    x = batch["logits"].clone().requires_grad_()
    loss, metrics = miles.policy_loss(args, batch, 1.0 * x, reducer(MASKS))
    assert torch.autograd.grad(loss, x)[0].isfinite().all()
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-6)
    assert metrics["ppo_kl"].item() == pytest.approx(want_metrics["ppo_kl"].item(), rel=1e-4)


@pytest.mark.parametrize("value, kept", [(torch.nan, 1), (-torch.inf, 1), (torch.inf, 0)])
def test_opsm_drops_what_its_mean_says(value, kept, batch, host):
    """A mean that is NaN or -inf is not above the threshold, +inf is: of the whole sequence."""
    args = SimpleNamespace(**ARGS | MILES | MILES_CASES["opsm"] | {"eps_clip": 0.99})
    for x in batch["advantages"]:
        x.fill_(-1.0)
    batch["log_probs"][2][1] = value
    x = batch["logits"].clone().requires_grad_()
    loss, _ = miles.policy_loss(args, batch, 1.0 * x, reducer(MASKS))
    want, _ = formula(args, batch["logits"].double(), batch)
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-6)
    rows = torch.autograd.grad(loss, x)[0][0, sum(TOTALS[:2]) :]
    assert (rows != 0).any() == bool(kept)


def test_parallel_ranks_take_miles_own_log_probs(batch, host):
    args = SimpleNamespace(**ARGS | MILES)
    want, _ = miles.policy_loss(args, batch, batch["logits"], reducer(MASKS))
    host.state.tp.size = 2
    got, _ = miles.policy_loss(args, batch, batch["logits"], reducer(MASKS))
    torch.testing.assert_close(got, want)
    host.state.cp.size = 2
    args.advantage_estimator = "gspo"
    with pytest.raises(ValueError, match=r"context parallelism \(2 ranks\)"):
        miles.policy_loss(args, batch, batch["logits"], reducer(MASKS))


def test_importance_sampling_is_miles_own(batch, host):
    def vanilla_tis_function(
        *, args, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **more
    ):
        assert more.keys() >= {"total_lengths", "response_lengths", "max_seq_lens"}
        assert more["parallel_state"] is host.state
        rho = (torch.cat(train_log_probs) - torch.cat(rollout_log_probs)).exp().clamp(max=1.1)
        return pg_loss * rho, loss_masks, {"tis": rho}

    host.corrections.vanilla_tis_function = vanilla_tis_function
    args = SimpleNamespace(**ARGS | MILES | {"use_tis": True})
    loss, metrics = miles.policy_loss(args, batch, batch["logits"], reducer(MASKS))
    logp, _ = scored(batch["logits"], batch)
    old, A = torch.cat(batch["log_probs"]), torch.cat(batch["advantages"])
    rho = (old - torch.cat(batch["rollout_log_probs"])).exp().clamp(max=1.1)
    torch.testing.assert_close(loss, reducer(MASKS)(rho * clipped(logp - old, A, 0.2, 0.2)))
    torch.testing.assert_close(metrics["tis"], reducer(MASKS)(rho))
    torch.testing.assert_close(metrics["ois"], reducer(MASKS)((logp - old).exp()))


def test_without_old_log_probs(batch, host):
    """The loss is on policy if miles skips the pass for them; else their absence is an error."""
    args = SimpleNamespace(**ARGS | MILES | {"skip_actor_forward_only": True})
    given = batch | {"log_probs": None}
    loss, metrics = miles.policy_loss(args, given, batch["logits"], reducer(MASKS))
    torch.testing.assert_close(loss, reducer(MASKS)(-torch.cat(batch["advantages"])))
    assert metrics["ppo_kl"] == 0
    args.use_tis = True
    with pytest.raises(ValueError, match="skip_actor_forward_only"):
        miles.policy_loss(args, batch, batch["logits"], reducer(MASKS))
    args.skip_actor_forward_only = False
    with pytest.raises(ValueError, match=r"batch\['log_probs'\]: needed"):
        miles.policy_loss(args, given, batch["logits"], reducer(MASKS))


def test_conventions(batch):
    assert parameters(miles.policy_loss) == ["args", "batch", "logits", "sum_of_sample_mean"]
    args = SimpleNamespace(**ARGS | MILES)
    with pytest.raises(ImportError, match=r"miles of August 2026.*no module miles"):
        miles.policy_loss(args, batch, batch["logits"], reducer(MASKS))


@pytest.mark.parametrize(
    "case", ["grpo", "dual", "low_var_kl", "k2", "unbiased", "gspo", "gspo dual", "opsm", "gspo k2"]
)
def test_masks_of_fractions_weigh(case, device, host):
    b, reduce = make_batch(device, FRACTIONS), reducer(FRACTIONS, FRACTIONS)
    args = SimpleNamespace(**ARGS | MILES | MILES_CASES[case])
    (metrics,) = agrees(
        lambda x, _: miles.policy_loss(args, b, 1.0 * x, reduce),
        lambda x, _: formula(args, x, b)[0],
        SimpleNamespace(logp=b["logits"], mask=torch.ones_like(b["logits"], dtype=torch.bool)),
        until=["CatBackward"] if case == "k2" else (),
    )
    for name, value in formula(args, b["logits"].double(), b)[1].items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
