"""The adapter of xtuner (August 2026): its "vanilla" policy loss.

Set `GRPOLossConfig(policy_loss_cfg={"loss_type": "grpo_fast.integrations.xtuner.policy_loss", ...})`: xtuner
imports a loss type that has a dot in its name. The other entries of `policy_loss_cfg` are those of "vanilla".
"""

from typing import Any

from torch import Tensor

from grpo_fast.integrations.shared.call import SUM, LossCall
from grpo_fast.integrations.shared.options import Entry, entry, read_options

OPTIONS: dict[str, Entry] = {
    "epsilon_low": entry("cliprange_low"),
    "epsilon_high": entry("cliprange_high"),
    "dual_clip": entry("clip_ratio_c", missing=3.0),
}
_INF = float("inf")


def policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    loss_weights: Tensor,
    policy_loss_cfg: dict[str, Any],
) -> Tensor:
    """Compute xtuner's `pg_loss_fn`: the clipped objective with dual clip, a weighted sum of (1, T) tensors.

    Args:
        loss_weights: 0 where a token does not count, else its share of the global batch.
        policy_loss_cfg: `cliprange_low`, `cliprange_high`, `clip_ratio_c`, and the clamp of the log-ratio
            `log_prob_diff_min`, `log_prob_diff_max`: symmetric, from above alone (a minimum of -inf), or none
            (-inf and inf).

    Raises:
        ValueError: the clamp is another one, or an entry is missing.
    """
    for name in ("cliprange_low", "cliprange_high"):
        if name not in policy_loss_cfg:
            raise ValueError(f"policy_loss_cfg: {name!r} is missing, got {sorted(policy_loss_cfg)}")
    call = LossCall(
        preset="xtuner/vanilla",
        options=read_options(policy_loss_cfg, OPTIONS) | _clamp(policy_loss_cfg),
        names=OPTIONS,
        average=SUM,
        logps=log_prob,
        old_logps=old_log_prob.detach(),
        advantages=advantages,
        mask=loss_weights != 0,
        token_weights=loss_weights,
    )
    return call.out.loss


def _clamp(policy_loss_cfg: dict[str, Any]) -> dict[str, float | None]:
    """Translate the clamp of the log-ratio into options of `Objective`."""
    low = policy_loss_cfg.get("log_prob_diff_min", -20.0)
    high = policy_loss_cfg.get("log_prob_diff_max", 20.0)
    low, high = -_INF if low is None else low, _INF if high is None else high
    if low == -_INF and high == _INF:
        return {"log_ratio_clip": None}
    if low == -_INF and 0 < high < _INF:
        return {"log_ratio_clip": None, "log_ratio_max": high}
    if low == -high and 0 < high < _INF:
        return {"log_ratio_clip": high}
    raise ValueError(
        f"policy_loss_cfg: log_prob_diff_min={low}, log_prob_diff_max={high}: want -m and m, -inf and m, "
        "or -inf and inf, with m > 0"
    )
