"""slime's adapter: calling convention, arguments, its formulas in float64 from the sources of August 2026."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from grpo_fast.integrations import slime
from grpo_fast.notices import FallbackError
from tests.support.hosts import agrees, parameters
from tests.support.slime import (
    ARGS,
    FRACTIONS,
    MASKS,
    RESPONSES,
    SLIME_CASES,
    make_batch,
    reducer,
    scored,
)


@pytest.fixture
def megatron(monkeypatch):
    """Megatron's parallel state, of one rank unless a test says otherwise."""
    state = SimpleNamespace(tp=1, cp=1)
    core = ModuleType("megatron.core")
    core.mpu = SimpleNamespace(
        get_tensor_model_parallel_world_size=lambda: state.tp,
        get_context_parallel_world_size=lambda: state.cp,
    )
    monkeypatch.setitem(sys.modules, "megatron", ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.core", core)
    return state


@pytest.fixture
def batch(device):
    return make_batch(device)


def formula(args, x, b):
    """(loss, metrics) as slime's function computes them, in the dtype of the logits."""
    logp, entropy = scored(x, b)
    mask = torch.cat(b["loss_masks"]).to(x)
    name = "rollout_log_probs" if args.use_rollout_logprobs else "log_probs"
    old, ref, A = (torch.cat(b[k]).to(x) for k in (name, "ref_log_probs", "advantages"))
    d = logp - old

    def sequence_mean(y):
        parts = zip((y * mask).split(RESPONSES), mask.split(RESPONSES), strict=True)
        return torch.cat([(p.sum() / m.sum().clamp(min=1)).expand_as(p) for p, m in parts])

    if args.advantage_estimator == "gspo":
        d = sequence_mean(d)
    r, high = d.exp(), args.eps_clip if args.eps_clip_high is None else args.eps_clip_high
    bounded = r.clamp(1 - args.eps_clip, 1 + high)
    loss = torch.maximum(-A * r, -A * bounded)
    clipped = -A * bounded > -A * r
    if args.eps_clip_c:
        loss = torch.where(A < 0, torch.minimum(loss, -A * args.eps_clip_c), loss)
    if args.advantage_estimator == "cispo":
        loss, clipped = -bounded.detach() * A * logp, bounded != r
    if args.use_opsm:
        loss = loss * ~((A < 0) & (sequence_mean(old - logp) > args.opsm_delta))
    reduce = reducer(b["loss_masks"], b["loss_masks"])
    metrics = {"pg_clipfrac": reduce(clipped.to(x)), "ppo_kl": reduce(-d), "pg_loss": reduce(loss)}
    total = reduce(loss) - args.entropy_coef * reduce(entropy)
    if args.entropy_coef:
        metrics["entropy_loss"] = reduce(entropy)
    if args.use_kl_loss:
        gap = ref - logp
        kl = -gap if args.kl_loss_type == "k1" else gap.exp() - 1 - gap
        if args.use_unbiased_kl:
            kl = (logp - old).exp() * kl
        if args.kl_loss_type == "low_var_kl":
            kl = kl.clamp(-10, 10)
        total = total + args.kl_loss_coef * reduce(kl)
        metrics["kl_loss"] = reduce(kl)
    rollout = torch.cat(b["rollout_log_probs"]).to(x)
    gap = (logp if args.use_rollout_logprobs else old) - rollout
    return total, metrics | {"loss": total, "train_rollout_logprob_abs_diff": reduce(gap.abs())}


def compare(args, b, until=()):
    """The adapter against the formula; its metrics."""
    logits = b["logits"]
    given = SimpleNamespace(logp=logits, mask=torch.ones_like(logits, dtype=torch.bool))
    (metrics,) = agrees(
        lambda x, _: slime.policy_loss(args, b, 1.0 * x, reducer(MASKS)),
        lambda x, _: formula(args, x, b)[0],
        given,
        until,
    )
    return metrics


@pytest.mark.parametrize("case", SLIME_CASES)
def test_loss_and_metrics(case, batch, megatron, backend):
    args = SimpleNamespace(**ARGS | SLIME_CASES[case])
    metrics = compare(args, batch)
    want = formula(args, batch["logits"].double(), batch)[1]
    if args.use_opsm:
        assert metrics.pop("opsm_clipfrac") > 0
    assert set(metrics) == set(want)
    assert metrics["pg_clipfrac"] > 0
    for name, value in want.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
        assert not metrics[name].requires_grad


def host(monkeypatch):
    """slime's own module of losses, with what the adapter takes from it."""
    for i in range(slime.LOSS.count(".") + 1):
        name = ".".join(slime.LOSS.split(".")[: i + 1])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    home = sys.modules[slime.LOSS]
    home.get_rollout_top_p_logprob_kwargs = lambda args, batch: {}

    def get_log_probs_and_entropy(logits, *, args, unconcat_tokens, with_entropy, **_):
        logp, entropy = scored(logits, {"unconcat_tokens": unconcat_tokens})
        both = {"log_probs": logp, "entropy": entropy}
        return None, {name: list(x.split(RESPONSES)) for name, x in both.items()}

    home.get_log_probs_and_entropy = get_log_probs_and_entropy
    home.get_sum_of_sample_mean = lambda totals, responses, masks, sums, per_token: reducer(masks)
    return home


@pytest.mark.parametrize("case", ["grpo", "gspo", "entropy", "k3"])
def test_tensor_parallel_log_probs_are_slimes(case, batch, megatron, monkeypatch):
    host(monkeypatch)
    megatron.tp = 2
    args = SimpleNamespace(**ARGS | SLIME_CASES[case])
    metrics = compare(args, batch, until=["CatBackward"])  # of slime's entropies
    assert metrics["entropy_loss"] > 0
    megatron.cp = 2
    if case == "gspo":
        with pytest.raises(ValueError, match=r"context parallelism \(2 ranks\)"):
            slime.policy_loss(args, batch, batch["logits"], reducer(MASKS))
    else:
        slime.policy_loss(args, batch, batch["logits"], reducer(MASKS))


def test_strict_wants_the_fused_pass(batch, megatron, monkeypatch):
    monkeypatch.setenv("GRPO_FAST_STRICT", "1")
    host(monkeypatch)
    args = SimpleNamespace(**ARGS)
    slime.policy_loss(args, batch, batch["logits"].clone(), reducer(MASKS))
    megatron.tp = 2
    for options, why in (
        ({}, "2 tensor-parallel and 1 context-parallel"),
        ({"rollout_top_p": 0.9}, "its options"),
    ):
        with pytest.raises(FallbackError, match=f"own function computes the log-probs.*: {why}"):
            slime.policy_loss(
                SimpleNamespace(**ARGS | options), batch, batch["logits"], reducer(MASKS)
            )
        megatron.tp = 1


def test_truncated_importance_sampling(batch, megatron, monkeypatch):
    """slime's function weighs and rejects; the mean stays that of all tokens."""
    home = host(monkeypatch)
    args = SimpleNamespace(**ARGS | {"use_tis": True})
    kept = [m * torch.tensor([1.0, 1, 0, 1])[: len(m)] for m in MASKS]

    def vanilla_tis_function(args, *, pg_loss, train_log_probs, rollout_log_probs, **_):
        rho = (torch.cat(train_log_probs) - torch.cat(rollout_log_probs)).exp().clamp(max=1.1)
        return pg_loss * rho, kept, {"tis": rho}

    home.vanilla_tis_function = vanilla_tis_function
    x = batch["logits"].clone().requires_grad_()
    leaves = [y.clone().requires_grad_() for y in batch["rollout_log_probs"]]
    given = batch | {"rollout_log_probs": leaves}
    loss, metrics = slime.policy_loss(args, given, 1.0 * x, reducer(MASKS))
    assert not any(metric.requires_grad for metric in metrics.values())
    logp, _ = scored(x, batch)
    old, A = torch.cat(batch["log_probs"]), torch.cat(batch["advantages"])
    rho = (old - torch.cat(batch["rollout_log_probs"])).exp().clamp(max=1.1)
    r = (logp - old).exp()
    want = reducer(kept)(rho * torch.maximum(-A * r, -A * r.clamp(0.8, 1.2)))
    torch.testing.assert_close(loss, want)
    for ours, theirs in zip(
        torch.autograd.grad(loss, x), torch.autograd.grad(want, x), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(metrics["tis"], reducer(MASKS)(rho))
    torch.testing.assert_close(metrics["ois"], reducer(MASKS)(r.detach()))


def test_conventions(batch, megatron, monkeypatch):
    assert parameters(slime.policy_loss) == ["args", "batch", "logits", "sum_of_sample_mean"]
    for changes, message in (
        ({"custom_pg_loss_reducer_function_path": "a.b"}, "custom_pg_loss_reducer"),
        ({"use_kl_loss": True, "use_unbiased_kl": True}, "kl_loss_type='k1'"),
        ({"use_tis": True}, "old log-probs, are needed"),
    ):
        args = SimpleNamespace(**ARGS | changes)
        with pytest.raises(ValueError, match=message):
            slime.policy_loss(args, batch | {"log_probs": []}, batch["logits"], reducer(MASKS))
    monkeypatch.delitem(sys.modules, "megatron.core")
    monkeypatch.delitem(sys.modules, "megatron")
    with pytest.raises(ImportError, match=r"no module megatron\.core"):
        slime.policy_loss(SimpleNamespace(**ARGS), batch, batch["logits"], reducer(MASKS))


def test_on_policy_and_in_place(batch, megatron):
    """Without old log-probs the ratio is 1; the logits are overwritten unless they are needed again."""
    args = SimpleNamespace(**ARGS)
    given = batch | {"log_probs": None}
    x = batch["logits"].clone().requires_grad_()
    logits = 1.0 * x
    loss, _ = slime.policy_loss(args, given, logits, reducer(MASKS))
    logp, _ = scored(x, batch)
    want = reducer(MASKS)(-torch.cat(batch["advantages"]) * (logp - logp.detach()).exp())
    torch.testing.assert_close(loss, want)
    (grad,), (other,) = torch.autograd.grad(loss, x), torch.autograd.grad(want, x)
    torch.testing.assert_close(grad, other)
    assert (logits != x).any()
    args.recompute_loss_function = True
    logits = 1.0 * x
    slime.policy_loss(args, given, logits, reducer(MASKS))
    assert (logits == x).all()


def test_a_ratio_that_is_nan_counts_as_clipped(batch, megatron):
    """cispo: slime counts where the clamp changes the ratio, by an inequality that NaN fulfils."""
    args = SimpleNamespace(**ARGS | SLIME_CASES["cispo"])
    before = slime.policy_loss(args, batch, batch["logits"], reducer(MASKS))[1]["pg_clipfrac"]
    logp, _ = scored(batch["logits"], batch)
    batch["log_probs"][2][1] = logp[-2]  # not clipped
    inside = slime.policy_loss(args, batch, batch["logits"], reducer(MASKS))[1]["pg_clipfrac"]
    batch["log_probs"][2][1] = torch.nan
    loss, metrics = slime.policy_loss(args, batch, batch["logits"], reducer(MASKS))
    assert loss.isnan()
    assert metrics["pg_clipfrac"].item() == pytest.approx(inside.item() + 1 / 3)
    assert before >= inside


def test_errors_name_slimes_arguments(batch, megatron):
    args = SimpleNamespace(**ARGS | {"eps_clip_c": 0.5})
    with pytest.raises(ValueError, match=r"dual_clip: .*0\.5 .*dual_clip is eps_clip_c"):
        slime.policy_loss(args, batch, batch["logits"], reducer(MASKS))


@pytest.mark.parametrize(
    "case", ["grpo", "dual", "cispo", "entropy", "k3", "unbiased", "gspo", "opsm"]
)
def test_masks_of_fractions_weigh(case, device, megatron):
    b, reduce = make_batch(device, FRACTIONS), reducer(FRACTIONS, FRACTIONS)
    args = SimpleNamespace(**ARGS | SLIME_CASES[case])
    (metrics,) = agrees(
        lambda x, _: slime.policy_loss(args, b, 1.0 * x, reduce),
        lambda x, _: formula(args, x, b)[0],
        SimpleNamespace(logp=b["logits"], mask=torch.ones_like(b["logits"], dtype=torch.bool)),
    )
    for name, value in formula(args, b["logits"].double(), b)[1].items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
