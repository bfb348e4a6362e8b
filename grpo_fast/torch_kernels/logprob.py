"""Log-probs and entropies of rows of logits, and their gradient: the twin of `kernels/logprob.py`."""

import functools

import torch
from torch import Tensor

from grpo_fast.records import RowStatistics, SoftCap, Targets
from grpo_fast.torch_kernels.rows import (
    Block,
    live_rows,
    read_block,
    row_blocks,
    row_scale,
    schedule,
    write_block,
)


def schedule_of(logits: Tensor, softcap: SoftCap | None = None) -> str:
    """Say how `logprob_fwd` walks over rows of logits."""
    return schedule(logits)


def logprob_fwd(
    logits: Tensor,
    targets: Targets,
    with_entropy: bool,
    softcap: SoftCap | None = None,
    out: RowStatistics | None = None,
    arrived: Tensor | None = None,
) -> RowStatistics:
    """Compute log-probs, entropies (None unless wanted) and the statistics that the gradient needs.

    Args:
        logits: (B, T, V), B T = N.
        out: the vectors to write; None: they are made here.
    """
    ids, mask = targets.ids, targets.mask
    if out is None:
        N = ids.numel()
        zeros = functools.partial(logits.new_zeros, N, dtype=torch.float32)
        ones = logits.new_ones(N, dtype=torch.float32)
        out = RowStatistics(zeros(), zeros() if with_entropy else None, zeros(), ones)
    else:
        for x, default in zip(out, (0, 0, 0, 1), strict=True):
            if x is not None:
                x.fill_(default)  # the values of rows that do not count
    for rows, (block,) in row_blocks(logits, at_once=mask is None):
        live = live_rows(mask, rows)
        z = block if live is None else block[live]
        where = rows if live is None else live + rows.start
        read = Block(z, ids[where].long(), row_scale(targets, where), softcap)
        found, _ = read_block(read, with_entropy)
        out.logp[where], out.top[where], out.total[where] = found.logp, found.top, found.total
        if with_entropy:
            out.entropy[where] = found.entropy
    return out if with_entropy else out._replace(entropy=None)


def logprob_bwd(
    dlogp: Tensor,
    dentropy: Tensor | None,
    logits: Tensor,
    targets: Targets,
    statistics: RowStatistics,
    dlogits: Tensor,
    softcap: SoftCap | None = None,
) -> None:
    """Write the gradient of logits (B, T, V) into `dlogits`, which may be `logits`.

    Args:
        targets: an id of -1 says that no column of this row is scored.
        statistics: what `logprob_fwd` returned.
    """
    for rows, (block, dblock) in row_blocks(logits, dlogits, at_once=targets.mask is None):
        live = live_rows(targets.mask, rows)
        where = rows if live is None else live + rows.start
        z = block if live is None else block[live]
        with_entropy = dentropy is not None
        of_rows = RowStatistics(
            statistics.logp[where],
            statistics.entropy[where] if with_entropy else None,
            statistics.top[where],
            statistics.total[where],
        )
        of_logits = Block(z, targets.ids[where].long(), row_scale(targets, where), softcap)
        dh = None if dentropy is None else dentropy[where]
        write_block(of_logits, dlogp[where], dh, of_rows, dblock, live)


def unit_of_tops(inv_temperature: Tensor, total: Tensor) -> Tensor:
    """Return the unit, in nats, of the maxima `top` that `logprob_fwd` returns.

    Args:
        inv_temperature: (N,).
        total: (..., N), what `logprob_fwd` returned.
    """
    return inv_temperature
