"""verl 0.9.1: its policy losses and log-probs, by this library.

`VERL_USE_EXTERNAL_MODULES=grpo_fast.integrations.verl` makes every verl process import this module, which
replaces verl's policy losses of the same `actor.policy_loss.loss_mode` by those of `POLICY_LOSSES`: the same
signature, configuration, losses, gradients and metrics. "bypass_mode", which calls verl's own functions by
name, stays verl's. `patch_logprobs()` replaces verl's log-prob functions.
"""

import functools
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from grpo_fast.integrations._host import (
    Average,
    as_floats,
    averaged_loss,
    bounds,
    masked_mean,
    read,
    replace,
    require,
    sequence_average,
)
from grpo_fast.loss import LossOutput
from grpo_fast.objective import Objective
from grpo_fast.ops import linear_logprob, logprob
from grpo_fast.ops.policy_loss import divergence_keeps
from grpo_fast.weights import clip_cov, kl_cov

NEEDS = "0.9.1"
Result = tuple[Tensor, dict[str, Tensor | float]]


class PolicyLoss(Protocol):
    """verl's signature of a policy loss; all tensors (B, T).

    Returns the loss, averaged over the global batch as `config.global_batch_info` says, and the metrics as
    Python numbers.
    """

    def __call__(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = ...,
        config: Any = ...,
        rollout_is_weights: Tensor | None = ...,
    ) -> tuple[Tensor, dict[str, float]]: ...


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
        return Average({"reduction": "token_mean"}, 1.0, dp_size)
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


class _Call(NamedTuple):
    """The arguments of one call; the average is decided by the loss."""

    old: Tensor
    logp: Tensor
    advantages: Tensor
    mask: Tensor
    mode: str
    config: Any
    weights: Tensor | None

    def loss(self, preset: str, **options: Any) -> LossOutput:
        """The loss of a preset with this call's importance weights on it."""
        how = average(self.mode, self.mask, self.config)
        return self.averaged(how, preset, options, importance_weights=self.weights)

    def averaged(self, how: Average, preset: str, options: dict, **extra: Any) -> LossOutput:
        return averaged_loss(
            how,
            f"verl/{preset}",
            options,
            logps=self.logp,
            old_logps=self.old,
            advantages=self.advantages,
            mask=self.mask,
            **extra,
        )

    def share(self, condition: Tensor) -> Tensor:
        return masked_mean(condition.float(), self.mask)

    def kl(self, clamp: float | None = None) -> dict[str, Tensor | float]:
        """The metric of E[old - new], of log-ratios within the clamp."""
        d = (self.logp - self.old).detach().float()
        return {
            "actor/ppo_kl": masked_mean(
                -(d if clamp is None else d.clamp(-clamp, clamp)), self.mask
            )
        }


def _clip_metrics(clipped: Tensor | float, lower: Tensor | float) -> dict[str, Tensor | float]:
    return {"actor/pg_clipfrac": clipped, "actor/pg_clipfrac_lower": lower}


def _vanilla(call: _Call) -> Result:
    dual = read(call.config, "clip_ratio_c", 3.0)
    out = call.loss("vanilla", dual_clip=dual, **_clip_range(call.config))
    m = out.metrics
    clipped = m["clip_fraction_low"] + m["clip_fraction_high"]
    return out.loss, call.kl(20) | _clip_metrics(clipped, m["clip_fraction_dual"])


def _gspo(call: _Call) -> Result:
    out = call.loss("gspo", **_clip_range(call.config))
    m = out.metrics
    return out.loss, call.kl() | _clip_metrics(
        m["clip_fraction_low"] + m["clip_fraction_high"], 0.0
    )


def _sapo(call: _Call) -> Result:
    taus = {name: read(call.config, name) for name in ("tau_pos", "tau_neg")}
    out = call._replace(mode="seq-mean-token-mean").loss("sapo", **taus)
    return out.loss, call.kl(20) | _clip_metrics(0.0, 0.0)


def _gpg(call: _Call) -> Result:
    # No ratio: the old log-probs may be anything.
    return call._replace(old=call.logp.detach()).loss("gpg").loss, {}


def _cispo(call: _Call) -> Result:
    clip = _clip_range(call.config)
    ratio = (call.logp - call.old).detach().float().clamp(-20, 20).exp()
    outside = (ratio < 1 - clip["epsilon_low"]) | (ratio > 1 + clip["epsilon_high"])
    metrics = call.kl(20) | _clip_metrics(call.share(outside), 0.0)
    return call.loss("cispo", **clip).loss, metrics


def _dro(call: _Call) -> Result:
    beta = read(call.config, "policy_loss.dro_beta", None)
    if beta is None or beta <= 0:
        raise ValueError(f"policy_loss.dro_beta: want a positive number, got {beta}")
    return call.loss("dro", quadratic_coef=beta).loss, call.kl()


def _dppo(call: _Call, kind: str) -> Result:
    cap = read(call.config, "clip_ratio_c", 20.0)
    options = {"ratio_cap": cap, **_clip_range(call.config)}
    logp, old = (x.detach().float() for x in (call.logp, call.old))
    keep = divergence_keeps(logp, old, call.advantages, Objective.preset(f"verl/{kind}", **options))
    above = (logp - old).clamp(-20, 20).exp() > cap
    metrics = call.kl(20) | _clip_metrics(call.share(~keep), call.share(keep & above))
    return call.loss(kind, **options).loss, metrics


def _geo_mean(call: _Call) -> Result:
    clip = _clip_range(call.config)
    weights = call.weights
    if weights is not None:  # one per sequence: their geometric mean
        logs = torch.where(call.mask != 0, (weights + 1e-10).log(), 0)
        weights = (logs.sum(-1) / (call.mask != 0).sum(-1).clamp(min=1)).exp()
    how = Average({}, None, 1.0)  # all sequences at hand, empty ones too
    out = call.averaged(how, "geo_mean", clip, importance_weights=weights)
    d = (call.logp - call.old).detach()
    outside = (d < -clip["epsilon_low"]) | (d > clip["epsilon_high"])
    up, down = (call.share(outside & side) for side in (call.advantages > 0, call.advantages < 0))
    return out.loss, call.kl() | _clip_metrics(up, down)


def _clip_cov(call: _Call) -> Result:
    config, clip = call.config, _clip_range(call.config)
    kept = clip_cov(
        call.logp.detach(),
        call.old,
        call.advantages,
        mask=call.mask,
        fraction=_given(config, "clip_cov_ratio", 0.0002),
        low=_given(config, "clip_cov_lb", 1.0),
        high=_given(config, "clip_cov_ub", 5.0),
        **clip,
    )
    weights = kept if call.weights is None else kept * call.weights
    out = call._replace(weights=weights).loss("clip_cov", **clip)
    return out.loss, {"actor/pg_clipfrac": call.share(kept == 0)} | call.kl()


def _kl_cov(call: _Call) -> Result:
    config, logp = call.config, call.logp.detach()
    chosen = kl_cov(
        logp, call.advantages, mask=call.mask, fraction=_given(config, "kl_cov_ratio", 0.0002)
    )
    how = average(call.mode, call.mask, config)
    # A penalty on the distance to the old policy, where chosen; elsewhere the distance to itself is 0. The
    # weights are on the penalty, too.
    out = call.averaged(
        how,
        "kl_cov",
        {"beta": _given(config, "ppo_kl_coef", 1.0)},
        ref_logps=torch.where(chosen, call.old, logp),
        token_weights=call.weights,
    )
    return out.loss, {"actor/ppo_kl": masked_mean((logp - call.old).abs(), call.mask)}


def _given(config: Any, name: str, default: float) -> float:
    """An option of `policy_loss`, or verl's stand-in for None."""
    value = read(config, f"policy_loss.{name}")
    return default if value is None else value


def _with_verls_signature(mode: str, loss: Callable[[_Call], Result]) -> PolicyLoss:
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
            old_log_prob,
            log_prob,
            advantages,
            response_mask,
            loss_agg_mode,
            config,
            rollout_is_weights,
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
        ImportError: verl is not installed, or too old.
    """
    require("verl", NEEDS)
    core_algos = importlib.import_module("verl.trainer.ppo.core_algos")
    for mode, loss in POLICY_LOSSES.items():
        core_algos.register_policy_loss(mode)(loss)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """verl's function of the same name: log-probs of `labels`, float32 whatever the dtype of `logits`.

    Equivalent to `logits.float().log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)`.

    Args:
        logits: (..., V).
        labels: (...).
        inplace_backward: accepted since verl passes it; the gradient gets memory of its own either way,
            and the logits stay what they are.
    """
    V = logits.shape[-1]
    return logprob(logits.reshape(-1, V), labels.reshape(-1)).view(labels.shape)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl's function of the same name: log-probs of `labels` and entropies, without the logits in memory.

    Equivalent to `logprob((hidden @ weight.T).view(-1, V), labels.view(-1), temperature=temperature,
    return_entropy=True)`, differentiable in both outputs.

    Args:
        hidden: (..., D).
        weight: (V, D).
        labels: (...).
        reduction: of the log-probs: "none", "sum" or "mean".
        dist_process_group: ranks that share the vocabulary; not supported.

    Returns:
        (log-probs, float32 (N,) or 0-dim; entropies, float32 (N,) in nats).
    """
    if dist_process_group is not None:
        raise ValueError(
            "linear_cross_entropy: dist_process_group is not supported: use one rank per vocabulary"
        )
    reduce = {"none": lambda x: x, "sum": torch.sum, "mean": torch.mean}.get(reduction.lower())
    if reduce is None:
        raise ValueError(f"reduction={reduction!r} is unknown; choose from none, sum, mean")
    logps, entropy = linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=temperature,
        return_entropy=True,
    )
    return reduce(logps), entropy


def patch_logprobs() -> None:
    """Replace verl's two functions above, in this process, also where verl has already imported them.

    Raises:
        ImportError: verl is not installed, or too old.
    """
    require("verl", NEEDS)
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
