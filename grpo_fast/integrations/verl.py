"""verl 0.9.1: its policy losses and log-probs, by this library.

`VERL_USE_EXTERNAL_MODULES=grpo_fast.integrations.verl` makes every verl process import this module, which
replaces verl's policy losses of the same `actor.policy_loss.loss_mode` by those of `POLICY_LOSSES`: the same
signature, configuration, losses, gradients and metrics. "bypass_mode", which calls verl's own functions by
name, stays verl's. `patch_logprobs()` replaces verl's log-prob functions.
"""

import dataclasses
import functools
import importlib
import importlib.util
import logging
import math
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from grpo_fast.integrations._host import (
    SUM,
    Average,
    Call,
    as_floats,
    bounds,
    clip_fraction,
    read,
    replace,
    require,
    sequence_average,
)
from grpo_fast.integrations._verl_logprobs import linear_cross_entropy, logprobs_from_logits
from grpo_fast.loss import LossOutput
from grpo_fast.weights import geometric_mean

SUPPORTED = ("0.9.1", "0.10")  # from, and below
Metrics = dict[str, Tensor | float]
Result = tuple[Tensor, Metrics]


def average(loss_agg_mode: str, mask: Tensor, config: Any) -> Average:
    """verl's `agg_loss` with the configuration's global batch.

    Raises:
        ValueError: an unknown mode, or a denominator that several ranks need and that is missing.
    """
    info = read(config, "global_batch_info", {})
    dp_size = read(info, "dp_size", 1)

    def total(name: str) -> Any:
        given = read(info, name, None)
        if given is None and dp_size > 1:
            raise ValueError(
                f"{loss_agg_mode}: global_batch_info.{name} is needed with dp_size={dp_size}"
            )
        return given

    if loss_agg_mode == "token-mean":
        return Average({"reduction": "token_mean"}, total("batch_num_tokens"), dp_size)
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


def _clip_range(config: Any) -> dict[str, Any]:
    return bounds(config, "clip_ratio_low", "clip_ratio_high", "clip_ratio")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call(Call):
    host = "verl"
    mode: str

    def loss(self, preset: str, **options: Any) -> LossOutput:
        """The loss of a preset, averaged as `mode` says."""
        return self.averaged(average(self.mode, self.mask, self.config), preset, options)

    def kl(self, clamp: float = math.inf) -> Metrics:
        """verl's metric of E[old - new]: of log-ratios within the clamp, unlike that of the losses here."""
        d = (self.old - self.logp).clamp(-clamp, clamp)
        return {"actor/ppo_kl": self.mean(d)}


def _clip_metrics(clipped: Tensor | float, lower: Tensor | float) -> Metrics:
    return {"actor/pg_clipfrac": clipped, "actor/pg_clipfrac_lower": lower}


def _vanilla(call: _Call) -> Result:
    dual = read(call.config, "clip_ratio_c", 3.0)
    out = call.loss("vanilla", dual_clip=dual, **_clip_range(call.config))
    metrics = _clip_metrics(clip_fraction(out), out.metrics["clip_fraction_dual"])
    return out.loss, call.kl(20) | metrics


def _gspo(call: _Call) -> Result:
    out = call.loss("gspo", **_clip_range(call.config))
    return out.loss, call.kl() | _clip_metrics(clip_fraction(out), 0.0)


def _sapo(call: _Call) -> Result:
    taus = {name: read(call.config, name) for name in ("tau_pos", "tau_neg")}
    out = dataclasses.replace(call, mode="seq-mean-token-mean").loss("sapo", **taus)
    return out.loss, call.kl(20) | _clip_metrics(0.0, 0.0)


def _gpg(call: _Call) -> Result:
    # No ratio: the old log-probs may be anything.
    return dataclasses.replace(call, old=call.logp.detach()).loss("gpg").loss, {}


def _cispo(call: _Call) -> Result:
    clip = _clip_range(call.config)
    outside = call.diagnose("cispo", clip).outside
    metrics = _clip_metrics(call.mean(outside), 0.0)
    return call.loss("cispo", **clip).loss, call.kl(20) | metrics


def _dro(call: _Call) -> Result:
    beta = read(call.config, "policy_loss.dro_beta", None)
    if beta is None or beta <= 0:
        raise ValueError(f"policy_loss.dro_beta: want a positive number, got {beta}")
    return call.loss("dro", quadratic_coef=beta).loss, call.kl()


def _dppo(call: _Call, kind: str) -> Result:
    options = {"ratio_cap": read(call.config, "clip_ratio_c", 20.0), **_clip_range(call.config)}
    token = call.diagnose(kind, options)
    metrics = _clip_metrics(call.mean(token.outside), call.mean(token.capped))
    return call.loss(kind, **options).loss, call.kl(20) | metrics


def _geo_mean(call: _Call) -> Result:
    clip, weights = _clip_range(call.config), call.weights
    if weights is not None:  # one per sequence: their geometric mean
        weights = geometric_mean(weights, mask=call.mask, eps=1e-10)
    how = Average({}, None, 1.0)  # all sequences at hand, empty ones too
    out = call.averaged(how, "geo_mean", clip, importance_weights=weights)
    outside, A = call.diagnose("geo_mean", clip).outside, call.advantages
    metrics = _clip_metrics(call.mean(outside & (A > 0)), call.mean(outside & (A < 0)))
    return out.loss, call.kl() | metrics


def _clip_cov(call: _Call) -> Result:
    clip = _clip_range(call.config)
    kept = call.clip_cov(
        fraction=_given(call.config, "clip_cov_ratio", 0.0002),
        low=_given(call.config, "clip_cov_lb", 1.0),
        high=_given(call.config, "clip_cov_ub", 5.0),
        **clip,
    )
    weights = kept if call.weights is None else kept * call.weights
    out = dataclasses.replace(call, weights=weights).loss("clip_cov", **clip)
    return out.loss, {"actor/pg_clipfrac": call.mean(kept == 0)} | call.kl()


def _kl_cov(call: _Call) -> Result:
    out = call.kl_cov(
        average(call.mode, call.mask, call.config),
        fraction=_given(call.config, "kl_cov_ratio", 0.0002),
        coef=_given(call.config, "ppo_kl_coef", 1.0),
        importance_weights=None,
        token_weights=call.weights,  # on the penalty, too
    )
    return out.loss, {"actor/ppo_kl": call.mean((call.logp - call.old).abs())}


def _given(config: Any, name: str, default: float) -> float:
    """An option of `policy_loss`, or verl's stand-in for None."""
    value = read(config, f"policy_loss.{name}")
    return default if value is None else value


def _with_verls_signature(
    mode: str, loss: Callable[[_Call], Result]
) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """verl's policy loss: the loss and its metrics as Python numbers; all tensors (B, T)."""

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if config is None:
            raise ValueError(f"{mode}: config: needed, verl's actor configuration")
        call = _Call(
            logp=log_prob,
            old=old_log_prob,
            advantages=advantages,
            mask=response_mask,
            config=config,
            weights=rollout_is_weights,
            mode=loss_agg_mode,
        )
        value, metrics = loss(call)
        return value, as_floats(metrics)

    policy_loss.__name__ = policy_loss.__qualname__ = f"policy_loss_{mode}"
    return policy_loss


_LOSSES: dict[str, Callable[[_Call], Result]] = {
    "vanilla": _vanilla,
    "gspo": _gspo,
    "sapo": _sapo,
    "gpg": _gpg,
    "cispo": _cispo,
    "dro": _dro,
    "geo_mean": _geo_mean,
    "dppo_tv": functools.partial(_dppo, kind="dppo_tv"),
    "dppo_kl": functools.partial(_dppo, kind="dppo_kl"),
    "clip_cov": _clip_cov,
    "kl_cov": _kl_cov,
}
POLICY_LOSSES = {mode: _with_verls_signature(mode, loss) for mode, loss in _LOSSES.items()}


def register() -> None:
    """Replace verl's policy losses by `POLICY_LOSSES`, in this process.

    Raises:
        ImportError: verl is not installed, or in another version.
    """
    require("verl", *SUPPORTED)
    core_algos = importlib.import_module("verl.trainer.ppo.core_algos")
    for mode, loss in POLICY_LOSSES.items():
        core_algos.register_policy_loss(mode)(loss)


def patch_logprobs() -> None:
    """Replace verl's two functions above, in this process, also where verl has already imported them.

    Raises:
        ImportError: verl is not installed, or in another version.
    """
    require("verl", *SUPPORTED)
    home = importlib.import_module("verl.utils.torch_functional")
    replace("verl", home.logprobs_from_logits, logprobs_from_logits)
    fused = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    replace("verl", fused.linear_cross_entropy, linear_cross_entropy)


def _is_installed() -> bool:
    spec = importlib.util.find_spec("verl")
    return (
        spec is not None and spec.origin is not None
    )  # not a folder that happens to have its name


if "verl" in sys.modules:
    register()
elif _is_installed():
    try:
        register()
    except ImportError as reason:  # the losses themselves work without verl
        logging.getLogger(__name__).warning("nothing is registered with verl: %s", reason)
