"""The gradients of the head, and the order of passes: it depends on when dloss/dlogp is known.

Logits, dH and dW take N D V multiplications each, 2 operations per multiplication:

    token       dloss/dlogp needs the token's own log-prob                        6 N D V
    known       it needs its sequence, but on policy it is known at the start     6 N D V
    late        it is known at the end; the head is frozen: (Y - P) W is scaled   4 N D V
    aligned     it needs its sequence, which is in the same chunk                 6 N D V
    two_phase   it needs all log-probs: logits are computed twice                 8 N D V
"""

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.operands import Modes
from grpo_fast.ops.coefficients import (
    Batch,
    coefficient_on_policy,
    entropy_gradient,
    values,
    with_coefficients,
)
from grpo_fast.ops.grpo import Arguments
from grpo_fast.ops.head.arguments import Needs
from grpo_fast.ops.head.chunked import Head
from grpo_fast.ops.head.passes import (
    fill_parts,
    kept_rows,
    new_statistics,
    read_all,
    read_part,
    read_with_unit_gradient,
    scatter_rows,
    select_rows,
    write_all,
    write_part,
)
from grpo_fast.ops.scaling import weigh_rows
from grpo_fast.records import Outputs, Rewards, RowStatistics, Sequences, Targets, select


class Rows(NamedTuple):
    """The rows of hidden states that take part in the gradient."""

    rows: Tensor | None  # their indices; None: all
    arguments: Arguments  # the arguments of these rows
    sequences: Sequences
    ends: list[int] | None  # boundaries of their sequences, where the host knows them

    @property
    def batch(self) -> Batch:
        """The rows as a batch, for an objective on their log-probs."""
        a = self.arguments
        return Batch(a.targets.mask, a.tokens, a.rewards, self.sequences)


def plan(
    modes: Modes,
    known: bool,
    needs: Needs,
    ends: list[int] | None,
    limit: int,
    shared: bool = False,
) -> str:
    """Choose one of the ways in the module docstring.

    Args:
        known: whether the surrogate's coefficients are known before the log-probs.
        ends: boundaries of the sequences, where the host knows them.
        limit: how many rows of logits may exist at a time.
        shared: whether other processes have a part of the vocabulary.
    """
    if modes.by_token:
        return "token"
    if known:
        return "known"
    if not (needs.parameters or modes.has_bonus or shared):
        return "late"
    whole = not modes.by_entropy  # otherwise tokens of all sequences decide
    if whole and ends is not None and all(j - i <= limit for i, j in itertools.pairwise(ends)):
        return "aligned"
    return "two_phase"


def rows_that_take_part(
    a: Arguments, sequences: Sequences, keep: Tensor | None, hidden: Tensor, by_sequence: bool
) -> Rows:
    """Gather the arguments of the rows that take part.

    Args:
        keep: (N,) bool, on any device: the rows that take part; None for all.
        by_sequence: whether the objective looks at sequences: then their boundaries change with the
            rows.
    """
    if keep is not None:  # `keep` holds no masked row
        a = a._replace(targets=a.targets._replace(mask=None))
    if not by_sequence:
        rows = kept_rows(keep, hidden)
        if rows is None:
            return Rows(None, a, sequences, None)
        share = None if sequences.share is None else sequences.share[rows]
        return Rows(rows, select_rows(a, rows), sequences._replace(share=share), None)
    if keep is None:
        ends = None
        if sequences.boundaries is None:  # every T_len tokens are a sequence
            ends = list(range(0, len(a.targets.ids) + 1, max(sequences.T_len, 1)))
        return Rows(None, a, sequences, ends)
    N, given = len(keep), sequences.boundaries
    if given is None:
        given = torch.arange(0, N + 1, max(sequences.T_len, 1), device=hidden.device)
    counts = torch.nn.functional.pad(keep.to(hidden.device).cumsum(0), (1, 0))
    boundaries = counts[given]
    ends = boundaries.tolist()  # the only sync: the sizes below are known then
    if ends[-1] == N:  # nothing to gather
        return Rows(None, a, sequences, ends)
    order = torch.argsort((~keep).to(torch.uint8), stable=True).to(hidden.device)
    rows = order[: ends[-1]]
    log_importance, share = sequences.log_importance, sequences.share
    if log_importance is not None:
        log_importance = _at_first(log_importance, given, boundaries, ends[-1])
    kept = Sequences(boundaries, 0, None if share is None else share[rows], log_importance)
    return Rows(rows, select_rows(a, rows), kept, ends)


def _at_first(x: Tensor, given: Tensor, boundaries: Tensor, n: int) -> Tensor:
    """Return the sum of x over each sequence, at its first token that takes part; else 0; (n,)."""
    total = torch.segment_reduce(x.double(), "sum", offsets=given.to(x.device)).to(x.dtype)
    first = torch.where(boundaries.diff() > 0, boundaries[:-1], n)  # n: a place that is cut off
    return x.new_zeros(n + 1).scatter_(0, first, total)[:n]


# A function that returns (dloss/dlogp, dloss/dentropy or None) of some rows from their log-probs
# and entropies.
Coefficients = Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def by_chunk(
    head: Head,
    targets: Targets,
    parts: Iterable[slice],
    coefficients: Coefficients,
    with_entropy: bool,
) -> RowStatistics:
    """Compute gradients where the coefficients of a chunk depend on nothing outside of it."""
    found = new_statistics(head, with_entropy)
    for part in parts:
        logits, dlogits = head.logits(part)
        these = select(targets, part)
        statistics = read_part(head, part, logits, these, with_entropy, found)
        dlogp, dentropy = coefficients(part, statistics.logp, statistics.entropy)
        write_part(head, dlogp, dentropy, logits, these, statistics, dlogits)
        head.backward(part)
    return found


def by_shared_token(head: Head, a: Arguments, c: Tensor | None) -> RowStatistics:
    """Compute the gradients of `fill_parts` where processes share the vocabulary.

    Coefficients need the statistics of all processes, so the logits of a chunk are read before its
    gradient is written.

    Args:
        c: the surrogate's part of dloss/dlogp, where that is known.
    """
    tokens, terms = a.tokens, a.terms
    if c is not None:
        tokens, terms = with_coefficients(tokens, c, terms)

    def coefficients(part: slice, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        these = select(tokens, part)
        mask = None if a.targets.mask is None else a.targets.mask[part]
        found = values(logp, entropy, Batch(mask, these, Rewards(), Sequences()), terms)
        dlogp = found.dlogp if c is None else found.dlogp + c[part]
        return dlogp, entropy_gradient(these, terms, found)

    return by_chunk(head, a.targets, head.parts(), coefficients, a.with_entropy)


def by_sequence(head: Head, a: Arguments, sequences: Sequences, ends: list[int]) -> RowStatistics:
    """Compute gradients where each chunk holds whole sequences, as many as fit."""
    runs = {ends[i]: (i, j) for i, j in sequences_together(ends, head.C)}

    def coefficients(part: slice, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        first, last = runs[part.start]
        boundaries = sequences.boundaries
        if boundaries is not None:
            boundaries = boundaries[first : last + 1] - ends[first]
        mine = select(sequences._replace(boundaries=None), part)._replace(boundaries=boundaries)
        these = select_rows(a, part)
        batch = Batch(these.targets.mask, these.tokens, Rewards(), mine)
        found = values(logp, entropy, batch, a.terms)
        return found.dlogp, entropy_gradient(these.tokens, a.terms, found)

    parts = (slice(ends[i], ends[j]) for i, j in runs.values())
    return by_chunk(head, a.targets, parts, coefficients, a.with_entropy)


def sequences_together(ends: list[int], C: int) -> list[tuple[int, int]]:
    """Return runs [first, last) of sequences with at most C tokens together and at least one token."""
    runs, first = [], 0
    for i in range(len(ends) - 1):
        if ends[i + 1] - ends[first] > C:
            runs.append((first, i))
            first = i
    runs.append((first, len(ends) - 1))
    return [(i, j) for i, j in runs if ends[j] > ends[i]]


def by_phases(way: str, head: Head, given: Rows) -> Outputs:
    """Compute the gradients of rows by one of the ways that `plan` chooses."""
    a, batch, terms = given.arguments, given.batch, given.arguments.terms
    c = coefficient_on_policy(batch, terms) if way == "known" else None
    statistics: RowStatistics | Outputs
    if head.shard and way in ("token", "known"):
        statistics = by_shared_token(head, a, c)
    elif c is not None:
        tokens, rest = with_coefficients(a.tokens, c, terms)
        statistics = fill_parts(head, a._replace(tokens=tokens, terms=rest))
    elif way == "aligned":
        assert given.ends is not None
        statistics = by_sequence(head, a, given.sequences, given.ends)
    elif way == "two_phase":
        statistics = read_all(head, a.targets, a.with_entropy)
    if way == "late":
        logp, entropy = read_with_unit_gradient(head, a.targets, a.with_entropy)
    else:
        logp, entropy = statistics.logp, statistics.entropy
    found = values(logp, entropy, batch, terms)
    if way == "late":
        c = scatter_rows(found.dlogp, head.rows, len(head.hidden))
        head.dhidden = weigh_rows(head.hidden_gradient(), c)
    elif way == "two_phase":
        dentropy = entropy_gradient(a.tokens, terms, found)
        assert isinstance(statistics, RowStatistics)
        write_all(head, a.targets, found.dlogp, dentropy, statistics)
    return Outputs(found.loss, logp, entropy, found.kl, found.clip)
