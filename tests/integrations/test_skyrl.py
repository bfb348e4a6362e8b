"""SkyRL's adapter: its calling convention, and its formulas in float64, from its sources."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from grpo_fast.integrations import skyrl
from tests.support.hosts import (
    T,
    agrees,
    clipped,
    fractional_batch,
    mean,
    parameters,
    sequence_mean,
    with_fractions,
    with_options,
)

SKYRL = SimpleNamespace(
    eps_clip_low=0.2,
    eps_clip_high=0.28,
    clip_ratio_c=3.0,
    sapo=SimpleNamespace(tau_pos=1.0, tau_neg=1.05),
    cispo=SimpleNamespace(cispo_eps_clip_low=1.0, cispo_eps_clip_high=1.5, cispo_anchor="old"),
    dppo=SimpleNamespace(dppo_type="binary_tv", delta_low=0.2, delta_high=0.1),
    clip_cov=SimpleNamespace(clip_ratio=1.0, clip_cov_lb=0.0, clip_cov_ub=5.0),
    kl_cov=SimpleNamespace(kl_cov_frac=0.3, ppo_kl_coef=0.5),
    off_policy_correction=SimpleNamespace(tis_ratio_type=None),
)


def skyrl_formula(name, config):
    def per_token(x, b):
        d = (x - b.old).clamp(-20, 20)
        if name in ("regular", "dual_clip"):
            dual = 3.0 if name == "dual_clip" else None
            return clipped(d, b.A, 0.2, 0.28, dual)
        if name == "gspo":
            s = sequence_mean(x - b.old, b.mask).detach() + x - x.detach()
            return clipped(s.clamp(max=10), b.A, 0.2, 0.28)
        if name == "sapo":
            tau = torch.where(b.A > 0, 1.0, 1.05)
            return -b.A * (4 / tau) * (tau * (d.exp() - 1)).sigmoid()
        if name == "cispo":
            anchor = b.rollout if config.cispo.cispo_anchor == "rollout" else b.old
            r = (x - anchor).clamp(-20, 20).exp().clamp(0.0, 2.5)
            return -r.detach() * b.A * x
        if name == "rollout_is":
            r = (x - b.rollout).clamp(-20, 20).exp()
            return -torch.where((r > 0.8) & (r < 1.28), r, 0).detach() * b.A * x
        if name == "dppo":
            new, mu = x.detach().exp(), b.rollout.exp()
            change = new - mu
            if config.dppo.dppo_type == "binary_kl":
                rest = ((1 - mu + 1e-8) / (1 - new + 1e-8)).log()
                kl = mu * (b.rollout - x.detach()) + (1 - mu) * rest
                change = torch.where(change > 0, kl, -kl)
            drop = ((b.A > 0) & (change > 0.1)) | ((b.A < 0) & (change < -0.2))
            return -(x - b.rollout).clamp(-20, 20).exp() * b.A * ~drop
        r = (x - b.old).exp()
        if name == "importance_sampling":
            return -r * b.A
        A, logp = (y - (y * b.mask).sum() / b.mask.sum() for y in (b.A, x.detach()))
        covariance = torch.where(b.mask != 0, A * logp, -torch.inf)
        if name == "clip_cov":
            free = -b.A * r >= -b.A * r.clamp(0.8, 1.28)
            drawn = free & (covariance > 0) & (covariance < 5)
            return torch.where(drawn, 0, clipped(x - b.old, b.A, 0.2, 0.28))
        chosen = torch.zeros_like(r).flatten()
        chosen[covariance.flatten().topk(int(0.3 * b.mask.sum())).indices] = 1
        return -b.A * r + 0.5 * (x - b.old).abs() * chosen.view_as(r)

    return lambda x, b: (per_token(x, b) * b.mask).sum()


def run_skyrl(name, config):
    loss = skyrl.POLICY_LOSSES[name]
    return lambda x, b: loss(
        x, b.old, b.A, config, loss_mask=b.mask.float(), rollout_logprobs=b.rollout
    )


@pytest.mark.parametrize(
    "name",
    skyrl.POLICY_LOSSES,
)
def test_skyrl(name, batch, backend):
    (metrics,) = agrees(run_skyrl(name, SKYRL), skyrl_formula(name, SKYRL), batch)
    d = batch.logp - batch.old
    high, low = (batch.A > 0), (batch.A < 0)
    expected = {
        "regular": ((d.exp() > 1.28) & high) | ((d.exp() < 0.8) & low),
        "cispo": d.exp() > 2.5,
        "rollout_is": ((batch.logp - batch.rollout).exp() - 1.04).abs() >= 0.24,
    }
    if name in expected:
        assert metrics["clip_ratio"] == pytest.approx(mean(expected[name], batch.mask))
        assert metrics["clip_ratio"] > 0
    if name == "cispo":
        ratio = d.clamp(-20, 20).exp()
        assert metrics["cispo/ratio_max"] == pytest.approx(ratio[batch.mask].max().item())
        assert metrics["cispo/ratio_min"] == pytest.approx(ratio[batch.mask].min().item())
        bounded = mean(ratio.clamp(0, 2.5), batch.mask)
        assert metrics["cispo/ratio_clamped_mean"] == pytest.approx(bounded)
    if name == "importance_sampling":
        assert metrics == {"importance_ratio": pytest.approx(mean(d.exp(), batch.mask))}
    assert all(type(value) is float for value in metrics.values())


def test_skyrl_cispo_of_the_sampler(batch, monkeypatch):
    cispo = with_options(SKYRL.cispo, cispo_anchor="rollout")
    config = with_options(SKYRL, cispo=cispo)
    agrees(run_skyrl("cispo", config), skyrl_formula("cispo", config), batch)
    twice = with_options(config, off_policy_correction=SimpleNamespace(tis_ratio_type="token"))
    loss = skyrl.POLICY_LOSSES["cispo"]
    with pytest.raises(ValueError, match="rollout_logprobs: needed"):
        loss(batch.logp, batch.old, batch.A, config, batch.mask)
    module = ModuleType(skyrl.CORRECTION)
    module.compute_off_policy_correction = lambda old, rollout, mask, _: (None, {}, mask)
    monkeypatch.setitem(sys.modules, skyrl.CORRECTION, module)
    with pytest.raises(ValueError, match="would count twice"):
        loss(batch.logp, batch.old, batch.A, twice, batch.mask, batch.rollout)


def test_skyrl_drops_a_token_without_the_samplers_log_prob(batch, backend):
    """rollout_is: NaN is outside of every range; the token has no loss, and counts as clipped."""
    loss = skyrl.POLICY_LOSSES["rollout_is"]
    batch.rollout[3, 1] = torch.nan
    x = batch.logp.clone().requires_grad_()
    got, metrics = loss(x, batch.old, batch.A, SKYRL, batch.mask, batch.rollout)
    want = skyrl_formula("rollout_is", SKYRL)(x, batch)  # NaN compares as False
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(y, x)[0] for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    r = (batch.logp - batch.rollout).exp()
    dropped = ~((r > 0.8) & (r < 1.28))
    assert metrics["clip_ratio"] == pytest.approx(mean(dropped, batch.mask))


def test_skyrl_dppo_by_kl_and_to_the_old_policy(batch):
    config = with_options(SKYRL, dppo=with_options(SKYRL.dppo, dppo_type="binary_kl"))
    agrees(run_skyrl("dppo", config), skyrl_formula("dppo", config), batch)
    batch.rollout = batch.old
    given = skyrl.POLICY_LOSSES["dppo"](batch.logp, batch.old, batch.A, config, batch.mask)
    want = run_skyrl("dppo", config)(batch.logp, batch)
    assert given == want
    config.dppo.dppo_type = "top_k"
    with pytest.raises(ValueError, match="dppo_type='top_k'"):
        run_skyrl("dppo", config)(batch.logp, batch)


def test_skyrl_corrects_off_policy_with_its_own_code(batch, backend, monkeypatch):
    """Truncated importance sampling and a mask, as SkyRL's function would return them."""

    def compute(old, rollout, mask, correction):
        assert correction.tis_ratio_type == "token"
        assert not (old.isnan() | rollout.isnan()).any(), "it is multiplied by the mask"
        keep = torch.ones_like(mask)
        keep[:, 1] = 0
        return (old - rollout).exp().clamp(max=1.2), {"is_ratio_mean": 1.5}, mask * keep

    module = ModuleType(skyrl.CORRECTION)
    module.compute_off_policy_correction = compute
    monkeypatch.setitem(sys.modules, skyrl.CORRECTION, module)
    config = with_options(SKYRL, off_policy_correction=SimpleNamespace(tis_ratio_type="token"))

    def formula(x, b):
        loss = clipped((x - b.old).clamp(-20, 20), b.A, 0.2, 0.28)
        keep = b.mask & (torch.arange(T, device=x.device) != 1)
        return (loss * (b.old - b.rollout).exp().clamp(max=1.2) * keep).sum()

    (metrics,) = agrees(run_skyrl("regular", config), formula, batch)
    assert metrics["is_ratio_mean"] == 1.5
    # Metrics and, for GSPO, the ratio of a sequence are of all tokens, those that it masks too.
    r, A = (batch.logp - batch.old).exp(), batch.A
    outside = ((r > 1.28) & (A > 0)) | ((r < 0.8) & (A < 0))
    assert metrics["clip_ratio"] == pytest.approx(mean(outside, batch.mask))

    def gspo(x, b):
        s = sequence_mean(x - b.old, b.mask).detach() + x - x.detach()
        keep = b.mask & (torch.arange(T, device=x.device) != 1)
        loss = clipped(s.clamp(max=10), b.A, 0.2, 0.28)
        return (loss * (b.old - b.rollout).exp().clamp(max=1.2) * keep).sum()

    agrees(run_skyrl("gspo", config), gspo, batch)
    name = "importance_sampling"  # without correction or its metrics
    (metrics,) = agrees(run_skyrl(name, config), skyrl_formula(name, config), batch)
    assert "is_ratio_mean" not in metrics
    for name in ("clip_cov", "kl_cov"):
        with pytest.raises(ValueError, match=f"{name}: off_policy_correction.*tis_ratio_type"):
            run_skyrl(name, config)(batch.logp, batch)


def test_skyrl_conventions(monkeypatch):
    for loss in skyrl.POLICY_LOSSES.values():
        assert parameters(loss) == [
            "log_probs",
            "old_log_probs",
            "advantages",
            "config",
            "loss_mask",
            "rollout_logprobs",
        ]
    with pytest.raises(ImportError, match=r"skyrl >= 0\.3"):
        skyrl.register()
    registered = {}
    home = "skyrl.backends.skyrl_train.utils.ppo_utils"
    for i in range(home.count(".")):
        name = ".".join(home.split(".")[: i + 1])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType(home)
    module.PolicyLossRegistry = SimpleNamespace(register=registered.__setitem__)
    monkeypatch.setitem(sys.modules, home, module)
    skyrl.register()
    assert registered == {f"grpo_fast/{k}": v for k, v in skyrl.POLICY_LOSSES.items()}


@pytest.mark.parametrize("name", skyrl.POLICY_LOSSES)
def test_a_mask_of_fractions_weighs(name, device):
    batch = fractional_batch(device)

    def ours(x, b):
        return skyrl.POLICY_LOSSES[name](
            x, b.old, b.A, SKYRL, loss_mask=batch.weights, rollout_logprobs=b.rollout
        )

    (metrics,) = agrees(ours, with_fractions(skyrl_formula(name, SKYRL)), batch)
    r, A, w = (batch.logp - batch.old).exp(), batch.A, batch.weights
    if name == "regular":
        outside = ((r > 1.28) & (A > 0)) | ((r < 0.8) & (A < 0))
        assert metrics["clip_ratio"] == pytest.approx(((outside * w).sum() / w.sum()).item())
    if name == "importance_sampling":
        assert metrics["importance_ratio"] == pytest.approx(((r * w).sum() / w.sum()).item())
