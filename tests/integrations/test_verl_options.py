"""verl's adapter, option by option: where each is read, its defaults, averages and metrics as literals."""

import importlib
import logging
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from grpo_fast.integrations import verl
from grpo_fast.integrations.verl import losses
from tests.support.hosts import mean
from tests.support.oracles import verl_core_algos
from tests.support.verl import GLOBAL, B, T, batch, configuration, run

CLIP = ("clip_ratio_low", "clip_ratio_high", "clip_ratio")
READS = {
    "vanilla": (*CLIP, "clip_ratio_c"),
    "gspo": CLIP,
    "sapo": ("tau_pos", "tau_neg"),
    "gpg": (),
    "cispo": CLIP,
    "dro": ("policy_loss.dro_beta",),
    "geo_mean": CLIP,
    "dppo_tv": (*CLIP, "clip_ratio_c"),
    "dppo_kl": (*CLIP, "clip_ratio_c"),
    "clip_cov": (*CLIP, *(f"policy_loss.clip_cov_{x}" for x in ("ratio", "lb", "ub"))),
    "kl_cov": ("policy_loss.ppo_kl_coef", "policy_loss.kl_cov_ratio"),
}
PG = ("actor/pg_clipfrac", "actor/pg_clipfrac_lower")
METRICS = dict.fromkeys(READS, ("actor/ppo_kl", *PG)) | {
    "gpg": (),
    "dro": ("actor/ppo_kl",),
    "clip_cov": ("actor/ppo_kl", PG[0]),
    "kl_cov": ("actor/ppo_kl",),
}


def both(mode, config, aggregation="token-mean", weighted=False, changed=None):
    """(loss, gradient, metrics) of verl's function in float64 and of ours, on the same batch."""
    old, logp, advantages, weights, mask = changed or batch("cpu")
    results = []
    for fn, dtype in (
        (verl_core_algos().get_policy_loss_fn(mode), torch.float64),
        (losses.POLICY_LOSSES[mode], torch.float32),
    ):
        x, o, a, w = (y.to(dtype) for y in (logp, old, advantages, weights))
        found = run(fn, x, o, a, mask, aggregation, config, w if weighted else None)
        results.append((found[0], torch.where(mask, found[1], 0), found[2]))
    return results


def assert_same(results):
    (loss, grad, metrics), (ours, our_grad, our_metrics) = results
    torch.testing.assert_close(ours.double(), loss.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_grad.double(), grad.double(), rtol=1e-5, atol=1e-6)
    assert our_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def test_the_losses_are_these():
    assert set(losses.POLICY_LOSSES) == set(READS)
    for mode, loss in losses.POLICY_LOSSES.items():
        assert loss.__name__ == loss.__qualname__ == f"policy_loss_{mode}"
    assert verl.SUPPORTED == ("0.9.1", "0.10")


@pytest.mark.parametrize("mode", READS)
def test_each_has_verls_metrics(mode):
    theirs, ours = both(mode, configuration())
    assert set(ours[2]) == set(theirs[2]) == set(METRICS[mode])


@pytest.mark.parametrize("mode", READS)
def test_an_option_is_read_where_verl_reads_it(mode):
    """A change of each option changes verl's loss, gradient or metrics, and ours in the same way."""
    old, logp, advantages, weights, mask = batch("cpu")
    old[3], logp[3], advantages[3] = -0.1, -0.6, -1.0  # less probable, within some bounds
    old[2, 0], logp[2, 0], advantages[2, 0] = -0.7, -0.1, 1.0  # and more
    given = (old, logp, advantages, weights, mask)
    base = both(mode, configuration(clip_ratio_low=0.1), changed=given)
    assert_same(base)
    for option in READS[mode]:
        outer, _, name = option.rpartition(".")
        values = {"clip_ratio_low": 0.6, "clip_ratio_high": 2.0, "clip_ratio_c": 1.4}
        values |= {"dro_beta": 0.7, "clip_cov_ub": 0.02, "clip_cov_ratio": 0.1}
        value = values.get(name, 0.35)
        changes = {name: value}
        if name == "clip_ratio":  # read where the two are not given
            changes |= {"clip_ratio_low": None, "clip_ratio_high": None}
        config = configuration(**{"clip_ratio_low": 0.1} | ({} if outer else changes))
        if outer:
            vars(config.policy_loss).update(changes)
        changed = both(mode, config, changed=given)
        if name != "clip_cov_ratio":  # which of the candidates are drawn is left to chance
            assert_same(changed)
        assert changed[0][0] != base[0][0] or changed[0][2] != base[0][2], option


@pytest.mark.parametrize("mode", READS)
def test_unequal_bounds(mode):
    for low, high in ((0.05, 0.5), (0.5, 0.05)):
        assert_same(both(mode, configuration(clip_ratio_low=low, clip_ratio_high=high)))


@pytest.mark.parametrize("mode, default", [("vanilla", 3.0), ("dppo_tv", 20.0), ("dppo_kl", 20.0)])
def test_clip_ratio_c_where_there_is_none(mode, default):
    """verl's default is 3 for the dual clip, 20 for DPPO's cap."""
    config = configuration(clip_ratio_low=0.9, clip_ratio_high=0.9)  # so that DPPO keeps some
    old, logp, advantages, weights, mask = batch("cpu")
    old[3, 0], logp[3, 0] = -6.0, -2.0  # a ratio of 55 that changes the probability by 0.13
    advantages[3, 0] = -1.0
    changed = (old, logp, advantages, weights, mask)
    given = both(mode, config, changed=changed)
    del config.clip_ratio_c
    absent = both(mode, config, changed=changed)
    assert_same(absent)
    config.clip_ratio_c = default
    assert both(mode, config, changed=changed)[1][0] == absent[1][0]
    assert (given[1][0] == absent[1][0]) == (default == 3.0)


@pytest.mark.parametrize(
    "mode, names",
    [
        ("clip_cov", {"clip_cov_ratio": 0.0002, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0}),
        ("kl_cov", {"kl_cov_ratio": 0.0002, "ppo_kl_coef": 1.0}),
    ],
)
def test_selections_where_an_option_is_none(mode, names):
    """A fraction of 0.0002 is one of 15 tokens, and the covariances are from 1 to 5."""
    old, logp, advantages, weights, mask = batch("cpu")
    logp[0, :3], old[0, :3] = torch.tensor([-0.1, -9.0, -5.0]), torch.tensor([-0.15, -9.05, -5.05])
    advantages[0, :3] = torch.tensor([2.0, -1.0, -0.8])  # covariances of 5 and more, and less
    changed = (old, logp, advantages, weights, mask)
    none = configuration()
    for name in names:
        setattr(none.policy_loss, name, None)
    without = both(mode, none, changed=changed)
    assert_same(without) if mode == "kl_cov" else None
    fraction = 1 / 15 if mode == "clip_cov" else None
    assert without[1][2].get("actor/pg_clipfrac") == (fraction and pytest.approx(fraction))
    for name, value in names.items():
        given = configuration()
        for other, theirs in names.items():
            setattr(given.policy_loss, other, theirs)
        torch.manual_seed(0)
        want = losses.POLICY_LOSSES[mode](old, logp, advantages, mask, "token-mean", given)
        setattr(given.policy_loss, name, None)
        torch.manual_seed(0)
        got = losses.POLICY_LOSSES[mode](old, logp, advantages, mask, "token-mean", given)
        assert got == want
        setattr(given.policy_loss, name, 1.5 * value)
    if mode == "clip_cov":  # the bounds of the covariance, as they are in verl
        for name, value in (("clip_cov_lb", 1.0), ("clip_cov_ub", 5.0)):
            results = []
            for given in (None, value):
                config = configuration()
                vars(config.policy_loss).update({"clip_cov_ratio": 1.0, "clip_cov_lb": 0.0})
                setattr(config.policy_loss, name, given)
                results.append(both(mode, config, changed=changed))
                assert_same(results[-1])
            assert results[0][1][0] == results[1][1][0]


def test_how_many_of_many_tokens():
    """A fraction of None is 0.0002: two of 10,000 tokens, in verl and here."""
    torch.manual_seed(0)
    logp, advantages = -torch.rand(1, 10_000) - 1, torch.randn(1, 10_000)
    old, mask = logp - 0.1, torch.ones(1, 10_000, dtype=torch.bool)
    config = configuration()
    names = ("clip_cov_ratio", "kl_cov_ratio")
    vars(config.policy_loss).update(dict.fromkeys(names))
    given = (old, logp, advantages, torch.ones_like(logp), mask)
    theirs, ours = both("clip_cov", config, changed=given)
    assert ours[2][PG[0]] == theirs[2][PG[0]] == pytest.approx(2 / 10_000)
    assert_same(both("kl_cov", config, "token-sum", changed=given))


@pytest.mark.parametrize("beta", [None, 0.0, -1.0])
def test_dro_needs_a_positive_beta(beta):
    old, logp, advantages, _, mask = batch("cpu")
    config = configuration(policy_loss=SimpleNamespace(dro_beta=beta))
    with pytest.raises(
        ValueError, match=rf"policy_loss\.dro_beta: want a positive number, got {beta}"
    ):
        losses.POLICY_LOSSES["dro"](old, logp, advantages, mask, "token-mean", config)
    without = configuration(policy_loss=SimpleNamespace())
    with pytest.raises(ValueError, match=r"dro_beta: .*got None"):
        losses.POLICY_LOSSES["dro"](old, logp, advantages, mask, "token-mean", without)


def test_gpg_has_no_ratio(backend):
    """The old log-probs may be anything, or none at all; the other losses name them."""
    old, logp, advantages, _, mask = batch("cpu")
    loss = losses.POLICY_LOSSES["gpg"]
    want = loss(old, logp, advantages, mask, "token-mean", configuration())
    assert (
        loss(torch.full_like(old, torch.nan), logp, advantages, mask, config=configuration())
        == want
    )
    assert loss(None, logp, advantages, mask, config=configuration()) == want
    for mode in set(READS) - {"gpg"}:
        with pytest.raises(ValueError, match=f"{mode}: old_log_prob: needed"):
            losses.POLICY_LOSSES[mode](None, logp, advantages, mask, config=configuration())
        with pytest.raises(ValueError, match=f"{mode}: config: needed, verl's actor configuration"):
            losses.POLICY_LOSSES[mode](old, logp, advantages, mask)


# The scale of the loss of one token at [2, 1] of the batch, whose mask has (6, 0, 3, 5, 1) tokens.
AVERAGES = {
    ("token-mean", "here"): 1 / 15,
    ("token-mean", "global"): 2 / 53,
    ("token-sum", "here"): 1.0,
    ("token-sum", "global"): 2.0,
    ("seq-mean-token-mean", "here"): 1 / (3 * 4),
    ("seq-mean-token-mean", "global"): 2 / (3 * 9),
    ("seq-mean-token-sum", "here"): 1 / 4,
    ("seq-mean-token-sum", "global"): 2 / 9,
    ("seq-mean-token-sum-norm", "here"): 1 / (4 * 6),
    ("seq-mean-token-sum-norm", "global"): 2 / (9 * 11),
}


@pytest.mark.parametrize("aggregation, where", AVERAGES)
@pytest.mark.parametrize("kind", [float, int, torch.tensor])
def test_averages(aggregation, where, kind):
    old, logp, _, _, mask = batch("cpu")
    advantages = torch.zeros(B, T)
    advantages[2, 1] = -1.0
    info = {name: kind(value) for name, value in GLOBAL.items()} if where == "global" else {}
    x = logp.clone().requires_grad_()
    config = configuration(global_batch_info=info)
    loss, _ = losses.POLICY_LOSSES["gpg"](old, x, advantages, mask, aggregation, config)
    (grad,) = torch.autograd.grad(loss, x)
    assert grad[2, 1].item() == pytest.approx(AVERAGES[aggregation, where], rel=1e-6)
    assert grad.count_nonzero() == 1


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_global_batch_of_less_than_one_token(kind):
    """Masks of fractions can sum to less than 1: verl's denominator is not changed."""
    for aggregation, name in (
        ("token-mean", "batch_num_tokens"),
        ("seq-mean-token-sum", "global_batch_size"),
    ):
        config = configuration(global_batch_info={"dp_size": 1, name: kind(0.25)})
        assert_same(both("vanilla", config, aggregation))


@pytest.mark.parametrize("mode", ["sapo", "geo_mean"])
def test_losses_that_average_in_their_own_way(mode):
    """sapo over the sequences with a token, geo_mean over all of them, whatever is asked for."""
    old, logp, advantages, _, mask = batch("cpu")
    found = {
        aggregation: losses.POLICY_LOSSES[mode](
            old, logp, advantages, mask, aggregation, configuration()
        )
        for aggregation in ("token-mean", "token-sum", "seq-mean-token-sum-norm")
    }
    assert len({loss.item() for loss, _ in found.values()}) == 1
    in_parts = configuration(global_batch_info={"dp_size": 1})
    assert_same(both(mode, in_parts))
    several = configuration(global_batch_info=GLOBAL)
    assert_same(both(mode, several))


@pytest.mark.parametrize(
    "aggregation, name",
    [
        ("token-mean", "batch_num_tokens"),
        ("seq-mean-token-mean", "global_batch_size"),
        ("seq-mean-token-sum", "global_batch_size"),
        ("seq-mean-token-sum-norm", "global_batch_size"),
    ],
)
def test_a_missing_denominator_is_named(aggregation, name):
    old, logp, advantages, _, mask = batch("cpu")
    info = {key: value for key, value in GLOBAL.items() if key != name}
    config = configuration(global_batch_info=info)
    with pytest.raises(
        ValueError, match=f"{aggregation}: global_batch_info.{name} is needed with dp_size=2"
    ):
        losses.POLICY_LOSSES["gpg"](old, logp, advantages, mask, aggregation, config)
    config = configuration(global_batch_info=info | {"dp_size": 1})
    losses.POLICY_LOSSES["gpg"](old, logp, advantages, mask, aggregation, config)
    with pytest.raises(
        ValueError, match="'max' is unknown; choose from token-mean, token-sum, seq-mean"
    ):
        losses.POLICY_LOSSES["gpg"](old, logp, advantages, mask, "max", config)


def test_no_valid_token_anywhere():
    """A global batch of 0 tokens, as of a micro-batch without one: 0, neither NaN nor an infinity."""
    old, logp, advantages, _, mask = batch("cpu")
    info = dict.fromkeys(GLOBAL, 0) | {"dp_size": 2}
    for aggregation in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
        for zero in (info, {k: torch.tensor(v) for k, v in info.items()}):
            x = logp.clone().requires_grad_()
            loss, metrics = losses.POLICY_LOSSES["vanilla"](
                old, x, advantages, mask & False, aggregation, configuration(global_batch_info=zero)
            )
            assert loss == 0
            assert (torch.autograd.grad(loss, x)[0] == 0).all()
            assert all(value == 0 for value in metrics.values())


@pytest.mark.parametrize("mode", READS)
def test_the_distance_that_is_logged(mode):
    """The mean of old - new, within 20 nats where the loss clamps; of its absolute value for kl_cov."""
    _, (_, _, metrics) = both(mode, configuration())
    if mode == "gpg":
        assert metrics == {}
        return
    old, logp, _, _, mask = batch("cpu")
    d = old - logp
    assert d[0, 0] == pytest.approx(-21)
    within = d.clamp(-20, 20) if mode in ("vanilla", "sapo", "cispo", "dppo_tv", "dppo_kl") else d
    want = mean(d.abs() if mode == "kl_cov" else within, mask)
    assert metrics["actor/ppo_kl"] == pytest.approx(want, rel=1e-5)


def test_what_is_logged_as_clipped():
    """geo_mean: of the log-ratio, by the sign of the advantage; dppo: dropped, and capped where it is not."""
    config = configuration(clip_ratio_low=0.3, clip_ratio_high=0.6, clip_ratio_c=1.5)
    old, logp, A, _, mask = batch("cpu")
    d, change = logp - old, logp.exp() - old.exp()
    _, (_, _, metrics) = both("geo_mean", config)
    outside = (d < -0.3) | (d > 0.6)
    assert metrics[PG[0]] == pytest.approx(mean(outside & (A > 0), mask))
    assert metrics[PG[1]] == pytest.approx(mean(outside & (A < 0), mask))
    _, (_, _, metrics) = both("dppo_tv", config)
    kept = torch.where(A > 0, change <= 0.6, change >= -0.3)
    assert metrics[PG[0]] == pytest.approx(mean(~kept, mask))
    assert metrics[PG[1]] == pytest.approx(mean(kept & (d.exp() > 1.5), mask))
    assert metrics[PG[1]] > 0
    _, (_, _, metrics) = both("cispo", config)
    assert metrics == pytest.approx(
        metrics | {PG[0]: mean((d.exp() < 0.7) | (d.exp() > 1.6), mask), PG[1]: 0.0}
    )


WITH_A_RATIO = [mode for mode in READS if mode not in ("gpg", "clip_cov", "kl_cov")]


@pytest.mark.parametrize("mode", WITH_A_RATIO)
def test_a_missing_old_log_prob_is_seen(mode):
    """NaN at a live token: in verl's loss NaN, and so here; the metrics count it as verl does."""
    old, logp, advantages, weights, mask = batch("cpu")
    old[3, 1] = math.nan
    theirs, ours = both(mode, configuration(), changed=(old, logp, advantages, weights, mask))
    assert theirs[0].isnan()
    assert ours[0].isnan()
    for name in PG:
        if name in theirs[2]:
            assert ours[2][name] == pytest.approx(theirs[2][name]), name


def test_the_weights_of_geo_mean_are_one_per_sequence():
    """Their geometric mean, of which 0 is 1e-10, and 1 where a sequence has no token."""
    old, logp, advantages, weights, mask = batch("cpu")
    weights[3, 2] = 0
    weights[1] = torch.nan  # a sequence without a token
    results = both("geo_mean", configuration(), weighted=True)
    assert_same(results)
    weights = torch.where(mask, weights, 1)
    results = both(
        "geo_mean", configuration(), weighted=True, changed=(old, logp, advantages, weights, mask)
    )
    assert_same(results)


def test_kl_covs_weights_are_on_the_penalty_too():
    config = configuration()
    assert_same(both("kl_cov", config, weighted=True))
    config.policy_loss.ppo_kl_coef = 5.0
    assert_same(both("kl_cov", config, weighted=True))


def test_clip_covs_weights_multiply_the_selection():
    config = configuration()
    results = both("clip_cov", config, weighted=True)
    assert_same(results)
    assert results[1][2][PG[0]] > 0


def test_every_loss_is_registered(verl_installed, monkeypatch):
    """And nothing else, by the names that verl's configuration has."""
    registered = {}

    def register_policy_loss(name):
        return lambda fn: registered.setdefault(name, fn)

    monkeypatch.setattr(verl_installed.core, "register_policy_loss", register_policy_loss)
    verl.register()
    assert registered == losses.POLICY_LOSSES


def test_importing_without_verl_registers_nothing(monkeypatch, caplog):
    """Neither an error nor a word; the losses are there."""
    monkeypatch.delitem(sys.modules, "verl", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        module = importlib.reload(verl)
    assert not caplog.records
    assert set(module.POLICY_LOSSES) == set(READS)


def test_importing_in_a_process_of_its_own(tmp_path):
    """An installed verl of another version is named; a folder of that name is nothing."""
    (tmp_path / "verl").mkdir()
    code = "import grpo_fast.integrations.verl as v; print(len(v.POLICY_LOSSES))"
    root = str(importlib.import_module("grpo_fast").__path__[0]).rsplit("/", 1)[0]
    for text, want in (
        (None, ""),
        ("__version__ = '0.7'", "nothing is registered with verl: this"),
    ):
        if text is not None:
            (tmp_path / "verl" / "__init__.py").write_text(text)
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": f"{root}:{tmp_path}", "PATH": ""},
            capture_output=True,
            text=True,
        )
        assert out.returncode == 0, out.stderr
        assert out.stdout == "11\n"
        assert want in out.stderr
        assert (out.stderr == "") == (want == "")
