"""Logits to the GRPO loss and its gradient in one pass (kernels: `grpo_fast.kernels.grpo`)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast._operands import Modes, operand
from grpo_fast._overwritten import DESTROYED, mark_again
from grpo_fast.objective import Objective
from grpo_fast.ops import _rows
from grpo_fast.ops._autograd import without_graph
from grpo_fast.ops._backend import (
    Strided,
    launch,
    use_triton,
    wants_rows_on_chip,
    warn_not_on_chip,
)
from grpo_fast.ops._terms import token_policy_terms, weigh
from grpo_fast.ops.group_advantage import group_advantage_fwd

SCORE_EPS = 1e-4  # of the z-score of `rewards`, as in kernels/grpo.py

USED_TWICE = (
    "grpo_loss: backward ran a second time. The gradient with respect to the logits is computed once, in "
    "the forward, and handed over by the first backward; compute the loss again for a second one."
)


class Arguments(NamedTuple):
    """What the operators take after the logits. Per token, (N,), unless said otherwise."""

    ids: Tensor
    mask: Tensor | None
    weight: Tensor
    advantages: Tensor | None
    rewards: Tensor | None  # (num_sequences,)
    group_size: int
    sequence: Tensor | None  # None: row (b, t) belongs to sequence b
    old_logp: Tensor | None
    ref_logp: Tensor | None
    importance: Tensor | None
    score: Tensor | None  # TOPR's; None: the advantages
    coefficient: Tensor | None  # what dloss/dlogp has besides, known beforehand
    entropy_weight: Tensor | None  # None: weight
    temperature: Tensor | None
    inv_temperature: Tensor  # where there is no temperature per token; 0-dim, on the CPU
    return_entropy: bool  # needed where the objective has a bonus
    modes: str  # `Modes.key`
    numbers: Tensor  # of `Terms`


ARGUMENTS = (
    "Tensor ids, Tensor? mask, Tensor weight, Tensor? advantages, Tensor? rewards, int group_size, "
    "Tensor? sequence, Tensor? old_logp, Tensor? ref_logp, Tensor? importance, Tensor? score, "
    "Tensor? coefficient, Tensor? entropy_weight, Tensor? temperature, Tensor inv_temperature, "
    "bool return_entropy, str modes, Tensor numbers"
)


class Outputs(NamedTuple):
    """Per token, (N,); `entropy` and `kl` are (0,) where they are not computed."""

    loss: Tensor  # weighted
    logp: Tensor
    entropy: Tensor
    kl: Tensor
    clip: Tensor


def new_outputs(a: Arguments, empty: bool = False) -> Outputs:
    """Zeros of the right shapes; with `empty` for `fill` to write."""
    N = a.weight.shape[0]  # not len(): it would tie a compiled graph to this one length
    new = a.weight.new_empty if empty else a.weight.new_zeros
    return Outputs(
        new(N),
        new(N),
        new(N if a.return_entropy else 0),
        new(N if a.ref_logp is not None else 0),
        new(N, dtype=torch.int8),
    )


def _launcher(
    logits: Tensor, dlogits: Tensor, softcap: _rows.SoftCap | None
) -> Callable[..., tuple[Tensor | None, ...]]:
    """Which of the two kernels runs; where GRPO_FAST_ON_CHIP=1 cannot be followed, a warning says why."""
    from grpo_fast.kernels import grpo as kernels

    if wants_rows_on_chip():
        from grpo_fast.kernels import on_chip

        why = on_chip.unsupported(logits, dlogits, softcap.softcap if softcap else None)
        if not why:
            return on_chip.grpo_fwd_bwd
        warn_not_on_chip(why)
    return kernels.grpo_fwd_bwd


def fill(
    logits: Tensor,
    a: Arguments,
    dlogits: Tensor,
    softcap: _rows.SoftCap | None = None,
    out: Outputs | None = None,
    arrived: Tensor | None = None,
) -> Outputs:
    """Write the gradient into `dlogits`, (B, T, V), which may be `logits`; return the rest.

    Args:
        out: what is returned, to be written; None: made here.
        arrived: as the launcher takes it.
    """
    objective = Objective.from_terms(Modes.of(a.modes), a.numbers)
    common = a.inv_temperature.item()
    if use_triton(logits):
        arguments = {**a._asdict(), "inv_temperature": common, "objective": objective}
        del arguments["modes"], arguments["numbers"]
        if out is not None:
            entropy = out.entropy if a.return_entropy else None
            kl = None if a.ref_logp is None else out.kl
            arguments["out"] = (out.loss, out.logp, entropy, kl, out.clip)
        outputs = launch(
            _launcher(logits, dlogits, softcap),
            logits,
            logits=logits,
            **arguments,
            dlogits=dlogits,
            arrived=arrived,
            **(softcap._asdict() if softcap else {}),
        )
        if out is not None:
            return out
        return Outputs(*(a.weight.new_empty(0) if x is None else x for x in outputs))
    if wants_rows_on_chip():
        warn_not_on_chip("PyTorch's operators run in place of the kernels")
    advantages = a.advantages
    if advantages is None:
        assert a.rewards is not None
        score = group_advantage_fwd(
            a.rewards, a.group_size, None, "group", operand(SCORE_EPS), True
        )
        advantages = spread(score, a.sequence, logits)
    out = new_outputs(a, empty=True) if out is None else out
    for x in out:
        x.zero_()  # what is said of tokens that do not count
    for rows, (block, dblock) in _rows.row_blocks(logits, dlogits):
        live = _rows.live_rows(a.mask, rows)
        where = rows if live is None else live + rows.start
        z = block if live is None else block[live]
        direct = live is None and dblock.dtype == torch.float32
        work = dblock if direct else torch.empty(z.shape, dtype=torch.float32, device=z.device)
        scale = common if a.temperature is None else 1 / a.temperature[where]
        ids = a.ids[where].long()
        if softcap is not None:
            z = softcap.apply(z)
        e, statistics, u = _rows.exponentials(z, ids, scale, work, a.return_entropy)
        loss, dlogp, kl, clip = token_policy_terms(
            statistics.logp,
            None if a.old_logp is None else a.old_logp[where],
            None if a.ref_logp is None else a.ref_logp[where],
            advantages[where],
            None if a.score is None else a.score[where],
            None if a.importance is None else a.importance[where],
            objective,
        )
        weight = a.weight[where]
        loss, dlogp, dentropy = weigh(weight, loss), weigh(weight, dlogp), None
        if a.coefficient is not None:
            dlogp += a.coefficient[where]
        if statistics.entropy is not None:
            by_entropy = weight if a.entropy_weight is None else a.entropy_weight[where]
            if objective.entropy_coef:
                dentropy = -objective.entropy_coef * by_entropy
                loss += weigh(dentropy, statistics.entropy)
            out.entropy[where] = statistics.entropy
        slope = None if softcap is None else softcap.slope(z)
        dz = _rows.gradient(e, u, ids, dlogp, dentropy, statistics, scale, slope)
        _rows.store(dblock, live, dz)
        out.loss[where], out.logp[where], out.clip[where] = loss, statistics.logp, clip
        if kl is not None:
            out.kl[where] = kl
    return out


def spread(score: Tensor, sequence: Tensor | None, logits: Tensor) -> Tensor:
    """One value per sequence as one per token, (N,)."""
    if sequence is not None:
        return score[sequence]
    # Contiguous: with one sequence `reshape` gives a view of one element, of stride 0.
    return score[:, None].expand(logits.shape[:2]).reshape(-1).contiguous()


def _grpo(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """`Outputs`, then dlogits: the gradient of the sum of the losses."""
    dlogits = _rows.new_gradient(logits)
    return (*fill(logits, Arguments(*arguments), dlogits), dlogits)


def _grpo_(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """`Outputs`, with the gradient written over the logits."""
    return tuple(fill(logits, Arguments(*arguments), logits))


five, six = (f"({', '.join(['Tensor'] * n)})" for n in (5, 6))
grpo = torch.library.custom_op(
    "grpo_fast::grpo", _grpo, mutates_args=(), schema=f"(Tensor logits, {ARGUMENTS}) -> {six}"
)
grpo_ = torch.library.custom_op(
    "grpo_fast::grpo_",
    _grpo_,
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, {ARGUMENTS}) -> {five}",
)


@grpo_.register_fake
def _(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(new_outputs(Arguments(*arguments)))


@grpo.register_fake
def _(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    outputs = new_outputs(Arguments(*arguments))
    return (*outputs, _rows.new_gradient(logits))


@torch.library.custom_op("grpo_fast::scale_rows_", mutates_args=("x",))
def scale_rows_(x: Tensor, factor: Tensor) -> None:
    """`x *= factor[:, None]` on the rows of x (B, T, V); rows whose factor is 1 are not touched."""
    if use_triton(x):
        from grpo_fast.kernels import scale_rows as kernels

        launch(kernels.scale_rows, x, Strided(factor), x)
    elif bool((factor != 1).any()):
        for rows, (_, block) in _rows.row_blocks(x, x):
            block.copy_(torch.where(block == 0, 0, block * factor[rows, None]))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    # Kept outside save_for_backward, so that backward can give the only reference away: the engine
    # then uses the buffer as the gradient instead of copying it.
    ctx.dlogits = output[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _hand_over(ctx: Any, dloss: Tensor) -> Tensor:
    """The gradient in the logits for the upstream gradient `dloss` (N,); once."""
    dlogits, ctx.dlogits = ctx.dlogits, None
    if dlogits is None:
        raise RuntimeError(USED_TWICE)
    scale_rows_(dlogits, dloss)
    return dlogits


@without_graph("grpo_loss")
def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple:
    return (None if dloss is None else _hand_over(ctx, dloss), *(None,) * len(Arguments._fields))


grpo.register_autograd(_backward, setup_context=_setup_context)


class _Overwrite(torch.autograd.Function):
    """`grpo_` with a gradient: a custom operator that mutates its input cannot have one of its own."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        ctx.dlogits = logits.detach()
        outputs = grpo_(ctx.dlogits, *arguments)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @without_graph("grpo_loss")
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple:
        if dloss is None:
            return (None,) * (1 + len(Arguments._fields))
        dlogits = _hand_over(ctx, dloss)
        mark_again(dlogits)
        return (dlogits, *(None,) * len(Arguments._fields))


class _Destroyed(torch.autograd.Function):
    """Put in front of overwritten logits: a gradient through what they became raises.

    A Function of its own, since one that changes a view may not return anything else.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        raise RuntimeError(f"grpo_loss: {DESTROYED}")


def grpo_inplace(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`grpo` with the gradient in the place of the logits; differentiable in them, once."""
    outputs = _Overwrite.apply(logits, *arguments)
    _Destroyed.apply(logits)
    return outputs
