"""The GRPO loss of logits and its gradient: the twin of `kernels/grpo.py`."""

import functools

import torch
from torch import Tensor

from grpo_fast.objective import Objective
from grpo_fast.records import (
    Z_SCORE,
    Grouping,
    Outputs,
    Rewards,
    RowStatistics,
    SoftCap,
    Targets,
    Tokens,
)
from grpo_fast.sequences import spread
from grpo_fast.torch_kernels.group_advantage import group_advantage_fwd
from grpo_fast.torch_kernels.rows import (
    Block,
    live_rows,
    read_block,
    row_blocks,
    row_scale,
    schedule,
    write_block,
)
from grpo_fast.torch_kernels.terms import token_policy_terms, weigh


def schedule_of(logits: Tensor, dlogits: Tensor, softcap: SoftCap | None, out: Outputs) -> str:
    """Say how `grpo_fwd_bwd` walks over rows of logits."""
    return schedule(logits)


def grpo_fwd_bwd(
    logits: Tensor,
    targets: Targets,
    tokens: Tokens,
    rewards: Rewards,
    return_entropy: bool,
    objective: Objective,
    dlogits: Tensor,
    softcap: SoftCap | None = None,
    out: Outputs | None = None,
    arrived: Tensor | None = None,
) -> Outputs:
    """Write the gradient into `dlogits`, (B, T, V), which may be `logits`; return the other results.

    Args:
        return_entropy: whether to compute the entropy; needed where the objective has a bonus.
        out: the vectors to write; None: they are made here.
    """
    if rewards.values is not None:
        grouping = Grouping(rewards.group_size, None)
        score = group_advantage_fwd(rewards.values, grouping, Z_SCORE)
        advantages = spread(score, logits.shape[:2], rewards.sequence)
        tokens = tokens._replace(advantages=advantages)
    if out is None:
        N = targets.ids.numel()
        new = functools.partial(tokens.weight.new_empty, N)
        entropy = new() if return_entropy else None
        kl = None if tokens.ref_logp is None else new()
        out = Outputs(new(), new(), entropy, kl, new(dtype=torch.int8))
    for x in out:
        if x is not None:
            x.zero_()  # masked tokens keep these values
    for rows, (block, dblock) in row_blocks(logits, dlogits):
        live = live_rows(targets.mask, rows)
        where = rows if live is None else live + rows.start
        z = block if live is None else block[live]
        read = Block(z, targets.ids[where].long(), row_scale(targets, where), softcap)
        work = dblock if live is None and dblock.dtype == torch.float32 else None
        statistics, kept = read_block(read, return_entropy, work)
        mine = Tokens(*(None if x is None else x[where] for x in tokens))  # type: ignore[arg-type]
        dlogp, dentropy = _coefficients(mine, statistics, objective, out, where)
        write_block(read, dlogp, dentropy, statistics, dblock, live, kept)
    return out


def _coefficients(
    tokens: Tokens,
    statistics: RowStatistics,
    objective: Objective,
    out: Outputs,
    where: slice | Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Write the losses of some tokens into `out`; return dloss/dlogp and dloss/dentropy."""
    found = token_policy_terms(statistics.logp, tokens, objective)
    weight = tokens.weight
    loss, dlogp, dentropy = weigh(weight, found.loss), weigh(weight, found.dlogp), None
    if tokens.coefficient is not None:
        dlogp += tokens.coefficient
    if statistics.entropy is not None:
        if objective.entropy_coef:
            by_entropy = weight if tokens.entropy_weight is None else tokens.entropy_weight
            dentropy = -objective.entropy_coef * by_entropy
            loss += weigh(dentropy, statistics.entropy)
        out.entropy[where] = statistics.entropy
    out.loss[where], out.logp[where], out.clip[where] = loss, statistics.logp, found.clip
    if found.kl is not None:
        out.kl[where] = found.kl
    return dlogp, dentropy
