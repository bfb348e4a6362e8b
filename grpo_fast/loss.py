"""The losses: `grpo_loss` on logits, `linear_grpo_loss` on hidden states, `policy_loss` on log-probs."""

import torch
from torch import Tensor

from grpo_fast import _overwritten
from grpo_fast._linear_loss import linear_grpo_loss
from grpo_fast._names import keywords_explained
from grpo_fast._operands import Terms, operand
from grpo_fast._output import LossOutput, loss_output
from grpo_fast.objective import OPTIONS, Objective
from grpo_fast.ops import _arguments, _phases
from grpo_fast.ops._autograd import anchors_of, once_differentiable
from grpo_fast.ops._metrics import fold_statistics, metrics_from
from grpo_fast.ops._tokens import Sequences, Tokens, check_objective, check_tokens
from grpo_fast.ops.group_advantage import group_advantage_fwd
from grpo_fast.ops.grpo import (
    SCORE_EPS,
    Arguments,
    grpo,
    grpo_inplace,
    spread,
)
from grpo_fast.ops.logprob import logprob_fwd

__all__ = [
    "LossOutput",
    "fold_statistics",
    "grpo_loss",
    "linear_grpo_loss",
    "metrics_from",
    "policy_loss",
]


@keywords_explained(OPTIONS)
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
    scores: Tensor | None = None,
    num_items: float | Tensor | None = None,
    loss_scale: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    objective: Objective = Objective(),
    return_entropy: bool = False,
    inplace: bool = False,
) -> LossOutput:
    """The GRPO loss of a batch of completions, with its gradient computed in the same pass over the logits.

    Equivalent to `grpo_fast.reference.grpo_loss` with the same arguments, computed in float32 whatever the
    dtype of `logits`. It makes one tensor of the size of `logits`, their gradient, or none with `inplace`.
    Autograd adds its own: the backward of a slice makes a tensor of the size of what was sliced. Let the head
    compute only the rows that are scored (`logits_to_keep=` in transformers) to avoid that.

    Args:
        logits: (B, T, V) padded or (N, V) packed, float32, bfloat16 or float16, aligned: row t scores
            token t. The last dimension contiguous; a strided view (`logits[:, prompt - 1 : -1]`) is not
            copied by this function. Their gradient is stored in their dtype before the upstream gradient
            is applied. An upstream gradient other than 1 costs a read and a write of all of it, more than
            half of what the loss itself takes, and rounds it again: pass factors as `loss_scale`.
        completion_ids: (B, T) or (N,), int32 or int64; anything where the mask is 0.
        advantages: (B,) or (B, 1) per sequence, or per token. Or:
        rewards: (B,) or (B, 1) with `group_size` of at least 2: z-scored within groups of consecutive
            sequences, on the device, in the same launch. Across ranks use
            `grpo_fast.ops.group_advantage` on gathered rewards.
        mask: per token; 0 leaves a token out: nothing of it is read, it may hold NaN. Default: all count.
            A floating mask weighs: m_t multiplies what a token adds to a sum, and the denominators are sums
            of m_t: of reductions, of means over a sequence (GSPO), of the metrics. Of bools and integers
            any nonzero value is 1. An additive attention mask (0 and -inf) is an error: pass `mask == 0`.
        old_logps: per token, of the policy that sampled. None: on policy, the ratio is 1. It and `ref_logps`
            are constants, detached here if they come with a graph: no gradient flows through them.
        ref_logps: per token, of the reference policy; needed where `objective.beta` is not 0.
        importance_weights: (B,), (B, 1) or per token; a detached factor on the surrogate, not on the KL
            term (train/inference mismatch). Where it is 0 the surrogate is left out, even if it is
            infinite or NaN.
        token_weights: per token; a detached factor on everything a token contributes. Where it is 0 the
            token is left out, even if its loss is infinite or NaN.
        scores: "topr" only: (B,), (B, 1) or per token, what was scored before any baseline; its sign decides.
            Default: the rewards, or else the advantages.
        num_items: the denominator of "token_mean", a number or 0-dim tensor; with another reduction an
            error. At least 1 is taken.
        loss_scale: a factor on the loss and its gradient, at no cost: a share of the micro-batch, the number
            of ranks, the scale of a GradScaler. A finite number, or a 0-dim tensor on the CPU or the device
            of `logits`, read without a host sync. It may be negative; 0 leaves out all tokens. It is applied
            before the gradient is rounded to the dtype of `logits`, which keeps float16 from underflow. All
            of the loss is scaled, KL and entropy terms too; `LossOutput.loss` is the scaled loss, and so is
            "loss" in `statistics`. The metrics and all other statistics do not change.
        cu_seqlens: (B + 1,) int boundaries of packed sequences. Packed tokens without it are one sequence.
            With B = N, and not one token in each sequence, (N,) may be per token or per sequence, and is
            refused: (B, 1) is per sequence.
        temperature: positive; a number, or one per token.
        objective: what is optimised.
        return_entropy: compute the entropy, for `LossOutput.entropy` and the metrics, also where the
            objective does not need it.
        inplace: allow the logits to be overwritten with their gradient, which then needs no memory of its
            own. Afterwards they cannot be used, nor their base, views, `detach()` and `.data`: a gradient
            through them raises, and so do this library's functions. PyTorch's own functions cannot be
            kept from reading: `logits.argmax(-1)`, or an entropy under `torch.no_grad()`, is then that of
            the gradient, without an error. Compute such metrics before, or use `LossOutput`.
            Not done under `torch.compile`, whose memory planner decides, nor where no gradient is wanted.
            Objectives that are not `objective.by_token` then read the logits once more, unless they are on
            policy.

    Returns:
        `LossOutput`. No host sync happens on the way. backward works once: a second one, or a second
        derivative, raises.

    Raises:
        ValueError, TypeError: arguments that do not fit, by name; advantages, rewards, weights, scores,
            `num_items`, `loss_scale` and temperatures that require grad, which none reaches. Values of
            tensors on a GPU (ids, `cu_seqlens`, per-token temperatures) are checked only with
            GRPO_FAST_VALIDATE=1. Without it, an id outside the vocabulary or a negative weight in a mask
            makes the loss NaN there.
    """
    op = "grpo_loss"
    check_objective(op, objective)
    rewards = _arguments.one_per_sequence(rewards)
    logits3 = _arguments.check_logits(op, logits, completion_ids, "completion_ids")
    _arguments.check_device(op, "completion_ids", completion_ids, logits)
    mask_flat = _arguments.check_mask(op, mask, completion_ids)
    ids = _arguments.check_ids(op, "completion_ids", completion_ids, mask_flat, logits.shape[-1])
    temperatures, inv_temperature = _arguments.check_temperature(
        op, temperature, completion_ids, mask_flat
    )
    tokens, sequences = check_tokens(
        op,
        completion_ids,
        mask_flat,
        _arguments.floating_mask(mask, completion_ids),
        advantages,
        rewards,
        group_size,
        old_logps,
        ref_logps,
        importance_weights,
        token_weights,
        scores,
        num_items,
        cu_seqlens,
        loss_scale,
        objective,
    )
    with_grad = torch.is_grad_enabled() and logits.requires_grad
    inplace = inplace and with_grad and not torch.compiler.is_compiling()
    if inplace:
        _overwritten.check_overwritable(op, logits)
    anchors = anchors_of(logits)
    return_entropy = return_entropy or objective.needs_entropy
    rest = (temperatures, inv_temperature, objective.terms, return_entropy, inplace)
    if objective.by_token and with_grad:
        loss, logp, entropy, kl, clip = _by_launch(logits3, ids, tokens, *rest)
    else:
        loss, logp, entropy, kl, clip = _by_phases(logits3, ids, tokens, sequences, *rest)
    loss = once_differentiable(op, loss, anchors)
    if inplace:
        _overwritten.mark(logits)
    return loss_output(
        *(completion_ids, loss, logp, entropy if return_entropy else None, kl, clip),
        *(tokens, sequences.share),
    )


@keywords_explained(OPTIONS)
def policy_loss(
    logps: Tensor,
    *,
    advantages: Tensor,
    mask: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    importance_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    scores: Tensor | None = None,
    entropy: Tensor | None = None,
    num_items: float | Tensor | None = None,
    loss_scale: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    objective: Objective = Objective(),
) -> LossOutput:
    """`grpo_loss` from log-probs instead of logits: the same objective, by the same device code.

    Equivalent to `grpo_fast.reference.policy_loss` with the same arguments, in float32. Differentiable in
    `logps`, and in `entropy` where `objective.entropy_coef` is not 0.

    Args:
        logps: (B, T) padded or (N,) packed log-probs of the completion tokens, any floating dtype.
        entropy: per token, in nats; needed where `objective.needs_entropy`.
        advantages, mask, old_logps, ref_logps, importance_weights, token_weights, scores, num_items,
            loss_scale, cu_seqlens, objective: as in `grpo_loss`: constants, `old_logps=logps` too.

    Returns:
        `LossOutput`; its `entropy` is the given one, detached.

    Raises:
        ValueError, TypeError: as `grpo_loss`.
    """
    op = "policy_loss"
    check_objective(op, objective)
    _arguments.check_tensor(op, "logps", logps)
    _arguments.check_no_tangent(op, "logps", logps)
    if not logps.is_floating_point():
        raise TypeError(f"{op}: logps: want a floating dtype, got {logps.dtype}")
    if logps.ndim not in (1, 2):
        raise ValueError(f"{op}: logps: want (B, T) or (N,), got {_arguments.shape_of(logps)}")
    if objective.needs_entropy and entropy is None:
        name = "entropy_coef" if objective.terms.modes.has_bonus else "top_entropy_quantile"
        raise ValueError(
            f"{op}: entropy: needed, since objective.{name}={getattr(objective, name)}"
        )
    if entropy is not None:
        _arguments.check_tensor(op, "entropy", entropy)
        _arguments.check_no_tangent(op, "entropy", entropy)
        if entropy.shape != logps.shape:
            raise ValueError(
                f"{op}: entropy: want {tuple(logps.shape)}, got {_arguments.shape_of(entropy)}"
            )
        _arguments.check_device(op, "entropy", entropy, logps)
    mask_flat = _arguments.check_mask(op, mask, logps)
    tokens, sequences = check_tokens(
        op,
        logps,
        mask_flat,
        _arguments.floating_mask(mask, logps),
        advantages,
        None,
        None,
        old_logps,
        ref_logps,
        importance_weights,
        token_weights,
        scores,
        num_items,
        cu_seqlens,
        loss_scale,
        objective,
    )
    logp = logps.reshape(-1).float().contiguous()
    flat_entropy = None if entropy is None else entropy.reshape(-1).float().contiguous()
    found = _phases.values(logp, flat_entropy, tokens, sequences, objective.terms)
    loss = once_differentiable(op, found.loss, anchors_of(logps, entropy))
    return loss_output(
        *(logps, loss, logp.detach(), flat_entropy, found.kl, found.clip),
        *(tokens, sequences.share),
    )


def _by_launch(
    logits: Tensor,
    ids: Tensor,
    tokens: Tokens,
    temperature: Tensor | None,
    inv_temperature: Tensor,
    terms: Terms,
    return_entropy: bool,
    inplace: bool,
    coefficient: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(weighted loss, log-probs, entropy, KL, clip flags), and the gradient, from one launch.

    coefficient: of the surrogate, where it is known beforehand.
    """
    if coefficient is not None:
        tokens, terms = _phases.without_surrogate(tokens, terms)
    arguments = Arguments(
        ids=ids,
        coefficient=coefficient,
        temperature=temperature,
        inv_temperature=inv_temperature,
        return_entropy=return_entropy,
        modes=terms.modes.key,
        numbers=terms.numbers,
        **tokens._asdict(),
    )
    return (grpo_inplace if inplace else grpo)(logits, *arguments)[:5]


def _by_phases(
    logits: Tensor,
    ids: Tensor,
    tokens: Tokens,
    sequences: Sequences,
    temperature: Tensor | None,
    inv_temperature: Tensor,
    terms: Terms,
    return_entropy: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same where a token's coefficient depends on others, or no gradient is wanted.

    On policy, one launch. In place, one read for the log-probs before it. Otherwise one read for the
    log-probs, and one read and write for the gradient in the backward. Without a gradient, one read.
    """
    if tokens.advantages is None:
        assert tokens.rewards is not None
        score = group_advantage_fwd(
            tokens.rewards, tokens.group_size, None, "group", operand(SCORE_EPS), True
        )
        tokens = tokens._replace(advantages=spread(score, tokens.sequence, logits))
    rest = (temperature, inv_temperature)
    with_grad = torch.is_grad_enabled() and logits.requires_grad
    coefficient = None
    if with_grad:
        coefficient = _phases.coefficient_on_policy(tokens, sequences, terms)
    if coefficient is not None:
        launched, logp, entropy, _, _ = _by_launch(
            logits, ids, tokens, *rest, terms, return_entropy, inplace, coefficient
        )
        with torch.no_grad():
            found = _phases.values(logp, entropy, tokens, sequences, terms)
        loss = _phases.WithGradientOf.apply(launched, found.loss)
        return loss, logp, entropy, found.kl, found.clip
    with torch.set_grad_enabled(with_grad and not inplace):
        logp, entropy, _, _ = logprob_fwd(logits, ids, tokens.mask, *rest, return_entropy)
        found = _phases.values(logp, entropy, tokens, sequences, terms)
    loss = found.loss
    if with_grad and inplace:
        known = tokens._replace(ref_logp=None, entropy_weight=found.entropy_weight)
        left = terms._replace(modes=terms.modes.without_kl())
        bonus = terms.modes.has_bonus
        launched = _by_launch(logits, ids, known, *rest, left, bonus, True, found.dlogp)[0]
        loss = _phases.WithGradientOf.apply(launched, loss)
    return loss, logp.detach(), entropy, found.kl, found.clip
