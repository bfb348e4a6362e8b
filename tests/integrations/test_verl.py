"""verl's own policy losses, KL penalties and averages, in float64, against the adapter and the presets."""

import importlib
import importlib.metadata
import sys
from types import MappingProxyType, SimpleNamespace

import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.integrations import verl
from grpo_fast.integrations.shared import packages
from grpo_fast.integrations.verl import losses
from grpo_fast.loss import policy_loss
from grpo_fast.notices import FallbackError
from grpo_fast.presets import GUARDED_K3
from grpo_fast.testing import assert_as_accurate
from grpo_fast.weights import clip_cov, geometric_mean
from tests.support.hosts import FRACTIONS
from tests.support.oracles import verl_core_algos
from tests.support.verl import AGGREGATIONS, GLOBAL, MODES, B, T, batch, configuration, run


def compare(mode, aggregation, config, device, weighted, per_token=True):
    old, logp, advantages, weights, mask = batch(device, per_token)
    weights = weights if weighted else None
    theirs = verl_core_algos().get_policy_loss_fn(mode)

    def padded(x, dtype, fill):
        return None if x is None else torch.where(mask, x, fill).to(dtype)

    results = []
    for fn, dtype, fill in (
        (losses.POLICY_LOSSES[mode], torch.float32, torch.nan),  # nothing of the padding is read
        (theirs, torch.float32, 0),
        (theirs, torch.float64, 0),
    ):
        x, o, a, w = (padded(y, dtype, fill) for y in (logp, old, advantages, weights))
        results.append(run(fn, x, o, a, mask, aggregation, config, w))
    ours, plain, truth = results
    assert_as_accurate(ours[0], plain[0], truth[0], name="loss")
    grads = [torch.where(mask, grad, 0) for _, grad, _ in results]
    assert_as_accurate(*grads, name="gradient")
    assert ours[2] == pytest.approx(truth[2], rel=1e-5, abs=1e-6)
    assert all(type(value) is float for value in ours[2].values())
    return truth


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_policy_loss(mode, aggregation, weighted, backend, device):
    _, grad, metrics = compare(mode, aggregation, configuration(), device, weighted)
    assert grad.abs().max() > 0
    if "actor/pg_clipfrac" in metrics and mode != "sapo":
        assert metrics["actor/pg_clipfrac"] > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_global_batch(mode, aggregation, device):
    compare(mode, aggregation, configuration(global_batch_info=GLOBAL), device, False)
    on_device = GLOBAL | {"batch_num_tokens": torch.tensor(53, device=device)}
    compare(mode, aggregation, configuration(global_batch_info=on_device), device, True)


def test_clip_cov_draws_as_many_as_verl(device):
    old, logp, advantages, _, mask = batch(device)
    config = configuration()
    for ratio, drawn in ((0.2, 3), (1e-4, 1)):  # of 15 tokens
        config.policy_loss.clip_cov_ratio = ratio
        for loss in (
            losses.POLICY_LOSSES["clip_cov"],
            verl_core_algos().get_policy_loss_fn("clip_cov"),
        ):
            _, metrics = loss(old, logp, advantages, mask, "token-mean", config)
            assert metrics["actor/pg_clipfrac"] == pytest.approx(drawn / 15)


@pytest.mark.parametrize("mode", MODES)
def test_one_advantage_per_sequence_and_a_common_clip_range(mode, device):
    common = configuration(clip_ratio_low=None, clip_ratio_high=None, clip_ratio=0.3)
    compare(mode, "token-mean", common, device, True, per_token=False)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_missing_denominator_is_an_error(aggregation, device):
    config = configuration(global_batch_info={"dp_size": 2})
    old, logp, advantages, _, mask = batch(device)
    arguments = (old, logp, advantages, mask, aggregation, config)
    if aggregation != "token-sum":
        with pytest.raises(ValueError, match="needed with dp_size=2"):
            losses.POLICY_LOSSES["vanilla"](*arguments)
    else:
        losses.POLICY_LOSSES["vanilla"](*arguments)


def test_gspo_bounds_the_sequence_ratio_from_above(backend, device, monkeypatch):
    old, logp, advantages, weights, mask = batch(device)
    old[0], old[3] = logp[0] - 12, logp[3] + 12
    advantages[0], advantages[3] = -1.0, 1.0
    changed = (old, logp, advantages, weights, mask)
    monkeypatch.setattr(sys.modules[__name__], "batch", lambda *_: changed)
    _, grad, _ = compare("gspo", "token-sum", configuration(), device, True)
    assert (grad[0] == 0).all()
    assert grad[3, 0] != 0


KL = {
    "kl": {"kl": "k1"},
    "k1": {"kl": "k1"},
    "abs": {"kl": "abs"},
    "mse": {"kl": "k2"},
    "k2": {"kl": "k2"},
    "low_var_kl": GUARDED_K3,
    "k3": GUARDED_K3,
    "k1+": {"kl": "k1", "kl_gradient": "k2"},
    "abs+": {"kl": "abs", "kl_gradient": "k2"},
    "k2+": {"kl": "k2"},
    "k3+": GUARDED_K3 | {"kl_gradient": "k2"},
    "low_var_kl+": GUARDED_K3 | {"kl_gradient": "k2"},
}


@pytest.mark.parametrize("kind", KL)
def test_kl_penalty(kind, backend, device):
    core = verl_core_algos()
    _, logp, _, _, mask = batch(device)
    ref = logp + torch.randn(B, T, device=device)
    ref[0] = logp[0] + torch.tensor([3.0, 21.0, -12.0, -21.0, 0.5, -0.5], device=device)
    objective = Objective(reduction="token_mean", beta=0.3, **KL[kind])

    def theirs(x):
        kl = core.kl_penalty(x, ref.to(x), kind)
        return 0.3 * core.agg_loss(kl, mask, "token-mean")

    arguments = {
        "advantages": torch.zeros(B, device=device),
        "mask": mask,
        "ref_logps": ref,
        "objective": objective,
    }
    results = []
    for fn, x in (
        (lambda x: policy_loss(x, **arguments).loss, logp),
        (lambda x: reference.policy_loss(x, **arguments), logp),
        (theirs, logp.double()),
    ):
        x = x.clone().requires_grad_()
        loss = fn(x)
        results.append((loss, torch.autograd.grad(loss, x)[0]))
    for name, (ours, plain, truth) in zip(
        ("loss", "gradient"), zip(*results, strict=True), strict=True
    ):
        assert_as_accurate(ours, plain, truth, name=name)


def test_configurations_may_be_anything(device):
    """An object, a dict, another mapping: the same."""
    old, logp, advantages, _, mask = batch(device)
    config = configuration()
    plain = vars(config) | {"policy_loss": vars(config.policy_loss)}
    for mode in MODES:
        results = []
        for given in (config, plain, MappingProxyType(plain)):
            torch.manual_seed(0)
            loss = losses.POLICY_LOSSES[mode]
            results.append(loss(old, logp, advantages, mask, "token-mean", given)[0])
        assert results[0] == results[1] == results[2]


def test_no_distance_is_logged_as_0(device):
    """Not as -0.0, which a log shows."""
    _, logp, advantages, _, mask = batch(device)
    for mode in ("vanilla", "dro", "kl_cov"):
        loss = losses.POLICY_LOSSES[mode]
        metrics = loss(logp, logp, advantages, mask, config=configuration())[1]
        assert str(metrics["actor/ppo_kl"]) == "0.0"


def test_bad_configurations(device):
    old, logp, advantages, _, mask = batch(device)
    for mode, config, message in (
        ("vanilla", None, "config: needed"),
        ("dro", configuration(policy_loss=SimpleNamespace(dro_beta=None)), "dro_beta.*None"),
        ("vanilla", configuration(clip_ratio_c=0.5), "dual_clip.*0.5.*dual_clip is clip_ratio_c"),
    ):
        with pytest.raises(ValueError, match=message):
            losses.POLICY_LOSSES[mode](old, logp, advantages, mask, "token-mean", config)
    with pytest.raises(ValueError, match="vanilla: old_log_prob: needed"):
        losses.POLICY_LOSSES["vanilla"](None, logp, advantages, mask, config=configuration())
    with pytest.raises(ValueError, match="'mean' is unknown"):
        losses.POLICY_LOSSES["gpg"](old, logp, advantages, mask, "mean", configuration())
    with pytest.raises(AttributeError, match="tau_pos"):
        losses.POLICY_LOSSES["sapo"](old, logp, advantages, mask, "token-mean", {"clip_ratio": 0.2})


def test_importing_registers(verl_installed):
    own = dict(verl_installed.core.POLICY_LOSS_REGISTRY)
    module = importlib.reload(verl)
    for mode, loss in module.POLICY_LOSSES.items():
        assert verl_installed.core.get_policy_loss_fn(mode) is loss is not own[mode]
    assert verl_installed.core.get_policy_loss_fn("bypass_mode") is own["bypass_mode"]


def test_a_verl_that_cannot_be_imported_leaves_the_losses(
    verl_installed, monkeypatch, caplog, tmp_path
):
    """One that is too old, or without what it needs; a folder of that name is none at all."""
    (tmp_path / "verl").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "verl")
    verl_installed.version.found = "0.7.0"
    (tmp_path / "verl" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert importlib.reload(verl).POLICY_LOSSES
    assert "nothing is registered with verl: this needs verl >= 0.9.1" in caplog.text


def test_strict_wants_what_is_registered(verl_installed, monkeypatch, tmp_path):
    (tmp_path / "verl").mkdir()
    (tmp_path / "verl" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "verl")
    monkeypatch.setenv("GRPO_FAST_STRICT", "1")
    verl_installed.version.found = "0.7.0"
    importlib.invalidate_caches()
    with pytest.raises(
        FallbackError, match=r"nothing is registered with verl: this needs verl >= 0\.9\.1"
    ):
        importlib.reload(verl)
    monkeypatch.delenv("GRPO_FAST_STRICT")
    importlib.reload(verl)


def test_a_checkout_says_its_version_itself(verl_installed, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match="which is not installed"):
        verl.register()
    sys.modules["verl"].__version__ = "0.9.2.dev0"
    verl.register()


@pytest.mark.parametrize("found", ["0.7.0", "0.10.0", "1.0"])
def test_another_verl_is_refused(found, verl_installed):
    verl_installed.version.found = found
    for patch in (verl.register, verl.patch_logprobs):
        with pytest.raises(
            ImportError, match=rf"verl >= 0\.9\.1, < 0\.10; verl {found} is installed"
        ):
            patch()
    with pytest.raises(ImportError, match=r"nosuchhost >= 1\.0, which is not installed"):
        packages.require("nosuchhost", "1.0")


def test_patching_log_probs(verl_installed, backend, device):
    sys.modules.pop("grpo_fast.integrations.verl_logprobs", None)
    importlib.import_module("grpo_fast.integrations.verl_logprobs")
    assert verl_installed.tools.logprobs_from_logits is verl.logprobs_from_logits
    assert verl_installed.engine.logprobs_from_logits is verl.logprobs_from_logits
    logits = torch.randn(2, 3, 7, device=device)
    labels = torch.randint(7, (2, 3), device=device)
    for shape in ((2, 3), (6,)):
        x = logits.view(*shape, 7).requires_grad_()
        got = verl_installed.engine.logprobs_from_logits(
            x, labels.view(shape), inplace_backward=True
        )
        want = x.log_softmax(-1).gather(-1, labels.view(shape)[..., None]).squeeze(-1)
        torch.testing.assert_close(got, want)
        upstream = torch.randn(shape, device=device)
        for a, b in zip(*(torch.autograd.grad(y, x, upstream) for y in (got, want)), strict=True):
            torch.testing.assert_close(a, b)


def test_patching_the_fused_head(verl_installed, backend, device):
    """verl's call: (1, N, D) hidden states, (N,) log-probs and entropies."""
    verl.patch_logprobs()
    hidden = torch.randn(1, 6, 8, device=device, requires_grad=True)
    weight = torch.randn(13, 8, device=device, requires_grad=True)
    labels = torch.randint(13, (1, 6), device=device)
    logp = (hidden @ weight.T / 0.7).log_softmax(-1)
    want = logp.gather(-1, labels[..., None]).flatten(), -(logp.exp() * logp).sum(-1).flatten()
    fused = verl_installed.engine.linear_cross_entropy
    got = fused(hidden, weight, labels, 0.7, "none")
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    upstream = torch.randn(2, 6, device=device).unbind()
    grads = [torch.autograd.grad(outputs, (hidden, weight), upstream) for outputs in (got, want)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for reduction in ("sum", "mean"):
        ours, _ = fused(hidden, weight, labels, 0.7, reduction)
        torch.testing.assert_close(ours, getattr(want[0], reduction)())
    with pytest.raises(ValueError, match="reduction='max'"):
        fused(hidden, weight, labels, 0.7, "max")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["", "global"])
def test_a_mask_of_fractions_weighs(mode, aggregation, info, device):
    old, logp, advantages, weights, _ = batch(device)
    fractions, theirs = FRACTIONS.to(device), verl_core_algos().get_policy_loss_fn(mode)
    live, config = fractions != 0, configuration(global_batch_info=info)
    results = []
    for fn, dtype, fill in (
        (losses.POLICY_LOSSES[mode], torch.float32, torch.nan),
        (theirs, torch.float32, 0),
        (theirs, torch.float64, 0),
    ):
        x, o, a, w = (
            torch.where(live, y, fill).to(dtype) for y in (logp, old, advantages, weights)
        )
        results.append(run(fn, x, o, a, fractions.to(dtype), aggregation, config, w))
    ours, plain, truth = results
    assert_as_accurate(ours[0], plain[0], truth[0], name="loss")
    assert_as_accurate(*(torch.where(live, grad, 0) for _, grad, _ in results), name="gradient")
    assert ours[2] == pytest.approx(truth[2], rel=1e-5, abs=1e-6)


def test_the_weights_that_verl_averages(device):
    """geo_mean's weights of a sequence, by the mask's; none where a sequence has no token."""
    weights, fractions = 2 * torch.rand(5, 6, device=device), FRACTIONS.to(device)
    got = geometric_mean(torch.where(fractions != 0, weights, torch.nan), mask=fractions, eps=1e-10)
    logs = ((weights.double() + 1e-10).log() * fractions).sum(1, keepdim=True)
    want = (logs / fractions.sum(1, keepdim=True).clamp(min=1)).exp()
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)
    packed_live = fractions != 0
    cu_seqlens = torch.nn.functional.pad(packed_live.sum(1).cumsum(0), (1, 0))
    flat = geometric_mean(
        weights[packed_live], mask=fractions[packed_live], cu_seqlens=cu_seqlens, eps=1e-10
    )
    torch.testing.assert_close(flat, got[:, 0])


def test_clip_cov_counts_by_the_mask(device):
    """Means and the number of tokens drawn, as verl computes them."""
    _, logp, advantages, _, _ = batch(device)
    fractions = FRACTIONS.to(device)
    live = fractions != 0
    A, x = (
        y.double() - (y * fractions).sum().double() / fractions.sum() for y in (advantages, logp)
    )
    within = live & (A * x > 0) & (A * x < 5)
    unweighed = (advantages - advantages[live].mean()) * (logp - logp[live].mean())
    assert (within != (live & (unweighed > 0) & (unweighed < 5))).any()
    options = {"mask": fractions, "low": 0.0, "high": 5.0}
    kept = clip_cov(logp, logp, advantages, fraction=1.0, **options)
    assert ((kept == 0) == (within | ~live)).all()
    kept = clip_cov(logp, logp, advantages, fraction=0.25, **options)
    assert ((kept == 0) & live).sum() == int(0.25 * fractions.sum()) != int(0.25 * live.sum())
