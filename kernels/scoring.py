"""What a row of logits comes to, rows at the ends of float32 included.

Where |x| = |z * scale| is 2^30 or more, the statistics of `tiles` lose it: the product rounds by more than an
exponential can make up for, or overflows. A row that has such numbers (all of it finfo.min, some of it -1e10,
ordinary logits at a tiny temperature) is read once more, by `read_again`, if they made a difference.
"""

import triton
import triton.language as tl

from grpo_fast.kernels.group_advantage import from_lowest, group_moments
from grpo_fast.kernels.tiles import (
    FAR,
    LN2,
    LOG2_ZERO,
    LOG2E,
    LOWEST,
    exact_scale,
    include_target,
    soft_cap,
    standard_score,
)


@triton.jit
def is_doubtful(m, s, z, scale):
    """Whether the statistics of a row may be wrong: its maximum is large, or that of some lanes is."""
    highest_x = tl.abs(tl.maximum(m, z * scale))
    return (highest_x >= FAR) | ((m <= -FAR) & (s != 0)) | (s != s)


@triton.jit
def read_again(
    row_ptr,
    target,
    V,
    z,
    scale,
    m,
    s,
    t,
    T: tl.constexpr,
    softcap=None,
    logit_scale=None,
    cap_rate=None,
):
    """(m, s, t, the scale they are of, its reciprocal if that is a power of two, else 0).

    m, s, t: of a row but its scored logit z, as the loops over all rows have found them. They are doubtful
    where the maximum is large, or that of some lanes is, whose sum is then inf, and 0 times it NaN. The new
    m is that of the whole row.
    """
    back = tl.full([], 0.0, tl.float32)
    if is_doubtful(m, s, z, scale):
        lanes = tl.arange(0, T // 8)
        highest = tl.full([T // 8], -float("inf"), tl.float32)
        for base in range(0, V, T // 8):
            others = load_others(row_ptr, target, base + lanes, V, softcap, logit_scale, cap_rate)
            highest = tl.maximum(highest, others)
        top = tl.maximum(tl.max(highest, axis=0), z)
        if tl.abs(top * scale) >= FAR:
            scale, back = exact_scale(top * scale, scale)
        m = tl.maximum(top * scale, LOWEST)
        s_lanes = tl.zeros([T // 8], tl.float32)
        t_lanes = tl.zeros([T // 8], tl.float32)
        for base in range(0, V, T // 8):
            others = load_others(row_ptr, target, base + lanes, V, softcap, logit_scale, cap_rate)
            u = tl.fma(others, scale, -m)
            e = tl.exp2(u)
            s_lanes += e
            t_lanes += e * tl.maximum(u, LOG2_ZERO)
        s = tl.sum(s_lanes, axis=0)
        t = tl.sum(t_lanes, axis=0)
    return m, s, t, scale, back


@triton.jit(noinline=True)
def read_again_apart(
    row_ptr,
    target,
    V,
    z,
    scale,
    m,
    s,
    t,
    T: tl.constexpr,
    softcap=None,
    logit_scale=None,
    cap_rate=None,
):
    """`read_again`, not inlined: it would cost the loops over all rows registers."""
    return read_again(row_ptr, target, V, z, scale, m, s, t, T, softcap, logit_scale, cap_rate)


@triton.jit
def load_others(row_ptr, target, column, V, softcap=None, logit_scale=None, cap_rate=None):
    """Logits of a row, -inf beyond its end and at the target."""
    z = tl.load(row_ptr + column, mask=column < V, other=-float("inf")).to(tl.float32)
    if softcap is not None:
        z, _ = soft_cap(z, softcap, logit_scale, cap_rate)
    return tl.where((column == target) | (column >= V), -float("inf"), z)


@triton.jit
def score_row(
    row_ptr,
    target,
    z,
    m,
    s,
    t,
    inv_temperature,
    V,
    T: tl.constexpr,
    softcap=None,
    logit_scale=None,
    cap_rate=None,
):
    """What a row comes to, given the statistics of all but its scored logit z.

    Returns m, s and log2 s of the whole row, its log p and entropy; then the scale that m is of, and 0. Of a
    row whose numbers are too large for its own scale that is a power of two, with its reciprocal for the 0.
    """
    m, s, t, scale, back = read_again_apart(
        row_ptr,
        target,
        V,
        z,
        inv_temperature * LOG2E,
        m,
        s,
        t,
        T,
        softcap,
        logit_scale,
        cap_rate,
    )
    m, s, log2_s, logp, entropy = score_statistics(m, s, t, z, scale, back, inv_temperature)
    return m, s, log2_s, logp, entropy, scale, back


@triton.jit
def score_statistics(m, s, t, z, scale, back, inv_temperature):
    """m, s and log2 s of the whole row, its log p and entropy, from what `read_again` returns."""
    m, s, log2_s, logp, entropy = include_target(m, s, t, z, scale)
    u = tl.fma(z, scale, -m)
    unit = back * inv_temperature  # of a row that is far, in nats
    logp = tl.where((back != 0) & (u < 0), u * unit - log2_s * LN2, logp)
    # A finite logit whose product with the scale is not: log p may be finite all the same. Next to a logit
    # of inf, or where all are -inf, it is NaN.
    beyond = (u == -float("inf")) & (m < float("inf")) & (s > 0)
    logp = tl.where(beyond, z * inv_temperature, logp)
    return m, s, log2_s, logp, entropy


@triton.jit
def saved_statistics(m, s, back):
    """m and s as the forward leaves them for the backward: of a row with a power of two for its scale
    the logit itself and -s."""
    return tl.where(back == 0, m, m * back), tl.where(back == 0, s, -s)


@triton.jit
def load_statistics(m_ptr, s_ptr, row, scale):
    """(m, s, the scale to use) of a row, from what `saved_statistics` made of them."""
    m = tl.load(m_ptr + row)
    s = tl.load(s_ptr + row)
    exact, _ = exact_scale(m, tl.full([], 1.0, tl.float32))
    return tl.where(s < 0, m * exact, m), tl.abs(s), tl.where(s < 0, exact, scale)


@triton.jit
def load_or(ptr, row, default):
    """The value of a row, or `default` where there is no such tensor."""
    value = default
    if ptr is not None:
        value = tl.load(ptr + row).to(tl.float32)
    return value


@triton.jit
def load_advantage(
    advantages_ptr, rewards_ptr, sequence_ptr, row, T_len, G, eps, BLOCK_G: tl.constexpr
):
    """The advantage of a row: its own, or the z-score of its sequence's reward in the group."""
    # No early return: Triton compiles what follows one, even where the condition is a constant.
    if rewards_ptr is None:
        advantage = tl.load(advantages_ptr + row).to(tl.float32)
    else:
        sequence = row // T_len
        if sequence_ptr is not None:
            sequence = tl.load(sequence_ptr + row)
        first = sequence // G * G
        lowest, _, inverse, mean, squares, count, differ = group_moments(
            rewards_ptr, None, 0, first, first + G, BLOCK_G
        )
        centred = from_lowest(tl.load(rewards_ptr + sequence), lowest, inverse) - mean
        eps = (0.5 * eps * inverse).to(tl.float32)
        advantage = standard_score(centred, squares, count, differ, eps, UNBIASED=True)
    return advantage
