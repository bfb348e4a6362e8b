"""The loss of a token and its derivatives, as pure maths: surrogates and KL estimators.

No loads, no stores. The numbers of an objective are named tuples (`scalars`). Twins on the PyTorch path:
`grpo_fast/torch_kernels/terms.py`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from grpo_fast.kernels.tiles import greater, lesser, one_minus_exp

# Bits of the clip flags: why the surrogate of a token passes no gradient (or is bounded).
CLIP_LOW = tl.constexpr(1)
CLIP_HIGH = tl.constexpr(2)
CLIP_DUAL = tl.constexpr(4)


class TokenValues(NamedTuple):
    """The arguments of a token's loss, besides its ratio."""

    logp: Any
    old_logp: Any
    ref_logp: Any  # None: no KL term
    advantage: Any
    score: Any
    importance: Any


class RatioValues(NamedTuple):
    """The importance ratio of a token."""

    log_ratio: Any  # after its clamp
    own: Any  # its derivative in the token's own log-prob
    log_w: Any  # VESPO's log sequence weight
    keep: Any  # whether the surrogate counts


@triton.jit
def clip_surrogate(ratio, advantage, scalars):
    """PPO's clipped surrogate: (loss, dloss/dlogp). An infinite bound is no bound."""
    low = scalars.ratio_min
    high = scalars.ratio_max
    free = lesser(ratio, scalars.delta) * advantage
    clipped = lesser(greater(ratio, low), high) * advantage
    loss = -lesser(free, clipped)
    # Where both branches agree (inside the clip range) either gradient is right: they are the same.
    cut = tl.where(free <= clipped, ratio > scalars.delta, (ratio < low) | (ratio > high))
    ceiling = -tl.where(advantage < 0, scalars.dual_clip, 0.0) * advantage
    dual = (advantage < 0) & (ceiling < loss)
    loss = tl.where(dual, ceiling, loss)
    # Select, not multiply: the ratio may be inf where no gradient passes.
    return loss, tl.where(cut | dual, 0.0, -ratio * advantage)


@triton.jit
def sapo_surrogate(ratio, advantage, scalars):
    """SAPO's soft gate: (loss, dloss/dlogp)."""
    tau = tl.where(advantage > 0, scalars.tau_pos, scalars.tau_neg)
    x = tau * (ratio - 1.0)
    gate = tl.sigmoid(x)
    slope = gate * tl.sigmoid(-x)
    # A saturated gate passes nothing, also where the ratio is inf.
    dlogp = tl.where(slope == 0, 0.0, -4.0 * advantage * slope * ratio)
    return -advantage * (4.0 / tau) * gate, dlogp


@triton.jit
def divergence_drops(token, scalars, SURROGATE: tl.constexpr):
    """DPPO's mask: whether a token has moved too far in the direction in which it is pushed.

    A token whose divergence is NaN stays. Either a log-prob is NaN, which must show in the loss, or it is
    slightly above 0.
    """
    logp = token.logp
    old_logp = token.old_logp
    low = scalars.low
    high = scalars.high
    old = tl.exp(old_logp)
    if SURROGATE == "dppo_tv" or SURROGATE == "dppo_tv_ratio":
        change = tl.exp(logp) - old
        up = change > high
        down = change < -low
    else:
        without = one_minus_exp(old_logp)
        rest = without * tl.log((without + 1e-8) / (one_minus_exp(logp) + 1e-8))
        kl = old * (old_logp - logp) + rest
        up = (kl > high) & (logp > old_logp)
        down = (kl > low) & (logp < old_logp)
    return tl.where(token.advantage > 0, up, down)


@triton.jit
def vespo_weight(log_w, advantage, scalars):
    """VESPO's weight phi(W) = W^k e^(lambda (1 - W)), with log W clamped to [log 1e-8, 20]."""
    log_w = lesser(greater(log_w, -18.420680743952367), 20.0)
    k = tl.where(advantage >= 0, scalars.k_pos, scalars.k_neg)
    rate = tl.where(advantage >= 0, scalars.lambda_pos, scalars.lambda_neg)
    return tl.exp(rate + k * log_w - rate * tl.exp(log_w))


@triton.jit
def quadratic_terms(d, coef):
    """(coef d^2, its derivative): 0 with a coefficient of 0, also where d is infinite."""
    used = coef != 0
    return tl.where(used, coef * d * d, 0.0), tl.where(used, 2.0 * coef * d, 0.0)


@triton.jit
def probability_change(token):
    """How far the probability of a token has moved."""
    return tl.exp(token.logp) - tl.exp(token.old_logp)


@triton.jit
def weight_of_logp(token, ratio, log_w, scalars, SURROGATE: tl.constexpr):
    """The weight w of surrogates of the form -w advantage logp, in which w takes no gradient."""
    if SURROGATE == "cispo":
        weight = lesser(greater(ratio, scalars.ratio_min), scalars.ratio_max)
    elif SURROGATE == "rollout_is":
        outside = (ratio <= scalars.ratio_min) | (ratio >= scalars.ratio_max)
        weight = tl.where(outside, 0.0, ratio)
    elif SURROGATE == "vespo":
        weight = vespo_weight(log_w, token.advantage, scalars)
    elif SURROGATE == "reinforce":
        weight = tl.zeros_like(ratio) + 1.0
    elif SURROGATE == "topr":
        score = token.score
        weight = tl.where(score > 0, scalars.weight_pos, scalars.weight_neg * lesser(ratio, 1.0))
        weight = tl.where(score == score, weight, score)  # a NaN that decides comes out
    else:
        tl.static_assert(
            SURROGATE == "dppo_tv" or SURROGATE == "dppo_kl",
            "surrogate_terms has no formula for this surrogate",
        )
        out = divergence_drops(token, scalars, SURROGATE)
        weight = tl.where(out, 0.0, lesser(ratio, scalars.ratio_cap))
    return weight


@triton.jit
def surrogate_terms(token, ratio, log_w, scalars, SURROGATE: tl.constexpr):
    """(loss, dloss/dlogp through the ratio, through logp alone) of tokens.

    Args:
        token: `TokenValues`.
        log_w: VESPO's log sequence weight.
        scalars: the numbers of this surrogate.
    """
    advantage = token.advantage
    by_ratio = tl.zeros_like(ratio)  # not ratio * 0: the ratio may be inf
    by_logp = tl.zeros_like(ratio)
    if SURROGATE == "clip":
        loss, by_ratio = clip_surrogate(ratio, advantage, scalars)
    elif SURROGATE == "sapo":
        loss, by_ratio = sapo_surrogate(ratio, advantage, scalars)
    elif SURROGATE == "gmpo":  # the ratio is the sequence's, its bounds are behind it
        by_ratio = -advantage * ratio
        loss = by_ratio
    elif SURROGATE == "dro":
        penalty, pull = quadratic_terms(token.logp - token.old_logp, scalars.quadratic_coef)
        loss = 0.5 * penalty - advantage * token.logp
        by_logp = 0.5 * pull - advantage
    elif SURROGATE == "ipo" or SURROGATE == "dppo_tv_ratio" or SURROGATE == "dppo_kl_ratio":
        penalty, by_logp = quadratic_terms(token.logp - token.old_logp, scalars.quadratic_coef)
        if SURROGATE == "ipo":
            change = probability_change(token)
            out = (change < -scalars.low) | (change > scalars.high)
        else:
            out = divergence_drops(token, scalars, SURROGATE)
        out = out | (advantage == 0)  # the ratio may be inf
        by_ratio = tl.where(out | (ratio > scalars.ratio_cap), 0.0, -advantage * ratio)
        loss = tl.where(out, 0.0, -advantage * lesser(ratio, scalars.ratio_cap)) + penalty
    else:
        by_logp = -weight_of_logp(token, ratio, log_w, scalars, SURROGATE) * advantage
        loss = by_logp * token.logp
    return loss, by_ratio, by_logp


@triton.jit
def clip_flags(token, ratio, scalars, SURROGATE: tl.constexpr):
    """Why a token is held back: bits CLIP_LOW, CLIP_HIGH, CLIP_DUAL."""
    clip = tl.zeros_like(ratio).to(tl.int32)
    if SURROGATE == "clip" or SURROGATE == "cispo" or SURROGATE == "rollout_is":
        below = ratio < scalars.ratio_min
        above = ratio > scalars.ratio_max
    elif (
        SURROGATE == "dppo_tv"
        or SURROGATE == "dppo_kl"
        or SURROGATE == "dppo_tv_ratio"
        or SURROGATE == "dppo_kl_ratio"
    ):
        cut = divergence_drops(token, scalars, SURROGATE)
        below = cut
        above = cut
    elif SURROGATE == "gmpo":
        below = token.logp - token.old_logp < -scalars.low
        above = token.logp - token.old_logp > scalars.high
    elif SURROGATE == "ipo":
        change = probability_change(token)
        below = change < -scalars.low
        above = change > scalars.high
    else:
        below = clip != 0
        above = below
    clip += tl.where(below & (token.advantage < 0), CLIP_LOW, 0)
    clip += tl.where(above & (token.advantage > 0), CLIP_HIGH, 0)
    if SURROGATE == "clip":
        over = ratio > lesser(scalars.delta, scalars.dual_clip)
        clip += tl.where(over & (token.advantage < 0), CLIP_DUAL, 0)
    return clip


@triton.jit
def exp_remainders(x):
    """(e^x - 1, e^x - x - 1): by a series where the terms would cancel."""
    series = 1 / 5040 + x * (1 / 40320 + x * (1 / 362880 + x * (1 / 3628800)))
    second = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * series)))))
    near = tl.abs(x) <= 1.0
    first = tl.exp(x) - 1.0
    return tl.where(near, x + second, first), tl.where(near, second, first - x)


@triton.jit
def kl_terms(token, ratio, log_ratio, own, scalars, MODES: tl.constexpr):
    """(KL estimate, its derivative in logp) from q = ref_logp - logp.

    Args:
        own: for "k3_unbiased", d(log ratio)/dlogp of this token. The derivative includes what comes through
            that: a sum of two large terms that cancel is never taken.
        scalars: `KLScalars`.
    """
    KL: tl.constexpr = MODES.KL
    KL_GRADIENT: tl.constexpr = MODES.KL_GRADIENT
    gap_clip = scalars.gap_clip
    value_clip = scalars.value_clip
    gap = token.ref_logp - token.logp
    pull = -gap
    if KL == "k1":
        kl = -gap
        dkl = tl.zeros_like(gap) + 1.0
    elif KL == "abs":
        kl = tl.abs(gap)
        dkl = tl.where(gap > 0, -1.0, tl.where(gap < 0, 1.0, gap))  # 0 or NaN
    elif KL == "k2":
        kl = 0.5 * gap * gap
        dkl = -gap
    else:
        far = tl.abs(gap) > gap_clip
        gap = lesser(greater(gap, -gap_clip), gap_clip)
        slope, kl = exp_remainders(gap)
        capped = kl > value_clip
        far = far | capped  # no gradient through a clamp
        kl = lesser(kl, value_clip)
        if KL == "k3_unbiased":
            # r (e^q - q - 1) as one exponential: r may have underflowed where e^q overflows.
            whole = tl.exp(log_ratio + gap) - ratio * (gap + 1.0)
            kl = tl.where((gap > 60.0) & (capped == 0), whole, ratio * kl)
            # -r (e^q - 1) + own r (e^q - q - 1), in terms of one sign.
            through = tl.where(own == 1.0, 0.0, (1.0 - own) * kl)
            inside = tl.where(
                gap > 0, -ratio * gap - through, -ratio * ((1.0 - own) * slope + own * gap)
            )
            dkl = tl.where(far, tl.where(own == 0.0, 0.0, own * kl), inside)
        else:
            dkl = tl.where(far, 0.0, -slope)
            if KL_GRADIENT == "k2_clipped":
                pull = tl.where(far, 0.0, pull)
    if KL_GRADIENT != "own":
        dkl = pull
    return kl, dkl


@triton.jit
def bounded_log_ratio(d, bounds):
    """(the log-ratio d after its clamp, whether the clamp lets a gradient through).

    Args:
        bounds: `LogRatioRange`.
    """
    held = (d < bounds.lowest) | (d > bounds.highest)
    return lesser(greater(d, bounds.lowest), bounds.highest), held == 0


@triton.jit
def policy_terms(token, ratio_values, scalars, MODES: tl.constexpr):
    """(loss, d/dlogp, d/d log ratio, KL, clip flags) of tokens, before the reduction's weight.

    d/d log ratio is the derivative of the surrogate. d/dlogp leaves that out, but has the whole derivative of
    the KL, with what comes through the token's own log-ratio.

    Args:
        token: `TokenValues`.
        ratio_values: `RatioValues`.
        scalars: `Scalars`.
        MODES: `Modes`.
    """
    SURROGATE: tl.constexpr = MODES.SURROGATE
    QUADRATIC: tl.constexpr = MODES.QUADRATIC
    log_ratio = ratio_values.log_ratio
    ratio = tl.exp(log_ratio)
    loss, by_ratio, by_logp = surrogate_terms(
        token, ratio, ratio_values.log_w, scalars.surrogate, SURROGATE
    )
    keep = ratio_values.keep
    if not QUADRATIC:
        # Without an advantage there is no surrogate, also where the ratio is inf.
        keep = keep & (token.advantage != 0)
    keep = keep & (token.importance != 0)  # the loss may be inf there: that is why it is left out
    loss = tl.where(keep, loss * token.importance, 0.0)
    by_ratio = tl.where(keep, by_ratio * token.importance, 0.0)
    by_logp = tl.where(keep, by_logp * token.importance, 0.0)
    kl = tl.zeros_like(token.logp)
    if token.ref_logp is not None:
        beta = scalars.kl.beta
        kl, dkl = kl_terms(token, ratio, log_ratio, ratio_values.own, scalars.kl, MODES)
        loss += tl.where(beta == 0, 0.0, beta * kl)
        by_logp += tl.where(beta == 0, 0.0, beta * dkl)
    clip = clip_flags(token, ratio, scalars.surrogate, SURROGATE)
    return loss, by_logp, by_ratio, kl, clip


@triton.jit
def token_policy_terms(token, scalars, MODES: tl.constexpr):
    """(loss, dloss/dlogp, KL, clip flags) of tokens whose ratio is their own."""
    log_ratio, free = bounded_log_ratio(token.logp - token.old_logp, scalars.log_ratio)
    keep = tl.full(log_ratio.shape, True, tl.int1)
    ratio = RatioValues(log_ratio, free.to(tl.float32), 0.0, keep)
    loss, by_logp, by_ratio, kl, clip = policy_terms(token, ratio, scalars, MODES)
    return loss, by_logp + tl.where(free, by_ratio, 0.0), kl, clip
