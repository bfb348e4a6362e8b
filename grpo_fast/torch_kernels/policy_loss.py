"""The objective on log-probs, and the statistics of a step: the twin of `kernels/policy_loss.py`."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_fast.metrics import LOSS, metrics_from
from grpo_fast.objective import Objective
from grpo_fast.records import Outputs, PolicyLoss, Sequences, Tokens, Weighing
from grpo_fast.torch_kernels.compiled import TOKENS, call, compiles
from grpo_fast.torch_kernels.reduction_weights import weights_of_rows
from grpo_fast.torch_kernels.sequence_loss import of_sequences
from grpo_fast.torch_kernels.terms import (
    CLIP_DUAL,
    CLIP_HIGH,
    CLIP_LOW,
    exp_remainders,
    masked,
    token_policy_terms,
    weigh,
)


def policy_loss_fwd(
    logp: Tensor, mask: Tensor | None, tokens: Tokens, objective: Objective
) -> PolicyLoss:
    """Compute the weighted loss of each token, its derivative, KL (or None), and clip flags."""
    if compiles(logp, len(logp), TOKENS):
        found = call(_of_tokens, (objective,), logp, mask, *tokens)
        if found is not None:
            return PolicyLoss(*found)
    return _of_tokens(logp, mask, *tokens, objective)


def _of_tokens(logp: Tensor, mask: Tensor | None, *given: Any) -> PolicyLoss:
    """Compute `policy_loss_fwd` from the fields of `Tokens` and the objective."""
    *fields, objective = given
    tokens = masked(Tokens(*fields), mask)
    logp = logp if mask is None else torch.where(mask, logp, 0)
    found = token_policy_terms(logp, tokens, objective)
    weight = tokens.weight
    # Not `_replace`, which torch 2.8 does not trace.
    loss, dlogp = weigh(weight, found.loss), weigh(weight, found.dlogp)
    return PolicyLoss(loss, dlogp, found.kl, found.clip)


def pays_off(logp: Tensor) -> bool:
    """Tell whether `padded_loss` is the way for log-probs of any shape and dtype."""
    padded = logp.ndim == 2 and logp.shape[1] > 1
    return padded and compiles(logp, logp.numel(), TOKENS)


def padded_loss(
    logp: Tensor,
    entropy: Tensor | None,
    weighing: Weighing,
    each: Sequence[Tensor | None],
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Compute weights, objective and statistics of padded tokens in one compiled call.

    Args:
        logp, entropy: (B, T) fp32, contiguous; no bonus and no choice of tokens by the entropy.
        weighing: `boundaries` is None.
        each: advantages, old_logp, ref_logp, importance and score, fp32 or None: (B, T), or (B,)
            with one value per sequence. With VESPO importance is None.

    Returns:
        dloss/dlogp (B, T), the statistics (16,), the metrics (14,), and the loss (); None if
        compiling fails.
    """
    mask, floating, token_weights, _, *factors = weighing
    rows = [None if x is None else x.view(logp.shape) for x in (mask, floating, token_weights)]
    # A graph takes any values of tensors, and each dtype by itself; float64 would be a constant of it.
    numbers = [None if x is None else x.to("cpu", torch.float32) for x in factors]
    given = logp, entropy, *numbers, *rows, *each
    found: tuple[Tensor, Tensor, Tensor, Tensor] | None = call(
        _of_padded_batch, (objective,), *given, moving=2
    )
    return found


def _of_padded_batch(
    logp: Tensor, entropy: Tensor | None, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `padded_loss` of (B, T) tensors, with the objective at the end."""
    num_items, loss_scale, mask, floating, token_weights, *each, objective = given
    each = [x if x is None or x.ndim == 2 else x[:, None].expand(logp.shape) for x in each]
    weighing = Weighing(mask, floating, token_weights, None, num_items, loss_scale)
    most = objective.max_length or 0
    weights = weights_of_rows(logp, weighing, objective.reduction, most, False)
    tokens = Tokens(weights.weight, *each)
    if objective.needs_sequences:
        sequences = Sequences(None, logp.shape[1], weights.share)
        found = of_sequences(logp, mask, tokens, sequences, objective)
    else:
        found = _of_tokens(logp, mask, *tokens, objective)
    outputs = Outputs(found.loss, logp, entropy, found.kl, found.clip)
    given = mask, weights.share, tokens.old_logp, tokens.importance
    return found.dlogp, *_statistics(*outputs, *given, torch.float64)


def token_statistics_fwd(
    outputs: Outputs,
    mask: Tensor | None,
    share: Tensor | None,
    old_logp: Tensor | None,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the statistics (16,) and metrics (14,) of a step, and the sum of its losses, (), all fp32.

    Args:
        outputs: (N,) each; entropy and kl are None where there are none.
        share: (N,) the weight of a token in the sums; the losses are weighted already. None: 1.
    """
    given = *outputs, mask, share, old_logp, importance
    if len(outputs.logp) > 1 and compiles(outputs.logp, len(outputs.logp), TOKENS):
        found = call(_statistics, (torch.float64,), *given)
        if found is not None:
            return found
    return _statistics(*given, torch.float32)


def _chosen(mask: Tensor | None, like: Tensor, x: Tensor | None, default: float) -> Tensor:
    """Return x in float32, with `default` where masked or where there is no x."""
    if x is None:
        return like.new_full((), default)
    return x.float() if mask is None else torch.where(mask, x, default).float()


def _statistics(
    loss: Tensor,
    logp: Tensor,
    entropy: Tensor | None,
    kl: Tensor | None,
    clip: Tensor,
    mask: Tensor | None,
    share: Tensor | None,
    old_logp: Tensor | None,
    importance: Tensor | None,
    precision: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `token_statistics_fwd`; inductor adds term by term, for which `precision` is float64."""
    chosen = functools.partial(_chosen, mask, logp)

    def total(x: Tensor) -> Tensor:
        """Return the sum of each row: compiled code makes one loop of these sums."""
        counts = x.dtype == torch.bool and share is None  # exact in float32
        return x.sum(-1, dtype=torch.float32 if counts else precision).to(precision)

    live = logp.new_ones(()) if mask is None else mask.float()
    d = chosen(logp, 0) - chosen(old_logp, 0) if old_logp is not None else logp.new_zeros(())
    weight = chosen(importance, 1)
    clipped, flags = [], chosen(clip.float(), 0)  # compiled code takes int8 one by one
    for bit in (CLIP_DUAL, CLIP_HIGH, CLIP_LOW):
        has = flags >= bit
        flags = flags - bit * has.float()
        clipped.append(has)

    def anew() -> Tensor:
        return d.exp() * live

    # Compiled code would store values of exp that are used twice.
    ratio = functools.cache(anew) if precision == torch.float32 else anew
    outside, weighted = (weight < 0.5) | (weight > 2), ratio()
    counted = live if mask is None else mask
    sums = [
        counted,
        chosen(loss, 0),
        weighted,
        -d,
        exp_remainders(d)[1],
        *reversed(clipped),
        chosen(kl, 0),
        chosen(entropy, 0),
        counted if importance is None else weight * live,
        outside if mask is None else outside & mask,
        weighted if importance is None else ratio() * weight,
        (ratio() * weight).square(),
    ]
    least, most = logp.new_full((), torch.inf), logp.new_full((), -torch.inf)
    if logp.numel():
        everywhere = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
        least = torch.where(everywhere, d, least).amin(-1).amin().exp()
        most = torch.where(everywhere, d, most).amax(-1).amax().exp()
    if share is not None:
        weighs = chosen(share, 0)
        sums = [x if i == LOSS else weighs * x for i, x in enumerate(sums)]
    # Each once; the others are the same for all tokens.
    varying = {id(x): x for x in sums if x.ndim}
    rows = torch.stack([total(x) for x in varying.values()])
    totals = dict(zip(varying, (rows.sum(-1) if rows.ndim == 2 else rows).unbind(), strict=True))
    whole = [totals[id(x)] if x.ndim else x.to(precision) * logp.numel() for x in sums]
    # The largest of no ratios, which is not e^-inf.
    most = torch.where(whole[0] == 0, -torch.inf, most)
    joined = torch.stack if precision == torch.float32 else _by_index
    statistics = joined([x.float() for x in (*whole, least, most)])
    metrics = joined(list(metrics_from(statistics).values()))
    return statistics, metrics, statistics[LOSS].clone()


def _by_index(values: list[Tensor]) -> Tensor:
    """Return `torch.stack(values)` of 0-dim tensors, without the view that inductor makes of each."""
    index, found = torch.arange(len(values), device=values[0].device), values[0]
    for i, x in enumerate(values[1:], 1):
        found = torch.where(index == i, x, found)
    return found
