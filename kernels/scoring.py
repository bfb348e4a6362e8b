"""Log-prob, entropy and loss of one row of logits, from its statistics.

Where |x| = |z * scale| is 2^30 or more, the statistics of `tiles` are wrong: the product overflows, or rounds
by more than an exponential tolerates. Such rows exist: all of a row is finfo.min, some of it is -1e10, or the
temperature is tiny. `read_again` reads such a row once more, if the large numbers made a difference.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from grpo_fast.kernels.group_advantage import from_lowest, group_moments
from grpo_fast.kernels.tiles import (
    FAR,
    LN2,
    LOG2_ZERO,
    LOG2E,
    LOWEST,
    Softmax,
    exact_scale,
    include_target,
    soft_cap,
    standard_score,
)


class Score(NamedTuple):
    """The statistics of a whole row, and what they say of its scored entry."""

    m: Any
    s: Any
    log2_s: Any
    logp: Any
    entropy: Any
    scale: Any  # of m: log2(e) / temperature, or a power of two if the numbers of the row are too large
    back: Any  # 1 / scale if that is such a power of two, else 0
    slope: Any  # the derivative of the soft cap at the scored logit; 1 without one


class RewardGroups(NamedTuple):
    """Rewards of sequences, to be scored within groups of consecutive ones."""

    rewards: Any  # (num_sequences,), or None: tokens have advantages
    sequence: Any  # (N,): the sequence of a row, or None: row // T_len
    size: Any
    eps: Any


@triton.jit
def is_doubtful(m, s, z, scale):
    """Whether the statistics of a row may be wrong: its maximum is large, or that of some lanes is."""
    highest_x = tl.abs(tl.maximum(m, z * scale))
    return (highest_x >= FAR) | ((m <= -FAR) & (s != 0)) | (s != s)


@triton.jit
def reads_again(z, sums, scale, cap=None):
    """Whether `score_row` reads a row again; z is its scored logit, as it was read."""
    if cap is not None:
        z, _ = soft_cap(z, cap)
    m, s, _ = sums
    return is_doubtful(m, s, z, scale)


@triton.jit
def read_again(row_ptr, target, V, z, scale, sums, T: tl.constexpr, cap=None):
    """(m, s, t, their scale, its reciprocal if that is a power of two, else 0) of a row.

    The statistics `sums` come from the loops that read every row. They are wrong where the maximum is large,
    or the maximum of some lanes: the sum of such a lane is inf, and 0 times it is NaN. Only then is the row
    read again.

    Args:
        z: the scored logit, which `sums` leaves out. A new m is the maximum of the whole row.
    """
    m, s, t = sums
    back = tl.full([], 0.0, tl.float32)
    if is_doubtful(m, s, z, scale):
        lanes = tl.arange(0, T // 8)
        highest = tl.full([T // 8], -float("inf"), tl.float32)
        for base in range(0, V, T // 8):
            others = load_others(row_ptr, target, base + lanes, V, cap)
            highest = tl.maximum(highest, others)
        top = tl.maximum(tl.max(highest, axis=0), z)
        if tl.abs(top * scale) >= FAR:
            scale, back = exact_scale(top * scale, scale)
        m = tl.maximum(top * scale, LOWEST)
        s_lanes = tl.zeros([T // 8], tl.float32)
        t_lanes = tl.zeros([T // 8], tl.float32)
        for base in range(0, V, T // 8):
            others = load_others(row_ptr, target, base + lanes, V, cap)
            u = tl.fma(others, scale, -m)
            e = tl.exp2(u)
            s_lanes += e
            t_lanes += e * tl.maximum(u, LOG2_ZERO)
        s = tl.sum(s_lanes, axis=0)
        t = tl.sum(t_lanes, axis=0)
    return m, s, t, scale, back


@triton.jit(noinline=True)
def read_again_apart(row_ptr, target, V, z, scale, sums, T: tl.constexpr, cap=None):
    """Call `read_again` without inlining it: inlined, it would cost the other loops registers."""
    return read_again(row_ptr, target, V, z, scale, sums, T, cap)


@triton.jit
def load_others(row_ptr, target, column, V, cap=None):
    """Logits of a row; -inf beyond its end and at the target."""
    z = tl.load(row_ptr + column, mask=column < V, other=-float("inf")).to(tl.float32)
    if cap is not None:
        z, _ = soft_cap(z, cap)
    return tl.where((column == target) | (column >= V), -float("inf"), z)


@triton.jit
def score_row(row_ptr, target, z, sums, inv_temperature, V, T: tl.constexpr, cap=None):
    """The `Score` of a row, given the statistics `sums` of all but its scored entry.

    Args:
        z: the scored logit, as it was read (`rows.load_scored`).
    """
    slope = 1.0
    if cap is not None:
        z, slope = soft_cap(z, cap)
    m, s, t, scale, back = read_again_apart(
        row_ptr, target, V, z, inv_temperature * LOG2E, sums, T=T, cap=cap
    )
    m, s, log2_s, logp, entropy = score_statistics(
        Softmax(m, s, t), z, scale, back, inv_temperature
    )
    return Score(m, s, log2_s, logp, entropy, scale=scale, back=back, slope=slope)


@triton.jit
def score_statistics(sums, z, scale, back, inv_temperature):
    """(m, s, log2 s, log p, entropy) of a whole row, from what `read_again` returns."""
    m, s, log2_s, logp, entropy = include_target(sums.m, sums.s, sums.t, z, scale)
    u = tl.fma(z, scale, -m)
    unit = back * inv_temperature  # nats, where the scale is a power of two
    logp = tl.where((back != 0) & (u < 0), u * unit - log2_s * LN2, logp)
    # The logit is finite and its product with the scale is not: log p may be finite all the same. Next to a
    # logit of inf, or where all logits are -inf, log p is NaN.
    beyond = (u == -float("inf")) & (m < float("inf")) & (s > 0)
    logp = tl.where(beyond, z * inv_temperature, logp)
    return m, s, log2_s, logp, entropy


@triton.jit
def saved_statistics(m, s, back):
    """m and s as the forward leaves them for the backward.

    Where the scale of a row is a power of two, these are the maximum logit itself and -s.
    """
    return tl.where(back == 0, m, m * back), tl.where(back == 0, s, -s)


@triton.jit
def load_statistics(m_ptr, s_ptr, row, scale):
    """(m, s, their scale) of a row, from what `saved_statistics` has left."""
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
def sequence_of(sequence_ptr, row, T_len):
    """The sequence that a row belongs to."""
    sequence = row // T_len
    if sequence_ptr is not None:
        sequence = tl.load(sequence_ptr + row)
    return sequence


@triton.jit
def score_rewards(groups, row, T_len, BLOCK_G: tl.constexpr):
    """The advantage of a row: the z-score of its sequence's reward within its group."""
    rewards_ptr = groups.rewards
    G = groups.size
    sequence = sequence_of(groups.sequence, row, T_len)
    first = sequence // G * G
    lowest, _, inverse, mean, squares, count, differ = group_moments(
        rewards_ptr, None, 0, first, first + G, BLOCK_G
    )
    centred = from_lowest(tl.load(rewards_ptr + sequence), lowest, inverse) - mean
    eps = (0.5 * groups.eps * inverse).to(tl.float32)
    return standard_score(centred, squares, count, differ, eps, UNBIASED=True)


@triton.jit
def weigh(loss, dlogp, entropy, weight, tokens, row, entropy_coef, BONUS: tl.constexpr):
    """(loss, dlogp, dentropy) of a row times its weights, an entropy bonus and `coefficient` added."""
    # Select, not multiply: a token without weight adds nothing, whatever its loss is.
    loss = tl.where(weight == 0, 0.0, weight * loss)
    dlogp = tl.where(weight == 0, 0.0, weight * dlogp)
    dlogp += load_or(tokens.coefficient, row, 0.0)
    dentropy = 0.0
    if BONUS:
        dentropy = -entropy_coef * load_or(tokens.entropy_weight, row, weight)
        loss += tl.where(dentropy == 0, 0.0, dentropy * entropy)
    return loss, dlogp, dentropy


@triton.jit
def store_outputs(outputs, row, values):
    """Store what is known of a row.

    Args:
        outputs, values: `grpo_fast.records.Outputs` of pointers, and of values.
    """
    if outputs.entropy is not None:
        tl.store(outputs.entropy + row, values.entropy)
    tl.store(outputs.loss + row, values.loss)
    tl.store(outputs.logp + row, values.logp)
    tl.store(outputs.clip + row, values.clip.to(tl.int8))
    if outputs.kl is not None:
        tl.store(outputs.kl + row, values.kl)


@triton.jit
def store_no_outputs(outputs, row):
    """Store zeros for a masked row."""
    tl.store(outputs.loss + row, 0.0)
    tl.store(outputs.logp + row, 0.0)
    tl.store(outputs.clip + row, 0)
    if outputs.entropy is not None:
        tl.store(outputs.entropy + row, 0.0)
    if outputs.kl is not None:
        tl.store(outputs.kl + row, 0.0)
