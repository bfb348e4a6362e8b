"""xtuner's adapter: its calling convention, and its formula in float64, from its sources."""

import pytest
import torch

from grpo_fast.integrations import xtuner
from tests.support.hosts import agrees, clipped, parameters

XTUNER = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.28}


@pytest.mark.parametrize(
    "changes", [{}, {"clip_ratio_c": 1.5}, {"log_prob_diff_min": -1.0, "log_prob_diff_max": 1.0}]
)
def test_xtuner(changes, batch, backend):
    config = XTUNER | changes
    share = torch.where(batch.mask, torch.rand_like(batch.A), 0)
    high = config.get("log_prob_diff_max", 20.0)

    def flat(x):
        return x.reshape(1, -1)

    def formula(x, b):
        d = (x - b.old).clamp(-high, high)
        loss = clipped(d, b.A, 0.2, 0.28, config.get("clip_ratio_c", 3.0))
        return (loss * share.to(x.dtype)).sum()

    def ours(x, b):
        return xtuner.policy_loss(*map(flat, (x, b.old, b.A, share)), config)

    agrees(ours, formula, batch)
    assert xtuner.policy_loss(*map(flat, (batch.logp, batch.old, batch.A, share)), config).ndim == 0


def test_xtuner_conventions(batch):
    assert parameters(xtuner.policy_loss) == [
        "log_prob",
        "old_log_prob",
        "advantages",
        "loss_weights",
        "policy_loss_cfg",
    ]
    tensors = (batch.logp, batch.old, batch.A, batch.mask.float())
    with pytest.raises(ValueError, match="'cliprange_high' is missing"):
        xtuner.policy_loss(*tensors, {"cliprange_low": 0.2})
    inf = torch.inf
    for low, high in (
        (-3.0, 20.0),
        (-20.0, inf),
        (inf, inf),
        (-inf, -inf),
        (-inf, -1.0),
        (0.0, 0.0),
    ):
        clamp = {"log_prob_diff_min": low, "log_prob_diff_max": high}
        with pytest.raises(
            ValueError, match=f"log_prob_diff_min={low}, log_prob_diff_max={high}: want"
        ):
            xtuner.policy_loss(*tensors, XTUNER | clamp)
    above = XTUNER | {"log_prob_diff_min": -inf}
    torch.testing.assert_close(
        xtuner.policy_loss(*tensors, above), xtuner.policy_loss(*tensors, XTUNER)
    )
    with pytest.raises(
        ValueError, match=r"dual_clip: .*0\.5 \(xtuner/vanilla: dual_clip is clip_ratio_c"
    ):
        xtuner.policy_loss(*tensors, XTUNER | {"clip_ratio_c": 0.5})


@pytest.mark.parametrize("bounds", [(-torch.inf, torch.inf), (None, torch.inf), (-torch.inf, 25.0)])
def test_an_xtuner_clamp_without_a_bound(bounds, batch):
    """No clamp at all, or one from above: ratios far below e^-20 and above e^20 are what they are."""
    low, high = bounds
    config = XTUNER | {"log_prob_diff_min": low, "log_prob_diff_max": high, "clip_ratio_c": 1e12}
    batch.old[0, 0], batch.old[3, 0] = batch.logp[0, 0] - 23, batch.logp[3, 0] + 23
    batch.A[0, 0], batch.A[3, 0] = -0.5, 1.0
    weights = batch.mask.float()

    def formula(x, b):
        d = (x - b.old).clamp(-torch.inf, torch.inf if high is None else high)
        return (clipped(d, b.A, 0.2, 0.28, 1e12) * b.mask).sum()

    agrees(lambda x, b: xtuner.policy_loss(x, b.old, b.A, weights, config), formula, batch)
