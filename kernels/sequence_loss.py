"""The objective on log-probs where a token's loss depends on its whole sequence (GSPO, GMPO, VESPO, masks).

    d        = logp - old, n live tokens in the sequence
    ratio    = exp(mean d) (GSPO), exp(mean of the clipped d) (GMPO), exp(d) otherwise
    log W    = sum of d, and of the log importance weights (VESPO)
    drift    = mean of -d (off-policy mask)
    dlogp_t  = w_t dl_t/dlogp_t + (sum_s w_s dl_s/d mean) / n     the second where the ratio is a mean

One program a sequence, two or three passes over its tokens: the sums; the losses; where the ratio is a mean,
the gradient that comes back through it. Bytes: the log-probs once per pass, everything else once or twice.
"""

import functools

import torch
import triton
import triton.language as tl

from grpo_fast.kernels.policy_loss import load_tokens, scalars
from grpo_fast.kernels.schedules import compiled_with
from grpo_fast.kernels.terms import bounded_log_ratio, policy_terms
from grpo_fast.kernels.tiles import greater, lesser

BLOCK = 512


@triton.jit
def sequence_statistics(
    logp_ptr,
    mask_ptr,
    advantages_ptr,
    old_logp_ptr,
    log_importance_ptr,
    share_ptr,
    start,
    stop,
    low,
    high,
    SURROGATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(sum of shares, mean d, mean of the d that the ratio takes, VESPO's log W) of tokens [start, stop).

    The sum is 1 where it is 0, the means and log W are weighted by the shares.
    """
    count = 0.0
    total = 0.0
    taken = 0.0
    log_w = 0.0
    for base in range(start, stop, BLOCK):
        offs, live = live_tokens(mask_ptr, base, stop, BLOCK)
        d = tl.zeros([BLOCK], tl.float32)
        if old_logp_ptr is not None:
            old_logp = load_tokens(old_logp_ptr, offs, live, 0.0)
            d = load_tokens(logp_ptr, offs, live, 0.0) - old_logp
        share = load_tokens(share_ptr, offs, live, 1.0)
        count += tl.sum(tl.where(live, share, 0.0), axis=0)
        total += tl.sum(share * d, axis=0)
        if SURROGATE == "gmpo":
            advantage = load_tokens(advantages_ptr, offs, live, 0.0)
            up = lesser(d, high)
            down = greater(d, -low)
            d = tl.where(advantage > 0, up, tl.where(advantage < 0, down, 0.0))
        taken += tl.sum(share * d, axis=0)
        if SURROGATE == "vespo":
            log_w += tl.sum(share * lesser(greater(d, -20.0), 20.0), axis=0)
            # Not `live`: a weight per sequence stands at its first token, masked or not.
            log_w += tl.sum(load_tokens(log_importance_ptr, offs, offs < stop, 0.0), axis=0)
    n = tl.where(count == 0, 1.0, count)
    return n, total / n, taken / n, log_w


@triton.jit
def live_tokens(mask_ptr, base, stop, BLOCK: tl.constexpr):
    """(offsets from `base` on, which of them are before `stop` and not masked)."""
    offs = base + tl.arange(0, BLOCK)
    live = offs < stop
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + offs, mask=live, other=0) != 0)
    return offs, live


@triton.jit
def opens(d, advantage, low, high):
    """GMPO: whether a token's bound lets the gradient of the mean through."""
    held = tl.where(advantage > 0, d > high, d < -low)
    return (advantage != 0) & (held == 0)


@triton.jit(do_not_specialize=["T_len"])
def _sequence_loss_kernel(
    logp_ptr,  # (N,)
    mask_ptr,  # (N,) bool, or None
    weight_ptr,  # (N,) fp32
    advantages_ptr,  # (N,) fp32
    old_logp_ptr,  # (N,) fp32, or None: on policy
    ref_logp_ptr,  # (N,) fp32, or None
    importance_ptr,  # (N,) fp32, or None: 1
    score_ptr,  # (N,) fp32, or None: the advantages
    log_importance_ptr,  # (N,) fp32, or None: 0
    share_ptr,  # (N,) fp32, the weight in means of the sequence, or None: 1
    boundaries_ptr,  # (num_sequences + 1,) int64, or None: every T_len tokens
    loss_ptr,  # (N,) fp32
    dlogp_ptr,  # (N,) fp32
    kl_ptr,  # (N,) fp32, or None
    clip_ptr,  # (N,) int8
    T_len,
    low,
    high,
    cap,
    second,
    log_ratio_min,
    log_ratio_max,
    beta,
    gap_clip,
    value_clip,
    stale_at,
    SURROGATE: tl.constexpr,
    RATIO: tl.constexpr,
    KL: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    HAS_REF: tl.constexpr = ref_logp_ptr is not None
    # The gradient of a mean over the sequence goes to all of its tokens.
    THROUGH_MEAN: tl.constexpr = RATIO == "sequence" or SURROGATE == "gmpo"
    b = tl.program_id(0).to(tl.int64)
    start = b * T_len
    stop = start + T_len
    if boundaries_ptr is not None:
        start = tl.load(boundaries_ptr + b)
        stop = tl.load(boundaries_ptr + b + 1)
    n, drift, taken, log_w = sequence_statistics(
        logp_ptr,
        mask_ptr,
        advantages_ptr,
        old_logp_ptr,
        log_importance_ptr,
        share_ptr,
        start,
        stop,
        low,
        high,
        SURROGATE,
        BLOCK,
    )
    UNBIASED: tl.constexpr = HAS_REF and KL == "k3_unbiased"
    pull = 0.0  # dL / d (mean d), of the surrogate
    kl_pull = 0.0  # the same of the KL
    for base in range(start, stop, BLOCK):
        offs, live = live_tokens(mask_ptr, base, stop, BLOCK)
        there = offs < stop
        logp = load_tokens(logp_ptr, offs, live, 0.0)
        old_logp = logp
        if old_logp_ptr is not None:
            old_logp = load_tokens(old_logp_ptr, offs, live, 0.0)
        advantage = load_tokens(advantages_ptr, offs, live, 0.0)
        score = advantage
        if score_ptr is not None:
            score = load_tokens(score_ptr, offs, live, 0.0)
        own_d = logp - old_logp
        d = own_d
        if RATIO != "token" or SURROGATE == "gmpo":
            d = tl.zeros([BLOCK], tl.float32) + taken
        log_ratio, free = bounded_log_ratio(d, log_ratio_min, log_ratio_max)
        own = free.to(tl.float32)
        if THROUGH_MEAN:
            own = own * load_tokens(share_ptr, offs, live, 1.0) / n
        if SURROGATE == "gmpo":
            own = tl.where(opens(own_d, advantage, low, high), own, 0.0)
        importance = load_tokens(importance_ptr, offs, live, 1.0)
        # Whether to drop the token cannot be told: the NaN that decides comes out.
        doubt = tl.where(drift == drift, 0.0, drift)
        decides = (stale_at < float("inf")) & (advantage < 0) & (importance != 0)
        importance = tl.where(decides, importance + doubt, importance)
        loss, by_logp, by_ratio, kl, clip = policy_terms(
            logp,
            old_logp,
            load_tokens(ref_logp_ptr, offs, live, 0.0),
            log_ratio,
            own,
            log_w,
            ((advantage < 0) == 0) | ((-drift > stale_at) == 0),
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
        by_ratio = tl.where(free, by_ratio, 0.0)
        weight = tl.load(weight_ptr + offs, mask=live, other=0.0)
        if THROUGH_MEAN:
            pull += tl.sum(tl.where(weight == 0, 0.0, weight * by_ratio), axis=0)
            if UNBIASED:
                by_kl = tl.where(free, weigh_kl(weight, beta, kl), 0.0)
                kl_pull += tl.sum(by_kl, axis=0)
        else:
            by_logp += by_ratio
        # Select, not multiply: a token without weight has no say, whatever its loss is.
        tl.store(loss_ptr + offs, tl.where(weight == 0, 0.0, weight * loss), mask=there)
        tl.store(dlogp_ptr + offs, tl.where(weight == 0, 0.0, weight * by_logp), mask=there)
        tl.store(clip_ptr + offs, tl.where(live, clip, 0).to(tl.int8), mask=there)
        if HAS_REF:
            tl.store(kl_ptr + offs, kl, mask=there)
    if THROUGH_MEAN:
        tl.debug_barrier()  # dlogp is read back, perhaps by other threads than stored it
        for base in range(start, stop, BLOCK):
            offs, live = live_tokens(mask_ptr, base, stop, BLOCK)
            open_ = live
            if SURROGATE == "gmpo":
                advantage = load_tokens(advantages_ptr, offs, live, 0.0)
                d = tl.zeros([BLOCK], tl.float32)
                if old_logp_ptr is not None:
                    d = load_tokens(logp_ptr, offs, live, 0.0)
                    d -= load_tokens(old_logp_ptr, offs, live, 0.0)
                open_ = live & opens(d, advantage, low, high)
            through = tl.zeros([BLOCK], tl.float32) + pull
            if UNBIASED:
                # Of the others: a token's own is in dlogp already, without the cancellation.
                weight = tl.load(weight_ptr + offs, mask=live, other=0.0)
                mine = weigh_kl(weight, beta, load_tokens(kl_ptr, offs, live, 0.0))
                _, free = bounded_log_ratio(taken, log_ratio_min, log_ratio_max)
                others = tl.where(tl.abs(mine) == float("inf"), 0.0, kl_pull - mine)
                through += tl.where(free, others, 0.0)
            dlogp = tl.load(dlogp_ptr + offs, mask=live, other=0.0)
            through = through * load_tokens(share_ptr, offs, live, 1.0) / n
            tl.store(dlogp_ptr + offs, dlogp + tl.where(open_, through, 0.0), mask=live)


@triton.jit
def weigh_kl(weight, beta, kl):
    """What a token's KL adds to the loss: 0 where the weight is, whatever the KL."""
    return tl.where((weight == 0) | (beta == 0), 0.0, weight * (beta * kl))


def sequence_loss_fwd(
    logp,
    mask,
    weight,
    advantages,
    old_logp,
    ref_logp,
    importance,
    score,
    log_importance,
    share,
    boundaries,
    T_len,
    objective,
):
    """`policy_loss_fwd` for objectives that look at whole sequences.

    Args:
        share: (N,) fp32, the weight of a token in means and sums over its sequence; None: 1.
        boundaries: (num_sequences + 1,) int64, or None where every `T_len` tokens are a sequence.
    """
    N = len(logp)
    new = functools.partial(torch.empty, N, device=logp.device, dtype=torch.float32)
    loss, dlogp, clip = new(), new(), new(dtype=torch.int8)
    kl = new() if ref_logp is not None else None
    stale_at = objective.off_policy_threshold
    if N:
        sequences = N // T_len if boundaries is None else len(boundaries) - 1
        _sequence_loss_kernel[(sequences,)](
            logp_ptr=logp,
            mask_ptr=mask,
            weight_ptr=weight,
            advantages_ptr=advantages,
            old_logp_ptr=old_logp,
            ref_logp_ptr=ref_logp,
            importance_ptr=importance,
            score_ptr=score,
            log_importance_ptr=log_importance,
            share_ptr=share,
            boundaries_ptr=boundaries,
            loss_ptr=loss,
            dlogp_ptr=dlogp,
            kl_ptr=kl,
            clip_ptr=clip,
            T_len=T_len,
            **scalars(objective),
            stale_at=float("inf") if stale_at is None else stale_at,
            SURROGATE=objective.variant,
            RATIO=objective.ratio,
            KL=objective.kl,
            KL_GRADIENT=objective.kl_gradient,
            BLOCK=BLOCK,
            **compiled_with(4, registers=80),
        )
    return loss, dlogp, kl, clip
