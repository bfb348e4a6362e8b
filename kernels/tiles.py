"""Pure maths on loaded tiles: no loads, no stores. One home for each formula, shared by all kernels.

Softmax statistics are kept in log2 units: with x = z * scale, scale = log2(e) / temperature,

    m  maximum of x            s  sum of 2^(x - m)            t  sum of 2^(x - m) (x - m)

and always over the entries other than the scored token; `include_target` adds that one at the end. A
confident row then keeps what it would lose by rounding 1 + tiny to 1: log p = -log1p(rest) and
1 - p = -expm1(log p) are exact to float32 however small the rest is.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Where a running maximum starts. Finite, so that a tile of -inf logits gives 2^(-inf) = 0 and no NaN.
LOWEST = tl.constexpr(-3.0e38)
# From here on x = z * scale is too coarse: its last bit is worth 128. See `exact_scale`.
FAR = tl.constexpr(1073741824.0)  # 2^30
# 2^-150 is 0 in float32: the cap makes 0 * log2(0) come out as 0 and not as NaN.
LOG2_ZERO = tl.constexpr(-150.0)


class Softmax(NamedTuple):
    """The running statistics m, s, t of some entries of a row."""

    m: Any
    s: Any
    t: Any


class Cap(NamedTuple):
    """A soft cap as kernels take it: a logit z stands for softcap * tanh(logit_scale * z / softcap)."""

    softcap: float
    logit_scale: float
    rate: float  # -2 logit_scale / (softcap ln 2); from the host, so that no program holds it in a register


class HighCap(NamedTuple):
    """A soft cap so high that small logits need a series. A record of its own, and no field that may be None:
    Triton 3.6 cannot ask whether a tuple that holds None is None."""

    softcap: float
    logit_scale: float
    rate: float
    near: float  # the r above which the series replaces the exponential


class RowGradient(NamedTuple):
    """The numbers from which the gradient of a row of logits is computed; see `dlogits_factors`."""

    target: Any  # the scored column
    dtarget: Any  # the gradient there
    scale: Any
    m: Any
    k0: Any
    k1: Any


def cap_of(softcap):
    """The soft cap that a kernel takes, `Cap` or `HighCap`; None without one.

    Args:
        softcap: a `grpo_fast.records.SoftCap`, or None.
    """
    if softcap is None:
        return None
    rate = -2.8853900817779268 * softcap.logit_scale / softcap.softcap  # -2 / ln 2
    # The exponential costs a capped logit softcap 2^-23. The logits have errors of that size, unless the cap
    # is far above them. The series takes a third more instructions.
    if softcap.softcap > 64:
        return HighCap(*softcap, rate, near=-1.0098865286222745)  # |x| < 0.35
    return Cap(*softcap, rate)


@triton.jit
def lesser(a, b):
    """The minimum, NaN where either is NaN: the hardware's minimum returns the other and hides the NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def greater(a, b):
    """The maximum, NaN where either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def soft_cap(z, cap):
    """softcap * tanh(x) with x = logit_scale * z / softcap, and its derivative in z.

    The derivative is logit_scale (1 - tanh^2). It is computed in a form that does not cancel.
    """
    r = tl.abs(z) * cap.rate
    t = tl.exp2(r)  # e^(-2 |x|)
    half = 1.0 / (1.0 + t)
    capped = cap.softcap * (1.0 - t) * half
    if len(cap) == 4:  # a `HighCap`: 1 - t cancels where x is small
        # tanh(x) / x - 1 for |x| <= 0.35 is w times a polynomial in w = (2 x / ln 2)^2, fitted to 4e-8
        w = r * r
        series = -0.0400369465 + w * (0.00191879156 + w * -8.51692967e-5)
        capped = tl.where(r > cap.near, cap.logit_scale * tl.abs(z) * (1.0 + w * series), capped)
    twice = half + half
    return tl.where(z < 0, -capped, capped), cap.logit_scale * t * twice * twice


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
    """Combine the statistics m, s, t [..., T] of all lanes, or of all segments of a row, into [...]."""
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
def merge_sums(m, s, m_other, s_other):
    """Combine the statistics (m, s) of two sets of entries; a combine function of `tl.reduce`."""
    top = tl.maximum(m, m_other)
    return top, s * tl.exp2(m - top) + s_other * tl.exp2(m_other - top)


@triton.jit
def merge_softmax(m, s, t, m_other, s_other, t_other):
    """Combine the statistics (m, s, t) of two sets of entries; a combine function of `tl.reduce`."""
    top = tl.maximum(m, m_other)
    shrink = tl.exp2(m - top)
    shrink_other = tl.exp2(m_other - top)
    t = shrink * (t + (m - top) * s) + shrink_other * (t_other + (m_other - top) * s_other)
    return top, s * shrink + s_other * shrink_other, t


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
    # The t of the other entries. Next to a confident token everything is relative to the token's u, because u
    # is a rounding residue that would drown the rest.
    t_rest = tl.exp2(m - top) * (t + (m - top) * s)
    t_all = tl.where(confident, t_rest - u * rest, t_rest + p * tl.maximum(u, LOG2_ZERO))
    entropy = (tl.where(confident, surprise, log2_total) - t_all / total) * LN2
    return top, total, log2_total, tl.where(surprise <= 0, 0.0, -surprise) * LN2, entropy


@triton.jit
def exact_scale(top, scale):
    """A power of two, and its reciprocal, to use in place of `scale` for a row of very large numbers.

    `top` is the maximum of z * scale. The power of two brings the maximum to [2^33, 2^35). Where |z * scale|
    is 2^30 or more, two logits that differ at all differ by more than 40 nats. Then the softmax depends on
    two things alone: the maximum, and how often it occurs. Products with a power of two are exact: equal
    logits have the difference 0, and for all other differences x, 2^x is 0.
    """
    e_top = (tl.abs(top).to(tl.int32, bitcast=True) >> 23) & 255
    e_scale = (scale.to(tl.int32, bitcast=True) >> 23) & 255
    e = tl.minimum(tl.maximum(127 + e_scale - tl.minimum(e_top, 254) + 34, 1), 253)
    return (e << 23).to(tl.float32, bitcast=True), ((254 - e) << 23).to(tl.float32, bitcast=True)


@triton.jit
def dlogits_factors(dlogp, dentropy, entropy, total, log2_total, inv_temperature):
    """(k0, k1) such that dL/dz_j = e_j (k0 + k1 u_j) for every entry j that is not scored.

    Here u_j = x_j - m and e_j = 2^u_j. It follows from dL/ds_j = p_j (-dlogp - dentropy (log p_j + H)) with
    log p_j = ln 2 (u_j - log2 total).
    """
    k = inv_temperature / total
    return (-dlogp - dentropy * (entropy - LN2 * log2_total)) * k, -dentropy * LN2 * k


@triton.jit
def dlogits_target(dlogp, dentropy, entropy, logp, inv_temperature):
    """dL/dz at the scored token."""
    p = tl.exp(logp)  # 0 where the logit is -inf: p log p is 0 then
    by_entropy = tl.where((dentropy == 0) | (p == 0), 0.0, dentropy * p * (logp + entropy))
    return (dlogp * one_minus_exp(logp) - by_entropy) * inv_temperature


@triton.jit
def dlogits_tile(z, scale, m, k0, k1, HAS_ENTROPY: tl.constexpr):
    """dL/dz of a tile of logits, from the statistics and factors of its row."""
    u = tl.fma(z, scale, -m)
    e = tl.exp2(u)
    if HAS_ENTROPY:
        return e * tl.fma(tl.maximum(u, LOG2_ZERO), k1, k0)
    return e * k0


@triton.jit
def standard_score(centred, squares, count, differ, eps, UNBIASED: tl.constexpr):
    """A centred reward divided by (std + eps); exactly 0 where the rewards do not differ."""
    freedom = tl.maximum(count - 1.0, 1.0) if UNBIASED else count
    return tl.where(differ, centred / (tl.sqrt(squares / freedom) + eps), 0.0)
