"""NeMo-RL 0.6: its `ClippedPGLossFn`, by this library.

    import grpo_fast.integrations.nemo_rl
    grpo_fast.integrations.nemo_rl.patch()

at the top of the training script: every `ClippedPGLossFn` that NeMo-RL builds afterwards, from any
`loss_fn` configuration, computes its loss here (NeMo-RL has no registry). Loss, gradient and metrics are the
same; what cannot be the same is refused.
"""

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast import reference
from grpo_fast.diagnostics import TokenDiagnostics, kl_estimate, token_diagnostics
from grpo_fast.integrations._host import Average, as_floats, averaged_loss, replace
from grpo_fast.loss import policy_loss
from grpo_fast.objective import Objective
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
    given = {"logps": next_token_logprobs, "advantages": data["advantages"][:, 1:]}
    sample_mask, generated = data["sample_mask"], data["generation_logprobs"][:, 1:]
    mask = given["mask"] = (data["token_mask"][:, 1:] * sample_mask[:, None]) != 0
    old = next_token_logprobs.detach()
    given["old_logps"] = None
    if not options.force_on_policy_ratio:
        old = given["old_logps"] = data["prev_logprobs"][:, 1:]
    if options.reference_policy_kl_penalty:
        given["ref_logps"] = data["reference_policy_logprobs"][:, 1:]
    by_token = getattr(options.loss_type, "name", options.loss_type) == "TOKEN_LEVEL"
    how = Average({"reduction": "token_mean"}, global_valid_toks, 1.0)
    if not by_token:
        scale = len(mask) / (global_valid_seqs + 1e-8)
        how = Average({"reduction": "sequence_mean"}, None, scale)
    preset, chosen = to_preset(options)
    weights, outside = _weights(options, old, generated, mask)
    corrects = options.use_importance_sampling_correction
    out = averaged_loss(
        how, preset, chosen, **given, importance_weights=weights if corrects else None
    )
    loss, nll = out.loss, out.loss.new_zeros(())
    if options.positive_example_nll_weight > 0 and "rewards" in data:
        right = mask & (data["rewards"] > 0)[:, None]
        ones = torch.ones_like(next_token_logprobs)
        nll = policy_loss(  # with an advantage of 1: the mean of -logp
            next_token_logprobs, advantages=ones, mask=right, objective=Objective.preset("gpg")
        ).loss
        loss = loss + options.positive_example_nll_weight * nll

    token = token_diagnostics(**given, objective=Objective.preset(preset, **chosen))
    if preset.endswith("reinforce"):  # no ratio: NeMo-RL reports the log-probs
        x = next_token_logprobs.detach()
        token = token._replace(ratio=x, bounded_ratio=x)
    totals = _Totals(mask, sample_mask, global_valid_toks, global_valid_seqs)
    metrics = _drift(options.reference_policy_kl_type, next_token_logprobs, old, generated, totals)
    metrics |= _ratios(token, mask, totals)
    kl = totals.tokens(token.kl)
    if not by_token:
        kl = totals.sequences(reference.sequence_mean(token.kl, mask))
    by_sequence = options.sequence_level_importance_ratios
    metrics |= {
        "loss": loss,
        "kl_penalty": kl,
        "sampling_importance_ratio": (totals.sequences if by_sequence else totals.tokens)(weights),
        "num_valid_samples": sample_mask.sum(),
        "positive_nll_loss": nll,
    }
    if outside is not None:
        by_sample = options.truncated_importance_sampling_type == "seq-mask-tis"
        metrics["is_oob_ratio"] = (totals.sequences if by_sample else totals.tokens)(outside)
    return loss, as_floats(metrics)


class _Totals(NamedTuple):
    """NeMo-RL's means: over what is valid here, by the numbers of the global batch."""

    mask: Tensor
    sample_mask: Tensor
    valid_toks: Tensor
    valid_seqs: Tensor

    def tokens(self, x: Tensor) -> Tensor:
        """Of (B, S - 1) or (B, 1) values."""
        return torch.where(self.mask, x.detach().float(), 0).sum() / (self.valid_toks + 1e-8)

    def sequences(self, x: Tensor) -> Tensor:
        """Of (B, 1) values, or of such that are the same all along their sequence."""
        x = x[:, 0].where(self.sample_mask != 0, 0)
        return x.float().sum() / (self.valid_seqs + 1e-8)


def _ratios(token: TokenDiagnostics, mask: Tensor, totals: _Totals) -> dict[str, Any]:
    metrics = {}
    for name, x in (("probs_ratio", token.ratio), ("probs_ratio_clamped", token.bounded_ratio)):
        metrics[name] = totals.tokens(x)
        metrics[f"{name}_min"] = x.where(mask, torch.inf).amin()
        metrics[f"{name}_max"] = x.where(mask, -torch.inf).amax()
    return metrics


def _drift(
    kind: str, logp: Tensor, old: Tensor, generated: Tensor, totals: _Totals
) -> dict[str, Any]:
    """Metrics of the distance between the trainer's policies and the one that generated.

    NeMo-RL's own: its "js_divergence_error" takes KL(mixture || policy) where Jensen and Shannon have
    KL(policy || mixture).
    """
    estimator = Objective(kl=kind)  # type: ignore[arg-type]
    mixture = (0.5 * old.exp() + 0.5 * generated.exp()).log()
    js = 0.5 * kl_estimate(mixture, old) + 0.5 * kl_estimate(mixture, generated)
    return {
        "token_mult_prob_error": totals.tokens((generated - old).abs().exp()),
        "gen_kl_error": totals.tokens(kl_estimate(generated, old, estimator)),
        "policy_kl_error": totals.tokens(kl_estimate(old, generated, estimator)),
        "js_divergence_error": totals.tokens(js),
        "approx_entropy": -totals.tokens((logp - generated).exp() * logp),
    }


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


def to_preset(options: Any) -> tuple[str, dict[str, Any]]:
    """NeMo-RL's options as a preset and what to set in it, but for the reduction."""
    chosen = {"epsilon_low": options.ratio_clip_min, "epsilon_high": options.ratio_clip_max}
    kind = "grpo"
    if options.use_cispo:
        kind = "cispo"
    elif options.disable_ppo_ratio and not options.force_on_policy_ratio:
        kind, chosen = "reinforce", {}
    elif options.sequence_level_importance_ratios and not options.force_on_policy_ratio:
        kind = "gspo"
    if options.ratio_clip_c is not None:
        chosen["dual_clip"] = options.ratio_clip_c
    gap, most = options.kl_input_clamp_value, options.kl_output_clamp_value
    clamped = gap is not None or most is not None
    chosen |= {
        "beta": float(options.reference_policy_kl_penalty),
        "kl_gap_clip": gap,
        "kl_value_clip": most,
        # That of k3 through the sampling probability, too, is that of k2.
        "kl_gradient": "k2_clipped" if clamped else "k2",
    }
    return f"nemo_rl/{kind}", chosen


def _weights(
    options: Any, old: Tensor, generated: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(the mismatch weights, per token or (B, 1); which of them are out of bounds, if there are bounds)."""
    level = "sequence" if options.sequence_level_importance_ratios else "token"
    low = options.truncated_importance_sampling_ratio_min
    high = options.truncated_importance_sampling_ratio
    kind = options.truncated_importance_sampling_type

    def rho(**bounds: Any) -> Tensor:
        return importance_weights(
            old, generated, mask=mask, level=level, undefined="zero", **bounds
        )

    if high is None:
        return rho(), None
    if kind == "seq-mask-tis":
        # For the mean NeMo-RL takes any difference that is not finite as none.
        gap = torch.nan_to_num(old - generated, nan=0.0, posinf=0.0, neginf=0.0)
        none = torch.zeros_like(gap)
        gate = importance_weights(
            gap, none, mask=mask, level="geometric", mode="gate", low=low, high=high
        )
        return gate * rho(), gate == 0
    outside = rho(mode="gate", low=low, high=high) == 0
    return rho(mode="truncate" if kind == "tis" else "mask", low=low, high=high), outside
