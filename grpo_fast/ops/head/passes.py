"""Passes over the rows that take part, chunk by chunk: they read log-probs and write gradients."""

import torch
from torch import Tensor

from grpo_fast.objective import Objective
from grpo_fast.ops.grpo import Arguments, fill, new_outputs
from grpo_fast.ops.head.arguments import Needs, Options, Parameters
from grpo_fast.ops.head.chunked import Head
from grpo_fast.ops.head.vocab_parallel import read_shared_rows
from grpo_fast.ops.logprob import read_rows, write_rows
from grpo_fast.records import Outputs, Rewards, RowStatistics, Targets, Tokens, select

NO_GRADIENT = Needs(False, False, False, False, False)
# With A = -1 the loss -A log p has the gradient of log p itself.
UNIT = Objective(surrogate="reinforce").terms
# `lifted` scales the largest weight to at most this. A factor of 4000 is then left for advantage
# and ratio.
LIFTED = 16.0


def scaled(targets: Targets, options: Options) -> Targets:
    """Return the targets with the logit scale as a part of the temperature, where there is no soft cap."""
    if options.softcap is not None or options.logit_scale == 1:
        return targets
    temperature = targets.temperature
    return targets._replace(
        temperature=None if temperature is None else temperature / options.logit_scale,
        inv_temperature=targets.inv_temperature * options.logit_scale,
    )


def kept_rows(keep: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the indices of the rows to keep, on the device of `like`; None for all.

    On a GPU this is a sync if `keep` is there.
    """
    if keep is None:
        return None
    rows = keep.nonzero().squeeze(1)
    return None if len(rows) == len(keep) else rows.to(like.device, non_blocking=True)


def scatter_rows(
    x: Tensor, rows: Tensor | None, N: int, default: float = 0.0, computed: bool = True
) -> Tensor:
    """Return values of the rows that took part as (N,), `default` elsewhere; unchanged if not computed."""
    if rows is None or not computed:
        return x
    return x.new_full((N,), default).index_copy_(0, rows, x)


def new_statistics(head: Head, with_entropy: bool) -> RowStatistics:
    """Return empty vectors for the statistics of the rows that take part; `read_part` writes them."""
    sizes = (head.N, head.N if with_entropy else 0, head.N, head.N)
    return RowStatistics(*(head.hidden.new_empty(n, dtype=torch.float32) for n in sizes))


def read_part(
    head: Head,
    part: slice,
    logits: Tensor,
    targets: Targets,
    with_entropy: bool,
    out: RowStatistics,
) -> RowStatistics:
    """Compute the statistics of the rows whose logits `head` computed last, and write them into `out`."""
    mine = select(out, part)
    if head.shard:
        found = read_shared_rows(logits, targets, with_entropy, head.softcap, head.shard)
        for x, y in zip(mine, found, strict=True):
            x.copy_(y)
    else:
        read_rows(logits, targets, with_entropy, head.softcap, mine, head.counters(part))
    return mine


def write_part(
    head: Head,
    dlogp: Tensor,
    dentropy: Tensor | None,
    logits: Tensor,
    targets: Targets,
    statistics: RowStatistics,
    dlogits: Tensor,
) -> None:
    """Write the gradient of a chunk of logits into `dlogits`, which may be `logits`."""
    if head.shard:
        if not logits.shape[-1]:
            return
        targets = targets._replace(ids=head.shard.local(targets.ids, logits.shape[-1]))
    write_rows(dlogp, dentropy, logits, targets, statistics, dlogits, head.softcap)


def read_all(head: Head, targets: Targets, with_entropy: bool) -> RowStatistics:
    """Compute the statistics of all rows that take part, chunk by chunk."""
    found = new_statistics(head, with_entropy)
    for part in head.parts():
        logits, _ = head.logits(part)
        read_part(head, part, logits, select(targets, part), with_entropy, found)
    return found


def write_all(
    head: Head,
    targets: Targets,
    dlogp: Tensor,
    dentropy: Tensor | None,
    statistics: RowStatistics,
) -> None:
    """Compute the logits again, chunk by chunk, their gradient, and the gradients of `head`."""
    for part in head.parts():
        logits, dlogits = head.logits(part)
        upstream = dlogp[part], None if dentropy is None else dentropy[part]
        of_part = select(targets, part), select(statistics, part)
        write_part(head, *upstream, logits, *of_part, dlogits)
        head.backward(part)


def read_with_unit_gradient(
    head: Head, targets: Targets, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute log-probs, entropies, and the gradient of each log-prob in its hidden state.

    The gradient is `head.hidden_gradient()`.
    """
    weight = head.hidden.new_ones(head.N, dtype=torch.float32)
    tokens = Tokens(weight, -weight)
    out = fill_parts(head, Arguments(targets, tokens, Rewards(), with_entropy, UNIT))
    return out.logp, out.entropy


def fill_parts(head: Head, a: Arguments) -> Outputs:
    """Compute the gradients of rows whose coefficients depend on nothing outside of the row."""
    out = new_outputs(a, empty=True)
    for part in head.parts():
        logits, dlogits = head.logits(part)
        mine = select(out, part)
        fill(logits, select_rows(a, part), dlogits, head.softcap, mine, head.counters(part))
        head.backward(part)
    return out


def select_rows(a: Arguments, rows: Tensor | slice) -> Arguments:
    """Return the arguments of some rows."""
    return a._replace(targets=select(a.targets, rows), tokens=select(a.tokens, rows))


def lifted(tokens: Tokens) -> tuple[Tokens, Tensor]:
    """Scale weights up, so that float16 gradients do not underflow; return tokens and factor.

    The gradients are computed before the loss scale arrives that would keep them out of underflow.
    So they get a factor here, a power of two chosen from the weights, and float32 gradients are
    divided by it at the end.
    """
    largest = torch.nn.functional.pad(tokens.weight.abs(), (0, 1)).amax()
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    lift = torch.ldexp(torch.full_like(largest, LIFTED), -exponent)
    entropy_weight = tokens.entropy_weight
    if entropy_weight is not None:
        entropy_weight = entropy_weight * lift
    return tokens._replace(weight=tokens.weight * lift, entropy_weight=entropy_weight), lift


def empty_gradients(
    hidden: Tensor, parameters: Parameters, needs: Needs, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Return tensors like those of `Head.gradients`, without values.

    Args:
        dtype: the dtype of the first one; default: that of `hidden`.
    """
    shapes = [
        x.shape if wanted and x is not None else 0
        for x, wanted in zip(parameters, needs[1:], strict=True)
    ]
    return (
        hidden.new_empty(hidden.shape if needs.hidden else 0, dtype=dtype),
        *(hidden.new_empty(shape, dtype=torch.float32) for shape in shapes),
    )
