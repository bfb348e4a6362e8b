"""The objective on log-probs, and the statistics of a step.

    ratio = exp(logp - old)
    loss  = w (importance * surrogate(ratio, A) + beta KL(logp, ref)),  dlogp = dloss/dlogp

`_policy_loss_kernel` computes both per token; formulas in `terms`. `_token_statistics_kernel` reduces what a
step produced to one vector, in fixed order, and to metrics. Bytes: every argument once; for masked tokens
only the mask.

A program owns BLOCK tokens. The last program to arrive adds up the statistics of all programs.
"""

import functools

import torch
import triton
import triton.language as tl

from grpo_fast.kernels.scalars import modes_of, scalars_of
from grpo_fast.kernels.schedules import compiled_with, parts_of
from grpo_fast.kernels.terms import (
    CLIP_DUAL,
    CLIP_HIGH,
    CLIP_LOW,
    TokenValues,
    exp_remainders,
    token_policy_terms,
)
from grpo_fast.records import PolicyLoss

BLOCK = 1024
NUM_STATISTICS = 16  # the layout is named in `grpo_fast.metrics.STATISTICS`
NUM_METRICS = 14  # likewise, `METRICS`


@triton.jit
def load_tokens(ptr, offs, keep, default):
    """Values of tokens as fp32; `default` where `keep` is false, or where there is no tensor."""
    if ptr is not None:
        values = tl.load(ptr + offs, mask=keep, other=default).to(tl.float32)
    else:
        values = tl.full(offs.shape, default, tl.float32)
    return values


@triton.jit
def load_or_none(ptr, offs, keep):
    """Values of tokens as fp32, 0 where `keep` is false; None where there is no tensor."""
    values = None
    if ptr is not None:
        values = load_tokens(ptr, offs, keep, 0.0)
    return values


@triton.jit
def load_moves(tokens, offs, live, logp):
    """(old log-probs, advantages, scores) of tokens whose log-probs are `logp`.

    Args:
        tokens: `grpo_fast.records.Tokens`.
    """
    old_logp = logp
    if tokens.old_logp is not None:
        old_logp = load_tokens(tokens.old_logp, offs, live, 0.0)
    advantage = load_tokens(tokens.advantages, offs, live, 0.0)
    score = advantage
    if tokens.score is not None:
        score = load_tokens(tokens.score, offs, live, 0.0)
    return old_logp, advantage, score


@triton.jit(do_not_specialize=["N"])
def _policy_loss_kernel(
    logp_ptr,  # (N,)
    mask_ptr,  # (N,) bool, or None
    tokens,  # Tokens, (N,)
    out,  # PolicyLoss, (N,)
    N,
    scalars,  # Scalars
    MODES: tl.constexpr,  # Modes
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = offs < N
    live = there
    if mask_ptr is not None:
        live = there & (tl.load(mask_ptr + offs, mask=there, other=0) != 0)
    weight = tl.load(tokens.weight + offs, mask=live, other=0.0)
    logp = load_tokens(logp_ptr, offs, live, 0.0)
    old_logp, advantage, score = load_moves(tokens, offs, live, logp)
    ref_logp = load_or_none(tokens.ref_logp, offs, live)
    importance = load_tokens(tokens.importance, offs, live, 1.0)
    token = TokenValues(logp, old_logp, ref_logp, advantage, score, importance)
    loss, dlogp, kl, clip = token_policy_terms(token, scalars, MODES)
    # Select, not multiply: a token without weight adds nothing, whatever its loss is.
    tl.store(out.loss + offs, tl.where(weight == 0, 0.0, weight * loss), mask=there)
    tl.store(out.dlogp + offs, tl.where(weight == 0, 0.0, weight * dlogp), mask=there)
    tl.store(out.clip + offs, clip.to(tl.int8), mask=there)
    if out.kl is not None:
        tl.store(out.kl + offs, kl, mask=there)


@triton.jit(do_not_specialize=["N", "programs"])
def _token_statistics_kernel(
    mask_ptr,  # (N,) bool, or None
    share_ptr,  # (N,) fp32, or None: 1
    outputs,  # Outputs, (N,); kl and entropy may be None
    old_logp_ptr,  # (N,) fp32, or None
    importance_ptr,  # (N,) fp32, or None
    partial_ptr,  # (programs, 16) fp32
    arrived_ptr,  # (1,) int32, zero, or None: there is one program
    statistics_ptr,  # (16,) fp32
    metrics_ptr,  # (14,) fp32
    total_ptr,  # the sum of the losses, fp32
    N,
    programs,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
):
    pid = tl.program_id(0)
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = offs < N
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + offs, mask=live, other=0) != 0)
    share = load_tokens(share_ptr, offs, live, 1.0)
    one = tl.where(live, share, 0.0)
    d = tl.zeros([BLOCK], tl.float32)
    if old_logp_ptr is not None:
        d = load_tokens(outputs.logp, offs, live, 0.0) - load_tokens(old_logp_ptr, offs, live, 0.0)
    ratio = tl.exp(d)
    _, k3 = exp_remainders(d)
    clip = tl.load(outputs.clip + offs, mask=live, other=0).to(tl.int32)
    importance = load_tokens(importance_ptr, offs, live, 1.0)
    outside = (importance < 0.5) | (importance > 2.0)
    rho = tl.where(live, ratio * importance, 0.0)

    slot_ptr = partial_ptr + pid * 16
    tl.store(slot_ptr + 0, tl.sum(one))
    tl.store(slot_ptr + 1, tl.sum(load_tokens(outputs.loss, offs, live, 0.0)))
    tl.store(slot_ptr + 2, tl.sum(share * tl.where(live, ratio, 0.0)))
    tl.store(slot_ptr + 3, tl.sum(share * (-d)))
    tl.store(slot_ptr + 4, tl.sum(share * k3))
    tl.store(slot_ptr + 5, tl.sum(share * ((clip & CLIP_LOW) != 0).to(tl.float32)))
    tl.store(slot_ptr + 6, tl.sum(share * ((clip & CLIP_HIGH) != 0).to(tl.float32)))
    tl.store(slot_ptr + 7, tl.sum(share * ((clip & CLIP_DUAL) != 0).to(tl.float32)))
    tl.store(slot_ptr + 8, tl.sum(share * load_tokens(outputs.kl, offs, live, 0.0)))
    tl.store(slot_ptr + 9, tl.sum(share * load_tokens(outputs.entropy, offs, live, 0.0)))
    tl.store(slot_ptr + 10, tl.sum(share * tl.where(live, importance, 0.0)))
    tl.store(slot_ptr + 11, tl.sum(share * (live & outside).to(tl.float32)))
    tl.store(slot_ptr + 12, tl.sum(share * rho))
    tl.store(slot_ptr + 13, tl.sum(share * (rho * rho)))
    tl.store(slot_ptr + 14, tl.min(tl.where(live, ratio, float("inf"))))
    tl.store(slot_ptr + 15, tl.max(tl.where(live, ratio, -float("inf"))))
    tl.debug_barrier()  # the stores of all threads come before the counter of one
    last = True
    if arrived_ptr is not None:
        last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        column = tl.arange(0, 16)
        total = combine_programs(partial_ptr, programs, FOLD)
        tl.store(statistics_ptr + column, total)
        tl.store(total_ptr + 0 * column, total, mask=column == 1)
        store_metrics(metrics_ptr, total, column)


@triton.jit
def combine_programs(partial_ptr, programs, FOLD: tl.constexpr):
    """The statistics [16] of all tokens from those of the programs: 14 sums, the minimum and the maximum."""
    column = tl.arange(0, 16)[None, :]
    total = tl.zeros([16], tl.float32)
    least = tl.full([16], float("inf"), tl.float32)
    most = tl.full([16], -float("inf"), tl.float32)
    for base in range(0, programs, FOLD):
        rows = base + tl.arange(0, FOLD)[:, None]
        there = (rows < programs) & (column < 16)
        # volatile: other programs wrote these, the cache of this one may be stale
        part = tl.load(partial_ptr + rows * 16 + column, mask=there, other=0.0, volatile=True)
        total += tl.sum(part, axis=0)
        least = tl.minimum(least, tl.min(tl.where(there, part, float("inf")), axis=0))
        most = tl.maximum(most, tl.max(tl.where(there, part, -float("inf")), axis=0))
    column = tl.arange(0, 16)
    total = tl.where(column == 14, least, tl.where(column == 15, most, total))
    # The extremes are NaN with their sum: hardware's minimum returns the other operand.
    summed = tl.sum(tl.where(column == 2, total, 0.0))
    return tl.where(column >= 14, tl.where(summed == summed, total, summed), total)


@triton.jit
def store_metrics(metrics_ptr, total, column):
    """Store the metrics, computed and ordered as in `grpo_fast.metrics.metrics_from`."""
    tokens = tl.sum(tl.where(column == 0, total, 0.0))
    rho = tl.sum(tl.where(column == 12, total, 0.0))
    squares = tl.sum(tl.where(column == 13, total, 0.0))
    empty = tokens == 0
    count = tl.where(empty, 1.0, tokens)
    value = tl.div_rn(total, tl.zeros_like(total) + count)
    value = tl.where((column == 0) | (column >= 14), total, value)
    of_ratios = (column == 2) | (column == 10) | (column >= 14)
    value = tl.where(of_ratios, tl.where(empty, 1.0, value), value)
    of_equal = tl.where(squares == 0, 1.0, count * squares)
    effective = tl.where(squares == 0, tl.where(empty, 1.0, 0.0), tl.div_rn(rho * rho, of_equal))
    value = tl.where(column == 12, effective, value)
    # tokens, the ratio's mean and extremes, clip fractions, approximate KLs, the rest.
    place = tl.where(column <= 4, column + 4, tl.where(column <= 7, column - 1, column + 1))
    place = tl.where(column == 0, 0, tl.where(column == 2, 1, place))
    place = tl.where(column >= 14, column - 12, place)
    tl.store(metrics_ptr + place, value, mask=(column != 1) & (column != 13))


def new_policy_loss(logp, with_kl):
    """New vectors for the `PolicyLoss` of log-probs."""
    new = functools.partial(torch.empty, len(logp), device=logp.device, dtype=torch.float32)
    return PolicyLoss(new(), new(), new() if with_kl else None, new(dtype=torch.int8))


def policy_loss_fwd(logp, mask, tokens, objective):
    """Launch the loss kernel.

    Args:
        logp, mask: (N,); the second is bool, or None.
        tokens: `Tokens`; `entropy_weight` and `coefficient` have no effect.

    Returns:
        `PolicyLoss`.
    """
    N = len(logp)
    out = new_policy_loss(logp, tokens.ref_logp is not None)
    if N:
        _policy_loss_kernel[(parts_of(N, BLOCK),)](
            logp_ptr=logp,
            mask_ptr=mask,
            tokens=tokens._replace(entropy_weight=None, coefficient=None),
            out=out,
            N=N,
            scalars=scalars_of(objective),
            MODES=modes_of(objective),
            BLOCK=BLOCK,
            **compiled_with(4),
        )
    return out


def token_statistics_fwd(outputs, mask, share, old_logp, importance):
    """Launch the statistics kernel on (N,) tensors, N > 0.

    Args:
        outputs: `Outputs`; kl and entropy may be None.
        share: (N,) fp32, the weight of a token in sums; None: 1.

    Returns:
        The statistics (16,), the metrics (14,), the sum of the losses (), all fp32.
    """
    logp = outputs.logp
    N = len(logp)
    programs = parts_of(N, BLOCK)
    new = functools.partial(torch.empty, device=logp.device, dtype=torch.float32)
    statistics, metrics, total = new(NUM_STATISTICS), new(NUM_METRICS), new(())
    arrived = None
    if programs > 1:
        arrived = torch.zeros(1, device=logp.device, dtype=torch.int32)
    _token_statistics_kernel[(programs,)](
        mask_ptr=mask,
        share_ptr=share,
        outputs=outputs,
        old_logp_ptr=old_logp,
        importance_ptr=importance,
        partial_ptr=new(programs, NUM_STATISTICS),
        arrived_ptr=arrived,
        statistics_ptr=statistics,
        metrics_ptr=metrics,
        total_ptr=total,
        N=N,
        programs=programs,
        BLOCK=BLOCK,
        FOLD=64,
        **compiled_with(4),
    )
    return statistics, metrics, total
