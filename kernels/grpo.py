"""From logits to the GRPO loss and its gradient, in one launch.

    logp, H   as in `logprob`                                            per row of (B, T, V) logits
    A         given, or the z-score of the group's rewards               `tiles.standard_score`
    l         w (importance * surrogate(logp, old, A) + beta KL(logp, ref)) - w_H entropy_coef H
    c, e      dl/dlogp, plus a coefficient known beforehand if there is one; dl/dH
    dz_v      (c (1[v = y] - p_v) - e p_v (log p_v + H)) / temperature

The coefficient of a row is known as soon as its log-prob is, so the gradient is taken while the row is still
in the cache. Bytes, at w per logit: N V w read from memory, N V w read again from the cache, N V w written.
For the scored ones, N w are read by every program of a row, and written once more. Rows with c = e = 0 are
read once and written once, masked rows are written only.

A program owns a row, or a part of one. The programs of a row wait for each other before each rewrites its
part, or the last to arrive rewrites the row (`rows`). `dlogits` may be `logits`, or lie over it
(`schedules.overlaps`): a row is rewritten after all of it has been read.
"""

import functools
from typing import Any, NamedTuple

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
from grpo_fast.kernels.schedules import overlaps, reading, registers_to_wait
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


class Numbers(NamedTuple):
    """The numbers that are loaded for a row besides its logits."""

    z: Any  # the scored logit
    weight: Any
    advantage: Any
    old_logp: Any  # or None
    ref_logp: Any  # or None


class Loss(NamedTuple):
    """The operands of the loss of a row, and the place where it is stored."""

    tokens: Any  # Tokens
    groups: Any  # RewardGroups
    outputs: Any  # Outputs
    scalars: Any  # Scalars
    entropy_coef: Any


class How(NamedTuple):
    """The compile-time constants of `go_on` and `finish_row`."""

    READER: Any
    WRITER: Any
    MODES: Any
    BLOCK_G: Any
    ROWS: Any
    SAME_ROWS: Any
    POLLS: Any  # `schedules.Reading.polls`


class Share(NamedTuple):
    """The part of a row that a program has read, and the parts that it writes."""

    part: Any  # which part it has read
    last: Any  # whether it was the last to arrive
    todo: Any  # which parts it writes, as bits


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
    cap,  # Cap, HighCap, or None
    MODES: tl.constexpr,  # Modes
    TILES: tl.constexpr,  # ReadTiles
    WRITE_TILE: tl.constexpr,  # Tile
    BLOCK_G: tl.constexpr,
    ROWS: tl.constexpr,
    SAME_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
    POLLS: tl.constexpr,
):
    HAS_ENTROPY: tl.constexpr = outputs.entropy is not None
    # A row of one tile has no direction, a capped one is bound by arithmetic: no spills on sm_100 this way.
    BACKWARDS: tl.constexpr = not OVERLAP and ((not TILES.SPLIT and TILES.K > 1) or cap is not None)
    HINT: tl.constexpr = FIRST_OF_TWO_SOON if POLLS > 0 else FIRST_OF_TWO
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
        HOW: tl.constexpr = How(READER, WRITER, MODES, BLOCK_G, ROWS, SAME_ROWS, POLLS)
        groups = RewardGroups(rewards_ptr, sequence_ptr, G, score_eps)
        go_on(
            row,
            drows,
            sums,
            slots=slots,
            target=target,
            part=part,
            split=split,
            arrived_ptr=meeting.arrived,
            inv_temperature=inv_temperature,
            loss=Loss(tokens, groups, outputs, scalars, entropy_coef),
            T_len=T_len,
            V=V,
            cap=cap,
            HOW=HOW,
        )
    else:
        drow = place_gradient(drows, index, T_len, row, ROWS, SAME_ROWS)
        start = part * split.columns
        write_zeros(drow, start, tl.minimum(start + split.columns, row.body), WRITE_TILE)
        if part == 0:
            if ROWS == "anywhere":
                zero_edges(drow, V)
            store_no_outputs(outputs, index)


@triton.jit
def go_on(
    row,
    drows,
    sums,
    slots,
    target,
    part,
    split,
    arrived_ptr,
    inv_temperature,
    loss,
    T_len,
    V,
    cap,
    HOW: tl.constexpr,
):
    """Finish a row, or a share of it, once all programs of the row have read their parts."""
    READER: tl.constexpr = HOW.READER
    index = slots.row
    edges = None
    numbers = None
    if HOW.POLLS > 0:
        # What another program may write over is read before that can begin. What is needed after the meeting
        # is under way before it.
        if HOW.ROWS == "anywhere":
            scale = inv_temperature * LOG2E
            edges = read_edges(row, target, V, scale, READER.HAS_ENTROPY, cap)
        z = load_scored(row.ptr, target)
        weight, advantage = load_factors(loss.tokens, index)
        old_logp = load_or(loss.tokens.old_logp, index, None)
        ref_logp = load_or(loss.tokens.ref_logp, index, None)
        numbers = Numbers(z, weight, advantage, old_logp, ref_logp)
        last, todo = meet(arrived_ptr, index, part, split.parts, HOW.POLLS)
    else:
        last = arrive(arrived_ptr, index, split.parts, READER.TILES.SPLIT)
        todo = last.to(tl.int32) if READER.TILES.SPLIT else 1
    if todo != 0:
        finish_row(
            row,
            drows,
            sums,
            edges,
            numbers,
            slots=slots,
            target=target,
            share=Share(part, last, todo),
            split=split,
            inv_temperature=inv_temperature,
            loss=loss,
            T_len=T_len,
            V=V,
            cap=cap,
            HOW=HOW,
        )


@triton.jit
def finish_row(
    row,
    drows,
    sums,
    edges,
    numbers,
    slots,
    target,
    share,
    split,
    inv_temperature,
    loss,
    T_len,
    V,
    cap,
    HOW: tl.constexpr,
):
    """Compute the loss of a row whose parts have all been read, and write its share of the gradient.

    Args:
        sums, edges, numbers: what was read before. Where programs do not wait for each other, the last two
            are None, and read here.
        share, loss, HOW: `Share`, `Loss`, `How`.
    """
    READER: tl.constexpr = HOW.READER
    WRITER: tl.constexpr = HOW.WRITER
    ROWS: tl.constexpr = HOW.ROWS
    TOGETHER: tl.constexpr = HOW.POLLS > 0
    index = slots.row
    tokens = loss.tokens
    HAS_ENTROPY: tl.constexpr = READER.HAS_ENTROPY
    if TOGETHER:
        z = numbers.z
    else:
        z = load_scored(row.ptr, target)
        if ROWS == "anywhere":
            edges = read_edges(row, target, V, inv_temperature * LOG2E, HAS_ENTROPY, cap)
    whole = whole_row(sums, slots, edges, READER=READER)
    todo = share.todo
    if TOGETHER:
        # A row that is read again: the last program does so, and then writes all of it alone.
        again = reads_again(z, whole, inv_temperature * LOG2E, cap)
        todo = tl.where(again, tl.where(share.last, -1, 0), todo)
    score = score_row(row.ptr, target, z, whole, inv_temperature, V, READER.TILES.T, cap)
    if TOGETHER:
        weight = numbers.weight
        advantage = numbers.advantage
        old_logp = numbers.old_logp
        ref_logp = numbers.ref_logp
    else:
        weight, advantage = load_factors(tokens, index)
        old_logp = load_or(tokens.old_logp, index, None)
        ref_logp = load_or(tokens.ref_logp, index, None)
    if loss.groups.rewards is not None:
        advantage = score_rewards(loss.groups, index, T_len, HOW.BLOCK_G)
    if old_logp is None:
        old_logp = score.logp
    own_score = load_or(tokens.score, index, advantage)
    importance = load_or(tokens.importance, index, 1.0)
    token = TokenValues(score.logp, old_logp, ref_logp, advantage, own_score, importance)
    dlogp, dentropy = store_loss(
        loss, share.last, index, token, weight, score.entropy, MODES=HOW.MODES
    )
    # In place, the scored logit is overwritten below, after every thread has read it.
    tl.debug_barrier()
    drow = place_gradient(drows, index, T_len, row, ROWS, HOW.SAME_ROWS)
    gradient = gradient_of_row(target, score, dlogp, dentropy, inv_temperature)
    moves = (dlogp != 0) | (dentropy != 0)
    if TOGETHER:
        write_parts(row, drow, gradient, moves, share.part, todo, split, WRITER=WRITER, cap=cap)
    elif moves:
        write_dlogits(row, drow, gradient, 0, row.body, WRITER, cap)
    else:
        write_zeros(drow, 0, row.body, WRITER.TILE)
    if ROWS == "anywhere" and share.last:
        if moves:
            write_edges(row, drow, gradient, V, WRITER, cap)
        else:
            zero_edges(drow, V)


@triton.jit
def write_parts(row, drow, gradient, moves, part, todo, split, WRITER: tl.constexpr, cap=None):
    """Write some parts of the gradient of a row, the bits of `todo`: usually `part` alone."""
    alone = todo == 1 << part
    first = tl.where(alone, part, 0)
    end = tl.where(alone, part + 1, split.parts)
    for i in range(first, end):
        start = i * split.columns
        stop = tl.minimum(start + split.columns, row.body)
        stop = tl.where((todo >> i) & 1 != 0, stop, start)
        if moves:
            write_dlogits(row, drow, gradient, start, stop, WRITER, cap)
        else:
            write_zeros(drow, start, stop, WRITER.TILE)


@triton.jit
def load_factors(tokens, row):
    """(weight, advantage) of a row; the second is 0 where sequences have rewards instead."""
    advantage = 0.0
    if tokens.advantages is not None:
        advantage = tl.load(tokens.advantages + row).to(tl.float32)
    return tl.load(tokens.weight + row), advantage


@triton.jit
def store_loss(loss, last, row, token, weight, entropy, MODES: tl.constexpr):
    """Let the last program of a row store its outputs.

    Returns (dlogp, dentropy), the derivatives of its loss.

    Args:
        loss, token: `Loss`, `TokenValues`.
    """
    outputs = loss.outputs
    HAS_ENTROPY: tl.constexpr = outputs.entropy is not None
    value, dlogp, kl, clip = token_policy_terms(token, loss.scalars, MODES)
    value, dlogp, dentropy = weigh(
        value, dlogp, entropy, weight, loss.tokens, row, loss.entropy_coef, BONUS=HAS_ENTROPY
    )
    if last:
        store_outputs(outputs, row, Outputs(value, token.logp, entropy, kl, clip))
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


def schedule_of(logits, dlogits, softcap, out):
    """How `grpo_fwd_bwd` walks over rows of logits, for the outputs `out`."""
    V = logits.shape[-1]
    # With an entropy a thread holds so much that too few programs would be resident.
    side = 4 if out.entropy is None else 1
    together = not overlaps(logits, dlogits)
    return reading(V, logits.element_size(), softcap is not None, side, together)


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
    B, T_len, _ = logits.shape
    N = B * T_len
    if out is None:
        has_ref = tokens.ref_logp is not None
        out = new_outputs(logits, return_entropy or objective.entropy_coef, has_ref)
    over = overlaps(logits, dlogits)
    plan = schedule_of(logits, dlogits, softcap, out)
    write_tile = plan.write_tile
    if over and softcap is not None:  # a longer tile forwards would spill on sm_100
        write_tile = write_tile._replace(K=min(write_tile.K, 2))
    if N:
        rows = rows_of("logits", logits)
        waiting = registers_to_wait(logits.device)
        if waiting and rows["ROWS"] == "anywhere":  # fewer would spill ten
            waiting = max(waiting, 64)
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
            **plan.arguments(out.entropy is not None, waiting),
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
