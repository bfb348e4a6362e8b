"""The objective on log-probs where a token's loss depends on its whole sequence (GSPO, GMPO, VESPO, masks).

    d        = logp - old, n live tokens in the sequence
    ratio    = exp(mean d) (GSPO), exp(mean of the clipped d) (GMPO), exp(d) otherwise
    log W    = sum of d, and of the log importance weights (VESPO)
    drift    = mean of -d (off-policy mask)
    dlogp_t  = w_t dl_t/dlogp_t + (sum_s w_s dl_s/d mean) / n     the second where the ratio is a mean

One program owns a sequence and passes over its tokens two or three times: for the sums; for the losses; and,
where the ratio is a mean, for the gradient that comes back through the mean. Bytes: the log-probs once per
pass, everything else once or twice.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from grpo_fast.kernels.policy_loss import load_moves, load_or_none, load_tokens, new_policy_loss
from grpo_fast.kernels.scalars import modes_of, scalars_of
from grpo_fast.kernels.schedules import compiled_with
from grpo_fast.kernels.terms import RatioValues, TokenValues, bounded_log_ratio, policy_terms
from grpo_fast.kernels.tiles import greater, lesser

BLOCK = 512


class Batch(NamedTuple):
    """All tokens, and the numbers of the objective."""

    logp: Any  # (N,)
    mask: Any  # (N,) bool, or None
    tokens: Any  # `grpo_fast.records.Tokens`, (N,)
    sequences: Any  # `grpo_fast.records.Sequences`
    scalars: Any  # `scalars.Scalars`
    stale_at: Any  # the drift from which on a sequence is stale


class Sequence(NamedTuple):
    """One sequence: its tokens, and the sums over them that the first pass takes."""

    start: Any
    stop: Any
    n: Any  # the sum of shares; 1 where that is 0
    drift: Any  # mean d, weighted by the shares
    taken: Any  # the mean of those d that the ratio is made of
    log_w: Any  # VESPO's log sequence weight


@triton.jit
def sequence_statistics(batch, start, stop, MODES: tl.constexpr, BLOCK: tl.constexpr):
    """The `Sequence` of tokens [start, stop)."""
    tokens = batch.tokens
    count = 0.0
    total = 0.0
    taken = 0.0
    log_w = 0.0
    for base in range(start, stop, BLOCK):
        offs, live = live_tokens(batch.mask, base, stop, BLOCK)
        d = tl.zeros([BLOCK], tl.float32)
        if tokens.old_logp is not None:
            old_logp = load_tokens(tokens.old_logp, offs, live, 0.0)
            d = load_tokens(batch.logp, offs, live, 0.0) - old_logp
        share = load_tokens(batch.sequences.share, offs, live, 1.0)
        count += tl.sum(tl.where(live, share, 0.0), axis=0)
        total += tl.sum(share * d, axis=0)
        if MODES.SURROGATE == "gmpo":
            advantage = load_tokens(tokens.advantages, offs, live, 0.0)
            up = lesser(d, batch.scalars.surrogate.high)
            down = greater(d, -batch.scalars.surrogate.low)
            d = tl.where(advantage > 0, up, tl.where(advantage < 0, down, 0.0))
        taken += tl.sum(share * d, axis=0)
        if MODES.SURROGATE == "vespo":
            log_w += tl.sum(share * lesser(greater(d, -20.0), 20.0), axis=0)
            # Not `live`: the weight of a sequence stands at its first token, masked or not.
            log_importance = batch.sequences.log_importance
            log_w += tl.sum(load_tokens(log_importance, offs, offs < stop, 0.0), axis=0)
    n = tl.where(count == 0, 1.0, count)
    return Sequence(start, stop, n, total / n, taken / n, log_w)


@triton.jit
def live_tokens(mask_ptr, base, stop, BLOCK: tl.constexpr):
    """(offsets from `base` on, which of them are before `stop` and not masked)."""
    offs = base + tl.arange(0, BLOCK)
    live = offs < stop
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + offs, mask=live, other=0) != 0)
    return offs, live


@triton.jit
def opens(d, advantage, scalars):
    """Whether GMPO's bound of a token lets the gradient of the mean through."""
    held = tl.where(advantage > 0, d > scalars.high, d < -scalars.low)
    return (advantage != 0) & (held == 0)


@triton.jit(do_not_specialize=["N", "T_len"])
def _sequence_loss_kernel(
    logp_ptr,  # (N,)
    mask_ptr,  # (N,) bool, or None
    tokens,  # Tokens, (N,)
    sequences,  # Sequences, without T_len, which is
    out,  # PolicyLoss, (N,)
    N,
    T_len,
    scalars,  # Scalars
    stale_at,
    MODES: tl.constexpr,  # Modes
    RATIO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The gradient of a mean over the sequence goes to all of its tokens.
    THROUGH_MEAN: tl.constexpr = RATIO == "sequence" or MODES.SURROGATE == "gmpo"
    UNBIASED: tl.constexpr = out.kl is not None and MODES.KL == "k3_unbiased"
    batch = Batch(logp_ptr, mask_ptr, tokens, sequences, scalars, stale_at)
    b = tl.program_id(0).to(tl.int64)
    start = b * T_len
    stop = start + T_len
    if sequences.boundaries is not None:
        # Boundaries are not checked on a GPU. Whatever they are, nothing outside the tensors is touched.
        start = tl.minimum(tl.maximum(tl.load(sequences.boundaries + b), 0), N)
        stop = tl.minimum(tl.maximum(tl.load(sequences.boundaries + b + 1), 0), N)
    sequence = sequence_statistics(batch, start, stop, MODES, BLOCK)
    if sequences.boundaries is not None:
        # Tokens of no sequence have weights of NaN (`reduction_weights`): so the loss is NaN, too.
        start = tl.where(b == 0, 0, start)
        stop = tl.where(b == tl.num_programs(0) - 1, N, stop)
        _, _, n, drift, taken, log_w = sequence
        sequence = Sequence(start, stop, n, drift, taken, log_w)
    pull = 0.0  # dL / d (mean d), of the surrogate
    kl_pull = 0.0  # the same of the KL
    for base in range(start, stop, BLOCK):
        of_block, kl_of_block = block_loss(batch, sequence, base, out, MODES, RATIO, BLOCK)
        if THROUGH_MEAN:
            pull += of_block
            if UNBIASED:
                kl_pull += kl_of_block
    if THROUGH_MEAN:
        tl.debug_barrier()  # dlogp is read back, perhaps by other threads than stored it
        for base in range(start, stop, BLOCK):
            spread_pull(batch, sequence, base, out, pull, kl_pull, MODES=MODES, BLOCK=BLOCK)


@triton.jit
def block_loss(
    batch, sequence, base, out, MODES: tl.constexpr, RATIO: tl.constexpr, BLOCK: tl.constexpr
):
    """Store loss, dlogp, KL and clip flags of the tokens from `base` on.

    Returns what the tokens add to dL / d (mean d), by the surrogate and by the KL.
    """
    THROUGH_MEAN: tl.constexpr = RATIO == "sequence" or MODES.SURROGATE == "gmpo"
    UNBIASED: tl.constexpr = out.kl is not None and MODES.KL == "k3_unbiased"
    offs, live = live_tokens(batch.mask, base, sequence.stop, BLOCK)
    there = offs < sequence.stop
    logp = load_tokens(batch.logp, offs, live, 0.0)
    old_logp, advantage, score = load_moves(batch.tokens, offs, live, logp)
    own_d = logp - old_logp
    d = own_d
    if RATIO != "token" or MODES.SURROGATE == "gmpo":
        d = tl.zeros([BLOCK], tl.float32) + sequence.taken
    log_ratio, free = bounded_log_ratio(d, batch.scalars.log_ratio)
    own = free.to(tl.float32)
    if THROUGH_MEAN:
        own = own * load_tokens(batch.sequences.share, offs, live, 1.0) / sequence.n
    if MODES.SURROGATE == "gmpo":
        own = tl.where(opens(own_d, advantage, batch.scalars.surrogate), own, 0.0)
    importance = load_tokens(batch.tokens.importance, offs, live, 1.0)
    # Where the drift is NaN, whether to drop the token is not known: the NaN must show in the loss.
    doubt = tl.where(sequence.drift == sequence.drift, 0.0, sequence.drift)
    decides = (batch.stale_at < float("inf")) & (advantage < 0) & (importance != 0)
    importance = tl.where(decides, importance + doubt, importance)
    ref_logp = load_or_none(batch.tokens.ref_logp, offs, live)
    token = TokenValues(logp, old_logp, ref_logp, advantage, score, importance)
    keep = ((advantage < 0) == 0) | ((-sequence.drift > batch.stale_at) == 0)
    ratio = RatioValues(log_ratio, own, sequence.log_w, keep)
    loss, by_logp, by_ratio, kl, clip = policy_terms(token, ratio, batch.scalars, MODES)
    by_ratio = tl.where(free, by_ratio, 0.0)
    weight = tl.load(batch.tokens.weight + offs, mask=live, other=0.0)
    pull = 0.0
    kl_pull = 0.0
    if THROUGH_MEAN:
        pull = tl.sum(tl.where(weight == 0, 0.0, weight * by_ratio), axis=0)
        if UNBIASED:
            by_kl = tl.where(free, weigh_kl(weight, batch.scalars.kl.beta, kl), 0.0)
            kl_pull = tl.sum(by_kl, axis=0)
    else:
        by_logp += by_ratio
    # Select, not multiply: a token without weight adds nothing, whatever its loss is.
    tl.store(out.loss + offs, tl.where(weight == 0, 0.0, weight * loss), mask=there)
    tl.store(out.dlogp + offs, tl.where(weight == 0, 0.0, weight * by_logp), mask=there)
    tl.store(out.clip + offs, tl.where(live, clip, 0).to(tl.int8), mask=there)
    if out.kl is not None:
        tl.store(out.kl + offs, kl, mask=there)
    return pull, kl_pull


@triton.jit
def spread_pull(
    batch, sequence, base, out, pull, kl_pull, MODES: tl.constexpr, BLOCK: tl.constexpr
):
    """Add the gradient that comes back through the mean to dlogp of the tokens from `base` on."""
    tokens = batch.tokens
    offs, live = live_tokens(batch.mask, base, sequence.stop, BLOCK)
    open_ = live
    if MODES.SURROGATE == "gmpo":
        advantage = load_tokens(tokens.advantages, offs, live, 0.0)
        d = tl.zeros([BLOCK], tl.float32)
        if tokens.old_logp is not None:
            d = load_tokens(batch.logp, offs, live, 0.0)
            d -= load_tokens(tokens.old_logp, offs, live, 0.0)
        open_ = live & opens(d, advantage, batch.scalars.surrogate)
    through = tl.zeros([BLOCK], tl.float32) + pull
    if out.kl is not None and MODES.KL == "k3_unbiased":
        # The share of the other tokens: a token's own is in dlogp already, without the cancellation.
        weight = tl.load(tokens.weight + offs, mask=live, other=0.0)
        mine = weigh_kl(weight, batch.scalars.kl.beta, load_tokens(out.kl, offs, live, 0.0))
        _, free = bounded_log_ratio(sequence.taken, batch.scalars.log_ratio)
        others = tl.where(tl.abs(mine) == float("inf"), 0.0, kl_pull - mine)
        through += tl.where(free, others, 0.0)
    dlogp = tl.load(out.dlogp + offs, mask=live, other=0.0)
    through = through * load_tokens(batch.sequences.share, offs, live, 1.0) / sequence.n
    tl.store(out.dlogp + offs, dlogp + tl.where(open_, through, 0.0), mask=live)


@triton.jit
def weigh_kl(weight, beta, kl):
    """The KL of a token times its weights; 0 where a weight is 0, whatever the KL is."""
    return tl.where((weight == 0) | (beta == 0), 0.0, weight * (beta * kl))


def sequence_loss_fwd(logp, mask, tokens, sequences, objective):
    """Launch the loss kernel for objectives that look at whole sequences.

    Args:
        logp, mask: (N,); the second is bool, or None.
        tokens: `Tokens`; `entropy_weight` and `coefficient` have no effect.
        sequences: `Sequences`.

    Returns:
        `PolicyLoss`.
    """
    N = len(logp)
    out = new_policy_loss(logp, tokens.ref_logp is not None)
    stale_at = objective.off_policy_threshold
    boundaries = sequences.boundaries
    if N:
        count = N // sequences.T_len if boundaries is None else len(boundaries) - 1
        _sequence_loss_kernel[(count,)](
            logp_ptr=logp,
            mask_ptr=mask,
            tokens=tokens._replace(entropy_weight=None, coefficient=None),
            # The length apart: Triton would compile anew for some lengths, if they were in a tuple.
            sequences=sequences._replace(T_len=None),
            T_len=sequences.T_len,
            out=out,
            N=N,
            scalars=scalars_of(objective),
            stale_at=float("inf") if stale_at is None else stale_at,
            MODES=modes_of(objective),
            RATIO=objective.ratio,
            BLOCK=BLOCK,
            **compiled_with(4, registers=80),
        )
    return out
