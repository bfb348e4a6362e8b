"""Log-probability of one token per row of logits, and the entropy of the row, without a softmax in memory.

    s       = z / temperature                                   (B, T, V)
    logp    = s[y] - logsumexp(s),   H = logsumexp(s) - sum_v p_v s_v
    dz_v    = (dlogp (1[v = y] - p_v) - dH p_v (log p_v + H)) / temperature

Bytes, at w per logit: the forward reads N V w, and N w for the scored logits; the backward reads N V w and
writes N V w, and N w once more for the scored ones. Rows whose upstream gradient is 0 are written only.
Of masked rows no logit is read.

A program owns a row, or a part of one (`schedules`). m and s (log2 units, `tiles`) are kept for the
backward.
"""

import dataclasses
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
from grpo_fast.kernels.rows import (
    ONLY_ONE,
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
from grpo_fast.kernels.schedules import overlaps, reading, schedule
from grpo_fast.kernels.scoring import load_statistics, saved_statistics, score_row
from grpo_fast.kernels.tiles import (
    LOG2E,
    dlogits_factors,
    dlogits_target,
    soft_cap,
)


@triton.jit(do_not_specialize=["before", "T_len"])
def _logprob_fwd_kernel(
    logits_ptr,  # (B, T, V)
    ids_ptr,  # (N,)
    mask_ptr,  # (N,) bool, or None
    temperature_ptr,  # (N,) fp32, or None
    logp_ptr,  # (N,) fp32
    entropy_ptr,  # (N,) fp32, or None
    m_ptr,  # (N,) fp32
    s_ptr,  # (N,) fp32
    partial_ptr,  # (N, segments, 3) fp32, or None
    arrived_ptr,  # (N,) int32, zeros, or None
    before,
    stride_b,
    stride_t,
    T_len,
    V,
    parts,
    columns,
    segments,
    inv_temperature,
    softcap,
    logit_scale,
    cap_rate,
    K: tl.constexpr,
    T: tl.constexpr,
    STEPS: tl.constexpr,
    SIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    HAS_ENTROPY: tl.constexpr = entropy_ptr is not None
    pid = tl.program_id(0)
    row = (pid // parts).to(tl.int64)
    part = pid % parts
    live = True
    if mask_ptr is not None:
        live = tl.load(mask_ptr + row) != 0
    target = load_target(ids_ptr, row, V)  # beside the mask: one wait for memory, not two
    if live:
        row_ptr, body_ptr, head, body = place_row(
            logits_ptr, before, row, T_len, stride_b, stride_t, V, ROWS
        )
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
                ONLY_ONE,
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
                ONLY_ONE,
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
            if softcap is not None:
                z, _ = soft_cap(z, softcap, logit_scale, cap_rate)
            m, s, _, logp, entropy, _, back = score_row(
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
            m, s = saved_statistics(m, s, back)
            tl.store(logp_ptr + row, logp)
            tl.store(m_ptr + row, m)
            tl.store(s_ptr + row, s)
            if HAS_ENTROPY:
                tl.store(entropy_ptr + row, entropy)
    elif part == 0:
        tl.store(logp_ptr + row, 0.0)
        tl.store(m_ptr + row, 0.0)
        tl.store(s_ptr + row, 1.0)
        if HAS_ENTROPY:
            tl.store(entropy_ptr + row, 0.0)


@triton.jit(do_not_specialize=["before", "dbefore", "T_len"])
def _logprob_bwd_kernel(
    dlogp_ptr,  # (N,) fp32
    dentropy_ptr,  # (N,) fp32, or None
    logits_ptr,  # (B, T, V)
    ids_ptr,  # (N,)
    mask_ptr,  # (N,) bool, or None
    temperature_ptr,  # (N,) fp32, or None
    logp_ptr,  # (N,) fp32
    entropy_ptr,  # (N,) fp32, or None
    m_ptr,  # (N,) fp32
    s_ptr,  # (N,) fp32
    dlogits_ptr,  # (B, T, V)
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
    inv_temperature,
    softcap,
    logit_scale,
    cap_rate,
    K: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    SAME_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    HAS_ENTROPY: tl.constexpr = dentropy_ptr is not None
    pid = tl.program_id(0)
    row = (pid // parts).to(tl.int64)
    part = pid % parts
    row_ptr, body_ptr, head, body = place_row(
        logits_ptr, before, row, T_len, stride_b, stride_t, V, ROWS
    )
    drow_ptr, dbody_ptr = place_gradient(
        dlogits_ptr, dbefore, row, T_len, dstride_b, dstride_t, head, ROWS, SAME_ROWS
    )
    start = part * columns
    stop = tl.minimum(start + columns, body)
    dlogp = tl.load(dlogp_ptr + row)
    dentropy = 0.0
    entropy = 0.0
    if HAS_ENTROPY:
        dentropy = tl.load(dentropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
    live = (dlogp != 0) | (dentropy != 0)
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + row) != 0)
    if live:
        target = load_target(ids_ptr, row, V)
        inv_temperature = inverse_temperature(temperature_ptr, row, inv_temperature)
        logp = tl.load(logp_ptr + row)
        m, s, scale = load_statistics(m_ptr, s_ptr, row, inv_temperature * LOG2E)
        k0, k1 = dlogits_factors(dlogp, dentropy, entropy, s, tl.log2(s), inv_temperature)
        dtarget = dlogits_target(dlogp, dentropy, entropy, logp, inv_temperature)
        if softcap is not None:
            place = target - head
            here = (place >= start) & (place < stop)
            if ROWS == "anywhere":
                here = here | ((part == 0) & ((place < 0) | (place >= body)) & (target >= 0))
            z = tl.load(row_ptr + target, mask=here, other=0.0).to(tl.float32)
            _, slope = soft_cap(z, softcap, logit_scale, cap_rate)
            dtarget = dtarget * slope
            tl.debug_barrier()  # in place, every thread has read it before one writes it
        write_dlogits(
            body_ptr,
            dbody_ptr,
            target - head,
            dtarget,
            scale,
            m,
            k0,
            k1,
            start,
            stop,
            K,
            T,
            HAS_ENTROPY,
            False,
            softcap,
            logit_scale,
            cap_rate,
            OVERLAP,
        )
        if ROWS == "anywhere" and part == 0:
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
        write_zeros(dbody_ptr, start, stop, K, T)
        if ROWS == "anywhere" and part == 0:
            zero_edges(drow_ptr, head, body, V)


def logprob_fwd(
    logits,
    ids,
    mask,
    temperature,
    inv_temperature,
    with_entropy,
    softcap=None,
    logit_scale=None,
    out=None,
    arrived=None,
):
    """Launch the forward kernel.

    Args:
        logits: (B, T, V), the last dimension contiguous.
        ids, mask, temperature: (N,) contiguous; the last two may be None.
        softcap, logit_scale: both or neither: z stands for softcap * tanh(logit_scale * logits / softcap).
        out: what is returned, to be written; None: made here.
        arrived: (N,) int32 zeros, for this launch alone; None: made here if they are needed.

    Returns:
        logp, entropy (or None), m, s: (N,) fp32.
    """
    B, T_len, V = logits.shape
    N = B * T_len
    if out is None:
        new = functools.partial(torch.empty, device=logits.device, dtype=torch.float32)
        out = new(N), new(N) if with_entropy else None, new(N), new(N)
    logp, entropy, m, s = out
    plan = reading(V, logits.element_size(), softcap is not None)
    if N:
        _logprob_fwd_kernel[(N * plan.parts,)](
            **rows_of("logits", logits),
            ids_ptr=ids,
            mask_ptr=mask,
            temperature_ptr=temperature,
            logp_ptr=logp,
            entropy_ptr=entropy,
            m_ptr=m,
            s_ptr=s,
            **plan.meeting_point(N, logits.device, arrived),
            **plan.arguments(entropy is not None),
            inv_temperature=inv_temperature,
            **soft_cap_scalars(softcap, logit_scale),
        )
    return logp, entropy, m, s


def logprob_bwd(
    dlogp,
    dentropy,
    logits,
    ids,
    mask,
    temperature,
    inv_temperature,
    logp,
    entropy,
    m,
    s,
    dlogits,
    softcap=None,
    logit_scale=None,
):
    """Launch the backward kernel, `dlogits` (B, T, V) being written.

    It may be `logits`, or lie over them (`schedules.overlaps`). Then a row has one program: another part of
    it would be overwritten before its own program has read it.
    """
    B, T_len, V = logits.shape
    plan = schedule(V, softcap is not None)
    over = overlaps(logits, dlogits)
    if over:
        plan = dataclasses.replace(plan, parts=1, columns=plan.parts * plan.columns)
    if dlogits.numel():
        rows = rows_of("logits", logits)
        _logprob_bwd_kernel[(B * T_len * plan.parts,)](
            dlogp_ptr=dlogp,
            dentropy_ptr=dentropy,
            **rows,
            **gradient_of(rows, dlogits),
            ids_ptr=ids,
            mask_ptr=mask,
            temperature_ptr=temperature,
            logp_ptr=logp,
            entropy_ptr=entropy,
            m_ptr=m,
            s_ptr=s,
            **plan.arguments(),
            inv_temperature=inv_temperature,
            **soft_cap_scalars(softcap, logit_scale),
            OVERLAP=over,
        )
