"""SkyRL's and OpenRLHF's adapters: calling conventions, and the hosts' formulas in float64.

The formulas are written out from the sources of the release that docs/integrations.md names.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from grpo_fast.integrations import openrlhf, skyrl
from tests.support.hosts import (
    T,
    agrees,
    clipped,
    host_batch,
    mean,
    parameters,
    sequence_mean,
    with_options,
)


@pytest.fixture
def batch(device):
    return host_batch(device)


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


CORRECTIONS = [
    {},
    {"is_correction_level": "token"},
    {"is_correction_level": "token", "is_correction_mode": "clip"},
    {"is_correction_level": "token", "is_correction_threshold": (-1.0, 1.2)},
    {"is_correction_level": "seq", "is_correction_threshold": (0.9, 1.1)},
    {
        "is_correction_level": "token",
        "is_correction_gating": "tv",
        "is_correction_threshold": (-1.0, 0.1),
    },
    {
        "is_correction_level": "seq",
        "is_correction_gating": "binary_kl",
        "is_correction_threshold": (-1.0, 0.05),
    },
]


def openrlhf_statistic(options, b):
    """What is held against the thresholds, per token or (B, 1)."""
    by_ratio = options.get("is_correction_gating", "ratio") == "ratio"
    statistic = b.old - b.rollout
    if not by_ratio:
        p, q = (y.exp().clamp(1e-6, 1 - 1e-6) for y in (b.rollout, b.old))
        statistic = (p - q).abs()
        if options["is_correction_gating"] == "binary_kl":
            statistic = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    if options["is_correction_level"] == "seq":
        statistic = sequence_mean(statistic, b.mask)
    return statistic.exp() if by_ratio else statistic


def openrlhf_formula(options, batch_info):
    kind = options.get("policy_loss_type", "ppo")
    level = options.get("is_correction_level", "off")
    low, high = options.get("is_correction_threshold", (0.5, 5.0))

    def weights(b):
        if level == "off" or kind == "gspo":
            return 1.0
        d, statistic = b.old - b.rollout, openrlhf_statistic(options, b)
        if options.get("is_correction_mode") == "clip":
            return statistic.clamp(low, high)
        return torch.where((statistic >= low) & (statistic <= high), d.exp(), 0)

    def formula(x, b):
        d = (x - b.old).clamp(-20, 20)
        if kind == "gspo":
            d = sequence_mean(x - (b.old if level == "off" else b.rollout), b.mask)
        loss = clipped(d, b.A, 0.2, 0.28, options.get("dual_clip")) * weights(b) * b.mask
        dp = batch_info.get("dp_size", 1)
        if kind == "ppo" and options.get("token_level_loss", True):
            tokens = batch_info.get("batch_num_tokens")
            return loss.sum() / (b.mask.sum() if tokens is None else tokens / dp)
        by_sequence = loss.sum(1) / b.mask.sum(1).clamp(min=1)
        sequences = batch_info.get("global_batch_size")
        return by_sequence.sum() / (b.mask.any(1).sum() if sequences is None else sequences / dp)

    return formula


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize(
    "info", [{}, {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 7}]
)
def test_openrlhf(kind, correction, info, batch):
    for extra in ({}, {"dual_clip": 3.0}, {"token_level_loss": False}):
        options = {"policy_loss_type": kind, "clip_eps_high": 0.28, **correction, **extra}
        loss = openrlhf.PolicyLoss(**options)
        clip, kl, rollout_kl, dropped = agrees(
            lambda x, b, loss=loss: loss(x, b.old, b.A, b.mask, b.rollout, **info),
            openrlhf_formula(options, info),
            batch,
        )
        corrected = kind == "ppo" and correction.get("is_correction_level", "off") != "off"
        assert (rollout_kl is not None) == (dropped is not None) == corrected
        assert kl.item() == pytest.approx(mean(batch.old - batch.logp, batch.mask), rel=1e-5)
        if corrected:
            want = mean(batch.rollout - batch.old, batch.mask)
            assert rollout_kl.item() == pytest.approx(want, rel=1e-5)
        assert 0 < clip < 1


@pytest.mark.parametrize(
    "correction", CORRECTIONS[1:], ids=lambda c: "-".join(map(str, c.values()))
)
@pytest.mark.parametrize(
    "field, value", [("rollout", torch.nan), ("rollout", -torch.inf), ("old", 1.0)]
)
def test_openrlhf_rejects_what_it_cannot_measure(correction, field, value, batch):
    """A statistic that is NaN is within no bounds: the token, or its sequence, is dropped."""
    options = {"clip_eps_high": 0.28, **correction}
    loss = openrlhf.PolicyLoss(**options)
    getattr(batch, field)[3, 1] = value
    x = batch.logp.clone().requires_grad_()
    got, *_, share = loss(x, batch.old, batch.A, batch.mask, batch.rollout)
    if correction.get("is_correction_mode") == "clip" and field == "rollout" and value != value:
        assert got.isnan()  # a clamp keeps it
        assert share == openrlhf_share(options, batch)
        return
    want = openrlhf_formula(options, {})(x, batch)
    torch.testing.assert_close(got, want)
    if want.isfinite():  # a divergence may keep a token whose ratio is infinite
        for a, b in zip(*(torch.autograd.grad(y, x)[0] for y in (got, want)), strict=True):
            torch.testing.assert_close(a, b)
    assert share.item() == pytest.approx(openrlhf_share(options, batch).item())


def openrlhf_share(options, b):
    """What OpenRLHF reports as filtered; a sequence without a live token counts as kept here."""
    low, high = options.get("is_correction_threshold", (0.5, 5.0))
    statistic = openrlhf_statistic(options, b)
    outside = ~((statistic >= low) & (statistic <= high))
    if options.get("is_correction_mode") == "clip":
        outside = (statistic < low) | (statistic > high)
    if options["is_correction_level"] == "seq":
        return outside.float().mean()
    return (outside * b.mask).sum() / b.mask.sum()


def test_openrlhf_metrics(batch):
    loss = openrlhf.PolicyLoss(is_correction_level="token", is_correction_threshold=(0.8, 1.3))
    _, clip, _, _, dropped = loss(batch.logp, batch.old, batch.A, batch.mask, batch.rollout)
    r, rho = (batch.logp - batch.old).exp(), (batch.old - batch.rollout).exp()
    outside = ((r > 1.2) & (batch.A > 0)) | ((r < 0.8) & (batch.A < 0))
    assert clip.item() == pytest.approx(mean(outside, batch.mask))
    assert dropped.item() == pytest.approx(mean((rho < 0.8) | (rho > 1.3), batch.mask))


def test_openrlhf_conventions(batch):
    assert parameters(openrlhf.PolicyLoss)[:6] == [
        "clip_eps_low",
        "clip_eps_high",
        "dual_clip",
        "token_level_loss",
        "policy_loss_type",
        "is_correction_level",
    ]
    assert parameters(openrlhf.PolicyLoss.forward)[1:] == [
        "log_probs",
        "old_log_probs",
        "advantages",
        "action_mask",
        "rollout_log_probs",
        "dp_size",
        "batch_num_tokens",
        "global_batch_size",
    ]
    for options, message in (
        ({"policy_loss_type": "grpo"}, "policy_loss_type='grpo'"),
        ({"dual_clip": 0.5}, "dual_clip"),
        ({"clip_eps_low": -0.1}, "epsilon_low: .*-0.1 .*epsilon_low is clip_eps_low"),
        (
            {"is_correction_level": "token", "is_correction_threshold": (2.0, 0.5)},
            r"is_correction_threshold: want \(low, high\).*\(2\.0, 0\.5\)",
        ),
        ({"is_correction_mode": "clip", "is_correction_level": "seq"}, "needs is_correction_level"),
        ({"is_correction_gating": "tv", "is_correction_level": "seq"}, "bounded from above"),
    ):
        with pytest.raises(ValueError, match=message):
            openrlhf.PolicyLoss(**options)
    openrlhf.PolicyLoss(is_correction_gating="tv", is_correction_threshold=None)  # off
    with pytest.raises(TypeError, match=r"enable_vllm_is_correction.*openrlhf >= 0\.11\.2"):
        openrlhf.PolicyLoss(enable_vllm_is_correction=False)  # what 0.11.0 passes
    with pytest.raises(ValueError, match="rollout_log_probs: needed"):
        openrlhf.PolicyLoss(is_correction_level="token")(batch.logp, batch.old, batch.A, batch.mask)
