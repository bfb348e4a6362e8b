"""The objective on log-probs, and the statistics of a step: the twin of `kernels/policy_loss.py`."""

import torch
from torch import Tensor

from grpo_fast.metrics import LOSS, metrics_from
from grpo_fast.objective import Objective
from grpo_fast.records import Outputs, PolicyLoss, Tokens
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
    tokens = masked(tokens, mask)
    logp = logp if mask is None else torch.where(mask, logp, 0)
    found = token_policy_terms(logp, tokens, objective)
    weight = tokens.weight
    return found._replace(loss=weigh(weight, found.loss), dlogp=weigh(weight, found.dlogp))


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
    loss, logp, entropy, kl, clip = outputs

    def chosen(x: Tensor | None, default: float) -> Tensor:
        if x is None:
            return logp.new_full((), default)
        return x.float() if mask is None else torch.where(mask, x, default).float()

    def total(x: Tensor) -> Tensor:
        return x.sum(dtype=torch.float32) if x.ndim else x.float() * logp.numel()

    live = logp.new_ones(()) if mask is None else mask.float()
    d = chosen(logp, 0) - chosen(old_logp, 0) if old_logp is not None else logp.new_zeros(())
    ratio, weight = d.exp(), chosen(importance, 1)
    flags = clip if mask is None else torch.where(mask, clip, 0)
    rho = ratio * weight * live
    outside = (weight < 0.5) | (weight > 2)
    sums = [
        live,
        chosen(loss, 0),
        ratio * live,
        -d,
        exp_remainders(d)[1],
        *((flags & bit) != 0 for bit in (CLIP_LOW, CLIP_HIGH, CLIP_DUAL)),
        chosen(kl, 0),
        chosen(entropy, 0),
        weight * live,
        outside.float() * live,
        rho,
        rho.square(),
    ]
    least, most = logp.new_full((), torch.inf), logp.new_full((), -torch.inf)
    if logp.numel():
        everywhere = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
        least = torch.where(everywhere, ratio, least).amin()
        most = torch.where(everywhere, ratio, most).amax()
    if share is not None:
        weighs = chosen(share, 0)
        sums = [x if i == LOSS else weighs * x for i, x in enumerate(sums)]
    statistics = torch.stack([*(total(x) for x in sums), least.float(), most.float()])
    metrics = torch.stack(list(metrics_from(statistics).values()))
    return statistics, metrics, statistics[LOSS].clone()
