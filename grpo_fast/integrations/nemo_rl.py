"""The adapter of NeMo-RL 0.7: its `ClippedPGLossFn`.

    import grpo_fast.integrations.nemo_rl
    grpo_fast.integrations.nemo_rl.patch()

Put these lines at the top of the training script (NeMo-RL has no registry). Every `ClippedPGLossFn` that
NeMo-RL builds afterwards computes its loss here, for any `loss_fn` configuration. Loss, gradient and metrics
are the same. An option with which they would differ raises an error.
"""

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.diagnostics import kl_estimate
from grpo_fast.integrations.shared.call import SUM, Average, LossCall, as_floats, sequence_mean
from grpo_fast.integrations.shared.options import (
    Entry,
    entry,
    read,
    read_options,
)
from grpo_fast.integrations.shared.packages import (
    VERSIONS,
    found_version,
    is_between,
    replace,
)
from grpo_fast.objective import Objective
from grpo_fast.weights import importance_weights

HOME = "nemo_rl.algorithms.loss.loss_functions"
SUPPORTED = VERSIONS["nemo_rl"]
TRUNCATIONS = ("tis", "icepop", "seq-mask-tis")

# The options of the presets, and which entries of NeMo-RL's `loss_fn` configuration they are.
CLIP: dict[str, Entry] = {
    "epsilon_low": entry("ratio_clip_min"),
    "epsilon_high": entry("ratio_clip_max"),
}
DUAL: dict[str, Entry] = {"dual_clip": entry("ratio_clip_c")}
KL: dict[str, Entry] = {
    "beta": entry("reference_policy_kl_penalty"),
    "kl_gap_clip": entry("kl_input_clamp_value"),
    "kl_value_clip": entry("kl_output_clamp_value"),
}


def patch() -> None:
    """Replace NeMo-RL's `ClippedPGLossFn` by a subclass with this library's `__call__`, in this process.

    Raises:
        ImportError: NeMo-RL is not installed, is another release than 0.7, or has no such class.
    """
    try:
        home: Any = importlib.import_module(HOME)
        base = home.ClippedPGLossFn
    except (ImportError, AttributeError) as error:
        raise ImportError(f"this needs NeMo-RL 0.7 with {HOME}.ClippedPGLossFn") from error
    if getattr(base, "by_grpo_fast", False):
        return
    _check_version(home)

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


def _check_version(home: Any) -> None:
    """Refuse the releases that have a different loss.

    A checkout of the main branch after 0.7.0 still calls itself 0.6.0. It is recognised by the entries of
    0.7.
    """
    found = found_version("nemo_rl")
    theirs = getattr(home, "ClippedPGLossConfig", None)
    has_entries = "use_cispo" in getattr(theirs, "model_fields", {})
    if is_between(found, *SUPPORTED) if found else has_entries:
        return
    if found and has_entries and is_between(found, "0.6", "0.7"):
        return
    raise ImportError(
        f"this needs NeMo-RL >= 0.7, < 0.8; NeMo-RL {found or 'of an unknown version'} is installed, "
        "whose loss has other options and another gradient of the KL term: check out its tag v0.7.0, "
        "or leave out grpo_fast.integrations.nemo_rl.patch()"
    )


def clipped_pg_loss(
    config: Any,
    next_token_logprobs: Tensor,
    data: Any,
    global_valid_seqs: Tensor,
    global_valid_toks: Tensor,
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss and the metrics of NeMo-RL's `ClippedPGLossFn.__call__`.

    Args:
        config: a `ClippedPGLossFn`, a `ClippedPGLossConfig` or anything with the entries of one.
        next_token_logprobs: (B, S - 1).
        data: NeMo-RL's batch, (B, S) tensors. Its masks may be fractions, which are weights.
        global_valid_seqs, global_valid_toks: the denominators.

    Raises:
        ValueError: an option would give another loss here, or NeMo-RL refuses the combination.
    """
    by_token = _by_token(config)
    _check(config, data, by_token)
    on_policy = config.force_on_policy_ratio
    token_mask, sample_mask = data["token_mask"][:, 1:], data["sample_mask"]
    generated = data["generation_logprobs"][:, 1:]
    old = next_token_logprobs.detach() if on_policy else data["prev_logprobs"][:, 1:]
    # The weight of a sample multiplies its loss. Means along the sequence are without it.
    mask = token_mask.where(sample_mask[:, None] != 0, 0)
    weights, out_of_bounds = _weights(config, old, generated, mask, sample_mask)
    how = SUM._replace(scale=1 / (global_valid_toks + 1e-8))
    if not by_token:
        how = Average({"reduction": "sequence_mean"}, None, len(mask) / (global_valid_seqs + 1e-8))
    preset, chosen = to_preset(config)
    call = LossCall(
        preset=preset,
        options=chosen,
        names=CLIP | KL | DUAL,
        average=how,
        logps=next_token_logprobs,
        old_logps=None if on_policy else old,
        ref_logps=data["reference_policy_logprobs"][:, 1:] if chosen["beta"] else None,
        advantages=data["advantages"][:, 1:],
        mask=mask,
        importance_weights=weights if config.use_importance_sampling_correction else None,
        token_weights=sample_mask[:, None].expand(mask.shape),
    )
    nll = _nll_of_right_answers(config, call, data)
    loss = call.out.loss + config.positive_example_nll_weight * nll
    totals = _Totals(mask * sample_mask[:, None], sample_mask, global_valid_toks, global_valid_seqs)
    by_sequence = config.sequence_level_importance_ratios
    metrics = _drift(config.reference_policy_kl_type, call, old, generated, totals)
    metrics |= _ratios(call, totals) | {
        "loss": loss,
        "kl_penalty": _kl(call, totals, by_token),
        "sampling_importance_ratio": totals.of(weights, by_sequence),
        "num_valid_samples": sample_mask.sum(),
        "positive_nll_loss": nll,
    }
    if out_of_bounds is not None:
        by_sample = config.truncated_importance_sampling_type == "seq-mask-tis"
        metrics["is_oob_ratio"] = totals.of(out_of_bounds, by_sample)
    return loss, as_floats(metrics)


class _Totals(NamedTuple):
    """The means of NeMo-RL: sums over the valid entries here, divided by the counts of the global batch."""

    weight: Tensor  # the mask of each token times that of its sample
    sample_mask: Tensor
    valid_toks: Tensor
    valid_seqs: Tensor

    def tokens(self, x: Tensor) -> Tensor:
        """Return the mean over tokens of (B, S - 1) or (B, 1) values."""
        x = torch.where(self.weight != 0, x.detach().float(), 0) * self.weight
        return x.sum() / (self.valid_toks + 1e-8)

    def sequences(self, x: Tensor) -> Tensor:
        """Return the mean over sequences of (B, 1) values, or of values that are equal along a sequence."""
        x = x[:, 0].detach().float().where(self.sample_mask != 0, 0) * self.sample_mask
        return x.sum() / (self.valid_seqs + 1e-8)

    def of(self, x: Tensor, by_sequence: bool) -> Tensor:
        return self.sequences(x) if by_sequence else self.tokens(x)


def _nll_of_right_answers(config: Any, call: LossCall, data: Any) -> Tensor:
    """Return the mean of -logp over the answers with a reward; 0 if the configuration has no such term."""
    if config.positive_example_nll_weight <= 0 or "rewards" not in data:
        return torch.zeros_like(call.out.loss)
    assert call.token_weights is not None
    right = call.mask.where((data["rewards"] > 0)[:, None], 0)
    total = (right * call.token_weights).sum()
    return LossCall(
        preset="gpg",
        average=SUM._replace(scale=1 / (total + 1e-8)),
        logps=call.logps,
        old_logps=None,
        advantages=torch.ones_like(call.logps),
        mask=right,
        token_weights=call.token_weights,
    ).out.loss


def _kl(call: LossCall, totals: _Totals, by_token: bool) -> Tensor:
    """Return the metric of the KL term, a mean over tokens or over sequences."""
    if by_token:
        return totals.tokens(call.token.kl)
    count = call.mask.sum(1, keepdim=True) + 1e-8
    return totals.sequences((call.token.kl * call.mask).sum(1, keepdim=True) / count)


def _ratios(call: LossCall, totals: _Totals) -> dict[str, Any]:
    """Return the metrics of the ratios, as they are and within the clip range."""
    ratio, bounded = call.token.ratio, call.token.bounded_ratio
    if call.objective.surrogate == "reinforce":  # no ratio: NeMo-RL reports the log-probs
        ratio = bounded = call.logps.detach()
    metrics = {}
    for name, x in (("probs_ratio", ratio), ("probs_ratio_clamped", bounded)):
        metrics[name] = totals.tokens(x)
        metrics[f"{name}_min"], metrics[f"{name}_max"] = call.extremes(x)
    return metrics


def _drift(
    kind: str, call: LossCall, old: Tensor, generated: Tensor, totals: _Totals
) -> dict[str, Any]:
    """Return the metrics of the distance between the trainer's policies and the one that generated.

    They are NeMo-RL's: its "js_divergence_error" has KL(mixture || policy), and the divergence of Jensen and
    Shannon has KL(policy || mixture).
    """
    estimator = Objective(kl=kind)  # type: ignore[arg-type]
    logps = call.logps.detach()
    mixture = (0.5 * old.exp() + 0.5 * generated.exp()).log()
    js = 0.5 * kl_estimate(mixture, old) + 0.5 * kl_estimate(mixture, generated)
    return {
        "token_mult_prob_error": totals.tokens(((generated - old).abs() * totals.weight).exp()),
        "gen_kl_error": totals.tokens(kl_estimate(generated, old, estimator)),
        "policy_kl_error": totals.tokens(kl_estimate(old, generated, estimator)),
        "js_divergence_error": totals.tokens(js),
        "approx_entropy": -totals.tokens((logps - generated).exp() * logps),
    }


def _by_token(config: Any) -> bool:
    """Read `token_level_loss`, which a `ClippedPGLossFn` keeps as `loss_type`."""
    kind = read(config, "loss_type", None)
    if kind is None:
        return bool(read(config, "token_level_loss"))
    return bool(getattr(kind, "name", kind) == "TOKEN_LEVEL")


def _penalty(config: Any) -> float:
    """Return the weight of the KL term in the loss; 0 where NeMo-RL has the KL in the rewards."""
    in_reward = read(config, "use_kl_in_reward", False)
    return 0.0 if in_reward else float(config.reference_policy_kl_penalty)  # it may be False


def _check(config: Any, data: Any, by_token: bool) -> None:
    """Refuse options with which the loss would be another one, and those that NeMo-RL refuses."""
    if _penalty(config):
        if config.reference_policy_kl_type != "k3":
            raise ValueError(
                f"reference_policy_kl_type={config.reference_policy_kl_type!r}: only k3 has NeMo-RL's "
                "gradient here"
            )
        if config.use_on_policy_kl_approximation:
            raise ValueError("use_on_policy_kl_approximation=True is not supported")
        if data.get("curr_logprobs_unfiltered") is not None:
            raise ValueError(
                "curr_logprobs_unfiltered: log-probs under top-k or top-p for the loss and without for "
                "the KL are not supported"
            )
    if config.ratio_clip_c is not None and config.disable_ppo_ratio:
        raise ValueError(
            f"ratio_clip_c={config.ratio_clip_c} is not supported with disable_ppo_ratio"
        )
    if config.sequence_level_importance_ratios and by_token:
        raise ValueError("sequence_level_importance_ratios=True needs token_level_loss=False")
    if config.use_cispo:
        others = ("disable_ppo_ratio", "force_on_policy_ratio", "sequence_level_importance_ratios")
        bad = [name for name in others if getattr(config, name)]
        bad += ["ratio_clip_c"] * (config.ratio_clip_c is not None)
        bad += ["token_level_loss=False"] * (not by_token)
        if bad:
            raise ValueError(f"use_cispo=True does not go with {', '.join(bad)}")
    _check_truncation(config)


def _check_truncation(config: Any) -> None:
    """Check the options of truncation, by NeMo-RL's own conditions."""
    name = "truncated_importance_sampling"
    kind, high, low = (getattr(config, f"{name}_{x}") for x in ("type", "ratio", "ratio_min"))
    if kind is None and high is None:
        return
    if kind not in TRUNCATIONS:
        raise ValueError(
            f"{name}_type={kind!r} with {name}_ratio={high}: choose from {', '.join(TRUNCATIONS)}"
        )
    if not config.use_importance_sampling_correction:
        raise ValueError(f"{name}_type={kind!r} needs use_importance_sampling_correction=True")
    if high is None or high <= 0:
        raise ValueError(f"{name}_ratio: want a positive number with type {kind!r}, got {high}")
    if low is None and kind != "tis":
        raise ValueError(f"{name}_ratio_min: needed with type {kind!r}")
    if low is not None and low > high:
        raise ValueError(f"{name}_ratio_min={low} is above {name}_ratio={high}")
    if kind == "seq-mask-tis" and config.sequence_level_importance_ratios:
        raise ValueError(f"{name}_type={kind!r} needs sequence_level_importance_ratios=False")


def to_preset(config: Any) -> tuple[str, dict[str, Any]]:
    """Translate NeMo-RL's options into a preset and the options that override it, without the reduction."""
    kind, table = "grpo", CLIP
    if config.use_cispo:
        kind = "cispo"
    elif config.disable_ppo_ratio and not config.force_on_policy_ratio:
        kind, table = "reinforce", {}
    elif config.sequence_level_importance_ratios and not config.force_on_policy_ratio:
        kind = "gspo"
    if config.ratio_clip_c is not None:
        table = table | DUAL
    chosen = read_options(config, table | KL)
    chosen["beta"] = _penalty(config)
    clamped = chosen["kl_gap_clip"] is not None or chosen["kl_value_clip"] is not None
    # NeMo-RL's gradient of k3 also goes through the sampling probability: it is the gradient of k2.
    chosen["kl_gradient"] = "k2_clipped" if clamped else "k2"
    return f"nemo_rl/{kind}", chosen


def _weights(
    config: Any, old: Tensor, generated: Tensor, mask: Tensor, sample_mask: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the mismatch weights, per token or (B, 1), and which of them are out of bounds (or None)."""
    level, live = "token", mask != 0
    if config.sequence_level_importance_ratios:  # NeMo-RL's sum has the masks as weights
        level, weight = "sequence", mask * sample_mask[:, None]
        old, generated = (x.where(live, 0) * weight for x in (old, generated))
    low = config.truncated_importance_sampling_ratio_min
    high = config.truncated_importance_sampling_ratio
    kind = config.truncated_importance_sampling_type

    def rho(**bounds: Any) -> Tensor:
        return importance_weights(
            old, generated, mask=live, level=level, undefined="zero", **bounds
        )

    if high is None:
        return rho(), None
    if kind == "seq-mask-tis":
        # In this mean NeMo-RL replaces differences that are not finite by 0.
        gap = torch.nan_to_num(old - generated, nan=0.0, posinf=0.0, neginf=0.0)
        mean = sequence_mean(gap, mask)[:, :1].exp()
        kept = (mean >= low) & (mean <= high)
        return rho().where(kept, 0), ~kept
    outside = rho(mode="gate", low=low, high=high) == 0
    return rho(mode="truncate" if kind == "tis" else "mask", low=low, high=high), outside
