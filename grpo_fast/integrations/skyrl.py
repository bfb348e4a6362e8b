"""SkyRL (August 2026): its policy losses, by this library.

Call `register()` in the entrypoint, before Ray starts, and set
`trainer.algorithm.policy_loss_type=grpo_fast/<name>` for a name of `POLICY_LOSSES`. The losses read SkyRL's
algorithm configuration and return what SkyRL's own do. SkyRL folds the reduction into the advantages and
sums. Off-policy correction is SkyRL's own code.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.integrations._host import Average, as_floats, averaged_loss, masked_mean, read
from grpo_fast.loss import LossOutput
from grpo_fast.objective import Objective
from grpo_fast.ops.policy_loss import divergence_keeps
from grpo_fast.weights import clip_cov, kl_cov

SUM = Average({}, 1.0, 1.0)
CORRECTION = "skyrl.backends.skyrl_train.utils.off_policy_correction_utils"
Metrics = dict[str, Tensor | float]


class _Call(NamedTuple):
    """The arguments of one call, (B, T), after the off-policy correction."""

    name: str
    logp: Tensor
    old: Tensor
    advantages: Tensor
    config: Any
    given_mask: Tensor
    rollout: Tensor | None
    mask: Tensor
    weights: Tensor | None

    def loss(self, behaviour: Tensor | None = None, **options: Any) -> LossOutput:
        """The loss with the ratio to `behaviour`, the old policy unless given."""
        return averaged_loss(
            SUM,
            f"skyrl/{self.name}",
            options,
            logps=self.logp,
            old_logps=self.old if behaviour is None else behaviour,
            advantages=self.advantages,
            mask=self.mask,
            importance_weights=self.weights,
        )

    def mean(self, x: Tensor) -> Tensor:
        return masked_mean(x.float(), self.given_mask)

    def sampler(self) -> Tensor:
        if self.rollout is None:
            raise ValueError(f"{self.name}: rollout_logprobs: needed, the ratio is to the sampler")
        return self.rollout

    def ratio(self, behaviour: Tensor) -> Tensor:
        return (self.logp - behaviour).detach().float().clamp(-20, 20).exp()

    def clip(self, low: str = "eps_clip_low", high: str = "eps_clip_high") -> dict[str, Any]:
        return {"epsilon_low": read(self.config, low), "epsilon_high": read(self.config, high)}


def _clipped(call: _Call, **options: Any) -> tuple[Tensor, Metrics]:
    clip = call.clip()
    d = (call.logp - call.old).detach().float()
    if call.name == "gspo":
        live = call.given_mask != 0
        d = torch.where(live, d, 0).sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1)
        d = d.expand(call.logp.shape)
    below = (d.exp() < 1 - clip["epsilon_low"]) & (call.advantages < 0)
    above = (d.exp() > 1 + clip["epsilon_high"]) & (call.advantages > 0)
    return call.loss(**clip, **options).loss, {"clip_ratio": call.mean(below | above)}


def _dual_clip(call: _Call) -> tuple[Tensor, Metrics]:
    return _clipped(call, dual_clip=read(call.config, "clip_ratio_c"))


def _sapo(call: _Call) -> tuple[Tensor, Metrics]:
    taus: dict[str, Any] = {
        name: read(call.config, f"sapo.{name}") for name in ("tau_pos", "tau_neg")
    }
    return call.loss(**taus).loss, {"clip_ratio": 0.0}


def _cispo(call: _Call) -> tuple[Tensor, Metrics]:
    behaviour = call.old
    if read(call.config, "cispo.cispo_anchor", "old") == "rollout":
        behaviour = call.sampler()
        if read(call.config, "off_policy_correction.tis_ratio_type", None) is not None:
            raise ValueError(
                "cispo_anchor='rollout' is a ratio to the sampler already: with "
                "off_policy_correction.tis_ratio_type it would count twice"
            )
    clip = call.clip("cispo.cispo_eps_clip_low", "cispo.cispo_eps_clip_high")
    ratio, live = call.ratio(behaviour), call.given_mask != 0
    bounded = ratio.clamp(1 - clip["epsilon_low"], 1 + clip["epsilon_high"])
    metrics: Metrics = {
        "clip_ratio": call.mean(ratio != bounded),
        "cispo/ratio_mean": call.mean(ratio),
        "cispo/ratio_clamped_mean": call.mean(bounded),
        "cispo/ratio_max": torch.where(live, ratio, -torch.inf).amax(),
        "cispo/ratio_min": torch.where(live, ratio, torch.inf).amin(),
    }
    return call.loss(behaviour, **clip).loss, metrics


def _rollout_is(call: _Call) -> tuple[Tensor, Metrics]:
    clip, ratio = call.clip(), call.ratio(call.sampler())
    inside = (ratio > 1 - clip["epsilon_low"]) & (ratio < 1 + clip["epsilon_high"])
    return call.loss(call.sampler(), **clip).loss, {"clip_ratio": call.mean(~inside)}


def _dppo(call: _Call) -> tuple[Tensor, Metrics]:
    kind = read(call.config, "dppo.dppo_type")
    if kind not in ("binary_tv", "binary_kl"):
        raise ValueError(f"dppo_type={kind!r} is unknown; choose from binary_tv, binary_kl")
    name = "dppo_" + kind.removeprefix("binary_")
    # To the sampler where its log-probs are known.
    behaviour = call.old if call.rollout is None else call.rollout
    clip = call.clip("dppo.delta_low", "dppo.delta_high")
    logp, mu = call.logp.detach().float(), behaviour.float()
    keep = divergence_keeps(logp, mu, call.advantages, Objective.preset(f"skyrl/{name}", **clip))
    dropped = ~keep & (call.advantages != 0)
    loss = call._replace(name=name).loss(behaviour, **clip).loss
    return loss, {"clip_ratio": call.mean(dropped)}


def _importance_sampling(call: _Call) -> tuple[Tensor, Metrics]:
    out = call._replace(mask=call.given_mask, weights=None).loss()
    return out.loss, {"importance_ratio": out.metrics["ratio_mean"]}


def _clip_cov(call: _Call) -> tuple[Tensor, Metrics]:
    clip, config = call.clip(), call.config
    kept = clip_cov(
        call.logp.detach(),
        call.old,
        call.advantages,
        mask=call.given_mask,
        fraction=read(config, "clip_cov.clip_ratio"),
        low=read(config, "clip_cov.clip_cov_lb"),
        high=read(config, "clip_cov.clip_cov_ub"),
        **clip,
    )
    # SkyRL corrects neither of the two by covariance.
    out = call._replace(mask=call.given_mask, weights=kept).loss(**clip)
    return out.loss, {"clip_ratio": call.mean(kept == 0)}


def _kl_cov(call: _Call) -> tuple[Tensor, Metrics]:
    logp, fraction = call.logp.detach(), read(call.config, "kl_cov.kl_cov_frac")
    chosen = kl_cov(logp, call.advantages, mask=call.given_mask, fraction=fraction)
    out = averaged_loss(
        SUM,
        "skyrl/kl_cov",
        {"beta": read(call.config, "kl_cov.ppo_kl_coef")},
        logps=call.logp,
        old_logps=call.old,
        ref_logps=torch.where(chosen, call.old, logp),  # elsewhere the distance to itself: 0
        advantages=call.advantages,
        mask=call.given_mask,
    )
    return out.loss, {"clip_ratio": 0.0}


def _corrected(
    old: Tensor, rollout: Tensor | None, mask: Tensor, config: Any
) -> tuple[Tensor | None, Tensor, dict[str, float]]:
    """(importance weights, mask, metrics) by SkyRL's off-policy correction, where it is configured."""
    correction = read(config, "off_policy_correction", None)
    names = (
        "tis_ratio_type",
        "sequence_mask_metric",
        "outlier_token_is_threshold_low",
        "outlier_token_is_threshold_high",
        "token_mask_is_threshold_low",
    )
    wanted = correction is not None and any(read(correction, n, None) is not None for n in names)
    if rollout is None or not wanted:
        return None, mask, {}
    compute = importlib.import_module(CORRECTION).compute_off_policy_correction
    weights, metrics, mask = compute(old, rollout, mask, correction)
    return weights, mask, metrics


def _with_skyrls_signature(
    name: str, loss: Callable[[_Call], tuple[Tensor, Metrics]]
) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    def policy_loss(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        given = torch.ones_like(log_probs) if loss_mask is None else loss_mask
        weights, mask, metrics = _corrected(old_log_probs, rollout_logprobs, given, config)
        call = _Call(
            name,
            log_probs,
            old_log_probs,
            advantages,
            config,
            given,
            rollout_logprobs,
            mask,
            weights,
        )
        value, own = loss(call)
        return value, as_floats(own) | metrics

    policy_loss.__name__ = policy_loss.__qualname__ = f"policy_loss_{name}"
    return policy_loss


_LOSSES: dict[str, Callable[[_Call], tuple[Tensor, Metrics]]] = {
    "regular": _clipped,
    "dual_clip": _dual_clip,
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
