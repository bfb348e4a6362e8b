"""NeMo-RL 0.6: its `ClippedPGLossFn`, by this library.

    import grpo_fast.integrations.nemo_rl
    grpo_fast.integrations.nemo_rl.patch()

at the top of the training script: every `ClippedPGLossFn` that NeMo-RL builds afterwards, from any
`loss_fn` configuration, computes its loss here (NeMo-RL has no registry). Loss, gradient and metrics are the
same; what cannot be the same is refused.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from grpo_fast import reference
from grpo_fast.integrations._host import Average, as_floats, averaged_loss, replace
from grpo_fast.loss import policy_loss
from grpo_fast.objective import Objective
from grpo_fast.ops.policy_loss import kl_terms
from grpo_fast.weights import importance_weights

HOME = "nemo_rl.algorithms.loss.loss_functions"


def patch() -> None:
    """Replace NeMo-RL's `ClippedPGLossFn` by a subclass with this library's `__call__`, in this process.

    Raises:
        ImportError: NeMo-RL is not installed, or has no such class.
    """
    try:
        home: Any = importlib.import_module(HOME)
        base = home.ClippedPGLossFn
    except (ImportError, AttributeError) as error:
        raise ImportError(f"this needs NeMo-RL >= 0.6 with {HOME}.ClippedPGLossFn") from error
    if getattr(base, "by_grpo_fast", False):
        return

    class ClippedPGLossFn(base):  # type: ignore[misc, valid-type]
        by_grpo_fast = True

        def __call__(
            self,
            next_token_logprobs: Tensor,
            data: Any,
            global_valid_seqs: Tensor,
            global_valid_toks: Tensor,
        ) -> tuple[Tensor, dict[str, Any]]:
            return clipped_pg_loss(
                self, next_token_logprobs, data, global_valid_seqs, global_valid_toks
            )

    replace("nemo_rl", base, ClippedPGLossFn)


def clipped_pg_loss(
    options: Any,
    next_token_logprobs: Tensor,
    data: Any,
    global_valid_seqs: Tensor,
    global_valid_toks: Tensor,
) -> tuple[Tensor, dict[str, float]]:
    """What NeMo-RL's `ClippedPGLossFn.__call__` returns.

    Args:
        options: a `ClippedPGLossFn`, or anything with its attributes.
        next_token_logprobs: (B, S - 1).
        data: NeMo-RL's batch, (B, S) tensors.
        global_valid_seqs, global_valid_toks: the denominators.

    Raises:
        ValueError: an option that cannot be the same here.
    """
    _check(options, data)
    logp, beta = next_token_logprobs, options.reference_policy_kl_penalty
    sample_mask, advantages = data["sample_mask"], data["advantages"][:, 1:]
    mask = (data["token_mask"][:, 1:] * sample_mask[:, None]) != 0
    generated = data["generation_logprobs"][:, 1:]
    forced = options.force_on_policy_ratio
    old = logp.detach() if forced else data["prev_logprobs"][:, 1:]
    by_token = getattr(options.loss_type, "name", options.loss_type) == "TOKEN_LEVEL"
    preset = "nemo_rl/" + _kind(options)
    weights, outside = _weights(options, old, generated, mask)
    corrects = options.use_importance_sampling_correction
    if by_token:
        how = Average({"reduction": "token_mean"}, global_valid_toks, 1.0)
    else:
        scale = len(logp) / (global_valid_seqs + 1e-8)
        how = Average({"reduction": "sequence_mean"}, None, scale)
    kl_options = _kl_options(options) if beta else {"beta": 0.0}
    ref = data["reference_policy_logprobs"][:, 1:] if beta else None
    clip = {"epsilon_low": options.ratio_clip_min, "epsilon_high": options.ratio_clip_max}
    surrogate: dict[str, Any] = {} if preset.endswith("reinforce") else clip
    if options.ratio_clip_c is not None:
        surrogate["dual_clip"] = options.ratio_clip_c
    out = averaged_loss(
        how,
        preset,
        surrogate | kl_options,
        logps=logp,
        old_logps=None if forced else old,
        ref_logps=ref,
        advantages=advantages,
        mask=mask,
        importance_weights=weights if corrects else None,
    )
    loss, nll = out.loss, logp.new_zeros(())
    if options.positive_example_nll_weight > 0 and "rewards" in data:
        right = mask & (data["rewards"] > 0)[:, None]
        objective = Objective.preset("gpg")  # with an advantage of 1: the mean of -logp
        nll = policy_loss(
            logp, advantages=torch.ones_like(logp), mask=right, objective=objective
        ).loss
        loss = loss + options.positive_example_nll_weight * nll

    def total(x: Tensor, live: Tensor = mask) -> Tensor:
        return torch.where(live, x.detach().float(), 0).sum() / (global_valid_toks + 1e-8)

    x = logp.detach()
    ratios = _ratios(options, x, old, mask)
    bounded = ratios
    if not (forced or options.disable_ppo_ratio):
        bounded = ratios.clamp(1 - clip["epsilon_low"], 1 + clip["epsilon_high"])
    gap = (generated - old).detach()
    mixture = (0.5 * old.exp() + 0.5 * generated.exp()).log()
    metrics: dict[str, Any] = {
        "loss": loss,
        "probs_ratio": total(ratios),
        "probs_ratio_clamped": total(bounded),
        "probs_ratio_min": torch.where(mask, ratios, torch.inf).amin(),
        "probs_ratio_max": torch.where(mask, ratios, -torch.inf).amax(),
        "probs_ratio_clamped_min": torch.where(mask, bounded, torch.inf).amin(),
        "probs_ratio_clamped_max": torch.where(mask, bounded, -torch.inf).amax(),
        "kl_penalty": 0.0,
        "token_mult_prob_error": total(gap.abs().exp()),
        "gen_kl_error": total(_divergence(gap, options.reference_policy_kl_type)),
        "policy_kl_error": total(_divergence(-gap, options.reference_policy_kl_type)),
        "js_divergence_error": total(
            0.5 * _divergence(old - mixture, "k3", True)
            + 0.5 * _divergence(generated - mixture, "k3", True)
        ),
        "sampling_importance_ratio": total(weights.expand(logp.shape)),
        "num_valid_samples": sample_mask.sum(),
        "approx_entropy": -total((x - generated).exp() * x),
        "positive_nll_loss": nll,
    }
    if options.sequence_level_importance_ratios:
        metrics["sampling_importance_ratio"] = _over_sequences(weights, data, global_valid_seqs)
    if ref is not None:
        objective = Objective.preset(preset, **surrogate, **kl_options)
        kl = kl_terms(x.float(), ref.float(), torch.ones_like(x), objective)[0]
        if by_token:
            metrics["kl_penalty"] = total(kl)
        else:
            each = reference.sequence_mean(kl, mask)[:, 0]
            metrics["kl_penalty"] = each.sum() / (global_valid_seqs + 1e-8)
    if outside is not None:
        if options.truncated_importance_sampling_type == "seq-mask-tis":
            metrics["is_oob_ratio"] = _over_sequences(outside, data, global_valid_seqs)
        else:
            metrics["is_oob_ratio"] = total(outside.expand(mask.shape).float())
    return loss, as_floats(metrics)


def _check(options: Any, data: Any) -> None:
    if options.reference_policy_kl_penalty:
        if options.reference_policy_kl_type != "k3":
            raise ValueError(
                f"reference_policy_kl_type={options.reference_policy_kl_type!r}: only k3 has NeMo-RL's "
                "gradient here"
            )
        if options.use_on_policy_kl_approximation:
            raise ValueError("use_on_policy_kl_approximation=True is not supported")
        if data.get("curr_logprobs_unfiltered") is not None:
            raise ValueError(
                "curr_logprobs_unfiltered: log-probs under top-k or top-p for the loss and without for "
                "the KL are not supported"
            )
    if options.ratio_clip_c is not None and options.disable_ppo_ratio:
        raise ValueError(
            f"ratio_clip_c={options.ratio_clip_c} is not supported with disable_ppo_ratio"
        )


def _kind(options: Any) -> str:
    if options.use_cispo:
        return "cispo"
    if options.force_on_policy_ratio:
        return "grpo"
    if options.disable_ppo_ratio:
        return "reinforce"
    return "gspo" if options.sequence_level_importance_ratios else "grpo"


def _kl_options(options: Any) -> dict[str, Any]:
    """k3 with NeMo-RL's clamps and its gradient, which goes through the sampling probability, too."""
    gap, most = options.kl_input_clamp_value, options.kl_output_clamp_value
    clamped = gap is not None or most is not None
    return {
        "beta": float(options.reference_policy_kl_penalty),
        "kl_gap_clip": gap,
        "kl_value_clip": most,
        "kl_gradient": "k2_clipped" if clamped else "k2",
    }


def _ratios(options: Any, logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    if options.force_on_policy_ratio:
        return torch.ones_like(logp)
    if options.disable_ppo_ratio:
        return logp
    d = logp - old
    if options.sequence_level_importance_ratios:
        d = reference.sequence_mean(d, mask)
    return d.exp()


def _weights(
    options: Any, old: Tensor, generated: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(the mismatch weights, per token or (B, 1); which of them are out of bounds, if there are bounds)."""
    level = "sequence" if options.sequence_level_importance_ratios else "token"
    rho = importance_weights(old, generated, mask=mask, level=level)
    rho = torch.where(rho.isinf(), 0, rho)
    high, kind = (
        options.truncated_importance_sampling_ratio,
        options.truncated_importance_sampling_type,
    )
    if high is None:
        return rho, None
    low = options.truncated_importance_sampling_ratio_min or 0.0
    if kind == "seq-mask-tis":
        mean = importance_weights(old, generated, mask=mask, level="geometric")
        outside = (mean < low) | (mean > high)
        return torch.where(outside, 0, rho), outside
    outside = (rho < low) | (rho > high)
    return (rho.clamp(low, high) if kind == "tis" else torch.where(outside, 0, rho)), outside


def _over_sequences(x: Tensor, data: Any, count: Tensor) -> Tensor:
    """The sum of (B, 1) values over valid samples, by their number in the global batch."""
    return torch.where(data["sample_mask"] != 0, x[:, 0].float(), 0).sum() / (count + 1e-8)


def _divergence(d: Tensor, kind: str, forward: bool = False) -> Tensor:
    """An estimate from d = log p - log q under p; the k3 of the mixture takes e^d, as NeMo-RL's does."""
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    return d.exp() - d - 1 if forward else (-d).exp() + d - 1
