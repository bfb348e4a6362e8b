"""Hidden states to the GRPO loss and its gradients, logits never held as a whole.

The language-model head runs in chunks of tokens (`grpo_fast.ops._head`). Kernels: `grpo_fast.kernels.grpo`
turns each chunk of logits into its gradient in place, `grpo_fast.kernels.linear_grpo` applies the upstream
gradient.

How often the logits are computed depends on when the coefficients dL/dlogp are known (`plan`), N D V
multiplications each for logits, dH and dW, 2 operations per multiplication:

    token       of a token alone: as soon as its log-prob is          6 N D V
    known       of its sequence, but on policy: before any log-prob   6 N D V
    late        after all, the head frozen: rows of (Y - P) W scaled  4 N D V
    aligned     of its sequence: as soon as the chunk it is in is     6 N D V
    two_phase   after all log-probs                                   8 N D V
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast._operands import Modes, Terms
from grpo_fast.ops import _phases
from grpo_fast.ops._autograd import without_graph
from grpo_fast.ops._backend import launch, use_triton
from grpo_fast.ops._chunks import (
    Scores,
    Statistics,
    at,
    fill_parts,
    kept_rows,
    lifted,
    new_statistics,
    read_all,
    read_part,
    read_with_unit_gradient,
    scaled,
    select,
    slice_arguments,
    spread_rows,
    write_all,
    write_part,
)
from grpo_fast.ops._head import Head, early_dtype, row_limit, working_dtypes
from grpo_fast.ops._head_arguments import (
    OPTIONS,
    PARAMETERS,
    Needs,
    Options,
    Parameters,
    sorted_into,
)
from grpo_fast.ops._tokens import Sequences, Tokens
from grpo_fast.ops.grpo import ARGUMENTS, Arguments, Outputs, new_outputs
from grpo_fast.ops.linear_logprob import empty_gradients, weigh_rows

USED_TWICE = (
    "linear_grpo_loss: backward ran a second time. The gradients are computed once, in the forward, and "
    "handed over by the first backward; compute the loss again for a second one."
)


class Call(NamedTuple):
    """The arguments of the operator, sorted."""

    parameters: Parameters
    tokens: Arguments
    keep: Tensor | None  # (N,) bool, on any device: the rows that take part; None for all
    sequences: Sequences
    options: Options
    needs: Needs
    dw_out: Tensor | None


def sort(arguments: tuple) -> Call:
    """The operator's flat arguments after `hidden`."""
    kinds = (Parameters, Arguments, None, Sequences, Options, None, None)
    found = Call(*sorted_into(arguments, *kinds))
    return found._replace(needs=Needs(*found.needs))


def plan(
    modes: Modes,
    known: bool,
    needs: Needs,
    ends: list[int] | None,
    limit: int,
    shared: bool = False,
) -> str:
    """Which of the ways in the module docstring.

    Args:
        known: whether the surrogate's coefficients are known beforehand.
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
    whole = not modes.by_entropy  # or tokens of all sequences decide
    if whole and ends is not None and all(j - i <= limit for i, j in itertools.pairwise(ends)):
        return "aligned"
    return "two_phase"


def compacted(
    call: Call, hidden: Tensor, by_sequence: bool
) -> tuple[Tensor | None, Arguments, Sequences, list[int] | None]:
    """(rows that take part or None, their arguments, their sequences, the boundaries on the host or None)."""
    a, sequences, keep = call.tokens, call.sequences, call.keep
    if keep is not None:  # nothing masked is kept
        a = a._replace(mask=None)
    if not by_sequence:
        rows = kept_rows(keep, hidden)
        if rows is None:
            return None, a, sequences, None
        sequences = sequences._replace(share=at(sequences.share, rows))
        return rows, slice_arguments(a, rows), sequences, None
    if keep is None:
        ends = None
        if sequences.boundaries is None:  # every T_len tokens are one
            ends = list(range(0, len(a.ids) + 1, max(sequences.T_len, 1)))
        return None, a, sequences, ends
    N, given = len(keep), sequences.boundaries
    if given is None:
        given = torch.arange(0, N + 1, max(sequences.T_len, 1), device=hidden.device)
    counts = torch.nn.functional.pad(keep.to(hidden.device).cumsum(0), (1, 0))
    boundaries = counts[given]
    ends = boundaries.tolist()  # the one sync: what follows knows its size
    if ends[-1] == N:  # nothing to gather
        return None, a, sequences, ends
    order = torch.argsort((~keep).to(torch.uint8), stable=True).to(hidden.device)
    rows = order[: ends[-1]]
    log_importance, share = sequences.log_importance, at(sequences.share, rows)
    if log_importance is not None:
        log_importance = _at_first(log_importance, given, boundaries, ends[-1])
    return rows, slice_arguments(a, rows), Sequences(log_importance, share, boundaries, 0), ends


def _at_first(x: Tensor, given: Tensor, boundaries: Tensor, n: int) -> Tensor:
    """The sum of x over each sequence, at the first of its tokens that take part; 0 at the others, (n,)."""
    total = torch.segment_reduce(x.double(), "sum", offsets=given.to(x.device)).to(x.dtype)
    first = torch.where(boundaries.diff() > 0, boundaries[:-1], n)  # n: nobody's
    return x.new_zeros(n + 1).scatter_(0, first, total)[:n]


def as_tokens(a: Arguments) -> Tokens:
    """The arguments as the objective on log-probs takes them."""
    return Tokens(*(getattr(a, name) for name in Tokens._fields))


def with_coefficients(a: Arguments, c: Tensor, tokens: Tokens, terms: Terms) -> Arguments:
    """What is left to find out where the surrogate's coefficients are known: KL and entropy bonus."""
    rest, without = _phases.without_surrogate(tokens, terms)
    return a._replace(**rest._asdict(), coefficient=c, modes=without.modes.key)


def _entropy_gradient(tokens: Tokens, terms: Terms, found: _phases.Values) -> Tensor | None:
    if not terms.modes.has_bonus:
        return None
    weight = tokens.weight if found.entropy_weight is None else found.entropy_weight
    return -terms.number("entropy_coef") * weight


def slice_tokens(tokens: Tokens, rows: slice) -> Tokens:
    """The arguments of some rows; all tensors in `tokens` are per token."""
    of_rows: list[Any] = [x[rows] if isinstance(x, Tensor) else x for x in tokens]
    return Tokens(*of_rows)


def by_chunk(
    head: Head,
    scores: Scores,
    parts: Iterable[slice],
    coefficients: Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor | None]],
    with_entropy: bool,
) -> Statistics:
    """Gradients where those of a chunk depend on nothing else.

    Args:
        coefficients: (dL/dlogp, dL/dentropy or None) from the rows, their log-probs and entropies.
    """
    found = new_statistics(head, with_entropy)
    for part in parts:
        logits, dlogits = head.logits(part)
        these = select(scores, part)
        statistics = read_part(head, part, logits, these, with_entropy, found)
        dlogp, dentropy = coefficients(part, statistics.logp, statistics.entropy)
        write_part(head, dlogp, dentropy, logits, these, statistics, dlogits)
        head.backward(part)
    return found


def by_shared_token(
    head: Head,
    scores: Scores,
    tokens: Tokens,
    c: Tensor | None,
    with_entropy: bool,
    terms: Terms,
) -> Statistics:
    """`fill_parts` where the vocabulary is shared: statistics meet before the coefficients are known.

    c: what dL/dlogp owes to the surrogate, where that is known.
    """
    if c is not None:
        tokens, terms = _phases.without_surrogate(tokens, terms)

    def coefficients(part: slice, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        these = slice_tokens(tokens, part)
        found = _phases.values(logp, entropy, these, Sequences(None, None, None, 0), terms)
        dlogp = found.dlogp if c is None else found.dlogp + c[part]
        return dlogp, _entropy_gradient(these, terms, found)

    return by_chunk(head, scores, head.parts(), coefficients, with_entropy)


def by_sequence(
    head: Head,
    scores: Scores,
    tokens: Tokens,
    sequences: Sequences,
    ends: list[int],
    with_entropy: bool,
    terms: Terms,
) -> Statistics:
    """Gradients where each chunk holds whole sequences, as many as fit."""
    runs = {ends[i]: (i, j) for i, j in _together(ends, head.C)}

    def coefficients(part: slice, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        first, last = runs[part.start]
        boundaries = sequences.boundaries
        if boundaries is not None:
            boundaries = boundaries[first : last + 1] - ends[first]
        mine = sequences._replace(
            log_importance=at(sequences.log_importance, part),
            share=at(sequences.share, part),
            boundaries=boundaries,
        )
        these = slice_tokens(tokens, part)
        found = _phases.values(logp, entropy, these, mine, terms)
        return found.dlogp, _entropy_gradient(these, terms, found)

    parts = (slice(ends[i], ends[j]) for i, j in runs.values())
    return by_chunk(head, scores, parts, coefficients, with_entropy)


def _together(ends: list[int], C: int) -> list[tuple[int, int]]:
    """Runs [first, last) of sequences with at most C tokens, at least one token each."""
    runs, first = [], 0
    for i in range(len(ends) - 1):
        if ends[i + 1] - ends[first] > C:
            runs.append((first, i))
            first = i
    runs.append((first, len(ends) - 1))
    return [(i, j) for i, j in runs if ends[j] > ends[i]]


def _forward(hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The loss, `Outputs` of every token, and the gradients in the order of `Needs`."""
    call = sort(arguments)
    options, needs = call.options, call.needs
    terms = Terms(Modes.of(call.tokens.modes), call.tokens.numbers)
    modes = terms.modes
    rows, a, sequences, ends = compacted(call, hidden, modes.needs_sequences)
    scores = scaled(Scores(a.ids, a.mask, a.temperature, a.inv_temperature), options)
    a = a._replace(temperature=scores.temperature, inv_temperature=scores.inv_temperature)
    lift = None
    if working_dtypes(hidden, options)[0] == torch.float16:
        a, lift = lifted(a)
    limit = row_limit(hidden, options)
    known = not modes.by_token and _phases.known_on_policy(a.old_logp, modes)
    way = plan(modes, known, needs, ends, limit, bool(options.tp_group))
    length = 0
    if way == "aligned" and ends is not None:
        length = max((ends[j] - ends[i] for i, j in _together(ends, limit)), default=1)
    head = Head(hidden, call.parameters, options, rows, a.mask, needs, length, early=True)
    if way == "token" and not head.shard:
        out = fill_parts(head, a)
    else:
        out = _by_phases(way, head, scores, a, sequences, ends, terms)
    gradients = head.gradients()
    if lift is not None:
        out = out._replace(loss=out.loss / lift)
        for x in gradients:
            x /= lift
    N = len(hidden)
    optional = {"entropy": a.return_entropy, "kl": a.ref_logp is not None}
    outputs = [
        spread_rows(x, rows, N, computed=optional.get(name, True))
        for name, x in out._asdict().items()
    ]
    return (out.loss.sum(), *outputs, *gradients)


def _by_phases(
    way: str,
    head: Head,
    scores: Scores,
    a: Arguments,
    sequences: Sequences,
    ends: list[int] | None,
    terms: Terms,
) -> Outputs:
    """Gradients of the rows that take part, their coefficients depending on other rows."""
    tokens = as_tokens(a)
    with_entropy = a.return_entropy
    c = None
    if way == "known":
        c = _phases.coefficient_on_policy(tokens, sequences, terms)
    if head.shard and way in ("token", "known"):
        statistics = by_shared_token(head, scores, tokens, c, with_entropy, terms)
        logp, entropy = statistics.logp, statistics.entropy
    elif c is not None:
        out = fill_parts(head, with_coefficients(a, c, tokens, terms))
        logp, entropy = out.logp, out.entropy
    elif way == "late":
        logp, entropy = read_with_unit_gradient(head, scores, with_entropy)
    elif way == "aligned":
        assert ends is not None
        statistics = by_sequence(head, scores, tokens, sequences, ends, with_entropy, terms)
        logp, entropy = statistics.logp, statistics.entropy
    else:
        statistics = read_all(head, scores, with_entropy)
        logp, entropy = statistics.logp, statistics.entropy
    found = _phases.values(logp, entropy, tokens, sequences, terms)
    if way == "late":
        c = spread_rows(found.dlogp, head.rows, len(head.hidden))
        head.dhidden = weigh_rows(head.hidden_gradient(), c)
    elif way == "two_phase":
        dentropy = _entropy_gradient(tokens, terms, found)
        write_all(head, scores, found.dlogp, dentropy, statistics)
    return Outputs(found.loss, logp, entropy, found.kl, found.clip)


linear_grpo = torch.library.custom_op(
    "grpo_fast::linear_grpo",
    _forward,
    mutates_args=(),
    schema=f"(Tensor hidden, {PARAMETERS}, {ARGUMENTS}, Tensor? keep, Tensor? log_importance, "
    f"Tensor? share, Tensor? boundaries, SymInt T_len, {OPTIONS}, bool[] needs, Tensor? dw_out) -> "
    f"({', '.join(['Tensor'] * 11)})",
)


@linear_grpo.register_fake
def _(hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = sort(arguments)
    a = call.tokens
    outputs = new_outputs(a)
    gradients = empty_gradients(hidden, call.parameters, call.needs, early_dtype(hidden))
    return (a.weight.new_empty(()), *outputs, *gradients)


@torch.library.custom_op("grpo_fast::scale_", mutates_args=("x",))
def scale_(x: Tensor, factor: Tensor) -> None:
    """`x *= factor`, a 0-dim tensor; nothing is touched if it is 1. x is contiguous."""
    if use_triton(x):
        from grpo_fast.kernels import linear_grpo as kernels

        launch(kernels.scale, x, x, factor, x)
    elif bool(factor != 1):
        x.copy_(torch.where(x == 0, 0, x * factor))


@torch.library.custom_op("grpo_fast::scaled_to", mutates_args=())
def scaled_to(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`(x * factor).to(dtype)`, in one read and one write. x is contiguous."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if use_triton(x):
        from grpo_fast.kernels import linear_grpo as kernels

        launch(kernels.scale, x, x, factor, y)
        return y
    return y.copy_(torch.where(x == 0, 0, x * factor))


@scaled_to.register_fake
def _(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    call = sort(inputs[1:])
    ctx.inputs, ctx.used = len(inputs), False
    ctx.dtypes = [None if x is None else x.dtype for x in (inputs[0], *call.parameters)]
    ctx.given = list(call.needs)
    # Saved, not kept aside: under activation checkpointing they are dropped and computed again.
    ctx.save_for_backward(*output[6:])
    # Not saved: other backwards add to it before this one does, which is what it is for.
    ctx.dw_out = call.dw_out
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@without_graph("linear_grpo_loss")
def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple:
    none = (None,) * ctx.inputs
    if dloss is None:
        return none
    if ctx.used:
        raise RuntimeError(USED_TWICE)
    ctx.used = True
    factor = dloss.float()
    result: list[Tensor | None] = []
    saved = zip(ctx.saved_tensors, ctx.dtypes, ctx.given, strict=True)
    for i, (x, dtype, wanted) in enumerate(saved):
        if not wanted or dtype is None:
            result.append(None)
        elif i == 1 and ctx.dw_out is not None:
            scale_(x, factor)  # not `addcmul_`: 0 stays 0 under a factor of inf, as below
            ctx.dw_out.add_(x)
            result.append(None)
        elif x.dtype == dtype:
            scale_(x, factor)
            result.append(x)
        else:
            result.append(scaled_to(x, factor, dtype))
    return (*result, *none[5:])


linear_grpo.register_autograd(_backward, setup_context=_setup_context)
