"""The terms of a token in plain PyTorch: surrogates and KL estimators, differentiated by autograd.

The part of the specification that `Objective` chooses from; `reference` puts it together.
"""

import dataclasses
import math

import torch
from torch import Tensor

from grpo_fast.objective import Objective


def surrogate_loss(
    logps: Tensor,
    old_logps: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    objective: Objective,
    scores: Tensor | None = None,
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
    else:
        weight = ratio * ((ratio > 1 - low) & (ratio < 1 + high))
    return -weight.detach() * advantages * logps


def vespo_weight(log_w: Tensor, advantages: Tensor, objective: Objective) -> Tensor:
    """phi(W) = W^k e^(lambda (1 - W)), with log W clamped to [log 1e-8, 20]."""
    up = advantages >= 0
    k = _either(up, objective.vespo_k_pos, objective.vespo_k_neg, log_w)
    rate = _either(up, objective.vespo_lambda_pos, objective.vespo_lambda_neg, log_w)
    log_w = log_w.clamp(math.log(1e-8), 20)
    return (rate + k * log_w - rate * log_w.exp()).exp()


def binary_kl(old_logps: Tensor, logps: Tensor) -> Tensor:
    """KL between the two-outcome distributions (y, not y) of the old and the new policy."""
    old, new = -old_logps.expm1(), -logps.expm1()  # of "not y"
    return old_logps.exp() * (old_logps - logps) + old * ((old + 1e-8) / (new + 1e-8)).log()


def kl_estimate(
    logps: Tensor,
    ref_logps: Tensor,
    ratio: Tensor,
    objective: Objective,
    log_ratio: Tensor | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """The estimate of KL(policy || reference) from one sample per token.

    Args:
        ratio, log_ratio: of "k3_unbiased" alone, after their clamp; log_ratio is log(ratio) by default.
        own: the derivative of a token's log_ratio in its own log-prob, 1 by default.
    """
    kl, gap = objective.kl, ref_logps - logps
    if objective.kl_gradient != "own":  # the value of the estimator, the gradient of k2
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
    # r k3 = e^(log r + q) - r (q + 1): its derivative is taken by hand, since autograd would add
    # r (1 - e^q) and r (e^q - q - 1), of which nothing is left where e^q is large.
    log_r = ratio.log() if log_ratio is None else log_ratio
    own = torch.ones_like(logps) if own is None else own
    with torch.no_grad():
        whole = (log_r + gap).exp() - ratio * (gap + 1)
        value = torch.where((gap > 60) & (k3 == bounded), whole, ratio * bounded)
        held = (given != gap) | (k3 != bounded)  # by a clamp: no gradient but through the ratio
        others = torch.where(own == 1, 0, (1 - own) * value)
        slope = torch.where(held, torch.where(own == 0, 0, own * value), -ratio * gap - others)
    step = logps - logps.detach()  # 0, and of slope 1
    through = log_r - log_r.detach() - own * step  # what other tokens have to do with it
    return value + slope * step + torch.where(own == 1, 0, value) * through


def _either(condition: Tensor, a: float, b: float, like: Tensor) -> Tensor:
    """`torch.where(condition, a, b)` with the digits and the dtype of `like`."""
    return torch.where(condition, like.new_full((), a), like.new_full((), b))
