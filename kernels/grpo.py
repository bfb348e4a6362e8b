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
    Rows,
    Writer,
    gradient_of,
    place_gradient,
    place_row,
    read_edges,
    rows_of,
    write_edges,
    zero_edges,
)
from grpo_fast.kernels.group_advantage import block_size
from grpo_fast.kernels.rows import (
    FIRST_OF_TWO,
    FIRST_OF_TWO_SOON,
    Reader,
    Slots,
    arrive,
    inverse_temperature,
    is_live,
    load_scored,
    load_target,
    meet,
    read_row,
    whole_row,
    write_dlogits,
    write_zeros,
)
from grpo_fast.kernels.scalars import modes_of, scalars_of
from grpo_fast.kernels.schedules import holds_more_rows, overlaps, reading
from grpo_fast.kernels.scoring import (
    RewardGroups,
    load_or,
    reads_again,
    score_rewards,
    score_row,
    store_no_outputs,
    store_outputs,
    weigh,
)
from grpo_fast.kernels.terms import TokenValues, token_policy_terms
from grpo_fast.kernels.tiles import LOG2E, RowGradient, cap_of, dlogits_factors, dlogits_target
from grpo_fast.records import SCORE_EPS, Outputs


@triton.jit(do_not_specialize=["before", "dbefore", "T_len", "G"])
def _grpo_kernel(
    logits_ptr,  # (B, T, V)
    targets,  # Targets, (N,), without inv_temperature, which would cost registers in there
    tokens,  # Tokens, (N,)
    rewards_ptr,  # (num_sequences,) fp32 or fp64, or None: tokens have advantages
    sequence_ptr,  # (N,) int64, the sequence of a token, or None: row // T_len
    dlogits_ptr,  # (B, T, V)
    outputs,  # Outputs, (N,); entropy and kl may be None
    meeting,  # Meeting
    before,
    stride_b,
    stride_t,
    dbefore,
    dstride_b,
    dstride_t,
    T_len,
    V,
    split,  # Split
    G,  # rewards of a group
    inv_temperature,
    scalars,  # Scalars
    entropy_coef,
    score_eps,
    cap,  # Cap, or None
    MODES: tl.constexpr,  # Modes
    TILES: tl.constexpr,  # ReadTiles
    WRITE_TILE: tl.constexpr,  # Tile
    BLOCK_G: tl.constexpr,
    ROWS: tl.constexpr,
    SAME_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
    POLLS: tl.constexpr,
):
    TOGETHER: tl.constexpr = POLLS > 0
    HAS_ENTROPY: tl.constexpr = outputs.entropy is not None
    # A row of one tile has no direction, a capped one is bound by arithmetic: no spills on sm_100 this way.
    BACKWARDS: tl.constexpr = not OVERLAP and ((not TILES.SPLIT and TILES.K > 1) or cap is not None)
    HINT: tl.constexpr = FIRST_OF_TWO_SOON if TOGETHER else FIRST_OF_TWO
    READER: tl.constexpr = Reader(TILES, HAS_ENTROPY, HINT)
    WRITER: tl.constexpr = Writer(WRITE_TILE, HAS_ENTROPY, BACKWARDS, OVERLAP)
    pid = tl.program_id(0)
    index = (pid // split.parts).to(tl.int64)
    part = pid % split.parts
    row = place_row(Rows(logits_ptr, before, stride_b, stride_t), index, T_len, V, ROWS)
    drows = Rows(dlogits_ptr, dbefore, dstride_b, dstride_t)
    live = is_live(targets.mask, index)
    target = load_target(targets.ids, index, V)  # beside the mask: one wait for memory, not two
    if live:
        inv_temperature = inverse_temperature(targets.temperature, index, inv_temperature)
        scale = inv_temperature * LOG2E
        slots = Slots(meeting.partial, index, split.segments)
        sums = read_row(row, slots, part, target, scale, split.columns, READER, cap)
        edges = None
        if TOGETHER:
            # What another program may write over is read before that can begin. What is needed after the
            # meeting is under way before it.
            if ROWS == "anywhere":
                edges = read_edges(row, target, V, scale, HAS_ENTROPY, cap)
            z = load_scored(row.ptr, target)
            weight, advantage = load_factors(tokens, index)
            old_logp = load_or(tokens.old_logp, index, None)
            ref_logp = load_or(tokens.ref_logp, index, None)
            last, todo = meet(meeting.arrived, index, part, split.parts, POLLS)
            goes_on = todo != 0
        else:
            last = arrive(meeting.arrived, index, split.parts, TILES.SPLIT)
            goes_on = last
        if goes_on:
            if not TOGETHER:
                z = load_scored(row.ptr, target)
                if ROWS == "anywhere":
                    edges = read_edges(row, target, V, scale, HAS_ENTROPY, cap)
            whole = whole_row(sums, slots, edges, READER=READER)
            if TOGETHER:
                # A row that is read again: the last program does so, and then writes all of it alone.
                todo = tl.where(reads_again(z, whole, scale, cap), tl.where(last, -1, 0), todo)
            score = score_row(row.ptr, target, z, whole, inv_temperature, V, TILES.T, cap)
            if not TOGETHER:
                weight, advantage = load_factors(tokens, index)
                old_logp = load_or(tokens.old_logp, index, None)
                ref_logp = load_or(tokens.ref_logp, index, None)
            if rewards_ptr is not None:
                groups = RewardGroups(rewards_ptr, sequence_ptr, G, score_eps)
                advantage = score_rewards(groups, index, T_len, BLOCK_G)
            if old_logp is None:
                old_logp = score.logp
            token = TokenValues(
                score.logp,
                old_logp,
                ref_logp,
                advantage,
                load_or(tokens.score, index, advantage),
                load_or(tokens.importance, index, 1.0),
            )
            dlogp, dentropy = store_loss(
                outputs,
                last,
                tokens,
                index,
                token,
                weight,
                score.entropy,
                entropy_coef,
                scalars,
                MODES=MODES,
            )
            # In place, the scored logit is overwritten below, after every thread has read it.
            tl.debug_barrier()
            drow = place_gradient(drows, index, T_len, row, ROWS, SAME_ROWS)
            first = 0
            end = 1
            size = row.body
            if TOGETHER:
                alone = todo == 1 << part
                first = tl.where(alone, part, 0)
                end = tl.where(alone, part + 1, split.parts)
                size = split.columns
            moves = (dlogp != 0) | (dentropy != 0)
            gradient = gradient_of_row(target, score, dlogp, dentropy, inv_temperature)
            for i in range(first, end):
                start = i * size
                stop = tl.minimum(start + size, row.body)
                if TOGETHER:
                    stop = tl.where((todo >> i) & 1 != 0, stop, start)
                if moves:
                    write_dlogits(row, drow, gradient, start, stop, WRITER, cap)
                else:
                    write_zeros(drow, start, stop, WRITE_TILE)
            if ROWS == "anywhere" and last:
                if moves:
                    write_edges(row, drow, gradient, V, WRITER, cap)
                else:
                    zero_edges(drow, V)
    else:
        masked = place_gradient(drows, index, T_len, row, ROWS, SAME_ROWS)
        start = part * split.columns
        stop = tl.minimum(start + split.columns, row.body)
        write_zeros(masked, start, stop, WRITE_TILE)
        if part == 0:
            if ROWS == "anywhere":
                zero_edges(masked, V)
            store_no_outputs(outputs, index)


@triton.jit
def load_factors(tokens, row):
    """(weight, advantage) of a row; the second is 0 where sequences have rewards instead."""
    advantage = 0.0
    if tokens.advantages is not None:
        advantage = tl.load(tokens.advantages + row).to(tl.float32)
    return tl.load(tokens.weight + row), advantage


@triton.jit
def store_loss(
    outputs, last, tokens, row, token, weight, entropy, entropy_coef, scalars, MODES: tl.constexpr
):
    """Let the last program of a row store its outputs.

    Returns (dlogp, dentropy), the derivatives of its loss.

    Args:
        token: `TokenValues`.
    """
    HAS_ENTROPY: tl.constexpr = outputs.entropy is not None
    loss, dlogp, kl, clip = token_policy_terms(token, scalars, MODES)
    loss, dlogp, dentropy = weigh(
        loss, dlogp, entropy, weight, tokens, row, entropy_coef, BONUS=HAS_ENTROPY
    )
    if last:
        store_outputs(outputs, row, Outputs(loss, token.logp, entropy, kl, clip))
    return dlogp, dentropy


@triton.jit
def gradient_of_row(target, score, dlogp, dentropy, inv_temperature):
    """The `RowGradient` of a row, given the derivatives of its loss."""
    logp = score.logp
    entropy = score.entropy
    k0, k1 = dlogits_factors(dlogp, dentropy, entropy, score.s, score.log2_s, inv_temperature)
    dtarget = dlogits_target(dlogp, dentropy, entropy, logp, inv_temperature) * score.slope
    return RowGradient(target, dtarget, score.scale, score.m, k0, k1)


def new_outputs(logits, with_entropy, with_kl):
    """New vectors for what `grpo_fwd_bwd` returns."""
    N = logits.shape[0] * logits.shape[1]
    new = functools.partial(torch.empty, N, device=logits.device, dtype=torch.float32)
    entropy, kl = new() if with_entropy else None, new() if with_kl else None
    return Outputs(new(), new(), entropy, kl, new(dtype=torch.int8))


def grpo_fwd_bwd(
    logits,
    targets,
    tokens,
    rewards,
    return_entropy,
    objective,
    dlogits,
    softcap=None,
    out=None,
    arrived=None,
):
    """Launch the kernel, which also writes the gradient, `dlogits` (B, T, V).

    `dlogits` may be `logits`, or lie over them (`schedules.overlaps`).

    Args:
        logits: (B, T, V), the last dimension contiguous.
        targets, tokens: `Targets` and `Tokens`, N = B T.
        rewards: `Rewards`; `values` is None where tokens have advantages.
        return_entropy: whether the entropy is wanted although the objective does not use it.
        objective: a `grpo_fast.Objective`.
        softcap: `SoftCap`, or None.
        out: what is returned, to be written; None: made here.
        arrived: (N,) int32 zeros, for this launch alone; None: made here if they are needed.

    Returns:
        `Outputs`; entropy and kl are None where they are not computed.
    """
    B, T_len, V = logits.shape
    N = B * T_len
    if out is None:
        has_ref = tokens.ref_logp is not None
        out = new_outputs(logits, return_entropy or objective.entropy_coef, has_ref)
    # With an entropy a thread holds so much that too few programs would be resident.
    side = 4 if out.entropy is None else 1
    over = overlaps(logits, dlogits)
    plan = reading(V, logits.element_size(), softcap is not None, side, together=not over)
    write_tile = plan.write_tile
    if over and softcap is not None:  # a longer tile forwards would spill on sm_100
        write_tile = write_tile._replace(K=min(write_tile.K, 2))
    if N:
        rows = rows_of("logits", logits)
        five = rows["ROWS"] != "anywhere" and holds_more_rows(logits.device)
        _grpo_kernel[(N * plan.parts,)](
            **rows,
            **gradient_of(rows, dlogits),
            targets=targets._replace(inv_temperature=None),
            inv_temperature=targets.inv_temperature,
            tokens=tokens,
            # One by one: of a tuple, Triton would specialise on the size of a group.
            rewards_ptr=rewards.values,
            sequence_ptr=rewards.sequence,
            G=rewards.group_size,
            outputs=out,
            meeting=plan.meeting_point(N, logits.device, arrived),
            **plan.arguments(out.entropy is not None, five),
            scalars=scalars_of(objective),
            entropy_coef=objective.entropy_coef,
            score_eps=SCORE_EPS,
            cap=cap_of(softcap),
            MODES=modes_of(objective),
            WRITE_TILE=write_tile,
            BLOCK_G=block_size(rewards.group_size),
            OVERLAP=over,
            POLLS=plan.polls,
        )
    return out
