"""A token's share of an objective, as pure maths: surrogates, KL estimators, their derivatives.

No loads, no stores. Twins on the PyTorch path: `grpo_fast/torch_kernels/terms.py`.
"""

import triton
import triton.language as tl

from grpo_fast.kernels.tiles import greater, lesser, one_minus_exp

# Bits of the clip flags: why the surrogate of a token passes no gradient (or is bounded).
CLIP_LOW = tl.constexpr(1)
CLIP_HIGH = tl.constexpr(2)
CLIP_DUAL = tl.constexpr(4)


@triton.jit
def clip_surrogate(ratio, advantage, low, high, delta, dual_clip):
    """PPO's clipped surrogate: (loss, dloss/dlogp, bounded). An infinite bound is no bound."""
    free = lesser(ratio, delta) * advantage
    clipped = lesser(greater(ratio, low), high) * advantage
    loss = -lesser(free, clipped)
    # Where both branches agree (inside the clip range) either gradient is right: they are the same.
    cut = tl.where(free <= clipped, ratio > delta, (ratio < low) | (ratio > high))
    ceiling = -tl.where(advantage < 0, dual_clip, 0.0) * advantage
    dual = (advantage < 0) & (ceiling < loss)
    loss = tl.where(dual, ceiling, loss)
    # Select, not multiply: the ratio may be inf where no gradient passes.
    return loss, tl.where(cut | dual, 0.0, -ratio * advantage)


@triton.jit
def sapo_surrogate(ratio, advantage, tau_pos, tau_neg):
    """The soft gate: (loss, dloss/dlogp)."""
    tau = tl.where(advantage > 0, tau_pos, tau_neg)
    x = tau * (ratio - 1.0)
    gate = tl.sigmoid(x)
    slope = gate * tl.sigmoid(-x)
    # A saturated gate passes nothing, also where the ratio is inf.
    dlogp = tl.where(slope == 0, 0.0, -4.0 * advantage * slope * ratio)
    return -advantage * (4.0 / tau) * gate, dlogp


@triton.jit
def divergence_drops(logp, old_logp, advantage, low, high, SURROGATE: tl.constexpr):
    """DPPO's mask: whether a token has moved too far in the direction it is pushed.

    Not where that is NaN: either a log-prob is, which must come out, or one is a hair above 0.
    """
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
    return tl.where(advantage > 0, up, down)


@triton.jit
def vespo_weight(log_w, advantage, k_pos, k_neg, lambda_pos, lambda_neg):
    """phi(W) = W^k e^(lambda (1 - W)), with log W clamped to [log 1e-8, 20]."""
    log_w = lesser(greater(log_w, -18.420680743952367), 20.0)
    k = tl.where(advantage >= 0, k_pos, k_neg)
    rate = tl.where(advantage >= 0, lambda_pos, lambda_neg)
    return tl.exp(rate + k * log_w - rate * tl.exp(log_w))


@triton.jit
def quadratic_terms(d, coef):
    """(coef d^2, its derivative): 0 with a coefficient of 0, also where d is infinite."""
    used = coef != 0
    return tl.where(used, coef * d * d, 0.0), tl.where(used, 2.0 * coef * d, 0.0)


@triton.jit
def surrogate_terms(
    logp, old_logp, ratio, log_w, advantage, score, low, high, cap, second, SURROGATE: tl.constexpr
):
    """(loss, dloss/dlogp through the ratio, through logp alone) of tokens.

    log_w: VESPO's log sequence weight. score: TOPR's. low, high: bounds as the surrogate uses them, cap and
    second: whatever else it takes (`policy_loss.scalars`).
    """
    by_ratio = tl.zeros_like(ratio)  # not ratio * 0: the ratio may be inf
    by_logp = tl.zeros_like(ratio)
    if SURROGATE == "clip":
        loss, by_ratio = clip_surrogate(ratio, advantage, low, high, cap, second)
    elif SURROGATE == "sapo":
        loss, by_ratio = sapo_surrogate(ratio, advantage, cap, second)
    elif SURROGATE == "gmpo":  # the ratio is the sequence's, its bounds are behind it
        by_ratio = -advantage * ratio
        loss = by_ratio
    elif SURROGATE == "dro":
        penalty, pull = quadratic_terms(logp - old_logp, second)
        loss = 0.5 * penalty - advantage * logp
        by_logp = 0.5 * pull - advantage
    elif SURROGATE == "ipo" or SURROGATE == "dppo_tv_ratio" or SURROGATE == "dppo_kl_ratio":
        penalty, by_logp = quadratic_terms(logp - old_logp, second)
        if SURROGATE == "ipo":
            change = tl.exp(logp) - tl.exp(old_logp)
            out = (change < -low) | (change > high)
        else:
            out = divergence_drops(logp, old_logp, advantage, low, high, SURROGATE)
        out = out | (advantage == 0)  # the ratio may be inf
        by_ratio = tl.where(out | (ratio > cap), 0.0, -advantage * ratio)
        loss = tl.where(out, 0.0, -advantage * lesser(ratio, cap)) + penalty
    else:
        if SURROGATE == "cispo":
            weight = lesser(greater(ratio, low), high)
        elif SURROGATE == "rollout_is":
            weight = tl.where((ratio <= low) | (ratio >= high), 0.0, ratio)
        elif SURROGATE == "vespo":
            weight = vespo_weight(log_w, advantage, low, high, cap, second)
        elif SURROGATE == "reinforce":
            weight = tl.zeros_like(ratio) + 1.0
        elif SURROGATE == "topr":
            weight = tl.where(score > 0, cap, second * lesser(ratio, 1.0))
            weight = tl.where(score == score, weight, score)  # a NaN that decides comes out
        else:
            out = divergence_drops(logp, old_logp, advantage, low, high, SURROGATE)
            weight = tl.where(out, 0.0, lesser(ratio, cap))
        by_logp = -weight * advantage
        loss = by_logp * logp
    return loss, by_ratio, by_logp


@triton.jit
def clip_flags(logp, old_logp, ratio, advantage, low, high, cap, second, SURROGATE: tl.constexpr):
    """Why a token is held back: bits CLIP_LOW, CLIP_HIGH, CLIP_DUAL."""
    clip = tl.zeros_like(ratio).to(tl.int32)
    if SURROGATE == "clip" or SURROGATE == "cispo" or SURROGATE == "rollout_is":
        below = ratio < low
        above = ratio > high
    elif (
        SURROGATE == "dppo_tv"
        or SURROGATE == "dppo_kl"
        or SURROGATE == "dppo_tv_ratio"
        or SURROGATE == "dppo_kl_ratio"
    ):
        cut = divergence_drops(logp, old_logp, advantage, low, high, SURROGATE)
        below = cut
        above = cut
    elif SURROGATE == "gmpo":
        below = logp - old_logp < -low
        above = logp - old_logp > high
    elif SURROGATE == "ipo":
        change = tl.exp(logp) - tl.exp(old_logp)
        below = change < -low
        above = change > high
    else:
        below = clip != 0
        above = below
    clip += tl.where(below & (advantage < 0), CLIP_LOW, 0)
    clip += tl.where(above & (advantage > 0), CLIP_HIGH, 0)
    if SURROGATE == "clip":
        clip += tl.where((ratio > lesser(cap, second)) & (advantage < 0), CLIP_DUAL, 0)
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
def kl_terms(
    logp,
    ref_logp,
    log_ratio,
    ratio,
    own,
    gap_clip,
    value_clip,
    KL: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
):
    """(KL estimate, d/dlogp) from q = ref_logp - logp.

    own: for "k3_unbiased", d(log ratio)/dlogp of this token. The derivative includes what comes through that:
    a sum of two large terms that cancel is never taken.
    """
    gap = ref_logp - logp
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
def bounded_log_ratio(d, log_ratio_min, log_ratio_max):
    """(the log-ratio d after its clamp, whether the clamp lets a gradient through)."""
    held = (d < log_ratio_min) | (d > log_ratio_max)
    return lesser(greater(d, log_ratio_min), log_ratio_max), held == 0


@triton.jit
def policy_terms(
    logp,
    old_logp,
    ref_logp,
    log_ratio,
    own,
    log_w,
    keep,
    advantage,
    score,
    importance,
    low,
    high,
    cap,
    second,
    beta,
    gap_clip,
    value_clip,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    HAS_REF: tl.constexpr,
):
    """(loss, d/dlogp, d/d log ratio, KL, clip flags) of tokens, before the reduction's weight.

    log_ratio: after its clamp. own: its derivative in the token's own log-prob.
    keep: whether the surrogate counts. d/d log ratio is of the surrogate, and d/dlogp is without it; the KL
    has in d/dlogp what comes through the token's own log-ratio, too.
    """
    ratio = tl.exp(log_ratio)
    loss, by_ratio, by_logp = surrogate_terms(
        logp, old_logp, ratio, log_w, advantage, score, low, high, cap, second, SURROGATE
    )
    QUADRATIC: tl.constexpr = (
        SURROGATE == "dro"
        or SURROGATE == "ipo"
        or SURROGATE == "dppo_tv_ratio"
        or SURROGATE == "dppo_kl_ratio"
    )
    if not QUADRATIC:
        # Without an advantage there is no surrogate, also where the ratio is inf.
        keep = keep & (advantage != 0)
    keep = keep & (importance != 0)  # the loss may be inf there: that is why it is left out
    loss = tl.where(keep, loss * importance, 0.0)
    by_ratio = tl.where(keep, by_ratio * importance, 0.0)
    by_logp = tl.where(keep, by_logp * importance, 0.0)
    kl = tl.zeros_like(logp)
    if HAS_REF:
        kl, dkl = kl_terms(
            logp, ref_logp, log_ratio, ratio, own, gap_clip, value_clip, KL, KL_GRADIENT
        )
        loss += tl.where(beta == 0, 0.0, beta * kl)
        by_logp += tl.where(beta == 0, 0.0, beta * dkl)
    clip = clip_flags(logp, old_logp, ratio, advantage, low, high, cap, second, SURROGATE)
    return loss, by_logp, by_ratio, kl, clip


@triton.jit
def token_policy_terms(
    logp,
    old_logp,
    ref_logp,
    advantage,
    score,
    importance,
    low,
    high,
    cap,
    second,
    log_ratio_min,
    log_ratio_max,
    beta,
    gap_clip,
    value_clip,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    HAS_REF: tl.constexpr,
):
    """(loss, dloss/dlogp, KL, clip flags) of tokens whose ratio is their own."""
    log_ratio, free = bounded_log_ratio(logp - old_logp, log_ratio_min, log_ratio_max)
    loss, by_logp, by_ratio, kl, clip = policy_terms(
        logp,
        old_logp,
        ref_logp,
        log_ratio,
        free.to(tl.float32),
        0.0,
        tl.full(log_ratio.shape, True, tl.int1),
        advantage,
        score,
        importance,
        low,
        high,
        cap,
        second,
        beta,
        gap_clip,
        value_clip,
        SURROGATE,
        KL,
        KL_GRADIENT,
        HAS_REF,
    )
    return loss, by_logp + tl.where(free, by_ratio, 0.0), kl, clip
