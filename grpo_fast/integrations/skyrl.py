"""The adapter of SkyRL (0.3.0, and main of August 2026): its policy losses.

Call `register()` in the entrypoint, before Ray starts, and set
`trainer.algorithm.policy_loss_type=grpo_fast/<name>` with a name from `POLICY_LOSSES`. The losses read
SkyRL's algorithm configuration and return the values of SkyRL's own losses. They are sums: SkyRL multiplies
the reduction into the advantages. Off-policy correction is SkyRL's own code.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_fast.integrations.shared.call import (
    SUM,
    LossCall,
    Metric,
    clip_fraction,
    dropped_fraction,
    nothing,
    outside,
)
from grpo_fast.integrations.shared.options import Entry, entry, read, read_options

CORRECTION = "skyrl.backends.skyrl_train.utils.off_policy_correction_utils"
_CORRECTIONS = {
    name: entry(f"off_policy_correction.{name}", missing=None)
    for name in (
        "tis_ratio_type",
        "sequence_mask_metric",
        "outlier_token_is_threshold_low",
        "outlier_token_is_threshold_high",
        "token_mask_is_threshold_low",
    )
}

_CLIP: dict[str, Entry] = {
    "epsilon_low": entry("eps_clip_low"),
    "epsilon_high": entry("eps_clip_high"),
}
# The options of `weights.clip_cov` and `weights.kl_cov`.
_CLIP_COV = {
    "fraction": entry("clip_cov.clip_ratio"),
    "low": entry("clip_cov.clip_cov_lb"),
    "high": entry("clip_cov.clip_cov_ub"),
}
_KL_COV = {"fraction": entry("kl_cov.kl_cov_frac")}

# The options of each loss's preset, and where SkyRL's algorithm configuration has them.
OPTIONS: dict[str, dict[str, Entry]] = {
    "regular": _CLIP,
    "dual_clip": _CLIP | {"dual_clip": entry("clip_ratio_c")},
    "gspo": _CLIP,
    "sapo": {"tau_pos": entry("sapo.tau_pos"), "tau_neg": entry("sapo.tau_neg")},
    "cispo": {
        "epsilon_low": entry("cispo.cispo_eps_clip_low"),
        "epsilon_high": entry("cispo.cispo_eps_clip_high"),
    },
    "rollout_is": _CLIP,
    "dppo": {"epsilon_low": entry("dppo.delta_low"), "epsilon_high": entry("dppo.delta_high")},
    "importance_sampling": {},
    "clip_cov": _CLIP,
    "kl_cov": {"beta": entry("kl_cov.ppo_kl_coef")},
}

_CLIPPED: dict[str, Metric] = {"clip_ratio": clip_fraction}
METRICS: dict[str, dict[str, Metric]] = {
    "regular": _CLIPPED,
    "dual_clip": _CLIPPED,
    "gspo": _CLIPPED,
    "sapo": {"clip_ratio": nothing},
    "cispo": {
        "clip_ratio": outside,
        "cispo/ratio_mean": lambda call: call.mean(call.token.ratio),
        "cispo/ratio_clamped_mean": lambda call: call.mean(call.token.bounded_ratio),
        "cispo/ratio_max": lambda call: call.extremes(call.token.ratio)[1],
        "cispo/ratio_min": lambda call: call.extremes(call.token.ratio)[0],
    },
    "rollout_is": {"clip_ratio": outside},
    "dppo": _CLIPPED,
    "importance_sampling": {
        "importance_ratio": lambda call: call.out.metrics["ratio_mean"],
    },
    "clip_cov": {"clip_ratio": dropped_fraction},
    "kl_cov": {"clip_ratio": nothing},
}


def _preset(name: str, config: Any) -> str:
    """Return the preset of a loss; DPPO has one for each divergence."""
    if name != "dppo":
        return f"skyrl/{name}"
    kind = read(config, "dppo.dppo_type")
    if kind not in ("binary_tv", "binary_kl"):
        raise ValueError(f"dppo_type={kind!r} is unknown; choose from binary_tv, binary_kl")
    return "skyrl/dppo_" + kind.removeprefix("binary_")


def _old(name: str, old: Tensor, rollout: Tensor | None, config: Any) -> Tensor:
    """Return the log-probs in the denominator of the ratio: of the old policy, or of the sampler."""
    anchored = name == "cispo" and read(config, "cispo.cispo_anchor", "old") == "rollout"
    if (anchored or name == "rollout_is") and rollout is None:
        raise ValueError(f"{name}: rollout_logprobs: needed, the ratio is to the sampler")
    if anchored and read(config, "off_policy_correction.tis_ratio_type", None) is not None:
        raise ValueError(
            "cispo_anchor='rollout' is a ratio to the sampler already: with "
            "off_policy_correction.tis_ratio_type it would count twice"
        )
    if name == "rollout_is":
        assert rollout is not None
        # In SkyRL a missing log-prob is outside every range, and the token has no loss.
        return rollout.where(~rollout.isnan(), -torch.inf)
    to_sampler = anchored or name == "dppo"
    return rollout if to_sampler and rollout is not None else old


def _corrected(
    name: str, old: Tensor, rollout: Tensor | None, mask: Tensor, config: Any
) -> tuple[Tensor | None, dict[str, float]]:
    """Return (importance weights, metrics) of SkyRL's off-policy correction, if it is configured.

    A token that the correction masks has the weight 0. Means over sequences, and those of metrics, are over
    the mask before the correction.
    """
    chosen = read_options(config, _CORRECTIONS)
    given = {name: value for name, value in chosen.items() if value is not None}
    if (
        not given or rollout is None or name == "importance_sampling"
    ):  # that loss is a correction itself
        return None, {}
    if name in ("clip_cov", "kl_cov"):  # SkyRL refuses these by name, and our names are others
        raise ValueError(f"{name}: off_policy_correction is not supported with it, got {given}")
    compute = importlib.import_module(CORRECTION).compute_off_policy_correction
    # SkyRL multiplies by the mask: NaN in the padding would reach its means and reject sequences.
    old, rollout = old.where(mask != 0, 0), rollout.where(mask != 0, 0)
    weights, metrics, kept = compute(old, rollout, mask, read(config, "off_policy_correction"))
    kept = kept != 0
    return kept.float() if weights is None else weights.where(kept, 0), metrics


def _policy_loss(name: str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """Return a policy loss for SkyRL: (loss, metrics as Python numbers) of (B, T) tensors."""

    def policy_loss(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
        weights, corrected = _corrected(name, old_log_probs, rollout_logprobs, mask, config)
        call = LossCall(
            preset=_preset(name, config),
            options=read_options(config, OPTIONS[name]),
            names=OPTIONS[name],
            average=SUM,
            logps=log_probs,
            old_logps=_old(name, old_log_probs, rollout_logprobs, config),
            advantages=advantages,
            mask=mask,
            importance_weights=weights,
        )
        if name == "clip_cov":
            call = call.clip_cov(**read_options(config, _CLIP_COV))
        if name == "kl_cov":
            call = call.kl_cov(**read_options(config, _KL_COV))
        return call.out.loss, call.report(METRICS[name]) | corrected

    policy_loss.__name__ = policy_loss.__qualname__ = f"policy_loss_{name}"
    return policy_loss


POLICY_LOSSES = {name: _policy_loss(name) for name in OPTIONS}


def register() -> None:
    """Add `POLICY_LOSSES` to SkyRL's registry as "grpo_fast/<name>".

    Raises:
        ImportError: SkyRL is not installed, or has no registry of policy losses.
    """
    try:
        utils = importlib.import_module("skyrl.backends.skyrl_train.utils.ppo_utils")
        registry = utils.PolicyLossRegistry
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "this needs SkyRL with skyrl.backends.skyrl_train.utils.ppo_utils.PolicyLossRegistry "
            "(skyrl >= 0.3)"
        ) from error
    for name, loss in POLICY_LOSSES.items():
        registry.register(f"grpo_fast/{name}", loss)
