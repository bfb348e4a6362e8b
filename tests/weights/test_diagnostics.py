"""Per-token diagnostics: by hand, and against the metrics and the loss of the same objective."""

import math
import re
from pathlib import Path

import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.diagnostics import kl_estimate, token_diagnostics
from grpo_fast.loss import policy_loss
from tests.support.hosts import clipped, host_batch
from tests.support.objectives import OBJECTIVES


def logs(*x):
    return torch.tensor(x).log()


def close(a, *wanted):
    torch.testing.assert_close(a, torch.tensor(wanted))


def test_clip_by_hand():
    """Ratios 1/2, 2, 1/2, 2, 1 with both signs of the advantage, and one masked token that holds NaN."""
    A = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, torch.nan])
    logps = logs(0.2, 0.8, 0.2, 0.8, 0.4, math.nan)
    found = token_diagnostics(
        logps,
        torch.full((6,), 0.4).log(),
        A,
        mask=torch.tensor([1, 1, 1, 1, 1, 0]),
        objective=Objective(epsilon_low=0.2, epsilon_high=0.3, dual_clip=1.5),
    )
    close(found.ratio, 0.5, 2.0, 0.5, 2.0, 1.0, 1.0)
    close(found.bounded_ratio, 0.8, 1.3, 0.8, 1.3, 1.0, 1.0)
    close(found.log_ratio, -math.log(2), math.log(2), -math.log(2), math.log(2), 0.0, 0.0)
    close(found.loss, -0.5, -1.3, 0.8, 1.5, -1.0, 0.0)
    for x, *wanted in (
        (found.outside, True, True, True, True, False, False),
        (found.clipped_low, False, False, True, False, False, False),
        (found.clipped_high, False, True, False, False, False, False),
        (found.clipped_dual, False, False, False, True, False, False),
        (found.clipped, False, True, True, False, False, False),
        (found.capped, *[False] * 6),
        (found.dropped, *[False] * 6),
    ):
        close(x, *wanted)
    assert (found.kl == 0).all()


def test_ratios_of_sequences_by_hand():
    """Padded and packed: the mean of the live tokens' log-ratios, also where its clamp holds."""
    d = torch.tensor([[0.5, 1.5, 9.0], [-3.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    objective = Objective(ratio="sequence", log_ratio_clip=2.0, off_policy_threshold=2.5)
    A = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]])
    found = token_diagnostics(d, torch.zeros(2, 3), A, mask=mask, objective=objective)
    close(found.log_ratio, [1.0, 1.0, 0.0], [-3.0, 0.0, 0.0])
    close(found.ratio, [math.e, math.e, 1.0], [math.exp(-2), 1.0, 1.0])
    close(found.clipped_high, [True, False, False], [False, False, False])
    close(found.clipped_low, [False, False, False], [True, False, False])
    close(found.dropped, [False, False, False], [True, False, False])
    live = mask.bool()
    packed = token_diagnostics(
        d[live],
        torch.zeros(3),
        A[live],
        cu_seqlens=torch.tensor([0, 2, 3]),
        objective=objective,
    )
    for ours, theirs in zip(packed, found, strict=True):
        torch.testing.assert_close(ours, theirs[live])


def test_other_bounds_by_hand():
    new, old = torch.tensor([0.5, 0.9, 0.1, 0.1]), torch.tensor([0.3, 0.8, 0.4, 0.001])
    A = torch.tensor([1.0, -1.0, -1.0, 0.0])
    bounds = {"epsilon_low": 0.2, "epsilon_high": 0.15}

    def find(**options):
        return token_diagnostics(
            new.log(), old.log(), A, objective=Objective(**{**bounds, **options})
        )

    close(find(surrogate="ipo").outside, True, False, True, False)
    tv = find(surrogate="dppo_tv", ratio_cap=1.1)
    close(tv.outside, True, False, True, False)
    close(tv.clipped_low, False, False, True, False)
    close(tv.clipped_high, True, False, False, False)
    close(tv.capped, False, True, False, True)
    close(find(surrogate="gmpo").outside, True, False, True, True)
    cispo = find(surrogate="cispo")
    close(cispo.outside, True, False, True, True)
    close(cispo.bounded_ratio, 1.15, 1.125, 0.8, 1.15)
    for surrogate in ("sapo", "reinforce", "dro"):
        free = token_diagnostics(new.log(), old.log(), A, objective=Objective(surrogate=surrogate))
        assert not free.outside.any()
    # The gate of SAPO is the loss of a unit advantage: 4 / tau * sigmoid(tau * (r - 1)).
    ones = torch.ones(1)
    sapo = Objective(surrogate="sapo", tau_pos=2.0)
    close(token_diagnostics(ones.log(), ones.log(), ones, objective=sapo).loss, -1.0)


WITHOUT_ENTROPY = [name for name, objective in OBJECTIVES.items() if not objective.needs_entropy]


@pytest.mark.parametrize("name", WITHOUT_ENTROPY)
def test_agrees_with_the_loss_and_its_metrics(name, backend, device):
    """The mean of each quantity is the metric of that name; the weighted sum of the losses is the loss."""
    objective = OBJECTIVES[name]
    b = host_batch(device)
    b.old = b.logp + (b.old - b.logp).clamp(-3, 3)
    ref = b.rollout if objective.beta else None
    out = policy_loss(
        torch.where(b.mask, b.logp, torch.nan),
        advantages=b.A,
        mask=b.mask,
        old_logps=b.old,
        ref_logps=ref,
        objective=objective,
    )
    found = token_diagnostics(
        torch.where(b.mask, b.logp, torch.nan),
        b.old,
        b.A,
        mask=b.mask,
        ref_logps=ref,
        objective=objective,
    )
    weights = reference.reduction_weights(b.mask, objective, None)
    torch.testing.assert_close((weights * found.loss).sum(), out.loss, rtol=1e-5, atol=1e-6)
    for metric, x in {
        "clip_fraction_low": found.clipped_low,
        "clip_fraction_high": found.clipped_high,
        "clip_fraction_dual": found.clipped_dual,
        "kl": found.kl,
    }.items():
        if metric in out.metrics:
            mean = x.sum() / b.mask.sum()
            torch.testing.assert_close(out.metrics[metric], mean, rtol=1e-5, atol=1e-6, msg=metric)
    assert not any(x.requires_grad for x in found)
    assert all((x[~b.mask] == 0).all() for x in found if x.dtype == torch.bool)


def test_kl_estimates():
    """k1, k2, k3, and the clamps of k3 that objectives have, by hand."""
    p, q = logs(0.5, 0.1), logs(0.25, 0.8)
    gap = torch.tensor([math.log(0.5), math.log(8)])
    for kind, wanted in (("k1", -gap), ("k2", gap**2 / 2), ("k3", gap.exp() - gap - 1)):
        torch.testing.assert_close(kl_estimate(p, q, Objective(kl=kind)), wanted)
    most = kl_estimate(p, q, Objective(kl="k3", kl_gap_clip=1.0, kl_value_clip=0.5))
    torch.testing.assert_close(most[1], torch.tensor(0.5))
    with pytest.raises(ValueError, match="k3_unbiased"):
        kl_estimate(p, q, Objective(kl="k3_unbiased"))


def test_the_example_of_an_adapter_runs():
    text = (Path(__file__).resolve().parents[2] / "docs" / "integrations.md").read_text()
    scope = {}
    exec(re.search(r"```python\n(.*?def their_loss.*?)```", text, re.DOTALL)[1], scope)
    b = host_batch("cpu")
    config = {"clip_low": 0.2, "clip_high": 0.28, "clip_c": 3.0}
    loss, metrics = scope["their_loss"](b.logp, b.old, b.A, b.mask, config)
    want = clipped(b.logp - b.old, b.A, 0.2, 0.28, 3.0)[b.mask].mean()
    torch.testing.assert_close(loss, want)
    assert 0 < metrics["clipped"] < 1


def test_errors():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"advantages: want .*\(2, 3\), got \(3,\)"):
        token_diagnostics(x, x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"ref_logps: needed, since objective\.beta=0\.5"):
        token_diagnostics(x, x, x, objective=Objective(beta=0.5))
    for wrong in (None, "grpo", {"beta": 0.5}):
        with pytest.raises(TypeError, match="token_diagnostics: objective: want an Objective"):
            token_diagnostics(x, x, x, objective=wrong)
        with pytest.raises(TypeError, match="kl_estimate: objective: want an Objective"):
            kl_estimate(x, x, wrong)
    imaginary = x.to(torch.complex64)
    with pytest.raises(TypeError, match="old_logps: want real numbers"):
        token_diagnostics(x, imaginary, x)
    with pytest.raises(ValueError, match="old_logps is on meta"):
        token_diagnostics(x, x.to("meta"), x)
    with pytest.raises(TypeError, match="token_diagnostics: ref_logps: want real numbers"):
        token_diagnostics(x, x, x, ref_logps=imaginary, objective=Objective(beta=0.5))
    for name, given in (("logps", (imaginary, x)), ("ref_logps", (x, imaginary))):
        with pytest.raises(TypeError, match=f"kl_estimate: {name}: want real numbers"):
            kl_estimate(*given)
    for other in (torch.zeros(3), torch.zeros(1, 2, 3), torch.zeros(3, 3)):  # some would broadcast
        with pytest.raises(ValueError, match=r"kl_estimate: ref_logps: want \(2, 3\), got"):
            kl_estimate(x, other)
