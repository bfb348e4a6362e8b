"""What the operators on hidden states share: rows that take part, read and written chunk by chunk."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.objective import Objective
from grpo_fast.ops._head import Head
from grpo_fast.ops._head_arguments import Needs, Options
from grpo_fast.ops._vocab_parallel import read_shared_rows
from grpo_fast.ops.grpo import Arguments, Outputs, fill, new_outputs
from grpo_fast.ops.logprob import read_rows, write_rows

NO_GRADIENT = Needs(False, False, False, False, False)
# -A log p with A = -1: the gradient of log p itself.
UNIT = Objective(surrogate="reinforce").terms
# What `lifted` makes of the largest weight, at most: 4000 times as much is left for advantage and ratio.
LIFTED = 16.0


class Scores(NamedTuple):
    """Which tokens are scored, and how. Per token, (N,)."""

    ids: Tensor
    mask: Tensor | None
    temperature: Tensor | None
    inv_temperature: Tensor  # 0-dim, on the CPU


SCORES = "Tensor ids, Tensor? mask, Tensor? temperature, Tensor inv_temperature"


class Statistics(NamedTuple):
    """Of each token, (N,) float32: what the gradient pass needs of the first pass."""

    logp: Tensor
    entropy: Tensor  # (0,) unless wanted
    top: Tensor
    total: Tensor


def scaled(scores: Scores, options: Options) -> Scores:
    """Without a soft cap a logit scale is a temperature."""
    if options.softcap is not None or options.logit_scale == 1:
        return scores
    temperature = scores.temperature
    return scores._replace(
        temperature=None if temperature is None else temperature / options.logit_scale,
        inv_temperature=scores.inv_temperature * options.logit_scale,
    )


def at(x: Tensor | None, rows: Tensor | slice | None) -> Tensor | None:
    """`x[rows]`; what is not there has no rows."""
    return x if x is None or rows is None else x[rows]


def select(scores: Scores, rows: Tensor | slice | None) -> Scores:
    """The scores of some rows, or of all."""
    ids, mask, temperature, inv_temperature = scores
    chosen = ids if rows is None else ids[rows]
    return Scores(chosen, at(mask, rows), at(temperature, rows), inv_temperature)


def kept_rows(keep: Tensor | None, like: Tensor) -> Tensor | None:
    """Indices, on the device of `like`, of the rows to keep; None for all. On a GPU `keep` costs a sync."""
    if keep is None:
        return None
    rows = keep.nonzero().squeeze(1)
    return None if len(rows) == len(keep) else rows.to(like.device, non_blocking=True)


def spread_rows(
    x: Tensor, rows: Tensor | None, N: int, default: float = 0.0, computed: bool = True
) -> Tensor:
    """x of the rows that took part as (N,), `default` for the others; as it is if it was not computed."""
    if rows is None or not computed:
        return x
    return x.new_full((N,), default).index_copy_(0, rows, x)


def new_statistics(head: Head, with_entropy: bool) -> Statistics:
    """Empty vectors for the statistics of the rows that take part: `read_part` writes them."""
    sizes = (head.N, head.N if with_entropy else 0, head.N, head.N)
    return Statistics(*(head.hidden.new_empty(n, dtype=torch.float32) for n in sizes))


def read_part(
    head: Head, part: slice, logits: Tensor, scores: Scores, with_entropy: bool, out: Statistics
) -> Statistics:
    """Write the statistics of the rows whose logits `head` has just computed into their place in `out`."""
    mine = Statistics(*(x[part] for x in out))
    if head.shard:
        found = read_shared_rows(logits, *scores, with_entropy, head.softcap, head.shard)
        for x, y in zip(mine, found, strict=True):
            x.copy_(y)
    else:
        counters = head.counters(part)
        read_rows(logits, *scores, with_entropy, head.softcap, mine, counters)
    return mine


def write_part(
    head: Head,
    dlogp: Tensor,
    dentropy: Tensor | None,
    logits: Tensor,
    scores: Scores,
    statistics: Statistics,
    dlogits: Tensor,
) -> None:
    """Their gradient into `dlogits`, which may be `logits`."""
    if head.shard:
        if not logits.shape[-1]:
            return
        scores = scores._replace(ids=head.shard.local(scores.ids, logits.shape[-1]))
    write_rows(dlogp, dentropy, logits, *scores, *statistics, dlogits, head.softcap)


def read_all(head: Head, scores: Scores, with_entropy: bool) -> Statistics:
    """The log-probs of the rows that take part."""
    found = new_statistics(head, with_entropy)
    for part in head.parts():
        logits, _ = head.logits(part)
        read_part(head, part, logits, select(scores, part), with_entropy, found)
    return found


def write_all(
    head: Head, scores: Scores, dlogp: Tensor, dentropy: Tensor | None, statistics: Statistics
) -> None:
    """The gradient pass: the logits again, their gradient, and what `head` makes of it."""
    for part in head.parts():
        logits, dlogits = head.logits(part)
        of_part = Statistics(*(x[part] for x in statistics))
        write_part(
            *(head, dlogp[part], at(dentropy, part), logits, select(scores, part), of_part, dlogits)
        )
        head.backward(part)


def read_with_unit_gradient(
    head: Head, scores: Scores, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy), in one pass with the gradient of each log-prob in its hidden state."""
    weight = head.hidden.new_ones(head.N, dtype=torch.float32)
    given: dict[str, Any] = dict.fromkeys(Arguments._fields)
    given |= {**scores._asdict(), "weight": weight, "advantages": -weight, "group_size": 1}
    given |= {"return_entropy": with_entropy, "modes": UNIT.modes.key, "numbers": UNIT.numbers}
    out = fill_parts(head, Arguments(**given))
    return out.logp, out.entropy


def fill_parts(head: Head, a: Arguments) -> Outputs:
    """Gradients of the rows that take part, where their coefficients depend on nothing else."""
    out = new_outputs(a, empty=True)
    for part in head.parts():
        logits, dlogits = head.logits(part)
        mine = Outputs(*(x[part] for x in out))
        fill(logits, slice_arguments(a, part), dlogits, head.softcap, mine, head.counters(part))
        head.backward(part)
    return out


def slice_arguments(a: Arguments, rows: Tensor | slice) -> Arguments:
    """The arguments of some rows; all tensors in `a` are per token but those of numbers."""
    of_rows: dict[str, Any] = {
        name: x[rows]
        for name, x in a._asdict().items()
        if isinstance(x, Tensor) and name not in ("inv_temperature", "numbers")
    }
    return a._replace(**of_rows)


def lifted(a: Arguments) -> tuple[Arguments, Tensor]:
    """With weights as large as gradients of logits in float16 want them, and the factor: a power of two.

    The gradients are computed before the loss scale arrives that would keep them out of float16's underflow:
    they get one here, chosen from the weights, and lose it again in float32.
    """
    largest = torch.nn.functional.pad(a.weight.abs(), (0, 1)).amax()
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    lift = torch.ldexp(torch.full_like(largest, LIFTED), -exponent)
    entropy_weight = a.entropy_weight
    if entropy_weight is not None:
        entropy_weight = entropy_weight * lift
    return a._replace(weight=a.weight * lift, entropy_weight=entropy_weight), lift
