"""The GRPO loss of hidden states and its gradients, as an operator; the logits never exist as a whole.

The language-model head runs in chunks of tokens (`grpo_fast.ops.head`). Each chunk of logits is
turned into its gradient in place. `grpo_fast.ops.head.gradients` says how often the logits are
computed.
"""

from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from grpo_fast.notices import logged, note
from grpo_fast.operands import Terms
from grpo_fast.ops.autograd import without_graph
from grpo_fast.ops.coefficients import coefficients_known
from grpo_fast.ops.grpo import Arguments, new_outputs
from grpo_fast.ops.head.arguments import Needs, Options, Parameters
from grpo_fast.ops.head.chunk_length import row_limit
from grpo_fast.ops.head.chunked import Head
from grpo_fast.ops.head.gradients import by_phases, plan, rows_that_take_part, sequences_together
from grpo_fast.ops.head.passes import (
    empty_gradients,
    fill_parts,
    lifted,
    scaled,
    scatter_rows,
)
from grpo_fast.ops.head.products import early_dtype, working_dtypes
from grpo_fast.ops.operator import operator
from grpo_fast.ops.scaling import scale_, scaled_to
from grpo_fast.records import Rewards, Sequences, Targets, Tokens

USED_TWICE = (
    "linear_grpo_loss: backward ran a second time. The gradients are computed once, in the forward, and "
    "handed over by the first backward; compute the loss again for a second one."
)


class LinearArguments(NamedTuple):
    """The arguments of the operator after the hidden states."""

    parameters: Parameters
    targets: Targets
    tokens: Tokens
    with_entropy: bool
    terms: Terms
    keep: Tensor | None  # (N,) bool, on any device: the rows that take part; None for all
    sequences: Sequences
    options: Options
    needs: Needs
    dw_out: Tensor | None

    @property
    def arguments(self) -> Arguments:
        """The arguments of the operator on logits."""
        return Arguments(self.targets, self.tokens, Rewards(), self.with_entropy, self.terms)


KINDS = {"hidden": Tensor, **get_type_hints(LinearArguments)}


@logged("operator linear_grpo", inner=True)
def _forward(hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the loss, `Outputs` of every token, and the gradients in the order of `Needs`."""
    call = LinearArguments(*arguments)
    options, needs, modes = call.options, call.needs, call.terms.modes
    given = rows_that_take_part(
        call.arguments, call.sequences, call.keep, hidden, modes.needs_sequences
    )
    a = given.arguments
    a, lift = a._replace(targets=scaled(a.targets, options)), None
    if working_dtypes(hidden, options)[0] == torch.float16:
        tokens, lift = lifted(a.tokens)
        a = a._replace(tokens=tokens)
    given, ends = given._replace(arguments=a), given.ends
    limit = row_limit(hidden, options)
    known = not modes.by_token and coefficients_known(a.tokens.old_logp, modes)
    way = plan(modes, known, needs, ends, limit, bool(options.tp_group))
    note(f"gradients: {way}")
    length = 0
    if way == "aligned" and ends is not None:
        length = max((ends[j] - ends[i] for i, j in sequences_together(ends, limit)), default=1)
    live = a.targets.mask
    head = Head(hidden, call.parameters, options, given.rows, live, needs, length, early=True)
    if way == "token" and not head.shard:
        out = fill_parts(head, a)
    else:
        out = by_phases(way, head, given)
    gradients = head.gradients()
    if lift is not None:
        out = out._replace(loss=out.loss / lift)
        for x in gradients:
            x /= lift
    optional = {"entropy": a.with_entropy, "kl": a.tokens.ref_logp is not None}
    outputs = [
        scatter_rows(x, given.rows, len(hidden), computed=optional.get(name, True))
        for name, x in out._asdict().items()
    ]
    return (out.loss.sum(), *outputs, *gradients)


def _fake(hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = LinearArguments(*arguments)
    outputs = new_outputs(call.arguments)
    gradients = empty_gradients(hidden, call.parameters, call.needs, early_dtype(hidden))
    return (call.tokens.weight.new_empty(()), *outputs, *gradients)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    call = LinearArguments(*inputs[1:])
    ctx.used = False
    ctx.dtypes = [None if x is None else x.dtype for x in (inputs[0], *call.parameters)]
    ctx.given = list(call.needs)
    # They are saved in the graph, so that activation checkpointing can drop them and compute them
    # again.
    ctx.save_for_backward(*output[6:])
    # `dw_out` is not saved in the graph: other backwards may add to it before this one does.
    ctx.dw_out = call.dw_out
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@without_graph("linear_grpo_loss")
def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple:
    if dloss is None:
        return ()
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
            scale_(x, factor)  # not `addcmul_`: 0 must stay 0 even if the factor is inf
            ctx.dw_out.add_(x)
            result.append(None)
        elif x.dtype == dtype:
            scale_(x, factor)
            result.append(x)
        else:
            result.append(scaled_to(x, factor, dtype))
    return tuple(result)


linear_grpo = operator(
    "linear_grpo",
    _forward,
    KINDS,
    f"({', '.join(['Tensor'] * 11)})",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    differentiable=2,
)
