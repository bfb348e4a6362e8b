"""The definition of everything in plain PyTorch, with which the tests compare.

It is correct in float64, and autograd computes the gradients. It makes no effort to be fast or to
save memory. Dimensions: B sequences, T completion tokens, N packed tokens (sequences end to end,
`cu_seqlens` are their boundaries), V vocabulary entries. Tensors per token are (B, T) or (N,).
"""

import dataclasses
import math
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from grpo_fast.objective import Objective
from grpo_fast.overwritten import check_not_overwritten


def logprob(logits: Tensor, ids: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Return the log-prob of each id under softmax(logits / temperature).

        >>> logits, ids = torch.randn(3, 7), torch.tensor([0, 2, 6])
        >>> want = -torch.nn.functional.cross_entropy(logits / 0.7, ids, reduction="none")
        >>> torch.testing.assert_close(reference.logprob(logits, ids, 0.7), want)

    Args:
        logits: (..., V).
        ids: (...), each in [0, V).
        temperature: positive; a number or a tensor (...).

    Returns:
        (...), in nats, of the dtype of `logits`.
    """
    return log_softmax(logits, temperature).gather(-1, ids[..., None].long()).squeeze(-1)


def entropy(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Return the entropy of softmax(logits / temperature) in each row.

        >>> p = torch.tensor([0.5, 0.5, 0.0])  # 0 log 0 is 0
        >>> torch.testing.assert_close(reference.entropy(p.log()), torch.tensor(2.0).log())

    Args:
        logits: (..., V).
        temperature: positive; a number or a tensor (...).

    Returns:
        (...), in nats, of the dtype of `logits`.
    """
    logp = log_softmax(logits, temperature)
    # A banned token has p = 0 and log p = -inf. Select before multiplying: 0 * inf would make the
    # row NaN.
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)


def log_softmax(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Return the log-probs of all vocabulary entries under softmax(logits / temperature).

        >>> logits, temperature = torch.randn(2, 7), torch.tensor([0.5, 2.0])
        >>> want = (logits / temperature[:, None]).log_softmax(-1)
        >>> torch.testing.assert_close(reference.log_softmax(logits, temperature), want)

    Args:
        logits: (..., V).
        temperature: positive; a number or a tensor (...).

    Returns:
        (..., V), of the dtype of `logits`.
    """
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
    """Return the loss of each token before it is weighted: importance * surrogate + beta * KL.

        >>> logps, old, A = -torch.rand(2, 3), -torch.rand(2, 3), torch.randn(2, 3)
        >>> r = (logps - old).exp()
        >>> want = -torch.minimum(r * A, r.clamp(0.8, 1.2) * A)
        >>> torch.testing.assert_close(reference.policy_terms(logps, A, Objective(), old), want)

    Args:
        logps, advantages, old_logps, ref_logps, importance_weights: of the same shape. Without
            `old_logps` the step is on policy: the ratio is 1, with the gradient of exp(logp).
        objective: `Objective` has the formulas.
        mask, cu_seqlens: the tokens that count, and the boundaries of packed sequences; for
            objectives that need them.
        log_importance: per token, only for "vespo": the sum over the sequence of the log importance
            weights.
        scores: of the same shape, only for "topr"; default: the advantages.

    Returns:
        The shape of `logps`.
    """
    old = logps.detach() if old_logps is None else old_logps
    log_ratio = logps - old
    if mask is None:
        mask = torch.ones_like(logps, dtype=torch.bool)
    loss_ratio = log_ratio
    own = torch.ones_like(log_ratio)  # d loss_ratio / d logps of the same token
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
        # With a NaN nobody can tell whether the token is dropped: its loss is NaN.
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
    """Return, at each token, the sum of x over the tokens of its sequence that count.

        >>> x, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1, 1, 0]])
        >>> reference.sequence_sum(x, mask).tolist()
        [[3.0, 3.0, 3.0]]

    Args:
        x: (B, T) or (N,).
        mask: the same shape; a floating mask weighs.
        cu_seqlens: (B + 1,) where x is packed.

    Returns:
        The shape of x.
    """
    x = torch.where(mask != 0, x * mask, torch.zeros_like(x))
    if cu_seqlens is not None:
        index = sequence_of_token(cu_seqlens, len(x))
        return x.new_zeros(len(cu_seqlens) - 1).index_add(0, index, x)[index]
    return x.sum(-1, keepdim=True).expand(x.shape)


def sequence_mean(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return, at each token, the mean of x over the tokens of its sequence that count, or 0.

        >>> x, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1, 1, 0]])
        >>> reference.sequence_mean(x, mask).tolist()
        [[1.5, 1.5, 1.5]]

    Args:
        x, mask, cu_seqlens: as in `sequence_sum`.

    Returns:
        The shape of x.
    """
    count = sequence_sum(torch.ones_like(x), mask, cu_seqlens)
    return sequence_sum(x, mask, cu_seqlens) / count.where(count != 0, 1)


def sequence_of_token(cu_seqlens: Tensor, N: int) -> Tensor:
    """Return the index of the sequence that each packed token belongs to.

        >>> reference.sequence_of_token(torch.tensor([0, 2, 2, 3]), 3).tolist()
        [0, 0, 2]

    Args:
        cu_seqlens: (B + 1,) boundaries.
        N: how many tokens there are.

    Returns:
        (N,) int64.
    """
    position = torch.arange(N, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)


def reduction_weights(
    mask: Tensor,
    objective: Objective,
    num_items: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the weight w_t of each token: the loss is `sum_t w_t * loss_t`.

        >>> mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> w = reference.reduction_weights(mask, Objective(reduction="sequence_mean"))
        >>> torch.testing.assert_close(w, mask / mask.sum(1, keepdim=True) / 2)

    Args:
        mask: (B, T) or (N,), bool, or 0 and 1; or floating, then it weighs each token here and in
            the denominators.
        objective: its `reduction` and `max_length` decide.
        num_items: the denominator of "token_mean" in place of the number of tokens that count.
        cu_seqlens: (B + 1,) where `mask` is packed.
        dtype: the dtype of the result.

    Returns:
        The shape of `mask`.
    """
    if mask.ndim == 1 and cu_seqlens is None:  # packed tokens without boundaries are one sequence
        return reduction_weights(mask[None], objective, num_items, None, dtype)[0]
    num_sequences = len(mask) if cu_seqlens is None else len(cu_seqlens) - 1
    if objective.reduction == "token_mean":
        items = total_of(mask, dtype) if num_items is None else num_items
        if not isinstance(items, Tensor):
            # It is made on the device, so nothing waits. It is a product, because a compiled
            # `torch.full` would keep the number of the first call.
            items = torch.ones((), dtype=dtype, device=mask.device) * float(items)
        items = items.to(mask.device, dtype, non_blocking=True)
        weight = 1 / (items if num_items is None else items.clamp(min=1))
    elif objective.reduction == "sequence_mean":
        if cu_seqlens is None:
            length = reduce(mask.to(dtype), "b t -> b 1", "sum")
        else:  # differences of a running count are exact and need no atomics
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
    """Return the denominator of means over the tokens of a mask: its sum, or 1 where the sum is 0.

        >>> reference.total_of(torch.tensor([0.5, 0.25]), torch.float32).item()
        0.75

    Args:
        mask: bool, integer or floating.
        dtype: the dtype of the result.

    Returns:
        0-dim.
    """
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
    """Return the loss of `grpo_fast.loss.grpo_loss` from the same arguments.

    It does not take `return_entropy` and `inplace`.

        >>> logits, ids, A = torch.randn(2, 3, 7), torch.randint(7, (2, 3)), torch.tensor([1.0, -1.0])
        >>> logps = reference.logprob(logits, ids)
        >>> want = reference.policy_loss(logps, advantages=A)
        >>> torch.testing.assert_close(reference.grpo_loss(logits, ids, advantages=A), want)

    Returns:
        0-dim, differentiable in `logits`, of their dtype.
    """
    check_not_overwritten("grpo_fast.reference", logits)
    objective = objective or Objective()
    keep = torch.ones_like(completion_ids, dtype=torch.bool) if mask is None else mask != 0
    # Masked rows may hold NaN: they are replaced before any arithmetic.
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
    """Return the logits of a language-model head, with its bias, adapter, scale and soft cap.

        >>> hidden, weight = torch.randn(3, 4), torch.randn(7, 4)
        >>> want = 5 * (2 * hidden @ weight.T / 5).tanh()
        >>> got = reference.head_logits(hidden, weight, softcap=5.0, logit_scale=2.0)
        >>> torch.testing.assert_close(got, want)

    Args:
        hidden: (..., D).
        weight: (rows, D).
        bias: (rows,).
        softcap: the logits x become softcap * tanh(x / softcap); None: they stay.
        logit_scale: factor on the logits before the soft cap.
        vocab_size: how many rows are vocabulary; None for all.
        lora: (A (r, D), B (rows, r), scaling): adds `scaling * (hidden @ A.T) @ B.T` before the
            scale.

    Returns:
        (..., vocab_size).
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
    """Return the values of `grpo_fast.ops.linear_logprob`: log-probs of ids from hidden states.

        >>> hidden, weight, ids = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 2, 6])
        >>> want = reference.logprob(hidden @ weight.T, ids)
        >>> torch.testing.assert_close(reference.linear_logprob(hidden, weight, ids), want)

    Args:
        hidden, weight, ids, temperature, mask, return_entropy: as in
            `grpo_fast.ops.linear_logprob`.
        head: the other arguments of `head_logits`, by keyword.

    Returns:
        The log-probs, of the shape of `ids`; with `return_entropy` a tuple (log-probs, entropies).
    """
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
    """Return the loss of `grpo_fast.loss.linear_grpo_loss`: the GRPO loss from hidden states.

        >>> hidden, weight, ids = torch.randn(2, 3, 4), torch.randn(7, 4), torch.randint(7, (2, 3))
        >>> A = torch.tensor([1.0, -1.0])
        >>> want = reference.grpo_loss(hidden @ weight.T, ids, advantages=A)
        >>> got = reference.linear_grpo(hidden, weight, ids, advantages=A)
        >>> torch.testing.assert_close(got, want)

    Args:
        hidden, weight, completion_ids, mask: as in `linear_grpo_loss`.
        bias, softcap, logit_scale, vocab_size, lora: as in `head_logits`.
        loss: the other arguments of `grpo_loss`, by keyword.

    Returns:
        0-dim, differentiable in `hidden` and the tensors of the head.
    """
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
    """Return the loss of `grpo_fast.loss.policy_loss`, from the same arguments.

        >>> logps, A = -torch.rand(2, 3), torch.tensor([1.0, -1.0])
        >>> objective, ref = Objective(beta=0.1, kl="k2"), -torch.rand(2, 3)
        >>> got = reference.policy_loss(logps, advantages=A, ref_logps=ref, objective=objective)
        >>> want = (-A[:, None] + 0.1 * (ref - logps).square() / 2).mean()
        >>> torch.testing.assert_close(got, want)

    Returns:
        0-dim, differentiable in `logps` and `entropy`, of the dtype of `logps`.
    """
    objective = objective or Objective()
    keep = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask != 0
    weighs = keep  # a floating mask weighs in sums and in denominators
    if mask is not None and mask.is_floating_point():
        weighs = mask.to(logps.dtype)

    if cu_seqlens is not None and logps.shape == cu_seqlens[1:].shape:
        for x in (advantages, importance_weights, scores):
            if x is not None and x.shape == logps.shape and (cu_seqlens.diff() != 1).any():
                raise ValueError("one per token or one per sequence? give (num_seqs, 1) for that")

    def per_token(x: Tensor | None) -> Tensor | None:
        """Return x as one value per token, 0 where the token is masked."""
        return None if x is None else _spread(x, logps, keep, cu_seqlens)

    logps = torch.where(keep, logps, torch.zeros_like(logps))
    advantages = per_token(advantages)
    assert advantages is not None
    log_importance = None
    if objective.surrogate == "vespo" and importance_weights is not None:
        # A weight per sequence counts once; weights per token count each.
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
        # An entropy that is NaN decides nothing: the loss is NaN.
        share = torch.where(keep & entropy.detach().isnan(), torch.nan, chosen.to(logps))
        importance_weights = share if factor is None else factor * share
    loss = policy_terms(
        logps,
        advantages,
        objective,
        old_logps=per_token(old_logps),
        ref_logps=per_token(ref_logps),
        importance_weights=per_token(importance_weights),
        mask=weighs,
        cu_seqlens=cu_seqlens,
        log_importance=log_importance,
        scores=per_token(scores),
    )
    weights = reduction_weights(weighs, objective, num_items, cu_seqlens, logps.dtype)
    extra = per_token(token_weights)
    extra = torch.ones_like(logps) if extra is None else extra
    if loss_scale is not None:  # on the whole loss; a token of weight 0 stays left out
        extra = torch.where(extra == 0, 0, extra * torch.as_tensor(loss_scale).to(extra))
    total = _weighted_sum(weights * extra, loss)
    if objective.entropy_coef:
        bonus = per_token(entropy)
        assert bonus is not None
        if objective.entropy_reduction == "token_mean":
            weights = weighs / total_of(weighs * chosen, logps.dtype)
        total = total - objective.entropy_coef * _weighted_sum(weights * extra * chosen, bonus)
    return total


def _spread(x: Tensor, like: Tensor, keep: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return x, one per token or one per sequence, with one value per token and 0 where masked."""
    if x.shape != like.shape:  # one per sequence
        x = x.reshape(-1)
        if cu_seqlens is not None:
            x = x[sequence_of_token(cu_seqlens, len(like))]
        elif like.ndim == 2:
            x = rearrange(x, "b -> b 1")
    return torch.where(keep, x.to(like), torch.zeros_like(like))


def _weighted_sum(weights: Tensor, x: Tensor) -> Tensor:
    """Return sum(weights * x), leaving out every x of weight 0, which may be infinite or NaN."""
    return torch.where(weights == 0, 0, weights * x).sum()


def top_entropy(entropy: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """Return the tokens whose entropy is at least the (1 - quantile) quantile.

        >>> entropy, mask = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([True, True, True, False])
        >>> reference.top_entropy(entropy, mask, 0.5).tolist()
        [False, True, True, False]

    Args:
        entropy: (B, T) or (N,).
        mask: the same shape, bool.
        quantile: in [0, 1].

    Returns:
        Bool, of the shape of `mask`; False where masked, True where the entropy is NaN.
    """
    live = entropy[mask]
    if not len(live):
        return mask
    return mask & ~(entropy < live.quantile(1 - quantile))


def surrogate_loss(
    logps: Tensor,
    old_logps: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    objective: Objective,
    scores: Tensor | None = None,
) -> Tensor:
    """Return the surrogate of each token; `Objective` has the formulas.

        >>> logps, old, A = -torch.rand(4), -torch.rand(4), torch.randn(4)
        >>> got = reference.surrogate_loss(logps, old, (logps - old).exp(), A, Objective(surrogate="sapo"))
        >>> tau, r = torch.where(A > 0, 1.0, 1.05), (logps - old).exp()
        >>> torch.testing.assert_close(got, -A * 4 / tau * (tau * (r - 1)).sigmoid())

    Args:
        logps, old_logps, ratio, advantages: of the same shape.
        objective: any surrogate but "gmpo" and "vespo", which `policy_terms` computes.
        scores: of the same shape, only for "topr"; default: the advantages.

    Returns:
        The shape of `logps`.
    """
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
        tau = _either(advantages > 0, objective.tau_pos, objective.tau_neg, ratio)
        return -advantages * (4 / tau) * (tau * (ratio - 1)).sigmoid()
    penalty = torch.zeros_like(logps)
    if objective.quadratic_coef:
        penalty = objective.quadratic_coef * (logps - old_logps).square()
    if surrogate == "dro":
        return -advantages * logps + penalty / 2
    change = logps.exp() - old_logps.exp()
    if surrogate == "ipo":
        inside = (change >= -low) & (change <= high)
        return -advantages * ratio * inside + penalty
    if surrogate in ("dppo_tv", "dppo_kl"):
        divergence = change if surrogate == "dppo_tv" else binary_kl(old_logps, logps)
        if surrogate == "dppo_tv":
            keep = ~torch.where(advantages > 0, divergence > high, divergence < -low)
        else:  # NaN where a log-prob is just above 0: kept
            up = (divergence > high) & (logps > old_logps)
            down = (divergence > low) & (logps < old_logps)
            keep = ~torch.where(advantages > 0, up, down)
        capped = ratio if objective.ratio_cap is None else ratio.clamp(max=objective.ratio_cap)
        if objective.dppo_value == "ratio":
            return -advantages * capped * keep + penalty
        return -(capped * keep).detach() * advantages * logps
    if surrogate == "reinforce":
        weight = torch.ones_like(ratio)
    elif surrogate == "topr":
        good = (advantages if scores is None else scores) > 0
        weight = torch.where(
            good, objective.topr_weight_pos, objective.topr_weight_neg * ratio.clamp(0, 1)
        )
        if scores is not None:
            weight = torch.where(scores.isnan(), scores, weight)
    elif surrogate == "cispo":
        weight = ratio.clamp(1 - low, 1 + high)
    elif surrogate == "rollout_is":
        weight = ratio * ((ratio > 1 - low) & (ratio < 1 + high))
    else:
        raise NotImplementedError(f"surrogate_loss has no formula for surrogate={surrogate!r}")
    return -weight.detach() * advantages * logps


def vespo_weight(log_w: Tensor, advantages: Tensor, objective: Objective) -> Tensor:
    """Return VESPO's weight phi(W) = W^k e^(lambda (1 - W)) of the sequence weight W.

        >>> W, A = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 1.0])
        >>> got = reference.vespo_weight(W.log(), A, Objective(surrogate="vespo"))
        >>> torch.testing.assert_close(got, W**2 * (3 * (1 - W)).exp())

    Args:
        log_w: log W, clamped here to [log 1e-8, 20].
        advantages: of the same shape; their sign selects k and lambda.
        objective: gives k and lambda.

    Returns:
        The shape of `log_w`.
    """
    up = advantages >= 0
    k = _either(up, objective.vespo_k_pos, objective.vespo_k_neg, log_w)
    rate = _either(up, objective.vespo_lambda_pos, objective.vespo_lambda_neg, log_w)
    log_w = log_w.clamp(math.log(1e-8), 20)
    return (rate + k * log_w - rate * log_w.exp()).exp()


def binary_kl(old_logps: Tensor, logps: Tensor) -> Tensor:
    """Return KL(old || new) of the two outcomes "this token" and "any other token".

        >>> p, q = torch.tensor([0.5]), torch.tensor([0.25])
        >>> want = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        >>> torch.testing.assert_close(reference.binary_kl(p.log(), q.log()), want)

    Args:
        old_logps, logps: log-probs of the token under the old and the new policy, of the same
            shape.

    Returns:
        The same shape, in nats.
    """
    old, new = -old_logps.expm1(), -logps.expm1()  # of "any other token"
    return old_logps.exp() * (old_logps - logps) + old * ((old + 1e-8) / (new + 1e-8)).log()


def kl_estimate(
    logps: Tensor,
    ref_logps: Tensor,
    ratio: Tensor,
    objective: Objective,
    log_ratio: Tensor | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """Return the estimate of KL(policy || reference) from one sample per token.

        >>> logps, ref = -torch.rand(4), -torch.rand(4)
        >>> q, ratio = ref - logps, torch.ones(4)
        >>> got = reference.kl_estimate(logps, ref, ratio, Objective(kl="k3"))
        >>> torch.testing.assert_close(got, q.exp() - q - 1)

    Args:
        logps, ref_logps: of the same shape.
        objective: gives the estimator and its clamps.
        ratio, log_ratio: only for "k3_unbiased", after their clamp; `log_ratio` is log(ratio) by
            default.
        own: the derivative of a token's log_ratio in its own log-prob; default: 1.

    Returns:
        The shape of `logps`.
    """
    kl, gap = objective.kl, ref_logps - logps
    if objective.kl_gradient != "own":  # the value of the estimator with the gradient of k2
        value = kl_estimate(
            logps, ref_logps, ratio, dataclasses.replace(objective, kl_gradient="own")
        )
        k2 = gap.square() / 2
        if objective.kl_gradient == "k2_clipped":
            most_gap, most = objective.kl_gap_clip, objective.kl_value_clip
            inside = gap.abs() <= (math.inf if most_gap is None else most_gap)
            inside &= gap.expm1() - gap <= (math.inf if most is None else most)
            k2 = torch.where(inside, k2, 0)
        return value.detach() + k2 - k2.detach()
    if kl == "k1":
        return -gap
    if kl == "abs":
        return gap.abs()
    if kl == "k2":
        return gap.square() / 2
    given = gap
    if objective.kl_gap_clip is not None:
        gap = gap.clamp(-objective.kl_gap_clip, objective.kl_gap_clip)
    k3 = bounded = gap.expm1() - gap
    if objective.kl_value_clip is not None:
        bounded = k3.clamp(max=objective.kl_value_clip)
    if kl == "k3":
        return bounded
    # r k3 = e^(log r + q) - r (q + 1). Its derivative is written by hand: autograd would add r (1 -
    # e^q) and r (e^q - q - 1), which cancel each other where e^q is large.
    log_r = ratio.log() if log_ratio is None else log_ratio
    own = torch.ones_like(logps) if own is None else own
    with torch.no_grad():
        whole = (log_r + gap).exp() - ratio * (gap + 1)
        value = torch.where((gap > 60) & (k3 == bounded), whole, ratio * bounded)
        held = (given != gap) | (k3 != bounded)  # by a clamp: only the ratio has a gradient
        others = torch.where(own == 1, 0, (1 - own) * value)
        slope = torch.where(held, torch.where(own == 0, 0, own * value), -ratio * gap - others)
    step = logps - logps.detach()  # its value is 0, its derivative 1
    through = log_r - log_r.detach() - own * step  # the part that other tokens have in it
    return value + slope * step + torch.where(own == 1, 0, value) * through


def _either(condition: Tensor, a: float, b: float, like: Tensor) -> Tensor:
    """Return `torch.where(condition, a, b)` in the dtype of `like`."""
    return torch.where(condition, like.new_full((), a), like.new_full((), b))


def group_advantage(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    scale: str = "group",
    eps: float = 1e-4,
    unbiased: bool = True,
    baseline: str = "mean",
    weights: Tensor | None = None,
    aggregation: str = "sum_then_normalize",
    nan: str = "error",
    singleton: str = "zero",
) -> Tensor:
    """Return `(rewards - mean) / (std + eps)` within groups; 0 where the rewards do not differ.

        >>> rewards = torch.tensor([0.0, 1.0, 5.0])
        >>> got = reference.group_advantage(rewards, group_size=3)
        >>> torch.testing.assert_close(got, (rewards - 2) / (rewards.std() + 1e-4))

    Args:
        rewards: (B,), or (B, K), which `weights` (K,) combine as `aggregation` says.
        weights: (K,); default: 1 each.
        aggregation: "sum_then_normalize" or "normalize_then_sum", as in
            `grpo_fast.ops.group_advantage`.
        group_size: sequences per prompt, consecutive. Or:
        group_ids: (B,) labels; equal labels form a group of any size.
        scale: divide by the std of the "group", of the whole "batch", or by nothing: "none".
        eps: added to the std.
        unbiased: divide the variance by n - 1 instead of n.
        baseline: subtract the "mean" of the group, or with "leave_one_out" that of the other
            members.
        nan: whether a NaN is an "error", or a missing reward to "skip".
        singleton: a reward alone in its group has the advantage "zero", or with "raw" mean 0 and
            std 1.

    Returns:
        (B,), of the dtype of `rewards` if it is floating, else float32.
    """
    if nan == "error" and rewards.isnan().any():
        raise ValueError("rewards hold NaN")
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    rewards = rewards.double()
    if group_ids is None:
        group_ids = torch.arange(len(rewards), device=rewards.device) // (group_size or 1)
    if rewards.ndim == 2:
        missing, normalize = rewards.isnan(), aggregation == "normalize_then_sum"
        if normalize:
            scores = [
                group_advantage(
                    column,
                    group_ids=group_ids,
                    scale=scale,
                    eps=eps,
                    unbiased=unbiased,
                    nan=nan,
                    singleton=singleton,
                )
                for column in rewards.unbind(1)
            ]
            rewards = torch.stack(scores, 1)
        if weights is not None:
            rewards = rewards * weights
        rewards = rewards.masked_fill(missing, 0).sum(1).masked_fill(missing.all(1), torch.nan)
        if normalize:
            whole = group_advantage(
                rewards, group_size=len(rewards), eps=eps, unbiased=unbiased, nan=nan
            )
            return whole.to(dtype)
    present = ~rewards.isnan()
    advantages = torch.zeros_like(rewards)
    for label in group_ids.unique():
        member = (group_ids == label) & present
        group = rewards[member]
        n = len(group)
        if n == 1 and singleton == "raw":
            advantages[member] = group if scale == "none" else group / (1 + eps)
        elif n > 1 and group.max() > group.min():
            # The lowest is subtracted first, because the rewards may have a large common offset.
            group = group - group.min()
            mean = group.mean()
            if baseline == "leave_one_out":
                mean = (group.sum() - group) / (n - 1)
            if scale == "none":
                advantages[member] = group - mean
                continue
            spread = group if scale == "group" else rewards[present] - rewards[present].min()
            size = spread.max()  # in this unit its squares do not overflow
            std = (spread / size).std(unbiased=unbiased)
            advantages[member] = (group - mean) / size / (std + eps / size)
    return advantages.to(dtype)
