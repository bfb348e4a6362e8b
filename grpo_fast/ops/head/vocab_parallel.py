"""Rows of logits whose vocabulary is spread over processes: each process holds consecutive columns.

Each process reads its own columns (`read_rows`). One all-gather of four numbers per row collects
the statistics of all processes. Every process combines them in the order of the processes, so that
all get the same bits. With these, each process writes the gradient of its own columns
(`write_rows`).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_fast.ops.backend import run
from grpo_fast.ops.logprob import read_rows
from grpo_fast.records import RowStatistics, SoftCap, Targets

# PyTorch 2.13 renamed it, and warns about the old name.
gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
LOWEST = -3.0e38  # the maximum where there are no columns; finite, as in kernels/tiles.py
NOBODY = 1.0  # in place of a log-prob where another process has the id; log-probs are <= 0


class Shard(NamedTuple):
    """The columns that this process has, and the group that has the others."""

    group: dist.ProcessGroup
    first: int

    @staticmethod
    def of(name: str, first: int) -> "Shard":
        """Return the shard for `ProcessGroup.group_name`, which an operator's schema can carry."""
        return Shard(dist.distributed_c10d._resolve_process_group(name), first)  # type: ignore[arg-type]

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of x over the processes, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def local(self, ids: Tensor, columns: int) -> Tensor:
        """Return the column of each id in this process, -1 where another process has it."""
        column = ids - self.first
        return torch.where((column >= 0) & (column < columns), column, -1)


def rows_of_all(rows: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """Return how many rows of the head each process has.

    In a compiled graph all must have as many as this one.
    """
    if torch.compiler.is_compiling():
        return [rows] * group.size()
    mine = torch.tensor([rows], device=device)
    found = torch.empty(group.size(), dtype=mine.dtype, device=device)
    gather(found, mine, group=group)
    return found.tolist()


def read_shared_rows(
    logits: Tensor,
    targets: Targets,
    with_entropy: bool,
    softcap: SoftCap | None,
    shard: Shard,
) -> RowStatistics:
    """Compute `read_rows` over the whole vocabulary from this process's columns, `logits` (1, n, columns).

    Args:
        targets: the ids are those of the whole vocabulary.
    """
    n, columns = logits.shape[1:]
    column = shard.local(targets.ids, columns)
    mine = column >= 0
    if columns:
        here = targets._replace(ids=column.clamp(min=0))
        logp, entropy, top, total = read_rows(logits, here, with_entropy, softcap)
    else:
        logp, entropy, total = (logits.new_zeros(n, dtype=torch.float32) for _ in range(3))
        top = torch.full_like(logp, LOWEST)
    logp = logp.masked_fill(total == 0, -torch.inf)  # all columns of this process are -inf
    own = [top, total, entropy if with_entropy else top, torch.where(mine, logp, NOBODY)]
    gathered = logp.new_empty(shard.group.size(), n, 4)
    gather(gathered.view(-1, 4), torch.stack(own, 1), group=shard.group)
    if targets.temperature is None:
        rate = torch.full_like(top, targets.inv_temperature.item())
    else:
        rate = 1 / targets.temperature
    unit = run("logprob.unit_of_tops", logits, rate, gathered[:, :, 1])
    found = combine(gathered, unit, with_entropy)
    if targets.mask is not None:  # a masked id may be anything: perhaps no process has it
        found = found._replace(logp=torch.where(targets.mask, found.logp, 0))
    return found


def combine(gathered: Tensor, unit: Tensor, with_entropy: bool) -> RowStatistics:
    """Combine the statistics of the processes' columns into those of whole rows.

    Args:
        gathered: (processes, n, 4): the maximum of each process's columns, the sum of exponentials
            relative to it, the entropy, and the log-prob of the scored token, which is > 0 where
            another process has it. The kernels use the sign of the sum to say what its maximum is
            of. The sum of the row keeps that sign.
        unit: the unit of the maxima, in nats; (n,) or (processes, n).
    """
    tops, signed, entropies, logps = gathered.unbind(2)
    totals = signed.abs()
    # In float64 the product with the unit does not overflow.
    heights = (tops.double() * unit).masked_fill(totals == 0, -torch.inf)
    highest, owner_of_top = heights.max(0, keepdim=True)
    below = (heights - highest).float()
    share = totals * below.exp()
    # The sum of the other processes' shares is added up on its own, so that it stays exact for a
    # confident token.
    apart = ~torch.eye(len(share), dtype=torch.bool, device=share.device)
    others = torch.where(apart[:, :, None], share[None], 0).sum(1)
    total = share.sum(0)
    log_share = torch.where(
        others < share, -(others / share).log1p(), below + totals.log() - total.log()
    )
    owner = logps <= 0
    logp = torch.where(owner, logps + log_share, 0).sum(0).clamp(max=0)
    logp = logp.masked_fill(~owner.any(0), torch.nan)  # the id is outside the vocabulary
    entropy = logp.new_empty(0)
    if with_entropy:
        part = share / total * (entropies - log_share)
        entropy = torch.where(share > 0, part, 0).sum(0)
    top, sign = (x.gather(0, owner_of_top).squeeze(0) for x in (tops, signed))
    return RowStatistics(logp, entropy, top, torch.where(sign < 0, -total, total))
