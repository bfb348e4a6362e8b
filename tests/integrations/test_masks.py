"""Masks of fractions, which every trainer multiplies with: they weigh here as they do there."""

import sys
from types import SimpleNamespace

import pytest
import torch

from grpo_fast.integrations import areal, miles, nemo_rl, openrlhf, prime_rl, skyrl, slime
from grpo_fast.integrations.verl import losses
from grpo_fast.testing import assert_as_accurate
from grpo_fast.weights import clip_cov, geometric_mean
from tests.integrations import test_miles, test_slime
from tests.integrations.test_miles import host
from tests.integrations.test_nemo_rl import CASES as NEMO
from tests.integrations.test_nemo_rl import OPTIONS as NEMO_OPTIONS
from tests.integrations.test_nemo_rl import PARTS, SEQS, TOKS, WHOLE, corrected, data_of
from tests.integrations.test_nemo_rl import batch as nemo_batch
from tests.integrations.test_nemo_rl import formula as nemo_formula
from tests.integrations.test_packed import packed, prime_inputs, row
from tests.integrations.test_padded import (
    CORRECTIONS,
    SKYRL,
    openrlhf_formula,
    openrlhf_share,
    skyrl_formula,
)
from tests.integrations.test_slime import megatron
from tests.integrations.test_verl import AGGREGATIONS, GLOBAL, MODES, configuration, run
from tests.integrations.test_verl import batch as verl_batch
from tests.support.hosts import agrees, clipped, host_batch
from tests.support.oracles import verl_core_algos

FIXTURES = (host, megatron, nemo_batch)  # pytest takes them by their names


# Of each row's tokens; a row that has any sums to 1 at least, below which trainers differ.
WEIGHTS = torch.tensor(
    [
        [1.0, 0.5, 0.25, 2.0, 0.0, 0.75],
        [0.0] * 6,
        [0.5, 0.5, 0.75, 0.0, 0.0, 0.0],
        [0.3, 0.9, 0.0, 0.6, 0.2, 0.0],
        [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    ]
)


@pytest.fixture
def batch(device):
    """The tests' batch, and weights that are 0 at some of its live tokens, too."""
    b = host_batch(device)
    b.mask = (WEIGHTS != 0).to(device)
    b.weights = WEIGHTS.to(device)
    return b


def weighed(formula):
    """A formula whose mask is the weights."""
    return lambda x, b: formula(x, SimpleNamespace(**vars(b) | {"mask": b.weights}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["", "global"])
def test_verl(mode, aggregation, info, device):
    old, logp, advantages, weights, _ = verl_batch(device)
    fractions, theirs = WEIGHTS.to(device), verl_core_algos().get_policy_loss_fn(mode)
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


@pytest.mark.parametrize("name", skyrl.POLICY_LOSSES)
def test_skyrl(name, batch):
    def ours(x, b):
        return skyrl.POLICY_LOSSES[name](
            x, b.old, b.A, SKYRL, loss_mask=batch.weights, rollout_logprobs=b.rollout
        )

    (metrics,) = agrees(ours, weighed(skyrl_formula(name, SKYRL)), batch)
    r, A, w = (batch.logp - batch.old).exp(), batch.A, batch.weights
    if name == "regular":
        outside = ((r > 1.28) & (A > 0)) | ((r < 0.8) & (A < 0))
        assert metrics["clip_ratio"] == pytest.approx(((outside * w).sum() / w.sum()).item())
    if name == "importance_sampling":
        assert metrics["importance_ratio"] == pytest.approx(((r * w).sum() / w.sum()).item())


@pytest.mark.parametrize("sample_mask", [WHOLE, PARTS], ids=["whole", "parts"])
@pytest.mark.parametrize("case", NEMO)
def test_nemo_rl(case, sample_mask, nemo_batch):
    """Fractions of tokens, and of samples beside them."""
    options = NEMO_OPTIONS | NEMO[case]
    if case == "seq-mask-tis":  # which the first sequence passes by its weighed mean alone
        options |= corrected("seq-mask-tis", 1.0, 1.2)
    b, o = nemo_batch, SimpleNamespace(**options)
    b.mask, b.weights = (WEIGHTS != 0).to(b.A.device), WEIGHTS.to(b.A.device)

    def ours(x, b):
        data = data_of(b, sample_mask)
        data["token_mask"] = torch.nn.functional.pad(nemo_batch.weights, (1, 0))
        return nemo_rl.clipped_pg_loss(o, x, data, SEQS, TOKS)

    agrees(ours, weighed(nemo_formula(o, sample_mask)), b)


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("token_level", [True, False])
def test_openrlhf(correction, token_level, batch):
    options = {"clip_eps_high": 0.28, "token_level_loss": token_level, **correction}
    loss = openrlhf.PolicyLoss(**options)
    clip, kl, _, share = agrees(
        lambda x, b: loss(x, b.old, b.A, batch.weights, b.rollout),
        weighed(openrlhf_formula(options, {})),
        batch,
    )
    r, A, w = (batch.logp - batch.old).exp(), batch.A, batch.weights
    outside = ((r > 1.28) & (A > 0)) | ((r < 0.8) & (A < 0))
    assert clip.item() == pytest.approx(((outside * w).sum() / w.sum()).item())
    gap = batch.old - batch.logp
    assert kl.item() == pytest.approx(((gap * w).sum() / w.sum()).item(), rel=1e-5)
    if share is not None:
        b = SimpleNamespace(**vars(batch) | {"mask": w})
        assert share.item() == pytest.approx(openrlhf_share(options, b).item())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_areal(level, batch):
    """Its own functions take bools; a floating mask is one of weights all the same."""

    def formula(x, b):
        d, A, w = x - b.old, b.A, b.mask
        if level == "sequence":
            count = w.sum(1, keepdim=True).clamp(min=1e-9)
            d, A = ((y * w).sum(1, keepdim=True) / count for y in (d, A))
        return (clipped(d, A, 0.2, 0.2) * w).sum() / w.sum()

    def ours(x, b):
        options = {"importance_sampling_level": level}
        return areal.ppo_actor_loss_fn(x, b.old, b.rollout, b.A, 0.2, batch.weights, **options)

    (stat,) = agrees(ours, weighed(formula), batch)
    assert stat["n_valid_tokens"] == batch.mask.sum()
    flat, cu_seqlens = packed(batch)
    loss, _ = areal.ppo_actor_loss_fn(
        flat.logp,
        flat.old,
        flat.rollout,
        flat.A,
        0.2,
        flat.weights,
        importance_sampling_level=level,
        cu_seqlens=cu_seqlens,
    )
    torch.testing.assert_close(loss, ours(batch.logp, batch)[0])


def test_prime_rl(batch):
    """Its masks are bools, too, and its weights an argument of their own: both weigh."""
    b = row(batch)
    weights = 2 * torch.rand(6, device=b.A.device)

    def ours(x, given):
        inputs = prime_inputs(x, given, weights)
        inputs.loss_mask = b.weights
        out = prime_rl.default_loss(inputs, dppo_mask_low=0.05, dppo_mask_high=0.1, kl_tau=0.02)
        return out.loss, out.metrics

    def formula(x, b):
        d = x - b.rollout
        moved = x.detach().exp() - b.rollout.exp()
        keep = torch.where(b.A > 0, moved <= 0.1, moved >= -0.05)
        return ((-b.A * d.exp() * keep + 0.02 * d**2) * b.mask * weights.to(x.dtype)).sum()

    sys.modules[__name__].LossInputs = sys.modules["tests.integrations.test_packed"].LossInputs
    (metrics,) = agrees(ours, weighed(formula), b)
    moved = b.logp.exp() - b.rollout.exp()
    dropped = torch.where(b.A > 0, moved > 0.1, moved < -0.05)
    want = (dropped * b.weights).sum() / b.weights.sum()
    assert metrics["is_masked"].item() == pytest.approx(want.item())


FRACTIONS = [
    torch.tensor([1.0, 0, 0.5, 0.25]),
    torch.tensor([0.0]),
    torch.tensor([0.3, 1.0, 0.6]),
]
TRAINERS = [("slime", case) for case in ("grpo", "dual", "cispo", "entropy", "k3", "unbiased")] + [
    ("miles", case) for case in ("grpo", "dual", "low_var_kl", "k2", "unbiased")
]
BY_SEQUENCE = [("slime", case) for case in ("gspo", "opsm")] + [
    ("miles", case) for case in ("gspo", "gspo dual", "opsm", "gspo k2")
]


@pytest.mark.parametrize("trainer, case", [*TRAINERS, *BY_SEQUENCE])
def test_slime_and_miles(trainer, case, device, megatron, host, monkeypatch):
    home = {"slime": test_slime, "miles": test_miles}[trainer]
    for module in (test_slime, test_miles):
        monkeypatch.setattr(module, "MASKS", FRACTIONS)
    b = test_slime.make_batch(device)
    more = getattr(home, "MORE", {})
    args = SimpleNamespace(**test_slime.ARGS | more | home.CASES[case])
    loss = {"slime": slime, "miles": miles}[trainer].policy_loss
    reduce = test_slime.reducer(FRACTIONS)
    (metrics,) = agrees(
        lambda x, _: loss(args, b, 1.0 * x, reduce),
        lambda x, _: home.formula(args, x, b)[0],
        SimpleNamespace(logp=b["logits"], mask=torch.ones_like(b["logits"], dtype=torch.bool)),
        until=["CatBackward"] if case == "k2" else (),
    )
    for name, value in home.formula(args, b["logits"].double(), b)[1].items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


def test_the_weights_that_verl_averages(device):
    """geo_mean's weights of a sequence, by the mask's; none where a sequence has no token."""
    weights, fractions = 2 * torch.rand(5, 6, device=device), WEIGHTS.to(device)
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
    _, logp, advantages, _, _ = verl_batch(device)
    fractions = WEIGHTS.to(device)
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
