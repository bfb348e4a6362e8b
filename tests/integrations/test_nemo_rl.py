"""NeMo-RL's adapter: calling convention, options, and its formulas in float64, from the sources of 0.7.0."""

import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from grpo_fast.integrations import nemo_rl
from tests.support.hosts import (
    FRACTIONS,
    agrees,
    clipped,
    host_batch,
    mean,
    parameters,
    sequence_mean,
    with_fractions,
)
from tests.support.nemo_rl import (
    CASES,
    GSPO,
    OPTIONS,
    PARTS,
    RATIO,
    SEQS,
    TOKS,
    WHOLE,
    corrected,
    data_of,
    with_reference,
)


@pytest.fixture
def batch(device):
    return with_reference(host_batch(device))


def formula(o, sample_mask=WHOLE):
    def loss(x, b):
        sample = torch.tensor(sample_mask).to(x)[:, None]
        weight = b.mask * sample
        d = x - b.old
        if o.sequence_level_importance_ratios:
            d = sequence_mean(d, b.mask)
        if o.force_on_policy_ratio:
            d = x - x.detach()
        policy = clipped(d, b.A, 0.2, 0.28, o.ratio_clip_c)
        if o.use_cispo:
            policy = -b.A * d.exp().clamp(0.8, 1.28).detach() * x
        if o.disable_ppo_ratio:
            policy = -b.A * x
        if o.use_importance_sampling_correction:
            gap = b.old - b.rollout
            if o.sequence_level_importance_ratios:
                gap = (gap * weight).sum(1, keepdim=True)
            rho = gap.exp()
            low = o.truncated_importance_sampling_ratio_min or 0
            high = o.truncated_importance_sampling_ratio
            kind = o.truncated_importance_sampling_type
            if kind == "tis":
                rho = rho.clamp(low, high)
            elif kind is not None:
                by = rho if kind == "icepop" else sequence_mean(gap, b.mask).exp()
                rho = torch.where((by >= low) & (by <= high), rho, 0)
            policy = policy * rho
        q = b.ref - x
        bound = o.kl_input_clamp_value or torch.inf
        through = (x - x.detach()).exp()  # the gradient through the sampling probability
        through = torch.where(q.abs() > bound, through.detach(), through)
        q = q.clamp(-bound, bound)
        kl = (through * (q.exp() - q - 1)).clamp(max=o.kl_output_clamp_value or torch.inf)
        in_reward = getattr(o, "use_kl_in_reward", False)
        policy = policy + (0 if in_reward else o.reference_policy_kl_penalty) * kl
        policy = torch.where(weight != 0, policy, 0) * weight
        if o.loss_type.name == "TOKEN_LEVEL":
            total = policy.sum() / TOKS
        else:
            total = (policy.sum(1) / b.mask.sum(1).clamp(min=1)).sum() / SEQS
        right = weight * (data_of(b)["rewards"] > 0)[:, None]
        return total - o.positive_example_nll_weight * (x * right).sum() / right.sum()

    return loss


@pytest.mark.parametrize("case", CASES)
def test_loss(case, batch):
    o = SimpleNamespace(**OPTIONS | CASES[case])
    (metrics,) = agrees(
        lambda x, b: nemo_rl.clipped_pg_loss(o, x, data_of(b), SEQS, TOKS), formula(o), batch
    )
    live = batch.mask.clone()
    live[4] = False
    share = live.sum().item() / TOKS.item()
    d = batch.logp - batch.old
    if case in ("grpo", "kl", "dual", "tis"):
        assert metrics["probs_ratio"] == pytest.approx(share * mean(d.exp(), live), rel=1e-5)
        assert metrics["probs_ratio_max"] == pytest.approx(d[live].exp().max().item())
        clamped = d.exp().clamp(0.8, 1.28)
        assert metrics["probs_ratio_clamped"] == pytest.approx(share * mean(clamped, live))
        assert metrics["probs_ratio_clamped_min"] == pytest.approx(0.8)
    gap = batch.rollout - batch.old
    if not o.force_on_policy_ratio:
        want = share * mean((-gap).exp() - 1 + gap, live)
        assert metrics["gen_kl_error"] == pytest.approx(want, rel=1e-4)
        p, q = batch.old.double().exp(), batch.rollout.double().exp()
        x, y = (z / ((p + q) / 2) for z in (p, q))
        want = share * mean((x - 1 - x.log() + y - 1 - y.log()) / 2, live)
        assert metrics["js_divergence_error"] == pytest.approx(want, rel=1e-4)
        want = share * mean(gap.abs().exp(), live)
        assert metrics["token_mult_prob_error"] == pytest.approx(want, rel=1e-5)
    if case == "kl":
        q = (batch.ref - batch.logp).clamp(-20, 20).double()
        want = share * mean((q.exp() - q - 1).clamp(max=10), live)
        assert metrics["kl_penalty"] == pytest.approx(want, rel=1e-5)
    if case == "icepop":
        outside = ((-gap).exp() < 0.7) | ((-gap).exp() > 1.3)
        assert metrics["is_oob_ratio"] == pytest.approx(share * mean(outside, live))
    assert metrics["num_valid_samples"] == 4
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize("case", CASES)
def test_a_sample_mask_weighs(case, batch):
    """`loss_multiplier`, as fractions: of the loss and of the metrics, in no denominator but NeMo-RL's."""
    o = SimpleNamespace(**OPTIONS | CASES[case])
    (metrics,) = agrees(
        lambda x, b: nemo_rl.clipped_pg_loss(o, x, data_of(b, PARTS), SEQS, TOKS),
        formula(o, PARTS),
        batch,
    )
    weight = (batch.mask * torch.tensor(PARTS, device=batch.A.device)[:, None]).double()

    def total(x):
        return (torch.where(batch.mask, x.double(), 0) * weight).sum().item() / TOKS.item()

    assert metrics["num_valid_samples"] == pytest.approx(sum(PARTS))
    d = batch.logp - batch.old
    if case in ("grpo", "tis", "icepop"):
        assert metrics["probs_ratio"] == pytest.approx(total(d.exp()), rel=1e-5)
        gap = (batch.rollout - batch.old).abs()
        want = total((gap * weight).exp())
        assert metrics["token_mult_prob_error"] == pytest.approx(want, rel=1e-5)
        assert metrics["approx_entropy"] == pytest.approx(
            -total((batch.logp - batch.rollout).exp() * batch.logp), rel=1e-5
        )
    if case == "sequences":
        q = (batch.ref - batch.logp).clamp(-20, 20).double()
        by_sequence = sequence_mean((q.exp() - q - 1).clamp(max=10), batch.mask)[:, 0]
        want = (by_sequence * torch.tensor(PARTS).to(by_sequence)).sum().item() / SEQS.item()
        assert metrics["kl_penalty"] == pytest.approx(want, rel=1e-5)
    if case == "gspo-icepop":
        rho = ((batch.old - batch.rollout) * weight).sum(1).exp()
        outside = ((rho < 0.99) | (rho > 2))[:, None].expand(batch.mask.shape)
        assert rho[3] < 2 < ((batch.old - batch.rollout) * batch.mask).sum(1).exp()[3]
        assert metrics["is_oob_ratio"] == pytest.approx(total(outside))
        sequences = torch.where((rho < 0.99) | (rho > 2), 0, rho) * torch.tensor(PARTS).to(rho)
        assert metrics["sampling_importance_ratio"] == pytest.approx(
            sequences.sum().item() / SEQS.item(), rel=1e-5
        )


def test_fewer_valid_tokens_than_one(batch):
    """The denominators are NeMo-RL's, also where masks of fractions sum to less than 1."""
    o = SimpleNamespace(**OPTIONS)
    losses = [
        nemo_rl.clipped_pg_loss(o, batch.logp, data_of(batch, PARTS), SEQS, torch.tensor(n))[0]
        for n in (0.5, 1.0, 0.0)
    ]
    torch.testing.assert_close(losses[0], 2 * losses[1])
    nothing = data_of(batch, [0.0] * 5)
    loss, metrics = nemo_rl.clipped_pg_loss(
        o, batch.logp, nothing, torch.tensor(0.0), torch.tensor(0.0)
    )
    assert loss == metrics["loss"] == metrics["probs_ratio"] == 0


@pytest.mark.parametrize("case", ["grpo", "kl", "sequences", "in the rewards"])
def test_the_configuration_itself(case, batch):
    """`loss_fn` by its entries, where a `ClippedPGLossFn` has `loss_type` and the weight of the KL."""
    o = OPTIONS | CASES[case]
    by_token = o.pop("loss_type").name == "TOKEN_LEVEL"
    config = SimpleNamespace(**{"use_kl_in_reward": False} | o, token_level_loss=by_token)
    got = nemo_rl.clipped_pg_loss(config, batch.logp, data_of(batch), SEQS, TOKS)
    o = SimpleNamespace(**OPTIONS | CASES[case])
    want = nemo_rl.clipped_pg_loss(o, batch.logp, data_of(batch), SEQS, TOKS)
    assert got == want


@pytest.mark.parametrize("case", ["raw", "icepop", "gspo-tis"])
def test_a_token_that_neither_policy_can_sample_has_no_weight(case, batch):
    """-inf less -inf: NeMo-RL's weight is 0, of the token or of its sequence; bounds come after that."""
    o = SimpleNamespace(**OPTIONS | CASES[case])
    data = data_of(batch)
    data["prev_logprobs"][0, 2] = data["generation_logprobs"][0, 2] = -torch.inf
    weights, _ = nemo_rl._weights(
        o,
        data["prev_logprobs"][:, 1:],
        data["generation_logprobs"][:, 1:],
        batch.mask,
        torch.ones(5, device=batch.A.device),
    )
    if case == "gspo-tis":
        assert weights[0].item() == pytest.approx(0.1)
    else:
        assert weights[0, 1] == 0
    assert (weights.expand(batch.mask.shape)[3, :5] > 0).any()


def test_an_infinite_difference_does_not_reject_its_sequence(batch):
    """seq-mask-tis: it counts as none in the mean that is bounded, and its own weight is 0."""
    o = SimpleNamespace(**OPTIONS | CASES["seq-mask-tis"])
    old, generated = batch.old.clone(), batch.old.clone()
    old[0, 2], generated[0, 3] = -torch.inf, -torch.inf
    weights, outside = nemo_rl._weights(o, old, generated, batch.mask, torch.ones(5))
    assert not outside.any()
    assert weights[0].tolist() == [1, 1, 0, 0, 1, 1]


def test_what_cannot_be_the_same_is_refused(batch):
    penalised = {"reference_policy_kl_penalty": 0.1}
    for changes, message in (
        (penalised | {"reference_policy_kl_type": "k1"}, "reference_policy_kl_type='k1'"),
        (penalised | {"use_on_policy_kl_approximation": True}, "use_on_policy_kl_approximation"),
        ({"disable_ppo_ratio": True, "ratio_clip_c": 3.0}, "ratio_clip_c=3.0"),
        ({"ratio_clip_c": 0.5}, "dual_clip"),
        # What NeMo-RL refuses, too.
        ({RATIO: 1.2}, "_type=None with .*_ratio=1.2: choose from tis, icepop, seq-mask-tis"),
        (corrected(None, None, 1.2), "_type=None"),
        (corrected("topk", None, 1.2), "_type='topk'"),
        (corrected("tis", None, None), "_ratio: want a positive number with type 'tis', got None"),
        (corrected("tis", None, 0.0), "_ratio: want a positive number.* got 0.0"),
        (corrected("icepop", None, 1.2), "_ratio_min: needed with type 'icepop'"),
        (corrected("seq-mask-tis", None, 1.2), "_ratio_min: needed with type 'seq-mask-tis'"),
        (corrected("tis", 1.3, 1.2), "_ratio_min=1.3 is above .*_ratio=1.2"),
        (corrected("seq-mask-tis", 0.9, 1.1, **GSPO), "needs sequence_level_importance_ratios=F"),
        (
            corrected("tis", None, 1.2) | {"use_importance_sampling_correction": False},
            "needs use_importance_sampling_correction=True",
        ),
        ({"sequence_level_importance_ratios": True}, "needs token_level_loss=False"),
        ({"use_cispo": True, "ratio_clip_c": 3.0}, "use_cispo=True .* ratio_clip_c"),
        ({"use_cispo": True, "disable_ppo_ratio": True}, "use_cispo=True .* disable_ppo_ratio"),
        ({"use_cispo": True, "force_on_policy_ratio": True}, "go with force_on_policy_ratio"),
        ({"use_cispo": True} | GSPO, "with sequence_level_importance_ratios, token_level_loss=F"),
    ):
        o = SimpleNamespace(**OPTIONS | changes)
        with pytest.raises(ValueError, match=message):
            nemo_rl.clipped_pg_loss(o, batch.logp, data_of(batch), SEQS, TOKS)
    filtered = data_of(batch) | {"curr_logprobs_unfiltered": batch.logp}
    o = SimpleNamespace(**OPTIONS | penalised)
    with pytest.raises(ValueError, match="top-k or top-p"):
        nemo_rl.clipped_pg_loss(o, batch.logp, filtered, SEQS, TOKS)


def test_no_penalty_may_be_false(batch):
    o = SimpleNamespace(**OPTIONS | {"reference_policy_kl_penalty": False})
    want = SimpleNamespace(**OPTIONS | {"reference_policy_kl_penalty": 0.0})
    losses = [
        nemo_rl.clipped_pg_loss(x, batch.logp, data_of(batch), SEQS, TOKS)[0] for x in (o, want)
    ]
    assert losses[0] == losses[1]


@pytest.fixture
def host(monkeypatch):
    """Modules laid out as NeMo-RL's, and a class with its signature."""
    for i in range(nemo_rl.HOME.count(".") + 1):
        name = ".".join(nemo_rl.HOME.split(".")[: i + 1])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    user = ModuleType("nemo_rl.algorithms.grpo")
    monkeypatch.setitem(sys.modules, user.__name__, user)

    class ClippedPGLossFn:
        def __init__(self, cfg, use_fused_linear_logprobs=False):
            vars(self).update(cfg)

        def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
            raise NotImplementedError

    home = sys.modules[nemo_rl.HOME]
    home.ClippedPGLossFn = user.ClippedPGLossFn = ClippedPGLossFn
    sys.modules["nemo_rl"].__version__ = "0.7.0+1a2b3c4"
    return SimpleNamespace(home=home, user=user, ClippedPGLossFn=ClippedPGLossFn)


def test_patching(batch, host):
    home, user, ClippedPGLossFn = host.home, host.user, host.ClippedPGLossFn
    nemo_rl.patch()
    nemo_rl.patch()  # once is enough
    assert home.ClippedPGLossFn is user.ClippedPGLossFn is not ClippedPGLossFn
    loss_fn = user.ClippedPGLossFn(OPTIONS)
    assert isinstance(loss_fn, ClippedPGLossFn)
    assert parameters(loss_fn.__call__) == parameters(ClippedPGLossFn.__call__)[1:]
    loss, _ = loss_fn(batch.logp, data_of(batch), SEQS, TOKS)
    o = SimpleNamespace(**OPTIONS)
    assert loss == nemo_rl.clipped_pg_loss(o, batch.logp, data_of(batch), SEQS, TOKS)[0]


def test_without_nemo_rl():
    with pytest.raises(
        ImportError, match=r"this needs NeMo-RL 0\.7 with nemo_rl\..*ClippedPGLossFn"
    ):
        nemo_rl.patch()


@pytest.mark.parametrize("found", ["0.6.0", "0.6.0+7ea279a", "0.5.0", "0.8.0", "0.10.0", None])
def test_another_release_is_refused(found, host):
    """0.6's loss has other options, and its importance weights in the KL term are constants."""
    sys.modules["nemo_rl"].__version__ = found
    name = "NeMo-RL of an unknown version" if found is None else f"NeMo-RL {re.escape(found)}"
    want = rf"this needs NeMo-RL >= 0\.7, < 0\.8; {name} is installed.*check out its tag v0\.7\.0"
    with pytest.raises(ImportError, match=want):
        nemo_rl.patch()
    assert host.home.ClippedPGLossFn is host.ClippedPGLossFn


@pytest.mark.parametrize("found", ["0.6.0+7ea279a", "0.7.1", None])
def test_a_checkout_with_the_entries_of_0_7(found, host):
    """The main branch calls itself 0.6.0 also after 0.7.0 was released from it."""
    sys.modules["nemo_rl"].__version__ = found
    host.home.ClippedPGLossConfig = SimpleNamespace(model_fields={"use_cispo": None})
    nemo_rl.patch()
    assert host.home.ClippedPGLossFn is not host.ClippedPGLossFn


@pytest.mark.parametrize("sample_mask", [WHOLE, PARTS], ids=["whole", "parts"])
@pytest.mark.parametrize("case", CASES)
def test_masks_of_fractions_weigh(case, sample_mask, batch):
    """Fractions of tokens, and of samples beside them."""
    options = OPTIONS | CASES[case]
    if case == "seq-mask-tis":  # which the first sequence passes by its weighed mean alone
        options |= corrected("seq-mask-tis", 1.0, 1.2)
    b, o = batch, SimpleNamespace(**options)
    b.weights = FRACTIONS.to(b.A.device)
    b.mask = b.weights != 0

    def ours(x, b):
        data = data_of(b, sample_mask)
        data["token_mask"] = torch.nn.functional.pad(batch.weights, (1, 0))
        return nemo_rl.clipped_pg_loss(o, x, data, SEQS, TOKS)

    agrees(ours, with_fractions(formula(o, sample_mask)), b)
