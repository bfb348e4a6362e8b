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

from grpo_fast._overwritten import check_not_overwritten
from grpo_fast.objective import Objective
from grpo_fast.reference_rewards import group_advantage
from grpo_fast.reference_terms import kl_estimate, surrogate_loss, vespo_weight


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
    check_not_overwritten("grpo_fast.reference", logits)
    if isinstance(temperature, Tensor):
        temperature = temperature[..., None].to(logits.dtype)
    return (logits / temperature).log_softmax(-1)


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
    scores: Tensor | None = None,
) -> Tensor:
    """The loss of each token before weighting: importance * surrogate + beta * KL.

    Args:
        logps, advantages, old_logps, ref_logps, importance_weights: the same shape. Without
            `old_logps` the step is on policy: the ratio is 1, with the gradient of exp(logp).
        mask, cu_seqlens: which tokens count, and the sequences if packed; for objectives that need them.
        log_importance: per token, "vespo" only: the sum over the sequence of the log importance weights.
        scores: the same shape, "topr" only; the advantages by default.
    """
    old = logps.detach() if old_logps is None else old_logps
    log_ratio = logps - old
    if mask is None:
        mask = torch.ones_like(logps, dtype=torch.bool)
    loss_ratio = log_ratio
    own = torch.ones_like(log_ratio)  # d loss_ratio / d logps, of the same token
    if objective.surrogate == "gmpo" or objective.ratio == "sequence":
        count = sequence_sum(own, mask, cu_seqlens)
        own = mask / count.where(count != 0, 1)
    if objective.surrogate == "gmpo":
        bounded = torch.where(
            advantages > 0,
            log_ratio.clamp(max=objective.epsilon_high),
            torch.where(advantages < 0, log_ratio.clamp(min=-objective.epsilon_low), 0),
        )
        loss_ratio = sequence_mean(bounded, mask, cu_seqlens)
        own = own * ((advantages != 0) & (bounded == log_ratio))
    elif objective.ratio != "token":
        loss_ratio = sequence_mean(log_ratio, mask, cu_seqlens)
        if objective.ratio == "sequence_token":
            loss_ratio = loss_ratio.detach() + logps - logps.detach()
    if objective.log_ratio_bounds != (None, None):
        bounded = loss_ratio.clamp(*objective.log_ratio_bounds)
        loss_ratio, own = bounded, own * (bounded == loss_ratio)
    ratio = loss_ratio.exp()
    if objective.surrogate == "gmpo":
        loss = -advantages * ratio
    elif objective.surrogate == "vespo":
        log_w = sequence_sum(log_ratio.clamp(-20, 20), mask, cu_seqlens)
        log_w = log_w if log_importance is None else log_w + log_importance
        loss = -vespo_weight(log_w, advantages, objective).detach() * advantages * logps
    else:
        loss = surrogate_loss(logps, old, ratio, advantages, objective, scores)
    if objective.off_policy_threshold is not None:
        drift = sequence_mean(-log_ratio.detach(), mask, cu_seqlens)
        dropped = drift > objective.off_policy_threshold
        loss = torch.where((advantages < 0) & dropped, 0, loss)
        # Whether it is dropped cannot be told: the NaN comes out.
        loss = torch.where((advantages < 0) & drift.isnan(), torch.nan, loss)
    if importance_weights is not None:
        loss = torch.where(importance_weights == 0, 0, loss * importance_weights)
    if objective.beta:
        assert ref_logps is not None
        loss = loss + objective.beta * kl_estimate(
            logps, ref_logps, ratio, objective, loss_ratio, own
        )
    return loss


def sequence_sum(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Per token: the sum of x over the live tokens of its sequence, weighed by a floating mask."""
    x = torch.where(mask != 0, x * mask, torch.zeros_like(x))
    if cu_seqlens is not None:
        index = sequence_of_token(cu_seqlens, len(x))
        return x.new_zeros(len(cu_seqlens) - 1).index_add(0, index, x)[index]
    return x.sum(-1, keepdim=True).expand(x.shape)


def sequence_mean(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Per token: the mean of x over the live tokens of its sequence, as `sequence_sum`; 0 without any."""
    count = sequence_sum(torch.ones_like(x), mask, cu_seqlens)
    return sequence_sum(x, mask, cu_seqlens) / count.where(count != 0, 1)


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
    """w_t of each token, so that the loss is `sum_t w_t * loss_t`; 0 where `mask` is.

    Args:
        mask: (B, T) or (N,), bool, or floating: what each token weighs, here and in the denominators.
        num_items: the denominator of "token_mean" in place of the number of live tokens.
        cu_seqlens: (B + 1,) where `mask` is packed.
    """
    if mask.ndim == 1 and cu_seqlens is None:  # packed tokens without boundaries are one sequence
        return reduction_weights(mask[None], objective, num_items, None, dtype)[0]
    num_sequences = len(mask) if cu_seqlens is None else len(cu_seqlens) - 1
    if objective.reduction == "token_mean":
        items = total_of(mask, dtype) if num_items is None else num_items
        if not isinstance(items, Tensor):
            # Made on the device, for which nothing waits; a product, since a compiled `torch.full`
            # would keep the number of the first call.
            items = torch.ones((), dtype=dtype, device=mask.device) * float(items)
        items = items.to(mask.device, dtype, non_blocking=True)
        weight = 1 / (items if num_items is None else items.clamp(min=1))
    elif objective.reduction == "sequence_mean":
        if cu_seqlens is None:
            length = reduce(mask.to(dtype), "b t -> b 1", "sum")
        else:  # differences of a running count: exact, and no atomics
            running = mask.double().cumsum(0) if mask.is_floating_point() else mask.cumsum(0)
            count = torch.nn.functional.pad(running, (1, 0))[cu_seqlens.long()]
            length = count.diff()[sequence_of_token(cu_seqlens, len(mask))].to(dtype)
        weight = 1 / (length.where(length != 0, 1) * max(num_sequences, 1))
    else:
        tokens = objective.max_length if objective.reduction == "fixed_length" else 1
        share = 1 / (max(num_sequences, 1) * (tokens or 1))
        weight = torch.full((), share, dtype=dtype, device=mask.device)
    if mask.is_floating_point():
        weight = weight * mask.to(dtype)
    return torch.where(mask != 0, weight, torch.zeros_like(weight))


def total_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The denominator of means over the tokens of a mask, bool or floating: its sum, 1 where that is 0."""
    total = mask.sum(dtype=torch.float64) if mask.is_floating_point() else mask.sum()
    return total.where(total != 0, 1).to(dtype)


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
    objective: Objective | None = None,
) -> Tensor:
    """The loss of `grpo_fast.loss.grpo_loss`, 0-dim, with the same arguments."""
    check_not_overwritten("grpo_fast.reference", logits)
    objective = objective or Objective()
    keep = torch.ones_like(completion_ids, dtype=torch.bool) if mask is None else mask != 0
    # Padding may hold anything, NaN included: it is replaced before any arithmetic.
    logits = torch.where(rearrange(keep, "... -> ... 1"), logits, torch.zeros_like(logits))
    ids = completion_ids.masked_fill(~keep, 0)
    logps = logprob(logits, ids, temperature)
    return policy_loss(
        logps,
        advantages=group_advantage(rewards.double(), group_size=group_size).to(logps)[:, None]
        if rewards is not None
        else advantages,
        mask=mask,
        old_logps=old_logps,
        ref_logps=ref_logps,
        importance_weights=importance_weights,
        token_weights=token_weights,
        scores=rewards[:, None]
        if rewards is not None and scores is None and objective.surrogate == "topr"
        else scores,
        entropy=entropy(logits, temperature) if objective.needs_entropy else None,
        num_items=num_items,
        loss_scale=loss_scale,
        cu_seqlens=cu_seqlens,
        objective=objective,
    )


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    vocab_size: int | None = None,
    lora: tuple[Tensor, Tensor, float | Tensor] | None = None,
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
    scores: Tensor | None = None,
    entropy: Tensor | None = None,
    num_items: float | Tensor | None = None,
    loss_scale: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    objective: Objective | None = None,
) -> Tensor:
    """The loss of `grpo_fast.loss.policy_loss`, 0-dim, with the same arguments."""
    objective = objective or Objective()
    keep = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask != 0
    weighs = keep  # a floating mask weighs, in sums and in denominators
    if mask is not None and mask.is_floating_point():
        weighs = mask.to(logps.dtype)

    if cu_seqlens is not None and logps.shape == cu_seqlens[1:].shape:
        for x in (advantages, importance_weights, scores):
            if x is not None and x.shape == logps.shape and (cu_seqlens.diff() != 1).any():
                raise ValueError("one per token or one per sequence? give (num_seqs, 1) for that")

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
            log_importance = sequence_sum(logs, weighs, cu_seqlens)
        else:
            log_importance = per_token(logs)
        importance_weights = None
    chosen = keep
    if objective.top_entropy_quantile < 1:
        assert entropy is not None
        chosen = top_entropy(entropy.detach(), keep, objective.top_entropy_quantile)
        factor = per_token(importance_weights)
        # An entropy that is NaN decides nothing: it comes out.
        share = torch.where(keep & entropy.detach().isnan(), torch.nan, chosen.to(logps))
        importance_weights = share if factor is None else factor * share
    loss = policy_terms(
        logps,
        advantages,
        objective,
        per_token(old_logps),
        per_token(ref_logps),
        per_token(importance_weights),
        weighs,
        cu_seqlens,
        log_importance,
        per_token(scores),
    )
    weights = reduction_weights(weighs, objective, num_items, cu_seqlens, logps.dtype)
    extra = per_token(token_weights)
    extra = torch.ones_like(logps) if extra is None else extra
    if loss_scale is not None:  # on all of the loss; what a token weight of 0 leaves out stays out
        extra = torch.where(extra == 0, 0, extra * torch.as_tensor(loss_scale).to(extra))
    total = _weighted_sum(weights * extra, loss)
    if objective.entropy_coef:
        bonus = per_token(entropy)
        assert bonus is not None
        if objective.entropy_reduction == "token_mean":
            weights = weighs / total_of(weighs * chosen, logps.dtype)
        total = total - objective.entropy_coef * _weighted_sum(weights * extra * chosen, bonus)
    return total


def _weighted_sum(weights: Tensor, x: Tensor) -> Tensor:
    """sum(weights * x), without the x of weight 0: they may be infinite or NaN."""
    return torch.where(weights == 0, 0, weights * x).sum()


def top_entropy(entropy: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """Which live tokens have at least the (1 - quantile) quantile of the live tokens' entropies."""
    live = entropy[mask]
    if not len(live):
        return mask
    return mask & ~(entropy < live.quantile(1 - quantile))
