"""Which tokens `grpo_fast.weights` selects: formulas written here, TRL's method, verl's functions."""

from types import SimpleNamespace

import pytest
import torch

from grpo_fast import Objective, weights
from grpo_fast.loss import policy_loss
from grpo_fast.ops.top_entropy import order_statistics
from grpo_fast.testing import assert_as_accurate
from tests.support.cases import loss_and_grad, packed, tokens
from tests.support.oracles import verl_core_algos
from tests.support.ranks import needs_gloo, run


def m2po_by_elimination(gap, threshold):
    """Drop the largest square until the mean of the others is below the threshold; keep one."""
    kept = list(range(len(gap)))
    while len(kept) > 1 and sum(gap[i] ** 2 for i in kept) / len(kept) >= threshold:
        kept.remove(max(kept, key=lambda i: gap[i] ** 2))
    return kept


@pytest.mark.parametrize("threshold", [1e-9, 0.01, 0.05, 0.1, 10.0])
def test_m2po(threshold, device):
    old, sampling, mask = tokens(device)
    ours = weights.m2po(old, sampling, threshold, mask=mask)
    gap = (old - sampling)[mask].double().tolist()
    want = torch.zeros(len(gap), device=device)
    want[m2po_by_elimination(gap, threshold)] = 1
    torch.testing.assert_close(ours[mask], want, rtol=0, atol=0)
    assert ours[~mask].eq(0).all()
    _, live, o, s = packed(mask, old, sampling)
    torch.testing.assert_close(weights.m2po(o, s, threshold, mask=live)[live], want)


def test_m2po_keeps_one_token_however_far_it_is(device):
    old, sampling = torch.zeros(4, device=device), torch.full((4,), -torch.inf, device=device)
    mask = torch.tensor([False, True, True, False], device=device)
    assert weights.m2po(old, sampling, 0.1, mask=mask).sum() == 1


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 1 / 3, 1.0])
@pytest.mark.parametrize("n", [1, 2, 11, 300])
def test_top_entropy(n, fraction, device):
    entropy = torch.rand(n, device=device)
    if n > 2:
        entropy[n // 2 :] = entropy[: n - n // 2].clone()  # ties
    threshold = torch.quantile(entropy.double(), 1 - fraction)
    ours = weights.top_entropy(entropy, fraction)
    clear = (entropy - threshold).abs() > 1e-6
    torch.testing.assert_close(ours[clear], (entropy >= threshold).float()[clear])
    torch.testing.assert_close(ours, (entropy >= torch.quantile(entropy, 1 - fraction)).float())


@pytest.mark.filterwarnings("ignore")  # of TRL's imports
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2, 0.25, 1.0])
def test_top_entropy_is_trl_s(fraction, device):
    pytest.importorskip("trl", "1.15", reason="the oracle is TRL's own method")
    from trl.trainer.grpo_trainer import GRPOTrainer

    accelerator = SimpleNamespace(pad_across_processes=lambda x, **_: x, gather=lambda x: x)
    for seed in range(20):
        torch.manual_seed(seed)
        *_, mask = tokens(device)
        entropy = torch.rand(6, 9, device=device)
        theirs = GRPOTrainer.get_high_entropy_mask(
            SimpleNamespace(accelerator=accelerator), entropy, mask, 1 - fraction
        )
        garbage = torch.where(mask, entropy, torch.nan)
        ours = weights.top_entropy(garbage, fraction, mask=mask)
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=0)


def test_top_entropy_beyond_what_torch_quantile_takes(device):
    entropy = torch.arange(2**24 + 3, device=device).float().flip(0)
    assert weights.top_entropy(entropy, 0.25).sum().item() == 2**22 + 1


def quantile_of_ranks():
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    entropy = torch.randn(31)  # of either sign: the order of floats as integers differs
    entropy[:4] = torch.tensor([0.0, -0.0, 1.0, 1.0])
    mask = torch.rand(31) < 0.8
    mine = slice(0, 9) if rank == 0 else slice(9, 31)
    group = torch.distributed.group.WORLD
    for fraction in (0.0, 0.1, 0.2, 0.5, 0.77, 1.0):
        ours = weights.top_entropy(entropy[mine], fraction, mask=mask[mine], group=group)
        alone = weights.top_entropy(entropy, fraction, mask=mask)[mine]
        torch.testing.assert_close(ours, alone, rtol=0, atol=0)
        nobody = weights.top_entropy(
            entropy[:rank], fraction, mask=mask[:rank] & False, group=group
        )
        assert nobody.sum() == 0


def test_values_are_found_by_their_bits(device, monkeypatch):
    """The search over processes, with one process: neighbours in float32, both signs, zeros, infinities."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, group: x)
    x = torch.tensor([0.0, 1.0, 1e-38, 3.0e38, 255.0, 2.0**-24], device=device)
    near = [x, torch.nextafter(x, x + 1), torch.nextafter(x, -x - 1), x]
    edges = torch.tensor([-torch.inf, torch.inf, 1.4e-45], device=device)
    values = torch.cat([*near, *(-y for y in near), edges]).sort().values
    ranks = torch.arange(len(values), device=device)
    for some in (ranks, ranks[::7].flip(0), ranks[:1]):
        found = order_statistics(values, some, group=object())
        torch.testing.assert_close(found, values[some], rtol=0, atol=0)


@needs_gloo
def test_top_entropy_over_processes():
    run("tests.weights.test_selection:quantile_of_ranks", 2)


def covariances(advantages, logps, mask):
    A, logp = advantages.double(), logps.double()
    return (A - A[mask].mean()) * (logp - logp[mask].mean())


def policy(device):
    """(logps, old_logps, advantages (B,), mask) whose covariances spread around 1."""
    logps, old, mask = tokens(device)
    advantages = 3 * torch.randn(6).to(device)
    return 3 * logps, 3 * logps + (old - logps) / 3, advantages, mask


@pytest.mark.parametrize("fraction", [1e-6, 0.1, 1.0])
def test_clip_cov(fraction, device):
    logps, old, advantages, mask = policy(device)
    A = advantages[:, None].expand_as(logps)
    r = (logps - old).exp()
    bound = -A * r.clamp(0.8, 1.2) > -A * r
    covariance = covariances(A, logps, mask)
    candidates = mask & ~bound & (covariance > 1.0) & (covariance < 5.0)
    number = min(max(int(fraction * mask.sum().item()), 1), int(candidates.sum()))
    assert number > 0
    generator = torch.Generator(device).manual_seed(1)
    ours = weights.clip_cov(
        logps, old, advantages, mask=mask, fraction=fraction, generator=generator
    )
    dropped = mask & (ours == 0)
    assert dropped.sum() == number
    assert not (dropped & ~candidates).any()
    assert ours[~mask].eq(0).all()
    again = weights.clip_cov(logps, old, A, mask=mask, fraction=fraction, generator=generator)
    generator.manual_seed(1)
    boundaries, live, x, o = packed(mask, logps, old)
    flat = weights.clip_cov(
        x, o, advantages, mask=live, cu_seqlens=boundaries, fraction=fraction, generator=generator
    )
    assert (mask & (again == 0)).sum() == (live & (flat == 0)).sum() == number


def test_clip_cov_draws_every_candidate_alike(device):
    logps = torch.tensor([-1.0, -1.0, -1.0, -3.0, -3.0, -3.0], device=device)
    A = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0], device=device)  # covariances 2
    dropped = sum(1 - weights.clip_cov(logps, logps, A, fraction=0.34) for _ in range(300))
    assert dropped.sum() == 600  # two of six each time
    assert dropped.min() > 60
    assert dropped.max() < 140


def test_kl_cov(device):
    logps, _, advantages, mask = policy(device)
    covariance = covariances(advantages[:, None].expand_as(logps), logps, mask)
    for fraction in (1e-6, 0.1, 0.37, 1.0):
        selected = weights.kl_cov(logps, advantages, mask=mask, fraction=fraction)
        number = max(int(fraction * mask.sum().item()), 1)
        largest = covariance[mask].sort(descending=True)[0][number - 1]
        torch.testing.assert_close(selected, mask & (covariance >= largest), rtol=0, atol=0)
    boundaries, live, x = packed(mask, logps)
    flat = weights.kl_cov(x, advantages, mask=live, cu_seqlens=boundaries, fraction=0.37)
    selected = weights.kl_cov(logps, advantages, mask=mask, fraction=0.37)
    torch.testing.assert_close(flat[live], selected[mask], rtol=0, atol=0)


# -A r without a clip: the ratio is never below 0, nor above this.
UNCLIPPED = {"epsilon_low": 1.0, "epsilon_high": 1e9, "reduction": "token_mean"}


def kl_cov_loss(logps, old, advantages, mask, k, fraction):
    """Compute the loss as the docs say."""
    selected = weights.kl_cov(logps, advantages, mask=mask, fraction=fraction)
    return policy_loss(
        logps,
        advantages=advantages,
        mask=mask,
        old_logps=old,
        ref_logps=torch.where(selected, old, logps.detach()),
        objective=Objective(kl="abs", beta=k, **UNCLIPPED),
    )


@pytest.mark.parametrize("fraction", [1e-6, 0.25])
def test_the_loss_of_kl_cov(fraction, backend, device):
    logps, old, advantages, mask = policy(device)
    k = 0.7
    ours = loss_and_grad(kl_cov_loss, logps, old, advantages, mask, k, fraction, upstream=3.0)
    selected = weights.kl_cov(logps, advantages, mask=mask, fraction=fraction)

    def formula(x):
        d = x[mask] - old[mask].to(x)
        A = advantages[:, None].expand_as(logps)[mask].to(x)
        penalty = torch.where(selected[mask], k * d.abs(), 0)
        return (-A * d.exp() + penalty).mean()

    baseline = loss_and_grad(formula, logps, upstream=3.0)
    truth = loss_and_grad(formula, logps.double(), upstream=3.0)
    for a, b, t in zip(ours, baseline, truth, strict=True):
        assert_as_accurate(a, b, t)


def verl_config(**options):
    return SimpleNamespace(
        policy_loss=SimpleNamespace(**options),
        global_batch_info={},
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=0.2,
    )


def verl_arguments(old, advantages, mask):
    """Return verl's arguments: finite numbers in the padding, and advantages per token."""
    dense = torch.where(mask, old, 0).double()
    return dense, advantages[:, None].expand_as(old).double().contiguous(), mask.double()


@pytest.mark.parametrize("fraction", [1e-6, 0.25])
def test_verl_kl_cov(fraction, backend, device):
    algorithm = verl_core_algos().compute_policy_loss_kl_cov
    logps, old, advantages, mask = policy(device)
    config = verl_config(kl_cov_ratio=fraction, ppo_kl_coef=0.7)
    dense, A, live = verl_arguments(old, advantages, mask)

    def theirs(x):
        return algorithm(dense, x, A, live, "token-mean", config)[0]

    truth = loss_and_grad(theirs, torch.where(mask, logps, 0).double())
    ours = loss_and_grad(kl_cov_loss, logps, old, advantages, mask, 0.7, fraction)
    for a, t in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=1e-5, atol=1e-7)


def test_verl_clip_cov(backend, device):
    """With a share of 1 verl drops every candidate, so the draw does not matter."""
    algorithm = verl_core_algos().compute_policy_loss_clip_cov
    logps, old, advantages, mask = policy(device)
    config = verl_config(clip_cov_ratio=1.0, clip_cov_lb=0.5, clip_cov_ub=4.0)
    dense, A, live = verl_arguments(old, advantages, mask)

    def theirs(x):
        return algorithm(dense, x, A, live, "token-mean", config)[0]

    def ours(x):
        kept = weights.clip_cov(x, old, advantages, mask=mask, fraction=1.0, low=0.5, high=4.0)
        assert 0 < kept.sum() < mask.sum()
        return policy_loss(
            x,
            advantages=advantages,
            mask=mask,
            old_logps=old,
            importance_weights=kept,
            objective=Objective(reduction="token_mean"),
        )

    truth = loss_and_grad(theirs, torch.where(mask, logps, 0).double())
    for a, t in zip(loss_and_grad(ours, logps), truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=1e-5, atol=1e-7)


def test_varied_groups(device):
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5, 0.5, 2.0, 2.5], device=device)
    want = torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1], device=device)
    torch.testing.assert_close(weights.varied_groups(rewards, group_size=2), want)
    labels = torch.tensor([9, 9, -4, -4, 7, 7, 0, 0], device=device)
    shuffled = torch.randperm(8, device=device)
    ours = weights.varied_groups(rewards[shuffled], group_ids=labels[shuffled])
    torch.testing.assert_close(ours, want[shuffled])
    rewards[3], rewards[4:6] = torch.nan, torch.nan
    want[2:4] = 0
    for groups in ({"group_size": 2}, {"group_ids": labels}):
        torch.testing.assert_close(weights.varied_groups(rewards, **groups, nan="skip"), want)
    empty = torch.zeros(0, device=device)
    assert weights.varied_groups(empty, group_size=2).shape == (0,)
    assert weights.varied_groups(empty, group_ids=empty.long()).shape == (0,)
