"""Replacements of verl's policy losses: one table each of options, metrics and averages."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from grpo_fast.integrations.shared.call import (
    SUM,
    Average,
    LossCall,
    Metric,
    changed_fraction,
    clip_fraction,
    dropped_fraction,
    dual_fraction,
    nothing,
    sequence_average,
    token_average,
)
from grpo_fast.integrations.shared.options import Entry, entry, read, read_options
from grpo_fast.weights import geometric_mean

_CLIP: dict[str, Entry] = {
    "epsilon_low": entry("clip_ratio_low", "clip_ratio"),
    "epsilon_high": entry("clip_ratio_high", "clip_ratio"),
}

_DPPO = _CLIP | {"ratio_cap": entry("clip_ratio_c", missing=20.0)}

# The options of each preset, and where verl's actor configuration has them.
OPTIONS: dict[str, dict[str, Entry]] = {
    "vanilla": _CLIP | {"dual_clip": entry("clip_ratio_c", missing=3.0)},
    "gspo": _CLIP,
    "sapo": {"tau_pos": entry("tau_pos"), "tau_neg": entry("tau_neg")},
    "gpg": {},
    "cispo": _CLIP,
    "dro": {"quadratic_coef": entry("policy_loss.dro_beta", missing=None)},
    "geo_mean": _CLIP,
    "dppo_tv": _DPPO,
    "dppo_kl": _DPPO,
    "clip_cov": _CLIP,
    "kl_cov": {"beta": entry("policy_loss.ppo_kl_coef", none=1.0)},
}

# The options of `weights.clip_cov` and `weights.kl_cov`.
_CLIP_COV = {
    "fraction": entry("policy_loss.clip_cov_ratio", none=0.0002),
    "low": entry("policy_loss.clip_cov_lb", none=1.0),
    "high": entry("policy_loss.clip_cov_ub", none=5.0),
}

_KL_COV = {"fraction": entry("policy_loss.kl_cov_ratio", none=0.0002)}


def _kl(clamp: float = math.inf) -> dict[str, Metric]:
    """Return verl's metric E[old - new], with its own clamp of the log-ratio."""
    return {"actor/ppo_kl": lambda call: call.mean((-call.change).clamp(-clamp, clamp))}


def _clip(clipped: Metric, lower: Metric = nothing) -> dict[str, Metric]:
    """Return verl's two metrics of clipping."""
    return {"actor/pg_clipfrac": clipped, "actor/pg_clipfrac_lower": lower}


def _moved(call: LossCall) -> Tensor:
    """Return where the clamp of geo_mean changes a token's own log-ratio, or this is NaN."""
    return call.token.outside | call.change.isnan()


_DPPO_METRICS = _kl(20) | _clip(changed_fraction, lambda call: call.mean(call.token.capped))

METRICS: dict[str, dict[str, Metric]] = {
    "vanilla": _kl(20) | _clip(clip_fraction, dual_fraction),
    "gspo": _kl() | _clip(clip_fraction),
    "sapo": _kl(20) | _clip(nothing),
    "gpg": {},
    "cispo": _kl(20) | _clip(changed_fraction),
    "dro": _kl(),
    "geo_mean": _kl()
    | _clip(
        lambda call: call.mean(_moved(call) & (call.advantages > 0)),
        lambda call: call.mean(_moved(call) & (call.advantages < 0)),
    ),
    "dppo_tv": _DPPO_METRICS,
    "dppo_kl": _DPPO_METRICS,
    "clip_cov": _kl() | {"actor/pg_clipfrac": dropped_fraction},
    "kl_cov": {"actor/ppo_kl": lambda call: call.mean(call.change.abs())},
}


def average(loss_agg_mode: str, mask: Tensor, config: Any) -> Average:
    """Return the average of verl's `agg_loss`, with the global batch of the configuration.

    Raises:
        ValueError: the mode is unknown, or several ranks need a denominator that is missing.
    """
    info = read(config, "global_batch_info", {})
    dp_size = read(info, "dp_size", 1)

    def total(name: str) -> Any:
        found = read(info, name, None)
        if found is None and dp_size > 1:
            raise ValueError(
                f"{loss_agg_mode}: global_batch_info.{name} is needed with dp_size={dp_size}"
            )
        return found

    if loss_agg_mode == "token-mean":
        return token_average(total("batch_num_tokens"), dp_size)
    if loss_agg_mode == "token-sum":
        return SUM._replace(scale=dp_size)
    names = {
        "seq-mean-token-mean": "sequence_mean",
        "seq-mean-token-sum": "sequence_sum",
        "seq-mean-token-sum-norm": "sequence_sum",
    }
    if loss_agg_mode not in names:
        raise ValueError(
            f"loss_agg_mode={loss_agg_mode!r} is unknown; choose from token-mean, token-sum, "
            + ", ".join(names)
        )
    result = sequence_average(names[loss_agg_mode], mask, total("global_batch_size"), dp_size)
    if loss_agg_mode == "seq-mean-token-sum-norm":
        length = read(info, "loss_scale_factor", None)
        result = result._replace(scale=result.scale / (length or mask.shape[-1]))
    return result


def _dro(call: LossCall) -> LossCall:
    beta = call.options["quadratic_coef"]
    if beta is None or beta <= 0:
        raise ValueError(f"policy_loss.dro_beta: want a positive number, got {beta}")
    return call


def _geo_mean(call: LossCall) -> LossCall:
    weights = call.importance_weights
    if weights is not None:  # one weight per sequence: the geometric mean
        weights = geometric_mean(weights, mask=call.mask, eps=1e-10)
    return call.replace(importance_weights=weights)


def _clip_cov(call: LossCall) -> LossCall:
    return call.clip_cov(**read_options(call.config, _CLIP_COV))


def _kl_cov(call: LossCall) -> LossCall:
    # In verl the weights multiply the penalty as well.
    call = call.replace(importance_weights=None, token_weights=call.importance_weights)
    return call.kl_cov(**read_options(call.config, _KL_COV))


# What a loss needs besides its options.
_PREPARE: dict[str, Callable[[LossCall], LossCall]] = {
    "dro": _dro,
    "geo_mean": _geo_mean,
    "clip_cov": _clip_cov,
    "kl_cov": _kl_cov,
}

# Losses that ignore `loss_agg_mode`.
_AVERAGES: dict[str, Callable[[Tensor, Any], Average]] = {
    "sapo": lambda mask, config: average("seq-mean-token-mean", mask, config),
    "geo_mean": lambda mask, config: Average({}, None, 1.0),  # all sequences, also empty ones
}


def _policy_loss(mode: str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """Return a policy loss for verl: (loss, metrics as Python numbers) of (B, T) tensors."""

    def policy_loss(
        old_log_prob: Tensor | None,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if config is None:
            raise ValueError(f"{mode}: config: needed, verl's actor configuration")
        if old_log_prob is None and mode != "gpg":
            raise ValueError(f"{mode}: old_log_prob: needed")
        own = _AVERAGES.get(mode, lambda mask, config: average(loss_agg_mode, mask, config))
        call = LossCall(
            preset=f"verl/{mode}",
            options=read_options(config, OPTIONS[mode]),
            names=OPTIONS[mode],
            average=own(response_mask, config),
            logps=log_prob,
            old_logps=old_log_prob,
            advantages=advantages,
            mask=response_mask,
            importance_weights=rollout_is_weights,
            config=config,
        )
        if mode in _PREPARE:
            call = _PREPARE[mode](call)
        return call.out.loss, call.report(METRICS[mode])

    policy_loss.__name__ = policy_loss.__qualname__ = f"policy_loss_{mode}"
    return policy_loss


POLICY_LOSSES = {mode: _policy_loss(mode) for mode in OPTIONS}
