"""Pure maths on loaded tiles: no loads, no stores. One home for each formula, shared by all kernels.

Softmax statistics are kept in log2 units: with x = z * scale, scale = log2(e) / temperature,

    m  maximum of x            s  sum of 2^(x - m)            t  sum of 2^(x - m) (x - m)

and always over the entries other than the scored token; `include_target` adds that one at the end. A
confident row then keeps what it would lose by rounding 1 + tiny to 1: log p = -log1p(rest) and
1 - p = -expm1(log p) are exact to float32 however small the rest is.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Where a running maximum starts. Finite, so that a tile of -inf logits gives 2^(-inf) = 0 and no NaN.
LOWEST = tl.constexpr(-1.0e30)
# 2^-150 is 0 in float32: the cap makes 0 * log2(0) come out as 0 and not as NaN.
LOG2_ZERO = tl.constexpr(-150.0)

# Bits of the clip flags: why the surrogate of a token passes no gradient (or is bounded).
CLIP_LOW = tl.constexpr(1)
CLIP_HIGH = tl.constexpr(2)
CLIP_DUAL = tl.constexpr(4)


@triton.jit
def lesser(a, b):
    """The minimum, NaN where either is: hardware's own returns the other, and hides what went wrong."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def greater(a, b):
    """The maximum, NaN where either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def soft_cap(z, softcap, logit_scale, cap_rate):
    """softcap * tanh(x) with x = logit_scale * z / softcap, and its derivative in z.

    The derivative, logit_scale (1 - tanh^2), comes without the cancellation of that form.
    """
    t = tl.exp2(tl.abs(z) * cap_rate)  # e^(-2 |x|)
    half = 1.0 / (1.0 + t)
    capped = softcap * (1.0 - t) * half
    twice = half + half
    return tl.where(z < 0, -capped, capped), logit_scale * t * twice * twice


@triton.jit
def fold_softmax(m, s, t, z, scale, HAS_ENTROPY: tl.constexpr):
    """Fold a tile `z` [K, ...] into the lane-wise statistics m, s, t [...]."""
    m_new = tl.maximum(m, tl.max(z, axis=0) * scale)
    u = tl.fma(
        z, scale, -tl.expand_dims(m_new, 0)
    )  # one rounding: the offset m_new cancels exactly later on
    e = tl.exp2(u)
    shrink = tl.exp2(m - m_new)
    if HAS_ENTROPY:
        t = shrink * (t + (m - m_new) * s) + tl.sum(e * tl.maximum(u, LOG2_ZERO), axis=0)
    return m_new, s * shrink + tl.sum(e, axis=0), t


@triton.jit
def reduce_softmax(m, s, t, HAS_ENTROPY: tl.constexpr):
    """Combine the statistics of all lanes (or of all segments of a row): m, s, t [..., T] into [...]."""
    AXIS: tl.constexpr = len(m.shape) - 1
    total = tl.max(m, axis=AXIS)
    if AXIS == 1:
        below = m - tl.expand_dims(total, 1)
    else:
        below = m - total
    shrink = tl.exp2(below)
    if HAS_ENTROPY:
        t_total = tl.sum(shrink * (t + below * s), axis=AXIS)
    else:
        t_total = 0.0
    return total, tl.sum(s * shrink, axis=AXIS), t_total


@triton.jit
def log2_1p(x):
    """log2(1 + x) for x >= 0, accurate for small x, whatever the accuracy of the hardware's log2."""
    # atanh series: log(1 + x) = 2 (w + w^3/3 + w^5/5 + ...), w = x / (2 + x) <= 1/9 for x <= 1/4.
    w = x / (2.0 + x)
    w2 = w * w
    series = 1.0 + w2 * (1 / 3 + w2 * (1 / 5 + w2 * (1 / 7 + w2 * (1 / 9))))
    return tl.where(x <= 0.25, 2.0 * LOG2E * w * series, tl.log2(1.0 + x))


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for x <= 0, accurate for small x: 1 - p of a token whose log-prob is x."""
    a = -x
    series = 1.0 - a / 5 * (1.0 - a / 6 * (1.0 - a / 7))
    series = a * (1.0 - a / 2 * (1.0 - a / 3 * (1.0 - a / 4 * series)))
    return tl.where(a <= 0.5, series, 1.0 - tl.exp(x))


@triton.jit
def include_target(m, s, t, z, scale):
    """Add the scored token, whose logit is z, to the statistics m, s, t of the others.

    Returns (m, s, log2 s) of the whole row, then its log p and entropy in nats.
    """
    top = tl.maximum(m, z * scale)
    u = tl.fma(z, scale, -top)  # rounded as every other entry was: see fold_softmax
    p = tl.exp2(u)
    rest = s * tl.exp2(m - top)
    total = rest + p
    # The token on top: everything relative to its own p, so that a small rest survives.
    confident = m <= z * scale
    surprise = tl.where(confident, log2_1p(rest / p), tl.log2(total) - u)
    log2_total = tl.where(confident, surprise + u, tl.log2(total))
    # Of the others. Next to a confident token everything is relative to its u, a rounding residue that would
    # drown the rest.
    t_rest = tl.exp2(m - top) * (t + (m - top) * s)
    t_all = tl.where(confident, t_rest - u * rest, t_rest + p * tl.maximum(u, LOG2_ZERO))
    entropy = (tl.where(confident, surprise, log2_total) - t_all / total) * LN2
    return top, total, log2_total, tl.where(surprise <= 0, 0.0, -surprise) * LN2, entropy


@triton.jit
def dlogits_factors(dlogp, dentropy, entropy, total, log2_total, inv_temperature):
    """(k0, k1) such that dL/dz_j = e_j (k0 + k1 u_j) with u_j = x_j - m, e_j = 2^u_j, for j not scored.

    From dL/ds_j = p_j (-dlogp - dentropy (log p_j + H)), log p_j = ln 2 (u_j - log2 total).
    """
    k = inv_temperature / total
    return (-dlogp - dentropy * (entropy - LN2 * log2_total)) * k, -dentropy * LN2 * k


@triton.jit
def dlogits_target(dlogp, dentropy, entropy, logp, inv_temperature):
    """dL/dz at the scored token."""
    share = dentropy * tl.exp(logp)
    # Also of a banned token, whose logp is -inf: p log p is 0 there, and so is its slope p.
    by_entropy = tl.where(share == 0, 0.0, share * (logp + entropy))
    return (dlogp * one_minus_exp(logp) - by_entropy) * inv_temperature


@triton.jit
def dlogits_tile(z, scale, m, k0, k1, HAS_ENTROPY: tl.constexpr):
    """dL/dz of a tile of logits from the statistics and factors of its row."""
    u = tl.fma(z, scale, -m)
    e = tl.exp2(u)
    if HAS_ENTROPY:
        return e * tl.fma(tl.maximum(u, LOG2_ZERO), k1, k0)
    return e * k0


@triton.jit
def clip_surrogate(ratio, advantage, low, high, delta, dual_clip):
    """PPO's clipped surrogate: (loss, dloss/dlogp, bounded). An infinite bound is no bound."""
    free = lesser(ratio, delta) * advantage
    clipped = lesser(greater(ratio, low), high) * advantage
    loss = -lesser(free, clipped)
    # Where both branches agree (inside the clip range) either gradient is right: they are the same.
    inside = tl.where(free <= clipped, ratio <= delta, (ratio >= low) & (ratio <= high))
    ceiling = -tl.where(advantage < 0, dual_clip, 0.0) * advantage
    dual = (advantage < 0) & (ceiling < loss)
    loss = tl.where(dual, ceiling, loss)
    # Select, not multiply: the ratio may be inf where no gradient passes.
    return loss, tl.where(inside & (dual == 0), -ratio * advantage, 0.0)


@triton.jit
def sapo_surrogate(ratio, advantage, tau_pos, tau_neg):
    """The soft gate: (loss, dloss/dlogp)."""
    tau = tl.where(advantage > 0, tau_pos, tau_neg)
    gate = tl.sigmoid(tau * (ratio - 1.0))
    slope = gate * (1.0 - gate)
    # A saturated gate passes nothing, also where the ratio is inf.
    dlogp = tl.where(slope > 0, -4.0 * advantage * slope * ratio, 0.0)
    return -advantage * (4.0 / tau) * gate, dlogp


@triton.jit
def divergence_keeps(logp, old_logp, advantage, low, high, SURROGATE: tl.constexpr):
    """DPPO's mask: whether a token has not yet moved too far in the direction it is pushed."""
    new = tl.exp(logp)
    old = tl.exp(old_logp)
    if SURROGATE == "dppo_tv" or SURROGATE == "dppo_tv_ratio":
        up = new - old <= high
        down = new - old >= -low
    else:
        rest = (1.0 - old) * tl.log((1.0 - old + 1e-8) / (1.0 - new + 1e-8))
        kl = old * (old_logp - logp) + rest
        up = (kl <= high) | (new <= old)
        down = (kl <= low) | (new >= old)
    return tl.where(advantage > 0, up, down)


@triton.jit
def vespo_weight(log_w, advantage, k_pos, k_neg, lambda_pos, lambda_neg):
    """phi(W) = W^k e^(lambda (1 - W)), with log W clamped to [log 1e-8, 20]."""
    log_w = lesser(greater(log_w, -18.420680743952367), 20.0)
    k = tl.where(advantage >= 0, k_pos, k_neg)
    rate = tl.where(advantage >= 0, lambda_pos, lambda_neg)
    return tl.exp(rate + k * log_w - rate * tl.exp(log_w))


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
        d = logp - old_logp
        loss = 0.5 * second * d * d - advantage * logp
        by_logp = second * d - advantage
    elif SURROGATE == "ipo" or SURROGATE == "dppo_tv_ratio" or SURROGATE == "dppo_kl_ratio":
        d = logp - old_logp
        if SURROGATE == "ipo":
            change = tl.exp(logp) - tl.exp(old_logp)
            inside = (change >= -low) & (change <= high)
        else:
            inside = divergence_keeps(logp, old_logp, advantage, low, high, SURROGATE)
        inside = inside & (advantage != 0)  # the ratio may be inf
        by_ratio = tl.where(inside & (ratio <= cap), -advantage * ratio, 0.0)
        by_logp = 2.0 * second * d
        loss = tl.where(inside, -advantage * lesser(ratio, cap), 0.0) + second * d * d
    else:
        if SURROGATE == "cispo":
            weight = lesser(greater(ratio, low), high)
        elif SURROGATE == "rollout_is":
            weight = tl.where((ratio > low) & (ratio < high), ratio, 0.0)
        elif SURROGATE == "vespo":
            weight = vespo_weight(log_w, advantage, low, high, cap, second)
        elif SURROGATE == "reinforce":
            weight = tl.zeros_like(ratio) + 1.0
        elif SURROGATE == "topr":
            weight = tl.where(score > 0, cap, second * lesser(ratio, 1.0))
        else:
            keep = divergence_keeps(logp, old_logp, advantage, low, high, SURROGATE)
            weight = tl.where(keep, lesser(ratio, cap), 0.0)
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
        cut = divergence_keeps(logp, old_logp, advantage, low, high, SURROGATE) == 0
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
def kl_terms(
    logp, ref_logp, ratio, gap_clip, value_clip, KL: tl.constexpr, KL_GRADIENT: tl.constexpr
):
    """(KL estimate, d/dlogp, d/dlogp through the ratio) from q = ref_logp - logp."""
    gap = ref_logp - logp
    pull = -gap
    by_ratio = tl.zeros_like(gap)
    if KL == "k1":
        kl = -gap
        dkl = tl.zeros_like(gap) + 1.0
    elif KL == "abs":
        kl = tl.abs(gap)
        dkl = tl.where(gap > 0, -1.0, tl.where(gap < 0, 1.0, 0.0))
    elif KL == "k2":
        kl = 0.5 * gap * gap
        dkl = -gap
    else:
        near = tl.abs(gap) <= gap_clip
        gap = lesser(greater(gap, -gap_clip), gap_clip)
        kl = tl.exp(gap) - gap - 1.0
        inside = kl <= value_clip
        dkl = tl.where(near & inside, 1.0 - tl.exp(gap), 0.0)
        kl = lesser(kl, value_clip)
        if KL == "k3_unbiased":
            kl = ratio * kl
            dkl = ratio * dkl
            by_ratio = kl
        elif KL_GRADIENT == "k2_clipped":
            pull = tl.where(near & inside, pull, 0.0)
    if KL_GRADIENT != "own":
        dkl = pull
    return kl, dkl, by_ratio


@triton.jit
def bounded_ratio(d, log_ratio_min, log_ratio_max):
    """(exp of the log-ratio d after its clamp, whether the clamp lets a gradient through)."""
    clamped = lesser(greater(d, log_ratio_min), log_ratio_max)
    return tl.exp(clamped), (d >= log_ratio_min) & (d <= log_ratio_max)


@triton.jit
def policy_terms(
    logp,
    old_logp,
    ref_logp,
    ratio,
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

    keep: whether the surrogate counts. d/dlogp is without what comes through the ratio.
    """
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
        kl, dkl, kl_by_ratio = kl_terms(
            logp, ref_logp, ratio, gap_clip, value_clip, KL, KL_GRADIENT
        )
        loss += tl.where(beta == 0, 0.0, beta * kl)
        by_logp += tl.where(beta == 0, 0.0, beta * dkl)
        by_ratio += tl.where(beta == 0, 0.0, beta * kl_by_ratio)
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
    ratio, free = bounded_ratio(logp - old_logp, log_ratio_min, log_ratio_max)
    loss, by_logp, by_ratio, kl, clip = policy_terms(
        logp,
        old_logp,
        ref_logp,
        ratio,
        0.0,
        tl.zeros_like(ratio) == 0,
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


@triton.jit
def standard_score(reward, mean, squares, count, differ, eps, UNBIASED: tl.constexpr):
    """`(reward - mean) / (std + eps)`; exactly 0 where the rewards do not differ."""
    freedom = tl.maximum(count - 1.0, 1.0) if UNBIASED else count
    score = (reward - mean) / (tl.sqrt(squares / freedom) + eps)
    return tl.where(differ, score, 0.0)
