"""The losses: `grpo_loss` on logits, `linear_grpo_loss` on hidden states, `policy_loss` on log-probs."""

import torch
from torch import Tensor

from grpo_fast._linear_loss import linear_grpo_loss
from grpo_fast._output import LossOutput, loss_output, policy_of_logps
from grpo_fast.objective import Objective
from grpo_fast.ops import _arguments
from grpo_fast.ops._metrics import fold_statistics, metrics_from
from grpo_fast.ops._tokens import Sequences, Tokens, check_tokens
from grpo_fast.ops.group_advantage import group_advantage_fwd
from grpo_fast.ops.grpo import DESTROYED, SCORE_EPS, grpo, grpo_inplace, spread
from grpo_fast.ops.logprob import logprob_fwd

__all__ = [
    "LossOutput",
    "fold_statistics",
    "grpo_loss",
    "linear_grpo_loss",
    "metrics_from",
    "policy_loss",
]


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
            `torch.compile`, whose memory planner decides, by objectives that look at whole sequences
            (`objective.needs_sequences`), nor where no gradient is wanted.

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
    tokens, sequences = check_tokens(
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
    with_grad = torch.is_grad_enabled() and logits.requires_grad
    if objective.needs_sequences or not with_grad:
        loss, logp, entropy, kl, clip = _from_log_probs(
            logits3, ids, tokens, sequences, temperatures, inv_temperature, objective
        )
    elif inplace and not torch.compiler.is_compiling():
        _check_overwritable(logits)
        loss, logp, entropy, kl, clip = grpo_inplace(logits3, *arguments)
        logits._grpo_fast_destroyed = logits._version  # type: ignore[attr-defined]
    else:
        loss, logp, entropy, kl, clip, _ = grpo(logits3, *arguments)
    has_entropy = objective.entropy_coef != 0
    return loss_output(
        completion_ids, loss, logp, entropy if has_entropy else None, kl, clip, tokens
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
    tokens, sequences = check_tokens(
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
    loss, kl, clip = policy_of_logps(logp, flat_entropy, tokens, sequences, objective)
    return loss_output(logps, loss, logp.detach(), flat_entropy, kl, clip, tokens)


def _from_log_probs(
    logits: Tensor,
    ids: Tensor,
    tokens: Tokens,
    sequences: Sequences,
    temperature: Tensor | None,
    inv_temperature: float,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The values of `grpo` by way of the log-probs.

    Where a token's coefficient depends on its whole sequence, this is the way: one read for the log-probs,
    the objective, and one read and write for the gradient in the backward. Without a gradient it reads once
    and writes nothing of the logits' size.
    """
    logp, entropy, _, _ = logprob_fwd(
        logits, ids, tokens.mask, temperature, inv_temperature, objective.entropy_coef != 0
    )
    if tokens.advantages is None:
        assert tokens.rewards is not None
        score = group_advantage_fwd(
            tokens.rewards, tokens.group_size, None, "group", SCORE_EPS, True
        )
        tokens = tokens._replace(advantages=spread(score, tokens.sequence, logits))
    loss, kl, clip = policy_of_logps(logp, entropy, tokens, sequences, objective)
    return loss, logp.detach(), entropy, kl, clip


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
