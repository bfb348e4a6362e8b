"""The loss terms of a token in closed form: the twin of `kernels/terms.py` on the PyTorch path."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.objective import Objective
from grpo_fast.records import PolicyLoss, Tokens

CLIP_LOW, CLIP_HIGH, CLIP_DUAL = 1, 2, 4  # bits of the clip flags, as in kernels/terms.py


class Ratio(NamedTuple):
    """The importance ratio of each token in the form that an objective uses."""

    log_ratio: Tensor  # after the clamp
    own: Tensor  # the derivative of log_ratio in the token's own log-prob
    log_w: Tensor | None = None  # log of VESPO's sequence weight
    dropped: Tensor | None = None  # whether the token's surrogate is left out


class TokenTerms(NamedTuple):
    """The loss terms of each token before they are weighted: the result of `policy_terms`."""

    loss: Tensor
    by_logp: Tensor  # dloss/dlogp, without the part that goes through `by_ratio`
    by_ratio: Tensor  # d(surrogate)/d(log ratio)
    kl: Tensor | None
    clip: Tensor


def token_policy_terms(logp: Tensor, tokens: Tokens, objective: Objective) -> PolicyLoss:
    """Return the loss terms, not yet weighted, of tokens that have their own ratio.

    The derivatives are in closed form, because autograd does not record inside an operator.
    """
    old = logp if tokens.old_logp is None else tokens.old_logp
    log_ratio, free = bounded_log_ratio(logp - old, objective)
    terms = policy_terms(logp, tokens, Ratio(log_ratio, free.to(logp.dtype)), objective)
    dlogp = terms.by_logp + torch.where(free, terms.by_ratio, 0)
    return PolicyLoss(terms.loss, dlogp, terms.kl, terms.clip)


def bounded_log_ratio(d: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return the log-ratio d after its clamp, and whether the clamp lets a gradient through."""
    low, high = objective.log_ratio_bounds
    if low is None and high is None:
        return d, torch.ones_like(d, dtype=torch.bool)
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return d.clamp(low, high), ~((d < low) | (d > high))


def policy_terms(logp: Tensor, tokens: Tokens, given: Ratio, objective: Objective) -> TokenTerms:
    """Return the loss terms of tokens from their log-probs and ratios."""
    advantage, importance = tokens.advantages, tokens.importance
    assert advantage is not None
    old = logp if tokens.old_logp is None else tokens.old_logp
    ratio = given.log_ratio.exp()
    loss, by_ratio, by_logp, clip = surrogate_terms(
        logp, old, ratio, given.log_w, advantage, tokens.score, objective
    )
    clip = clip.to(torch.int8)
    none = given.dropped
    if none is None:
        none = torch.zeros_like(advantage, dtype=torch.bool)
    if importance is not None:
        loss, by_ratio, by_logp = (x * importance for x in (loss, by_ratio, by_logp))
        none = none | (importance == 0)  # its loss may be inf, which times 0 is NaN
    if not objective.has_quadratic:
        # With an advantage of 0 there is no surrogate, even if the ratio is inf.
        none = none | (advantage == 0)
    loss, by_ratio, by_logp = (torch.where(none, 0, x) for x in (loss, by_ratio, by_logp))
    if tokens.ref_logp is None:
        return TokenTerms(loss, by_logp, by_ratio, None, clip)
    kl, dkl = kl_terms(logp, tokens.ref_logp, given.log_ratio, ratio, given.own, objective)
    if objective.beta:
        loss = loss + objective.beta * kl
        by_logp = by_logp + objective.beta * dkl
    return TokenTerms(loss, by_logp, by_ratio, kl, clip)


def surrogate_terms(
    logp: Tensor,
    old: Tensor,
    ratio: Tensor,
    log_w: Tensor | None,
    advantage: Tensor,
    score: Tensor | None,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the surrogate, its derivatives through the ratio and through logp alone, and clip flags.

    The first derivative is in the log-ratio. `kernels/terms.py` has the twin.
    """
    zero, surrogate = torch.zeros_like(logp), objective.surrogate
    below, above = beyond_bounds(logp, old, ratio, advantage, objective)
    flags = _flags(below, above, advantage)
    if surrogate == "clip":
        loss, by_ratio, dual = clip_surrogate(ratio, advantage, objective)
        return loss, by_ratio, zero, torch.where(dual, flags + CLIP_DUAL, flags)
    if surrogate == "sapo":
        tau = either(advantage > 0, objective.tau_pos, objective.tau_neg, ratio)
        x = tau * (ratio - 1)
        gate = x.sigmoid()
        slope = gate * (-x).sigmoid()
        by_ratio = torch.where(slope == 0, 0, -4 * advantage * slope * ratio)
        return -advantage * (4 / tau) * gate, by_ratio, zero, flags
    if objective.has_quadratic:
        q, d = objective.quadratic_coef, logp - old
        penalty, pull = (q * d.square(), 2 * q * d) if q else (zero, zero)  # avoids 0 * inf
    if surrogate == "dro":
        return penalty / 2 - advantage * logp, zero, pull / 2 - advantage, flags
    cap = ratio_cap(objective)
    if objective.has_quadratic:
        assert below is not None
        assert above is not None
        out = below | above | (advantage == 0)  # selected, because the ratio may be inf
        by_ratio = torch.where(out | (ratio > cap), 0, -advantage * ratio)
        loss = torch.where(out, 0, -advantage * ratio.clamp(max=cap)) + penalty
        return loss, by_ratio, pull, flags
    if surrogate == "gmpo":  # the ratio is that of the sequence, with bounded d
        return -advantage * ratio, -advantage * ratio, zero, flags
    low, high = 1 - objective.epsilon_low, 1 + objective.epsilon_high
    if surrogate == "vespo":
        assert log_w is not None
        weight = vespo_weight(log_w, advantage, objective)
    elif surrogate == "reinforce":
        weight = torch.ones_like(ratio)
    elif surrogate == "topr":
        score = advantage if score is None else score
        weight = torch.where(
            score > 0, objective.topr_weight_pos, objective.topr_weight_neg * ratio.clamp(max=1)
        )
        weight = torch.where(score.isnan(), score, weight)  # a NaN score makes the loss NaN
    elif surrogate == "cispo":
        weight = ratio.clamp(low, high)
    elif surrogate == "rollout_is":
        weight = torch.where((ratio <= low) | (ratio >= high), 0, ratio)
    elif surrogate in ("dppo_tv", "dppo_kl"):
        assert below is not None
        weight = torch.where(below, 0, ratio.clamp(max=cap))
    else:
        raise NotImplementedError(f"surrogate_terms has no formula for surrogate={surrogate!r}")
    return -weight * advantage * logp, zero, -weight * advantage, flags


def beyond_bounds(
    logp: Tensor, old: Tensor, ratio: Tensor, advantage: Tensor, objective: Objective
) -> tuple[Tensor | None, Tensor | None]:
    """Return which tokens are below the bounds of the surrogate, and which above; None where it has none.

    The sign of the advantage decides whether a bound matters (`_flags`). DPPO's mask depends on
    that sign itself: both results are the tokens that the mask drops.
    """
    low, high = objective.epsilon_low, objective.epsilon_high
    if objective.surrogate in ("clip", "cispo", "rollout_is"):
        return ratio < 1 - low, ratio > 1 + high
    if objective.surrogate == "ipo":
        change = logp.exp() - old.exp()
        return change < -low, change > high
    if objective.surrogate == "gmpo":
        d = logp - old
        return d < -low, d > high
    if objective.surrogate in ("dppo_tv", "dppo_kl"):
        dropped = divergence_drops(logp, old, advantage, objective)
        return dropped, dropped
    return None, None


def ratio_cap(objective: Objective) -> float:
    """Return DPPO's upper bound of the ratio; inf where there is none."""
    if objective.surrogate not in ("dppo_tv", "dppo_kl") or objective.ratio_cap is None:
        return math.inf
    return objective.ratio_cap


def vespo_weight(log_w: Tensor, advantage: Tensor, objective: Objective) -> Tensor:
    """Return VESPO's weight phi(W) of the sequence weight W; `kernels/terms.py` has the twin."""
    log_w = log_w.clamp(math.log(1e-8), 20)
    up = advantage >= 0
    k = either(up, objective.vespo_k_pos, objective.vespo_k_neg, log_w)
    rate = either(up, objective.vespo_lambda_pos, objective.vespo_lambda_neg, log_w)
    return (rate + k * log_w - rate * log_w.exp()).exp()


def _flags(below: Tensor | None, above: Tensor | None, advantage: Tensor) -> Tensor:
    flags = torch.zeros_like(advantage)  # inductor does arithmetic on int8 one by one
    if below is not None:
        flags = torch.where(below & (advantage < 0), flags + CLIP_LOW, flags)
    if above is not None:
        flags = torch.where(above & (advantage > 0), flags + CLIP_HIGH, flags)
    return flags


def clip_surrogate(
    ratio: Tensor, advantage: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the "clip" surrogate, its derivative in the log-ratio, and a clip flag.

    The flag is 1 where A < 0 and the ratio is above `delta` or `dual_clip`. `kernels/terms.py` has
    the twin.
    """
    low, high = 1 - objective.epsilon_low, 1 + objective.epsilon_high
    bounded = ratio if objective.delta is None else ratio.clamp(max=objective.delta)
    free, clipped = bounded * advantage, ratio.clamp(low, high) * advantage
    loss = -torch.minimum(free, clipped)
    cut = torch.where(free <= clipped, bounded < ratio, (ratio < low) | (ratio > high))
    dual = torch.zeros_like(cut)
    if objective.dual_clip is not None:
        ceiling = -objective.dual_clip * advantage
        dual = (advantage < 0) & (ceiling < loss)
        loss = torch.where(dual, ceiling, loss)
    # Select, not multiply: the ratio may be inf where no gradient passes.
    by_ratio = torch.where(cut | dual, 0, -ratio * advantage)
    bound = objective.delta or objective.dual_clip or math.inf
    return loss, by_ratio, (ratio > bound) & (advantage < 0)


def divergence_drops(logp: Tensor, old: Tensor, advantage: Tensor, objective: Objective) -> Tensor:
    """Return the tokens that DPPO's mask drops; `kernels/terms.py` has the twin."""
    low, high = objective.epsilon_low, objective.epsilon_high
    if objective.surrogate == "dppo_tv":
        change = logp.exp() - old.exp()
        up, down = change > high, change < -low
    else:
        kl = binary_kl(old, logp)
        up, down = (kl > high) & (logp > old), (kl > low) & (logp < old)
    return torch.where(advantage > 0, up, down)


def binary_kl(old: Tensor, logp: Tensor) -> Tensor:
    """Return KL(old || new) of the two outcomes "this token" and "any other token"."""
    other_old, other = -exp_remainders(old)[0], -exp_remainders(logp)[0]
    return old.exp() * (old - logp) + other_old * ((1e-8 + other_old) / (1e-8 + other)).log()


def exp_remainders(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return e^x - 1 and e^x - x - 1, by a series where the terms would cancel.

    Inductor writes expm1 as exp(x) - 1 on a CPU (torch 2.13), which has no digits left for a small x.
    """
    last = 18 if x.dtype == torch.float64 else 10  # the rest is below the dtype's precision
    series = x * (1 / math.factorial(last))
    for n in range(last - 1, 2, -1):
        series = (series + 1 / math.factorial(n)) * x
    near, first = x.abs() <= 1, x.exp() - 1
    second = torch.where(near, x * x * (series + 0.5), first - x)
    return torch.where(near, x + second, first), second


def kl_terms(
    logp: Tensor,
    ref_logp: Tensor,
    log_ratio: Tensor,
    ratio: Tensor,
    own: Tensor,
    objective: Objective,
) -> tuple[Tensor, Tensor]:
    """Return the KL estimate and its derivative in logp; `kernels/terms.py` has the twin."""
    kl, gap = objective.kl, ref_logp - logp
    pull = -gap if objective.kl_gradient != "own" else None
    if kl == "k1":
        return -gap, torch.ones_like(gap) if pull is None else pull
    if kl == "abs":
        return gap.abs(), -gap.sign() if pull is None else pull
    if kl == "k2":
        return gap.square() / 2, -gap
    reach = math.inf if objective.kl_gap_clip is None else objective.kl_gap_clip
    most = math.inf if objective.kl_value_clip is None else objective.kl_value_clip
    far = torch.zeros_like(gap, dtype=torch.bool)
    if reach < math.inf:
        far, gap = gap.abs() > reach, gap.clamp(-reach, reach)
    slope, k3 = exp_remainders(gap)
    capped = torch.zeros_like(far)
    if most < math.inf:
        capped = k3 > most
        far = far | capped  # no gradient through a clamp
        k3 = k3.clamp(max=most)
    if kl == "k3_unbiased":
        # r (e^q - q - 1) is computed with one exponential: r may underflow where e^q overflows.
        whole = (log_ratio + gap).exp() - ratio * (gap + 1)
        value = torch.where((gap > 60) & ~capped, whole, ratio * k3)
        # The derivative is -r (e^q - 1) + own r (e^q - q - 1), written in terms of one sign.
        through = torch.where(own == 1, 0, (1 - own) * value)
        inside = torch.where(
            gap > 0, -ratio * gap - through, -ratio * ((1 - own) * slope + own * gap)
        )
        return value, torch.where(far, torch.where(own == 0, 0, own * value), inside)
    if pull is None:
        return k3, torch.where(far, 0, -slope)
    return k3, torch.where(far, 0, pull) if objective.kl_gradient == "k2_clipped" else pull


def either(condition: Tensor, a: float, b: float, like: Tensor) -> Tensor:
    """Return `torch.where(condition, a, b)` in the dtype of `like`, not in the default dtype."""
    return torch.where(condition, like.new_full((), a), like.new_full((), b))


def weigh(weight: Tensor, x: Tensor) -> Tensor:
    """Return `weight * x`, and 0 where the weight is 0, even if x is inf or NaN there."""
    return torch.where(weight == 0, 0, weight * x)


def masked(tokens: Tokens, mask: Tensor | None) -> Tokens:
    """Return the tokens with 0 where the mask is 0; masked values may be NaN."""
    if mask is None:
        return tokens
    return Tokens(*(None if x is None else torch.where(mask, x, 0) for x in tokens))  # type: ignore[arg-type]
