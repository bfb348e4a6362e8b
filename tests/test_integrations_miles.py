"""miles' adapter, with a stand-in for its package: what it has elsewhere or computes otherwise than slime."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from grpo_fast.integrations import miles
from tests.hosts import agrees, clipped, parameters
from tests.test_integrations_slime import ARGS, MASKS, RESPONSES, batch, reducer, scored

assert batch  # the fixture: pytest takes it by its name

MORE = {
    "qkv_format": "thd",
    "true_on_policy_mode": False,
    "skip_actor_forward_only": False,
    "observe_training_entropy": False,
    "custom_pg_loss_reducer_function_path": None,
}
CASES = {
    "grpo": {},
    "dual": {"eps_clip_high": 0.3, "eps_clip_c": 1.5},
    "gspo": {"advantage_estimator": "gspo"},
    "entropy": {"entropy_coef": 0.05},
    "observed entropy": {"observe_training_entropy": True},
    "low_var_kl": {"use_kl_loss": True, "kl_loss_type": "low_var_kl"},
    "rollout": {"use_rollout_logprobs": True},
    "own log-probs": {"true_on_policy_mode": True},
    "padded": {"qkv_format": "bshd"},
}


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
    mask, reduce = torch.cat(MASKS).to(x), reducer(MASKS)
    d = logp - old
    if args.advantage_estimator == "gspo":
        parts = zip((d * mask).split(RESPONSES), mask.split(RESPONSES), strict=True)
        d = torch.cat([(p.sum() / m.sum().clamp(min=1)).expand_as(p) for p, m in parts])
    high = args.eps_clip if args.eps_clip_high is None else args.eps_clip_high
    r = d.clamp(-20, 20).exp()
    loss = clipped(d.clamp(-20, 20), A, args.eps_clip, high, args.eps_clip_c)
    outside = -A * r.clamp(1 - args.eps_clip, 1 + high) > -A * r
    total = reduce(loss) - args.entropy_coef * reduce(entropy)
    seen = args.entropy_coef or args.observe_training_entropy
    metrics = {
        "pg_loss": reduce(loss),
        "pg_clipfrac": reduce(outside.to(x)),
        "ppo_kl": reduce(-d),
        "ess_ratio": (-d * mask).sum(),
        "entropy_loss": reduce(entropy) if seen else torch.zeros(()),
    }

    def k3(gap):
        gap = gap.clamp(-20, 20)
        return (gap.exp() - 1 - gap).clamp(max=10)

    if args.use_kl_loss:
        metrics["kl_loss"] = reduce(k3(ref - logp))
        total = total + args.kl_loss_coef * metrics["kl_loss"]
    rollout = torch.cat(b["rollout_log_probs"]).to(x)
    metrics["train_rollout_logprob_abs_diff"] = reduce((old - rollout).abs())
    metrics["train_rollout_kl"] = reduce(k3(old - rollout))
    return total, metrics | {"loss": total}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_metrics(case, batch, host, backend):
    args = SimpleNamespace(**ARGS | MORE | CASES[case])
    batch["log_probs"][0][2] -= 21  # beyond the clamp, where the advantage may pull
    batch["advantages"][0][2] = -1.0
    whole = torch.ones_like(batch["logits"], dtype=torch.bool)
    (metrics,) = agrees(
        lambda x, _: miles.policy_loss(args, batch, 1.0 * x, reducer(MASKS)),
        lambda x, _: formula(args, x, batch)[0],
        SimpleNamespace(logp=batch["logits"], mask=whole),
    )
    want = formula(args, batch["logits"].double(), batch)[1]
    assert set(metrics) == set(want)
    for name, value in want.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
        assert not metrics[name].requires_grad


def test_parallel_ranks_take_miles_own_log_probs(batch, host):
    args = SimpleNamespace(**ARGS | MORE)
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
    args = SimpleNamespace(**ARGS | MORE | {"use_tis": True})
    loss, metrics = miles.policy_loss(args, batch, batch["logits"], reducer(MASKS))
    logp, _ = scored(batch["logits"], batch)
    old, A = torch.cat(batch["log_probs"]), torch.cat(batch["advantages"])
    rho = (old - torch.cat(batch["rollout_log_probs"])).exp().clamp(max=1.1)
    torch.testing.assert_close(loss, reducer(MASKS)(rho * clipped(logp - old, A, 0.2, 0.2)))
    torch.testing.assert_close(metrics["tis"], reducer(MASKS)(rho))
    torch.testing.assert_close(metrics["ois"], reducer(MASKS)((logp - old).exp()))


def test_without_old_log_probs(batch, host):
    """On policy where miles skips the pass for them; else an error."""
    args = SimpleNamespace(**ARGS | MORE | {"skip_actor_forward_only": True})
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
    args = SimpleNamespace(**ARGS | MORE)
    with pytest.raises(ImportError, match=r"miles of August 2026.*no module miles"):
        miles.policy_loss(args, batch, batch["logits"], reducer(MASKS))
