"""SkyRL (August 2026): its policy losses, by this library.

Call `register()` in the entrypoint, before Ray starts, and set
`trainer.algorithm.policy_loss_type=grpo_fast/<name>` for a name of `POLICY_LOSSES`. The losses read SkyRL's
algorithm configuration and return what SkyRL's own do. SkyRL folds the reduction into the advantages and
sums. Off-policy correction is SkyRL's own code.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_fast.diagnostics import TokenDiagnostics
from grpo_fast.integrations._host import SUM, Call, as_floats, clip_fraction, read
from grpo_fast.loss import LossOutput

CORRECTION = "skyrl.backends.skyrl_train.utils.off_policy_correction_utils"
CORRECTIONS = (
    "tis_ratio_type",
    "sequence_mask_metric",
    "outlier_token_is_threshold_low",
    "outlier_token_is_threshold_high",
    "token_mask_is_threshold_low",
)
Metrics = dict[str, Tensor | float]
Result = tuple[Tensor, Metrics]

# The options of each preset, and where SkyRL's algorithm configuration has them.
_CLIP = {"epsilon_low": "eps_clip_low", "epsilon_high": "eps_clip_high"}
_DPPO = {"epsilon_low": "dppo.delta_low", "epsilon_high": "dppo.delta_high"}
OPTIONS: dict[str, dict[str, str]] = {
    "regular": _CLIP,
    "dual_clip": _CLIP | {"dual_clip": "clip_ratio_c"},
    "gspo": _CLIP,
    "sapo": {"tau_pos": "sapo.tau_pos", "tau_neg": "sapo.tau_neg"},
    "cispo": {
        "epsilon_low": "cispo.cispo_eps_clip_low",
        "epsilon_high": "cispo.cispo_eps_clip_high",
    },
    "rollout_is": _CLIP,
    "dppo_tv": _DPPO,
    "dppo_kl": _DPPO,
    "importance_sampling": {},
    "clip_cov": _CLIP,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call(Call):
    """`mask` is the given one; `weights` hold the off-policy correction, its mask too."""

    host = "skyrl"
    name: str  # of a preset
    rollout: Tensor | None

    @property
    def options(self) -> dict[str, Any]:
        return {name: read(self.config, path) for name, path in OPTIONS[self.name].items()}

    def loss(self) -> LossOutput:
        return self.averaged(SUM, self.name, self.options)

    def tokens(self) -> TokenDiagnostics:
        return self.diagnose(self.name, self.options)

    def to_sampler(self) -> "_Call":
        """The same with the ratio to the sampler."""
        if self.rollout is None:
            raise ValueError(f"{self.name}: rollout_logprobs: needed, the ratio is to the sampler")
        return dataclasses.replace(self, old=self.rollout)


def _clipped(call: _Call) -> Result:
    out = call.loss()
    return out.loss, {"clip_ratio": clip_fraction(out)}


def _sapo(call: _Call) -> Result:
    return call.loss().loss, {"clip_ratio": 0.0}


def _cispo(call: _Call) -> Result:
    if read(call.config, "cispo.cispo_anchor", "old") == "rollout":
        call = call.to_sampler()
        if read(call.config, "off_policy_correction.tis_ratio_type", None) is not None:
            raise ValueError(
                "cispo_anchor='rollout' is a ratio to the sampler already: with "
                "off_policy_correction.tis_ratio_type it would count twice"
            )
    token, live = call.tokens(), call.mask != 0
    metrics: Metrics = {
        "clip_ratio": call.mean(token.outside),
        "cispo/ratio_mean": call.mean(token.ratio),
        "cispo/ratio_clamped_mean": call.mean(token.bounded_ratio),
        "cispo/ratio_max": token.ratio.where(live, -torch.inf).amax(),
        "cispo/ratio_min": token.ratio.where(live, torch.inf).amin(),
    }
    return call.loss().loss, metrics


def _rollout_is(call: _Call) -> Result:
    call = call.to_sampler()
    return call.loss().loss, {"clip_ratio": call.mean(call.tokens().outside)}


def _dppo(call: _Call) -> Result:
    kind = read(call.config, "dppo.dppo_type")
    if kind not in ("binary_tv", "binary_kl"):
        raise ValueError(f"dppo_type={kind!r} is unknown; choose from binary_tv, binary_kl")
    if call.rollout is not None:
        call = call.to_sampler()
    return _clipped(dataclasses.replace(call, name="dppo_" + kind.removeprefix("binary_")))


def _importance_sampling(call: _Call) -> Result:
    out = call.loss()
    return out.loss, {"importance_ratio": out.metrics["ratio_mean"]}


def _clip_cov(call: _Call) -> Result:
    names = {"fraction": "clip_ratio", "low": "clip_cov_lb", "high": "clip_cov_ub"}
    given = {name: read(call.config, f"clip_cov.{path}") for name, path in names.items()}
    kept = call.clip_cov(**given, **call.options)
    out = dataclasses.replace(call, weights=kept).loss()
    return out.loss, {"clip_ratio": call.mean(kept == 0)}


def _kl_cov(call: _Call) -> Result:
    fraction, coef = (read(call.config, f"kl_cov.{k}") for k in ("kl_cov_frac", "ppo_kl_coef"))
    out = call.kl_cov(SUM, fraction, coef)
    return out.loss, {"clip_ratio": 0.0}


def _corrected(
    name: str, old: Tensor, rollout: Tensor | None, mask: Tensor, config: Any
) -> tuple[Tensor | None, dict[str, float]]:
    """(importance weights, metrics) by SkyRL's off-policy correction, where it is configured.

    What it masks has a weight of 0: the means of sequences and of metrics are over the mask it was given.
    """
    options = {
        option: read(config, f"off_policy_correction.{option}", None) for option in CORRECTIONS
    }
    given = {option: value for option, value in options.items() if value is not None}
    if not given or rollout is None or name == "importance_sampling":  # which is one by itself
        return None, {}
    if name in ("clip_cov", "kl_cov"):  # SkyRL refuses it by their names, which ours are not
        raise ValueError(f"{name}: off_policy_correction is not supported with it, got {given}")
    compute = importlib.import_module(CORRECTION).compute_off_policy_correction
    weights, metrics, kept = compute(old, rollout, mask, read(config, "off_policy_correction"))
    kept = kept != 0
    return kept.float() if weights is None else weights.where(kept, 0), metrics


def _with_skyrls_signature(
    name: str, loss: Callable[[_Call], Result]
) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    def policy_loss(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
        weights, metrics = _corrected(name, old_log_probs, rollout_logprobs, mask, config)
        call = _Call(
            name=name,
            logp=log_probs,
            old=old_log_probs,
            advantages=advantages,
            mask=mask,
            config=config,
            weights=weights,
            rollout=rollout_logprobs,
        )
        value, own = loss(call)
        return value, as_floats(own) | metrics

    policy_loss.__name__ = policy_loss.__qualname__ = f"policy_loss_{name}"
    return policy_loss


_LOSSES: dict[str, Callable[[_Call], Result]] = {
    "regular": _clipped,
    "dual_clip": _clipped,
    "gspo": _clipped,
    "sapo": _sapo,
    "cispo": _cispo,
    "rollout_is": _rollout_is,
    "dppo": _dppo,
    "importance_sampling": _importance_sampling,
    "clip_cov": _clip_cov,
    "kl_cov": _kl_cov,
}
POLICY_LOSSES = {name: _with_skyrls_signature(name, loss) for name, loss in _LOSSES.items()}


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
            "(skyrl >= 0.4)"
        ) from error
    for name, loss in POLICY_LOSSES.items():
        registry.register(f"grpo_fast/{name}", loss)
