"""From logits to the GRPO loss and its gradient, in one launch.

    logp, H   as in `logprob`                                            per row of (B, T, V) logits
    A         given, or the z-score of the group's rewards               `tiles.standard_score`
    l         w (importance * surrogate(logp, old, A) + beta KL(logp, ref)) - w_H entropy_coef H
    c, e      dl/dlogp, plus a coefficient known beforehand if there is one; dl/dH
    dz_v      (c (1[v = y] - p_v) - e p_v (log p_v + H)) / temperature

The coefficient of a row is known as soon as its log-prob is, so the gradient is taken while the row is still
in the cache. Bytes, at w per logit: N V w read from memory, N V w read again from the cache, N V w written,
and N w read and written once more for the scored ones; rows with c = e = 0 are read once and written once,
masked rows are written only.

A program owns a row, or a part of one until the last part to arrive takes over (`rows`). `dlogits` may be
`logits`, or lie over it (`schedules.overlaps`): a row is rewritten after all of it has been read.
"""

import functools

import torch
import triton
import triton.language as tl

from grpo_fast.kernels.edges import (
    gradient_of,
    place_gradient,
    place_row,
    read_edges,
    rows_of,
    write_edges,
    zero_edges,
)
from grpo_fast.kernels.group_advantage import block_size
from grpo_fast.kernels.policy_loss import scalars
from grpo_fast.kernels.rows import (
    FIRST_OF_TWO,
    arrive,
    combine_segments,
    inverse_temperature,
    load_scored,
    load_target,
    read_part,
    read_statistics,
    soft_cap_scalars,
    write_dlogits,
    write_zeros,
)
from grpo_fast.kernels.schedules import overlaps, reading
from grpo_fast.kernels.scoring import load_advantage, load_or, score_row
from grpo_fast.kernels.terms import token_policy_terms
from grpo_fast.kernels.tiles import (
    LOG2E,
    dlogits_factors,
    dlogits_target,
    soft_cap,
)

SCORE_EPS = 1e-4  # of the z-score taken in the launch: TRL's and the paper code's


@triton.jit(do_not_specialize=["before", "dbefore", "T_len", "G"])
def _grpo_kernel(
    logits_ptr,  # (B, T, V)
    ids_ptr,  # (N,)
    mask_ptr,  # (N,) bool, or None
    weight_ptr,  # (N,) fp32
    advantages_ptr,  # (N,) fp32, or None
    rewards_ptr,  # (B,) fp32 or fp64, or None
    sequence_ptr,  # (N,) int64, or None: row // T_len
    old_logp_ptr,  # (N,) fp32, or None: on policy
    ref_logp_ptr,  # (N,) fp32, or None
    importance_ptr,  # (N,) fp32, or None: 1
    score_ptr,  # (N,) fp32, or None: the advantage
    coefficient_ptr,  # (N,) fp32, or None: 0; what dl/dlogp has besides
    entropy_weight_ptr,  # (N,) fp32, or None: weight
    temperature_ptr,  # (N,) fp32, or None
    dlogits_ptr,  # (B, T, V)
    loss_ptr,  # (N,) fp32
    logp_ptr,  # (N,) fp32
    entropy_ptr,  # (N,) fp32, or None
    kl_ptr,  # (N,) fp32, or None
    clip_ptr,  # (N,) int8
    partial_ptr,  # (N, segments, 3) fp32, or None
    arrived_ptr,  # (N,) int32, zeros, or None
    before,
    stride_b,
    stride_t,
    dbefore,
    dstride_b,
    dstride_t,
    T_len,
    V,
    parts,
    columns,
    segments,
    G,
    inv_temperature,
    low,
    high,
    cap,
    second,
    log_ratio_min,
    log_ratio_max,
    beta,
    gap_clip,
    value_clip,
    entropy_coef,
    score_eps,
    softcap,
    logit_scale,
    cap_rate,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    SIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    WRITE_K: tl.constexpr,
    WRITE_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    SAME_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    HAS_ENTROPY: tl.constexpr = entropy_ptr is not None
    HAS_REF: tl.constexpr = ref_logp_ptr is not None
    # A row of one tile has no direction, a capped one is bound by arithmetic: no spills on sm_100 this way.
    BACKWARDS: tl.constexpr = not OVERLAP and ((not SPLIT and K > 1) or softcap is not None)
    pid = tl.program_id(0)
    row = (pid // parts).to(tl.int64)
    part = pid % parts
    row_ptr, body_ptr, head, body = place_row(
        logits_ptr, before, row, T_len, stride_b, stride_t, V, ROWS
    )
    live = True
    if mask_ptr is not None:
        live = tl.load(mask_ptr + row) != 0
    target = load_target(ids_ptr, row, V)  # beside the mask: one wait for memory, not two
    if live:
        inv_temperature = inverse_temperature(temperature_ptr, row, inv_temperature)
        scale = inv_temperature * LOG2E
        if SPLIT:
            read_part(
                body_ptr,
                partial_ptr,
                row,
                part,
                target - head,
                scale,
                columns,
                body,
                segments,
                K,
                T,
                STEPS,
                SIDE,
                GROUPS,
                HAS_ENTROPY,
                FIRST_OF_TWO,
                softcap,
                logit_scale,
                cap_rate,
            )
        else:
            m, s, t = read_statistics(
                body_ptr,
                target - head,
                scale,
                0,
                body,
                K,
                T,
                HAS_ENTROPY,
                FIRST_OF_TWO,
                softcap,
                logit_scale,
                cap_rate,
            )
        last = True
        if SPLIT:
            last = arrive(arrived_ptr, row, parts)
        if last:
            if SPLIT:
                m, s, t = combine_segments(partial_ptr, row, segments, BLOCK_SEGMENTS, HAS_ENTROPY)
            if ROWS == "anywhere":
                m, s, t = read_edges(
                    row_ptr,
                    target,
                    head,
                    body,
                    V,
                    scale,
                    m,
                    s,
                    t,
                    HAS_ENTROPY,
                    softcap,
                    logit_scale,
                    cap_rate,
                )
            z = load_scored(row_ptr, target)
            slope = 1.0
            if softcap is not None:
                z, slope = soft_cap(z, softcap, logit_scale, cap_rate)
            m, s, log2_s, logp, entropy, scale, _ = score_row(
                row_ptr,
                target,
                z,
                m,
                s,
                t,
                inv_temperature,
                V,
                T,
                softcap,
                logit_scale,
                cap_rate,
            )
            advantage = load_advantage(
                advantages_ptr, rewards_ptr, sequence_ptr, row, T_len, G, score_eps, BLOCK_G
            )
            loss, dlogp, kl, clip = token_policy_terms(
                logp,
                load_or(old_logp_ptr, row, logp),
                load_or(ref_logp_ptr, row, 0.0),
                advantage,
                load_or(score_ptr, row, advantage),
                load_or(importance_ptr, row, 1.0),
                low,
                high,
                cap,
                second,
                log_ratio_min,
                log_ratio_max,
                beta,
                gap_clip,
                value_clip,
                SURROGATE,
                KL,
                KL_GRADIENT,
                HAS_REF,
            )
            weight = tl.load(weight_ptr + row)
            dentropy = 0.0
            # Select, not multiply: a token without weight has no say, whatever its loss is.
            loss = tl.where(weight == 0, 0.0, weight * loss)
            dlogp = tl.where(weight == 0, 0.0, weight * dlogp)
            dlogp += load_or(coefficient_ptr, row, 0.0)
            if HAS_ENTROPY:
                dentropy = -entropy_coef * load_or(entropy_weight_ptr, row, weight)
                loss += tl.where(dentropy == 0, 0.0, dentropy * entropy)
                tl.store(entropy_ptr + row, entropy)
            tl.store(loss_ptr + row, loss)
            tl.store(logp_ptr + row, logp)
            tl.store(clip_ptr + row, clip.to(tl.int8))
            if HAS_REF:
                tl.store(kl_ptr + row, kl)
            # In place, the scored logit is overwritten below, after every thread has read it.
            tl.debug_barrier()
            drow_ptr, dbody_ptr = place_gradient(
                dlogits_ptr, dbefore, row, T_len, dstride_b, dstride_t, head, ROWS, SAME_ROWS
            )
            if (dlogp != 0) | (dentropy != 0):
                k0, k1 = dlogits_factors(dlogp, dentropy, entropy, s, log2_s, inv_temperature)
                dtarget = dlogits_target(dlogp, dentropy, entropy, logp, inv_temperature) * slope
                write_dlogits(
                    body_ptr,
                    dbody_ptr,
                    target - head,
                    dtarget,
                    scale,
                    m,
                    k0,
                    k1,
                    0,
                    body,
                    WRITE_K,
                    WRITE_T,
                    HAS_ENTROPY,
                    BACKWARDS,
                    softcap,
                    logit_scale,
                    cap_rate,
                    OVERLAP,
                )
                if ROWS == "anywhere":
                    write_edges(
                        row_ptr,
                        drow_ptr,
                        target,
                        dtarget,
                        head,
                        body,
                        V,
                        scale,
                        m,
                        k0,
                        k1,
                        HAS_ENTROPY,
                        softcap,
                        logit_scale,
                        cap_rate,
                        OVERLAP,
                    )
            else:
                write_zeros(dbody_ptr, 0, body, WRITE_K, WRITE_T)
                if ROWS == "anywhere":
                    zero_edges(drow_ptr, head, body, V)
    else:
        drow_ptr, dbody_ptr = place_gradient(
            dlogits_ptr, dbefore, row, T_len, dstride_b, dstride_t, head, ROWS, SAME_ROWS
        )
        start = part * columns
        write_zeros(dbody_ptr, start, tl.minimum(start + columns, body), WRITE_K, WRITE_T)
        if part == 0:
            if ROWS == "anywhere":
                zero_edges(drow_ptr, head, body, V)
            tl.store(loss_ptr + row, 0.0)
            tl.store(logp_ptr + row, 0.0)
            tl.store(clip_ptr + row, 0)
            if HAS_ENTROPY:
                tl.store(entropy_ptr + row, 0.0)
            if HAS_REF:
                tl.store(kl_ptr + row, 0.0)


def new_outputs(logits, with_entropy, with_kl):
    """Vectors for what `grpo_fwd_bwd` returns."""
    N = logits.shape[0] * logits.shape[1]
    new = functools.partial(torch.empty, N, device=logits.device, dtype=torch.float32)
    entropy, kl = new() if with_entropy else None, new() if with_kl else None
    return new(), new(), entropy, kl, new(dtype=torch.int8)


def grpo_fwd_bwd(
    logits,
    ids,
    mask,
    weight,
    advantages,
    rewards,
    group_size,
    sequence,
    old_logp,
    ref_logp,
    importance,
    score,
    coefficient,
    entropy_weight,
    temperature,
    inv_temperature,
    return_entropy,
    objective,
    dlogits,
    softcap=None,
    logit_scale=None,
    out=None,
    arrived=None,
):
    """Launch the kernel, `dlogits` (B, T, V) being written (`logits`, or over them: `schedules.overlaps`).

    Args:
        logits: (B, T, V), the last dimension contiguous.
        ids, mask, weight, advantages, sequence, old_logp, ref_logp, importance, score, coefficient,
            entropy_weight, temperature: (N,) contiguous, or None as the kernel allows.
        rewards: (num_sequences,).
        return_entropy: also where the objective has no use for it.
        objective: a `grpo_fast.Objective`.
        softcap, logit_scale: both or neither: z stands for softcap * tanh(logit_scale * logits / softcap).
        out: what is returned, to be written; None: made here.
        arrived: (N,) int32 zeros, for this launch alone; None: made here if they are needed.

    Returns:
        loss, logp, entropy (or None), kl (or None): (N,) fp32; clip: (N,) int8.
    """
    B, T_len, V = logits.shape
    N = B * T_len
    if out is None:
        out = new_outputs(logits, return_entropy or objective.entropy_coef, ref_logp is not None)
    loss, logp, entropy, kl, clip = out
    # With an entropy a thread holds so much that too few programs would be resident.
    side = 4 if entropy is None else 1
    plan = reading(V, logits.element_size(), softcap is not None, side)
    write_K, write_T = plan.write_tile
    over = overlaps(logits, dlogits)
    if over and softcap is not None:  # a longer tile forwards would spill on sm_100
        write_K = min(write_K, 2)
    if N:
        rows = rows_of("logits", logits)
        _grpo_kernel[(N * plan.parts,)](
            **rows,
            **gradient_of(rows, dlogits),
            ids_ptr=ids,
            mask_ptr=mask,
            weight_ptr=weight,
            advantages_ptr=advantages,
            rewards_ptr=rewards,
            sequence_ptr=sequence,
            old_logp_ptr=old_logp,
            ref_logp_ptr=ref_logp,
            importance_ptr=importance,
            score_ptr=score,
            coefficient_ptr=coefficient,
            entropy_weight_ptr=entropy_weight,
            temperature_ptr=temperature,
            loss_ptr=loss,
            logp_ptr=logp,
            entropy_ptr=entropy,
            kl_ptr=kl,
            clip_ptr=clip,
            **plan.meeting_point(N, logits.device, arrived),
            **plan.arguments(entropy is not None),
            G=group_size,
            inv_temperature=inv_temperature,
            **scalars(objective),
            entropy_coef=objective.entropy_coef,
            score_eps=SCORE_EPS,
            **soft_cap_scalars(softcap, logit_scale),
            SURROGATE=objective.variant,
            KL=objective.kl,
            KL_GRADIENT=objective.kl_gradient,
            WRITE_K=write_K,
            WRITE_T=write_T,
            BLOCK_G=block_size(group_size),
            OVERLAP=over,
        )
    return loss, logp, entropy, kl, clip
