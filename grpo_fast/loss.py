"""The losses: `grpo_loss` on logits, `policy_loss` on log-probs."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast import reference
from grpo_fast.objective import Objective
from grpo_fast.ops import _arguments
from grpo_fast.ops._backend import check_values
from grpo_fast.ops.group_advantage import check_rewards, group_advantage_fwd
from grpo_fast.ops.grpo import DESTROYED, SCORE_EPS, grpo, grpo_inplace
from grpo_fast.ops.logprob import logprob_fwd
from grpo_fast.ops.policy_loss import STATISTICS, policy_loss_fwd, token_statistics


class LossOutput(NamedTuple):
    """What a loss returns.

    Attributes:
        loss: 0-dim, differentiable.
        logps: log-probs, of the shape of the ids, detached; finite but unspecified where masked.
        entropy: the same of the entropy in nats, or None where it was not computed.
        metrics: 0-dim tensors on the device of the loss; see `metrics_from`.
        statistics: (16,) fp32, the sums the metrics come from. Gather them across ranks (one collective),
            then `metrics_from(fold_statistics(gathered))` is the metrics of the global batch.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor | None
    metrics: dict[str, Tensor]
    statistics: Tensor


class _Tokens(NamedTuple):
    """The arguments that both losses share, checked and flattened to (N,)."""

    mask: Tensor | None
    weight: Tensor
    advantages: Tensor | None
    rewards: Tensor | None
    group_size: int
    sequence: Tensor | None
    old_logp: Tensor | None
    ref_logp: Tensor | None
    importance: Tensor | None


def grpo_loss(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    advantages: Tensor | None = None,
    rewards: Tensor | None = None,
    group_size: int | None = None,
    mask: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    importance_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    objective: Objective = Objective(),
    inplace: bool = False,
) -> LossOutput:
    """The GRPO loss of a batch of completions, with its gradient computed in the same pass over the logits.

    Equivalent to `grpo_fast.reference.grpo_loss` with the same arguments, computed in float32 whatever the
    dtype of `logits`, with one tensor of the size of `logits` (their gradient), or none with `inplace`.

    Args:
        logits: (B, T, V) padded or (N, V) packed, float32, bfloat16 or float16, aligned: row t scores
            token t. The last dimension contiguous; a strided view (`logits[:, prompt - 1 : -1]`) is not
            copied.
        completion_ids: (B, T) or (N,), int32 or int64; anything where the mask is 0.
        advantages: (B,) per sequence, or per token. Or:
        rewards: (B,) with `group_size`: z-scored within groups of consecutive sequences, on the device,
            in the same launch. Across ranks use `grpo_fast.ops.group_advantage` on gathered rewards.
        mask: per token; 0 leaves a token out: nothing of it is read, it may hold NaN. Default: all count.
        old_logps: per token, of the policy that sampled. None: on policy, the ratio is 1.
        ref_logps: per token, of the reference policy; needed where `objective.beta` is not 0.
        importance_weights: (B,), (B, 1) or per token; a detached factor on the surrogate, not on the KL
            term (train/inference mismatch).
        token_weights: per token; a detached factor on everything a token contributes.
        num_items: the denominator of "token_mean", a number or 0-dim tensor; with another reduction an
            error. At least 1 is taken.
        cu_seqlens: (B + 1,) int boundaries of packed sequences. Packed tokens without it are one sequence.
        temperature: positive; a number, or one per token.
        objective: what is optimised.
        inplace: allow the logits to be overwritten with their gradient, which then needs no memory of its
            own. Afterwards they cannot be used: a gradient through them raises. Not done under
            `torch.compile`, whose memory planner decides, nor where no gradient is wanted.

    Returns:
        `LossOutput`. No host sync happens on the way. backward works once: a second one, or a double
        backward, raises.

    Raises:
        ValueError, TypeError: arguments that do not fit, by name. Values of tensors on a GPU (ids,
            `cu_seqlens`, per-token temperatures) are checked only with GRPO_FAST_VALIDATE=1.
    """
    op = "grpo_loss"
    logits3 = _arguments.check_logits(op, logits, completion_ids, "completion_ids")
    _arguments.check_device(op, "completion_ids", completion_ids, logits)
    _check_not_destroyed(logits)
    mask_flat = _arguments.check_mask(op, mask, completion_ids)
    ids = _arguments.check_ids(op, "completion_ids", completion_ids, mask_flat, logits.shape[-1])
    temperatures, inv_temperature = _arguments.check_temperature(
        op, temperature, completion_ids, mask_flat
    )
    tokens = _check_tokens(
        op,
        completion_ids,
        mask_flat,
        advantages,
        rewards,
        group_size,
        old_logps,
        ref_logps,
        importance_weights,
        token_weights,
        num_items,
        cu_seqlens,
        objective,
    )
    arguments = (ids, *tokens, temperatures, inv_temperature, objective.key)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        loss, logp, entropy, kl, clip = _forward_only(
            logits3, ids, tokens, temperatures, inv_temperature, objective
        )
    elif inplace and not torch.compiler.is_compiling():
        _check_overwritable(logits)
        loss, logp, entropy, kl, clip = grpo_inplace(logits3, *arguments)
        logits._grpo_fast_destroyed = logits._version  # type: ignore[attr-defined]
    else:
        loss, logp, entropy, kl, clip, _ = grpo(logits3, *arguments)
    has_entropy = objective.entropy_coef != 0
    return _output(
        op, completion_ids, loss, logp, entropy if has_entropy else None, kl, clip, tokens
    )


def policy_loss(
    logps: Tensor,
    *,
    advantages: Tensor,
    mask: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    importance_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    num_items: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    objective: Objective = Objective(),
) -> LossOutput:
    """`grpo_loss` from log-probs instead of logits: the same objective, by the same device code.

    Equivalent to `grpo_fast.reference.policy_loss` with the same arguments, in float32. Differentiable in
    `logps`, and in `entropy` where `objective.entropy_coef` is not 0.

    Args:
        logps: (B, T) padded or (N,) packed log-probs of the completion tokens, any floating dtype.
        entropy: per token, in nats; needed where `objective.entropy_coef` is not 0.
        advantages, mask, old_logps, ref_logps, importance_weights, token_weights, num_items, cu_seqlens,
            objective: as in `grpo_loss`.

    Returns:
        `LossOutput`; its `entropy` is the given one, detached.

    Raises:
        ValueError, TypeError: as `grpo_loss`.
    """
    op = "policy_loss"
    _arguments.check_tensor(op, "logps", logps)
    if not logps.is_floating_point():
        raise TypeError(f"{op}: logps: want a floating dtype, got {logps.dtype}")
    if logps.ndim not in (1, 2):
        raise ValueError(f"{op}: logps: want (B, T) or (N,), got {_arguments.shape_of(logps)}")
    if objective.entropy_coef and entropy is None:
        raise ValueError(
            f"{op}: entropy: needed, since objective.entropy_coef={objective.entropy_coef}"
        )
    if entropy is not None and entropy.shape != logps.shape:
        raise ValueError(
            f"{op}: entropy: want {tuple(logps.shape)}, got {_arguments.shape_of(entropy)}"
        )
    mask_flat = _arguments.check_mask(op, mask, logps)
    tokens = _check_tokens(
        op,
        logps,
        mask_flat,
        advantages,
        None,
        None,
        old_logps,
        ref_logps,
        importance_weights,
        token_weights,
        num_items,
        cu_seqlens,
        objective,
    )
    logp = logps.reshape(-1).float()
    flat_entropy = None if entropy is None else entropy.reshape(-1).float()
    loss, kl, clip = _policy(logp, flat_entropy, tokens, objective)
    return _output(op, logps, loss, logp.detach(), flat_entropy, kl, clip, tokens)


def _policy(
    logp: Tensor, entropy: Tensor | None, tokens: _Tokens, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """(weighted loss, KL, clip flags) of (N,) log-probs."""
    assert tokens.advantages is not None
    loss, _, kl, clip = policy_loss_fwd(
        logp,
        tokens.mask,
        tokens.weight,
        tokens.advantages,
        tokens.old_logp,
        tokens.ref_logp,
        tokens.importance,
        objective.key,
    )
    if objective.entropy_coef:
        assert entropy is not None
        # The weight is 0 where a token is masked; select, since its entropy may be NaN there.
        bonus = torch.where(tokens.weight == 0, 0, entropy)
        loss = loss - objective.entropy_coef * tokens.weight * bonus
    return loss, kl, clip


def _forward_only(
    logits: Tensor,
    ids: Tensor,
    tokens: _Tokens,
    temperature: Tensor | None,
    inv_temperature: float,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The values of `grpo` without a gradient: one read of the logits, nothing of their size written."""
    logp, entropy, _, _ = logprob_fwd(
        logits, ids, tokens.mask, temperature, inv_temperature, objective.entropy_coef != 0
    )
    if tokens.advantages is None:
        assert tokens.rewards is not None
        score = group_advantage_fwd(
            tokens.rewards, tokens.group_size, None, "group", SCORE_EPS, True
        )
        if tokens.sequence is not None:
            score = score[tokens.sequence]
        else:
            score = score[:, None].expand(logits.shape[:2]).reshape(-1)
        tokens = tokens._replace(advantages=score)
    loss, kl, clip = _policy(logp, entropy, tokens, objective)
    return loss, logp, entropy, kl, clip


def _output(
    op: str,
    like: Tensor,
    loss: Tensor,
    logp: Tensor,
    entropy: Tensor | None,
    kl: Tensor,
    clip: Tensor,
    tokens: _Tokens,
) -> LossOutput:
    entropy = None if entropy is None else entropy.detach()
    statistics = token_statistics(
        tokens.mask,
        loss.detach(),
        logp,
        tokens.old_logp,
        tokens.importance,
        kl if tokens.ref_logp is not None else None,
        entropy,
        clip,
    )
    metrics = metrics_from(statistics)
    if tokens.ref_logp is None:
        del metrics["kl"]
    if entropy is None:
        del metrics["entropy"]
    shaped = None if entropy is None else entropy.view(like.shape)
    return LossOutput(loss.sum(), logp.view(like.shape), shaped, metrics, statistics)


def fold_statistics(gathered: Tensor) -> Tensor:
    """The statistics of the union of several micro-batches or ranks: (n, 16) -> (16,).

    The "loss" entry is summed, like the gradients of losses normalised by a common `num_items`.
    """
    if gathered.ndim != 2 or gathered.shape[1] != len(STATISTICS):
        raise ValueError(
            f"fold_statistics: gathered: want (n, {len(STATISTICS)}), "
            f"got {_arguments.shape_of(gathered)}"
        )
    return torch.cat(
        [gathered[:, :-2].sum(0), gathered[:, -2].amin(0, True), gathered[:, -1].amax(0, True)]
    )


def metrics_from(statistics: Tensor) -> dict[str, Tensor]:
    """The metrics of a step from its statistics: means over live tokens, all finite, also without any.

    tokens; ratio_mean, ratio_min, ratio_max (1 without a live token); clip_fraction_low (ratio below the
    range where A < 0), clip_fraction_high (above it where A > 0), clip_fraction_dual (above `delta` or
    `dual_clip` where A < 0); approx_kl_k1 = E[old - new], approx_kl_k3 = E[r - 1 - log r]; kl (to the
    reference, by the objective's estimator; only with `ref_logps`); entropy (where computed);
    importance_weight_mean; importance_weight_out_of_range: share of weights outside [1/2, 2];
    effective_sample_size: (sum rho)^2 / (n sum rho^2) in (0, 1], rho = ratio * importance weight.

    Args:
        statistics: (16,), from `LossOutput.statistics` or `fold_statistics`.
    """
    s = dict(zip(STATISTICS, statistics.unbind(), strict=True))
    tokens = s["tokens"]
    count = tokens.clamp(min=1)
    empty = tokens == 0
    return {
        "tokens": tokens,
        "ratio_mean": torch.where(empty, 1, s["ratio"] / count),
        "ratio_min": torch.where(empty, 1, s["ratio_min"]),
        "ratio_max": torch.where(empty, 1, s["ratio_max"]),
        "clip_fraction_low": s["clip_low"] / count,
        "clip_fraction_high": s["clip_high"] / count,
        "clip_fraction_dual": s["clip_dual"] / count,
        "approx_kl_k1": s["k1"] / count,
        "approx_kl_k3": s["k3"] / count,
        "kl": s["kl"] / count,
        "entropy": s["entropy"] / count,
        "importance_weight_mean": torch.where(empty, 1, s["importance"] / count),
        "importance_weight_out_of_range": s["importance_outside"] / count,
        "effective_sample_size": torch.where(
            s["rho_squared"] == 0,
            empty.to(count.dtype),
            s["rho"].square() / (count * s["rho_squared"]).clamp(min=1e-30),
        ),
    }


def _check_tokens(
    op: str,
    like: Tensor,
    mask: Tensor | None,
    advantages: Tensor | None,
    rewards: Tensor | None,
    group_size: int | None,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    importance_weights: Tensor | None,
    token_weights: Tensor | None,
    num_items: float | Tensor | None,
    cu_seqlens: Tensor | None,
    objective: Objective,
) -> _Tokens:
    """Check what the losses share; `like` has one entry per token."""
    if not isinstance(objective, Objective):
        raise TypeError(f"{op}: objective: want an Objective, got {objective!r}")
    if cu_seqlens is not None:
        cu_seqlens = _arguments.check_cu_seqlens(op, cu_seqlens, like)
    sequence = None if cu_seqlens is None else reference.sequence_of_token(cu_seqlens, len(like))
    # Packed tokens without boundaries are one sequence.
    rows = like[None] if like.ndim == 1 and cu_seqlens is None else like
    num_sequences = len(rows) if cu_seqlens is None else len(cu_seqlens) - 1
    if (advantages is None) == (rewards is None):
        raise ValueError(
            f"{op}: give either advantages or rewards with group_size, "
            f"got {'neither' if advantages is None else 'both'}"
        )
    if rewards is not None:
        if group_size is None:
            raise ValueError(f"{op}: group_size: needed with rewards")
        rewards = check_rewards(op, rewards, group_size)
        _check_shape(op, "rewards", rewards, ((num_sequences,),))
        _arguments.check_device(op, "rewards", rewards, like)
    elif group_size is not None:
        raise ValueError(f"{op}: group_size={group_size} has no effect with advantages")
    if objective.beta and ref_logps is None:
        raise ValueError(f"{op}: ref_logps: needed, since objective.beta={objective.beta}")

    def spread(name: str, x: Tensor | None) -> Tensor | None:
        """A per-sequence or per-token argument as (N,)."""
        if x is None:
            return None
        _arguments.check_tensor(op, name, x)
        shapes = ((num_sequences,), (num_sequences, 1), tuple(like.shape))
        _check_shape(op, name, x, shapes if name != "advantages" else shapes[::2])
        if x.shape != like.shape:
            _arguments.check_device(op, name, x, like)
            x = x.reshape(-1)
            x = x[:, None].expand(rows.shape) if sequence is None else x[sequence]
            x = x.reshape(like.shape)
        return _arguments.per_token(op, name, x, like)

    live = torch.ones(like.numel(), dtype=torch.bool, device=like.device) if mask is None else mask
    weight = reference.reduction_weights(
        live.view(rows.shape), objective, _check_num_items(op, num_items, objective), cu_seqlens
    ).reshape(-1)
    if token_weights is not None:
        extra = _arguments.per_token(op, "token_weights", token_weights, like)
        assert extra is not None
        weight = torch.where(live, weight * extra, 0)
    return _Tokens(
        mask,
        weight.expand(like.numel()).contiguous(),
        spread("advantages", advantages),
        rewards,
        group_size or 1,
        sequence,
        _arguments.per_token(op, "old_logps", old_logps, like),
        _arguments.per_token(op, "ref_logps", ref_logps, like),
        spread("importance_weights", importance_weights),
    )


def _check_shape(op: str, name: str, x: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if tuple(x.shape) not in shapes:
        wanted = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{op}: {name}: want {wanted}, got {_arguments.shape_of(x)}")


def _check_num_items(
    op: str, num_items: float | Tensor | None, objective: Objective
) -> float | Tensor | None:
    if num_items is None:
        return None
    if objective.reduction != "token_mean":
        raise ValueError(
            f"{op}: num_items is the denominator of reduction='token_mean' and has no effect with "
            f"{objective.reduction!r}"
        )
    if isinstance(num_items, Tensor):
        if num_items.ndim:
            raise ValueError(
                f"{op}: num_items: want a number or a 0-dim tensor, got {_arguments.shape_of(num_items)}"
            )
        if not check_values(num_items):
            return num_items.detach()
        num_items = num_items.item()
    if isinstance(num_items, bool) or not isinstance(num_items, (int, float)):
        raise TypeError(f"{op}: num_items: want a number or a 0-dim tensor, got {num_items!r}")
    if not 0 <= num_items < math.inf:
        raise ValueError(f"{op}: num_items: want a finite number >= 0, got {num_items}")
    return num_items


def _check_not_destroyed(logits: Tensor) -> None:
    # Autograd notices a reuse that asks for a gradient; this one also notices the others.
    if getattr(logits, "_grpo_fast_destroyed", None) == logits._version:
        raise RuntimeError(DESTROYED)


def _check_overwritable(logits: Tensor) -> None:
    if logits.is_leaf:
        raise ValueError(
            "grpo_loss: inplace=True would overwrite a leaf tensor that requires grad; "
            "pass logits that an operation computed, or inplace=False"
        )
    if torch._debug_has_internal_overlap(logits) == 1:
        raise ValueError(
            f"grpo_loss: inplace=True needs logits whose rows do not overlap, got strides {logits.stride()}"
        )
