"""slime (August 2026): its policy loss, by this library.

    --loss-type custom_loss --custom-loss-function-path grpo_fast.integrations.slime.policy_loss

with all other options as they are: `--advantage-estimator`, clipping, KL, entropy, OPSM, TIS. Without tensor
or context parallelism and top-p replay, the loss and its gradient are one pass over the logits, which are
overwritten with it unless `--recompute-loss-function`; otherwise log-probs are slime's own and the loss is
computed from those.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from grpo_fast import reference
from grpo_fast.loss import LossOutput, grpo_loss
from grpo_fast.loss import policy_loss as loss_of_log_probs
from grpo_fast.objective import Objective
from grpo_fast.ops.policy_loss import kl_terms

LOSS = "slime.backends.megatron_utils.loss"


def policy_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's `policy_loss_function`.

    Returns:
        The loss, and slime's metrics of it, detached; "entropy_loss" where the entropy is computed, which on
        the fused path it is for an `entropy_coef` other than 0 alone.

    Raises:
        ValueError: options that cannot be the same here.
        ImportError: Megatron or slime is missing where it is needed.
    """
    objective = to_objective(args)
    mpu = _import("megatron.core").mpu
    ranks = (mpu.get_tensor_model_parallel_world_size(), mpu.get_context_parallel_world_size())
    if ranks[1] > 1 and objective.needs_sequences:
        raise ValueError(
            f"context parallelism ({ranks[1]} ranks) splits sequences, which "
            f"{'OPSM' if objective.ratio == 'token' else args.advantage_estimator} needs whole"
        )
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    sampled = batch.get("rollout_log_probs")
    metrics: dict[str, Tensor] = {}
    importance, reduce = None, sum_of_sample_mean
    if args.use_tis or args.get_mismatch_metrics:
        importance, reduce, corrected = _correct(args, batch)
        # Of all tokens, those that are rejected too.
        metrics = {name: sum_of_sample_mean(x) for name, x in corrected.items()}
    tokens: dict[str, Any] = {
        "advantages": torch.cat(batch["advantages"]),
        "old_logps": torch.cat(old) if old else None,
        "ref_logps": torch.cat(batch["ref_log_probs"]) if args.use_kl_loss else None,
        "importance_weights": importance,
        "token_weights": _weights(reduce, torch.cat(batch["advantages"])),
    }
    mask = _local_mask(batch, tokens["token_weights"], ranks[1])
    fused = ranks == (1, 1) and getattr(args, "rollout_top_p", 1.0) == 1.0
    out = (_from_logits if fused else _from_log_probs)(
        args, batch, logits, objective, mask, {k: x for k, x in tokens.items() if x is not None}
    )
    own, ratio = _metrics(args, batch, out, objective, tokens, mask, reduce)
    if importance is not None:
        metrics["ois"] = sum_of_sample_mean(ratio)
    if sampled:
        old_logp = tokens["old_logps"]
        compared = out.logps if args.use_rollout_logprobs or old_logp is None else old_logp
        own["train_rollout_logprob_abs_diff"] = reduce((compared - torch.cat(sampled)).abs())
    return out.loss, own | metrics


def to_objective(args: Any) -> Objective:
    """slime's arguments as an objective; the weights of its sum are `token_weights`."""
    if getattr(args, "custom_pg_loss_reducer_function_path", None) is not None:
        raise ValueError("custom_pg_loss_reducer_function_path is not supported")
    kind = args.advantage_estimator if args.advantage_estimator in ("gspo", "cispo") else "grpo"
    high = args.eps_clip if args.eps_clip_high is None else args.eps_clip_high
    options: dict[str, Any] = {
        "reduction": "token_mean",
        "epsilon_low": args.eps_clip,
        "epsilon_high": high,
        "entropy_coef": args.entropy_coef,
    }
    if kind != "cispo" and args.eps_clip_c is not None:
        options["dual_clip"] = args.eps_clip_c
    if args.use_opsm:
        options["off_policy_threshold"] = args.opsm_delta
    if args.use_kl_loss:
        name, unbiased = args.kl_loss_type, args.use_unbiased_kl
        if unbiased and (name != "k3" or kind == "gspo"):
            raise ValueError(
                f"use_unbiased_kl with kl_loss_type={name!r} and advantage_estimator="
                f"{args.advantage_estimator!r} is not supported: want k3 and a ratio per token"
            )
        options |= {"beta": args.kl_loss_coef, "kl": "k3_unbiased" if unbiased else name}
        if name == "low_var_kl":
            options |= {"kl": "k3", "kl_value_clip": 10.0}
    return Objective.preset(f"slime/{kind}", **options)


def _from_logits(
    args: Any,
    batch: dict[str, Any],
    logits: Tensor,
    objective: Objective,
    mask: Tensor,
    tokens: dict[str, Any],
) -> LossOutput:
    """One pass over (1, T, V) logits: prompts are masked rows, a response's scores begin one before it."""
    rows, start = [], 0
    for total, response in zip(batch["total_lengths"], batch["response_lengths"], strict=True):
        rows.append(torch.arange(start + total - response - 1, start + total - 1))
        start += total
    T, device = logits.shape[1], logits.device
    where = torch.cat(rows).to(device, non_blocking=True)
    boundaries = torch.tensor([0, *batch["total_lengths"], T - start]).cumsum(0)
    targets = zip(batch["unconcat_tokens"], batch["response_lengths"], strict=True)

    def spread(x: Tensor) -> Any:
        return x.new_zeros(T).index_copy(0, where, x)

    out = grpo_loss(
        logits[0],
        spread(torch.cat([tokens_[len(tokens_) - n :] for tokens_, n in targets]).to(device)),
        mask=spread(mask),
        cu_seqlens=boundaries.to(device, non_blocking=True),
        temperature=getattr(args, "rollout_temperature", 1.0),
        num_items=1.0,
        objective=objective,
        inplace=not args.recompute_loss_function and not logits.is_leaf,
        **{name: spread(x) for name, x in tokens.items()},
    )
    entropy = None if out.entropy is None else out.entropy[where]
    return out._replace(logps=out.logps[where], entropy=entropy)


def _from_log_probs(
    args: Any,
    batch: dict[str, Any],
    logits: Tensor,
    objective: Objective,
    mask: Tensor,
    tokens: dict[str, Any],
) -> LossOutput:
    """From slime's own log-probs, which know its parallelism."""
    home = _import(LOSS)
    _, scored = home.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=True,
        **home.get_rollout_top_p_logprob_kwargs(args, batch),
    )
    logps, entropy = torch.cat(scored["log_probs"]), torch.cat(scored["entropy"])
    lengths = torch.tensor([0, *map(len, scored["log_probs"])]).cumsum(0)
    out = loss_of_log_probs(
        logps,
        mask=mask,
        entropy=entropy if objective.needs_entropy else None,
        cu_seqlens=lengths.to(logps.device, non_blocking=True),
        num_items=1.0,
        objective=objective,
        **tokens,
    )
    loss = out.loss if logps.numel() else out.loss + 0 * logits.sum()
    return out._replace(loss=loss, entropy=entropy.detach())


def _weights(reduce: Any, like: Tensor) -> Tensor:
    """What a reducer, which is linear, multiplies each token with."""
    with torch.enable_grad():
        probe = torch.zeros_like(like, dtype=torch.float32, requires_grad=True)
        (weights,) = torch.autograd.grad(reduce(probe), probe, materialize_grads=True)
    return weights


def _local_mask(batch: dict[str, Any], weights: Tensor, cp_size: int) -> Tensor:
    """Which response tokens count; with context parallelism those of this rank."""
    return weights != 0 if cp_size > 1 else torch.cat(batch["loss_masks"]) != 0


def _correct(args: Any, batch: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Tensor]]:
    """(importance weights, reducer, metrics) of slime's or the user's TIS function."""
    if not batch.get("log_probs"):
        raise ValueError("use_tis: batch['log_probs'], the trainer's old log-probs, are needed")
    home = _import(LOSS)
    path = args.custom_tis_function_path
    function = home.vanilla_tis_function if path is None else home.load_function(path)
    ones = torch.ones_like(torch.cat(batch["log_probs"]))
    weights, masks, metrics = function(
        args=args,
        pg_loss=ones,
        train_log_probs=batch["log_probs"],
        rollout_log_probs=batch["rollout_log_probs"],
        loss_masks=batch["loss_masks"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
    )
    reduce = home.get_sum_of_sample_mean(
        batch["total_lengths"],
        batch["response_lengths"],
        masks,
        batch["rollout_mask_sums"],
        args.calculate_per_token_loss,
    )
    return weights.detach(), reduce, metrics


@torch.no_grad()
def _metrics(
    args: Any,
    batch: dict[str, Any],
    out: LossOutput,
    objective: Objective,
    tokens: dict[str, Any],
    mask: Tensor,
    reduce: Any,
) -> tuple[dict[str, Tensor], Tensor]:
    """(slime's metrics of the loss, the ratio of each token)."""
    logp, A = out.logps, tokens["advantages"]
    old = logp if tokens["old_logps"] is None else tokens["old_logps"]
    d = torch.where(mask, logp - old, 0)
    if objective.ratio == "sequence" or args.use_opsm:
        lengths = torch.tensor([0, *batch["response_lengths"]]).cumsum(0).to(d.device)
        by_sequence = reference.sequence_mean(d, mask, lengths)
        if objective.ratio == "sequence":
            d = by_sequence
    ratio = d.exp()
    below, above = ratio < 1 - objective.epsilon_low, ratio > 1 + objective.epsilon_high
    clipped = below | above
    if objective.surrogate == "clip":
        clipped = (below & (A < 0)) | (above & (A > 0))
    metrics = {"loss": out.loss.detach(), "pg_loss": out.loss.detach()}
    if out.entropy is not None:
        metrics["entropy_loss"] = reduce(out.entropy)
        metrics["pg_loss"] = metrics["pg_loss"] + objective.entropy_coef * metrics["entropy_loss"]
    metrics |= {"pg_clipfrac": reduce(clipped.float()), "ppo_kl": reduce(-d)}
    if args.use_kl_loss:
        ref = torch.where(mask, tokens["ref_logps"], logp)
        metrics["kl_loss"] = reduce(kl_terms(logp, ref, ratio, objective)[0])
        metrics["pg_loss"] = metrics["pg_loss"] - objective.beta * metrics["kl_loss"]
    if args.use_opsm:
        dropped = ((A < 0) & (-by_sequence > args.opsm_delta)).float()
        count = reference.sequence_sum(torch.ones_like(dropped), mask, lengths).clamp(min=1)
        metrics["opsm_clipfrac"] = (dropped / count).sum()
    if batch.get("opd_reverse_kl"):
        metrics["opd_reverse_kl"] = reduce(torch.cat(batch["opd_reverse_kl"]))
    return metrics, ratio


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this needs slime of August 2026 or later on Megatron-LM: no module {name}"
        ) from error
