"""What everything computes, in plain PyTorch: the specification, and the oracle of the tests.

Correct in float64, gradients by autograd, no attention paid to speed or memory. Dimensions: B sequences,
T completion tokens, N tokens when packed (sequences end to end, `cu_seqlens` their boundaries),
V vocabulary entries. Per-token tensors are (B, T) or (N,).
"""

import math
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from grpo_fast.objective import Objective


def logprob(logits: Tensor, ids: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """`log_softmax(logits / temperature)[ids]`, one value per row.

    Args:
        logits: (..., V).
        ids: (...), each in [0, V).
        temperature: positive; a number or a tensor (...).
    """
    return log_softmax(logits, temperature).gather(-1, ids[..., None].long()).squeeze(-1)


def entropy(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """`-sum_v p_v log p_v` with p = softmax(logits / temperature), where 0 log 0 = 0.

    Args:
        logits: (..., V).
        temperature: positive; a number or a tensor (...).
    """
    logp = log_softmax(logits, temperature)
    # Banned tokens: p = 0 and log p = -inf. Select before multiplying, or 0 * inf poisons the row.
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)


def log_softmax(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """`(logits / temperature).log_softmax(-1)`, the temperature a number or one per row."""
    if isinstance(temperature, Tensor):
        temperature = temperature[..., None].to(logits.dtype)
    return (logits / temperature).log_softmax(-1)


def group_advantage(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scale: str = "group",
    eps: float = 1e-4,
    unbiased: bool = True,
) -> Tensor:
    """`(rewards - mean of the group) / (std + eps)`; 0 where the rewards do not differ.

    Args:
        rewards: (B,).
        group_size: sequences per prompt, consecutive; or
        group_ids: (B,) labels; equal labels form a group of any size.
        scale: std of the "group", of the whole "batch", or "none" (no division).
    """
    if group_ids is None:
        group_ids = torch.arange(len(rewards), device=rewards.device) // (group_size or 1)
    advantages = torch.zeros_like(rewards)
    for label in group_ids.unique():
        member = group_ids == label
        group = rewards[member]
        if group.max() > group.min():
            spread = {"group": group, "batch": rewards}.get(scale)
            std = spread.std(unbiased=unbiased) + eps if spread is not None else 1.0
            advantages[member] = (group - group.mean()) / std
    return advantages


def policy_terms(
    logps: Tensor,
    advantages: Tensor,
    objective: Objective,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    importance_weights: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    log_importance: Tensor | None = None,
) -> Tensor:
    """The loss of each token before weighting: importance * surrogate + beta * KL.

    Args:
        logps, advantages, old_logps, ref_logps, importance_weights: the same shape. Without
            `old_logps` the step is on policy: the ratio is 1, with the gradient of exp(logp).
        mask, cu_seqlens: which tokens count, and the sequences if packed; for objectives that need them.
        log_importance: per token, "vespo" only: the sum over the sequence of the log importance weights.
    """
    old = logps.detach() if old_logps is None else old_logps
    log_ratio = logps - old
    if mask is None:
        mask = torch.ones_like(logps, dtype=torch.bool)
    loss_ratio = log_ratio
    if objective.surrogate == "gmpo":
        bounded = torch.where(
            advantages > 0,
            log_ratio.clamp(max=objective.epsilon_high),
            torch.where(advantages < 0, log_ratio.clamp(min=-objective.epsilon_low), 0),
        )
        loss_ratio = sequence_mean(bounded, mask, cu_seqlens)
    elif objective.ratio != "token":
        loss_ratio = sequence_mean(log_ratio, mask, cu_seqlens)
        if objective.ratio == "sequence_token":
            loss_ratio = loss_ratio.detach() + logps - logps.detach()
    if objective.log_ratio_clip is not None:
        loss_ratio = loss_ratio.clamp(-objective.log_ratio_clip, objective.log_ratio_clip)
    ratio = loss_ratio.exp()
    if objective.surrogate == "gmpo":
        loss = -advantages * ratio
    elif objective.surrogate == "vespo":
        log_w = sequence_sum(log_ratio.clamp(-20, 20), mask, cu_seqlens)
        log_w = log_w if log_importance is None else log_w + log_importance
        loss = -vespo_weight(log_w, advantages, objective).detach() * advantages * logps
    else:
        loss = surrogate_loss(logps, old, ratio, advantages, objective)
    if objective.off_policy_threshold is not None:
        stale = sequence_mean(-log_ratio, mask, cu_seqlens) > objective.off_policy_threshold
        loss = torch.where((advantages < 0) & stale, 0, loss)
    if importance_weights is not None:
        loss = loss * importance_weights
    if objective.beta:
        assert ref_logps is not None
        loss = loss + objective.beta * kl_estimate(logps, ref_logps, ratio, objective)
    return loss


def vespo_weight(log_w: Tensor, advantages: Tensor, objective: Objective) -> Tensor:
    """phi(W) = W^k e^(lambda (1 - W)), with log W clamped to [log 1e-8, 20]."""
    up = advantages >= 0
    k = torch.where(up, objective.vespo_k_pos, objective.vespo_k_neg).to(log_w)
    rate = torch.where(up, objective.vespo_lambda_pos, objective.vespo_lambda_neg).to(log_w)
    log_w = log_w.clamp(math.log(1e-8), 20)
    return (rate + k * log_w - rate * log_w.exp()).exp()


def sequence_sum(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Per token: the sum of x over the live tokens of its sequence."""
    x = torch.where(mask, x, torch.zeros_like(x))
    if cu_seqlens is not None:
        index = sequence_of_token(cu_seqlens, len(x))
        return x.new_zeros(len(cu_seqlens) - 1).index_add(0, index, x)[index]
    return x.sum(-1, keepdim=True).expand(x.shape)


def sequence_mean(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Per token: the mean of x over the live tokens of its sequence; 0 without any."""
    count = sequence_sum(torch.ones_like(x), mask, cu_seqlens)
    return sequence_sum(x, mask, cu_seqlens) / count.clamp(min=1)


def surrogate_loss(
    logps: Tensor, old_logps: Tensor, ratio: Tensor, advantages: Tensor, objective: Objective
) -> Tensor:
    """The surrogate of each token; formulas in `Objective`."""
    low, high = objective.epsilon_low, objective.epsilon_high
    surrogate = objective.surrogate
    if surrogate == "clip":
        bounded = ratio if objective.delta is None else ratio.clamp(max=objective.delta)
        clipped = ratio.clamp(1 - low, 1 + high)
        loss = -torch.minimum(bounded * advantages, clipped * advantages)
        if objective.dual_clip is not None:
            ceiling = torch.minimum(loss, -objective.dual_clip * advantages)
            loss = torch.where(advantages < 0, ceiling, loss)
        return loss
    if surrogate == "sapo":
        tau = torch.where(advantages > 0, objective.tau_pos, objective.tau_neg).to(ratio)
        return -advantages * (4 / tau) * (tau * (ratio - 1)).sigmoid()
    log_ratio = logps - old_logps
    if surrogate == "dro":
        return -advantages * logps + objective.quadratic_coef * log_ratio.square() / 2
    change = logps.exp() - old_logps.exp()
    if surrogate == "ipo":
        inside = (change >= -low) & (change <= high)
        return -advantages * ratio * inside + objective.quadratic_coef * log_ratio.square()
    if surrogate == "reinforce":
        weight = torch.ones_like(ratio)
    elif surrogate == "cispo":
        weight = ratio.clamp(1 - low, 1 + high)
    elif surrogate == "rollout_is":
        weight = ratio * ((ratio > 1 - low) & (ratio < 1 + high))
    else:
        divergence = change if surrogate == "dppo_tv" else binary_kl(old_logps, logps)
        if surrogate == "dppo_tv":
            keep = torch.where(advantages > 0, divergence <= high, divergence >= -low)
        else:
            up = (divergence <= high) | (logps <= old_logps)
            down = (divergence <= low) | (logps >= old_logps)
            keep = torch.where(advantages > 0, up, down)
        weight = (
            ratio if objective.ratio_cap is None else ratio.clamp(max=objective.ratio_cap)
        ) * keep
    return -weight.detach() * advantages * logps


def binary_kl(old_logps: Tensor, logps: Tensor) -> Tensor:
    """KL between the two-outcome distributions (y, not y) of the old and the new policy."""
    old, new = old_logps.exp(), logps.exp()
    rest = (1 - old) * ((1 - old + 1e-8) / (1 - new + 1e-8)).log()
    return old * (old_logps - logps) + rest


def kl_estimate(logps: Tensor, ref_logps: Tensor, ratio: Tensor, objective: Objective) -> Tensor:
    """The estimate of KL(policy || reference) from one sample per token."""
    kl, gap = objective.kl, ref_logps - logps
    if kl == "k1":
        return -gap
    if kl == "abs":
        return gap.abs()
    if kl == "k2":
        return gap.square() / 2
    if objective.kl_gap_clip is not None:
        gap = gap.clamp(-objective.kl_gap_clip, objective.kl_gap_clip)
    k3 = gap.exp() - gap - 1
    if objective.kl_value_clip is not None:
        k3 = k3.clamp(max=objective.kl_value_clip)
    return ratio * k3 if kl == "k3_unbiased" else k3


def sequence_of_token(cu_seqlens: Tensor, N: int) -> Tensor:
    """(N,) index of the sequence each packed token belongs to."""
    position = torch.arange(N, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)


def reduction_weights(
    mask: Tensor,
    objective: Objective,
    num_items: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """w_t of each token, so that the loss is `sum_t w_t * loss_t`; 0 where `mask` is False.

    Args:
        mask: (B, T) or (N,) bool.
        num_items: the denominator of "token_mean" in place of the number of live tokens.
        cu_seqlens: (B + 1,) where `mask` is packed.
    """
    if mask.ndim == 1 and cu_seqlens is None:  # packed tokens without boundaries are one sequence
        return reduction_weights(mask[None], objective, num_items, None, dtype)[0]
    num_sequences = len(mask) if cu_seqlens is None else len(cu_seqlens) - 1
    if objective.reduction == "token_mean":
        items = mask.sum() if num_items is None else num_items
        if not isinstance(items, Tensor):  # filled on the device: a copy from the host could wait
            items = torch.full((), items, dtype=dtype, device=mask.device)
        weight = 1 / items.to(mask.device, dtype, non_blocking=True).clamp(min=1)
    elif objective.reduction == "sequence_mean":
        if cu_seqlens is None:
            length = reduce(mask.to(dtype), "b t -> b 1", "sum")
        else:  # differences of a running count: exact, and no atomics
            count = torch.nn.functional.pad(mask.cumsum(0), (1, 0))[cu_seqlens.long()]
            length = count.diff()[sequence_of_token(cu_seqlens, len(mask))].to(dtype)
        weight = 1 / (length.clamp(min=1) * max(num_sequences, 1))
    else:
        tokens = objective.max_length if objective.reduction == "fixed_length" else 1
        share = 1 / (max(num_sequences, 1) * (tokens or 1))
        weight = torch.full((), share, dtype=dtype, device=mask.device)
    return torch.where(mask, weight, torch.zeros_like(weight))


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
    objective: Objective | None = None,
) -> Tensor:
    """The loss of `grpo_fast.loss.grpo_loss`, 0-dim, with the same arguments."""
    objective = objective or Objective()
    keep = torch.ones_like(completion_ids, dtype=torch.bool) if mask is None else mask != 0
    # Padding may hold anything, NaN included: it is replaced before any arithmetic.
    logits = torch.where(rearrange(keep, "... -> ... 1"), logits, torch.zeros_like(logits))
    ids = completion_ids.masked_fill(~keep, 0)
    logps = logprob(logits, ids, temperature)
    return policy_loss(
        logps,
        advantages=group_advantage(rewards.to(logps), group_size=group_size)
        if rewards is not None
        else advantages,
        mask=keep,
        old_logps=old_logps,
        ref_logps=ref_logps,
        importance_weights=importance_weights,
        token_weights=token_weights,
        entropy=entropy(logits, temperature) if objective.entropy_coef else None,
        num_items=num_items,
        cu_seqlens=cu_seqlens,
        objective=objective,
    )


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """`cap(logit_scale * (hidden @ weight.T + bias + scaling * (hidden @ A.T) @ B.T))`, (..., vocab_size).

    Args:
        hidden: (..., D). weight: (rows, D). bias: (rows,). lora: (A (r, D), B (rows, r), scaling).
        softcap: cap(x) = softcap * tanh(x / softcap); None for the identity.
        vocab_size: the rows that count; None for all.
    """
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if lora is not None:
        a, b, scaling = lora
        logits = logits + scaling * (hidden @ a.T) @ b.T
    logits = logit_scale * logits[..., : len(weight) if vocab_size is None else vocab_size]
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    **head: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """The values of `grpo_fast.ops.linear_logprob`; `head`: the arguments of `head_logits`."""
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    hidden = torch.where(rearrange(keep, "... -> ... 1"), hidden, torch.zeros_like(hidden))
    logits = head_logits(hidden, weight, **head)
    logp = logprob(logits, ids.masked_fill(~keep, 0), temperature)
    return (logp, entropy(logits, temperature)) if return_entropy else logp


def linear_grpo(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    **loss: Any,
) -> Tensor:
    """The loss of `grpo_fast.loss.linear_grpo_loss`, 0-dim; `loss`: the other arguments of `grpo_loss`."""
    keep = torch.ones_like(completion_ids, dtype=torch.bool) if mask is None else mask != 0
    hidden = torch.where(rearrange(keep, "... -> ... 1"), hidden, torch.zeros_like(hidden))
    logits = head_logits(hidden, weight, bias, softcap, logit_scale, vocab_size, lora)
    return grpo_loss(logits, completion_ids, mask=mask, **loss)


def policy_loss(
    logps: Tensor,
    *,
    advantages: Tensor | None,
    mask: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    importance_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    num_items: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    objective: Objective | None = None,
) -> Tensor:
    """The loss of `grpo_fast.loss.policy_loss`, 0-dim, with the same arguments."""
    objective = objective or Objective()
    keep = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask != 0

    def per_token(x: Tensor | None) -> Tensor | None:
        """`x` broadcast to one value per token, and 0 where the token is masked."""
        if x is None:
            return None
        if x.shape != logps.shape:  # one per sequence
            x = x.reshape(-1)
            if cu_seqlens is not None:
                x = x[sequence_of_token(cu_seqlens, len(logps))]
            elif logps.ndim == 2:
                x = rearrange(x, "b -> b 1")
        return torch.where(keep, x.to(logps), torch.zeros_like(logps))

    logps = torch.where(keep, logps, torch.zeros_like(logps))
    advantages = per_token(advantages)
    assert advantages is not None
    log_importance = None
    if objective.surrogate == "vespo" and importance_weights is not None:
        # One weight per sequence counts once, weights per token each.
        logs = importance_weights.to(logps).log().clamp(math.log(1e-8), 20)
        if importance_weights.shape == logps.shape:
            log_importance = sequence_sum(logs, keep, cu_seqlens)
        else:
            log_importance = per_token(logs)
        importance_weights = None
    loss = policy_terms(
        logps,
        advantages,
        objective,
        per_token(old_logps),
        per_token(ref_logps),
        per_token(importance_weights),
        keep,
        cu_seqlens,
        log_importance,
    )
    if objective.entropy_coef:
        bonus = per_token(entropy)
        assert bonus is not None
        loss = loss - objective.entropy_coef * bonus
    weights = reduction_weights(keep, objective, num_items, cu_seqlens, logps.dtype)
    if token_weights is not None:
        extra = per_token(token_weights)
        assert extra is not None
        weights = weights * extra
    return (weights * loss).sum()
