"""Logits to the GRPO loss and its gradient in one pass (kernels: `grpo_fast.kernels.grpo`)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.objective import Objective
from grpo_fast.ops import _rows
from grpo_fast.ops._backend import use_triton
from grpo_fast.ops.group_advantage import group_advantage_fwd
from grpo_fast.ops.policy_loss import policy_terms, weigh

SCORE_EPS = 1e-4  # of the z-score of `rewards`, as in kernels/grpo.py

USED_TWICE = (
    "grpo_loss: backward ran a second time. The gradient with respect to the logits is computed once, in "
    "the forward, and handed over by the first backward; compute the loss again for a second one."
)
DESTROYED = (
    "grpo_loss: these logits were overwritten with their gradient by grpo_loss(..., inplace=True) and "
    "cannot be used afterwards; use inplace=False, or do all other work on the logits first."
)


class Outputs(NamedTuple):
    """Per token, (N,); `entropy` and `kl` are (0,) where they are not computed."""

    loss: Tensor  # weighted
    logp: Tensor
    entropy: Tensor
    kl: Tensor
    clip: Tensor


def _grpo_rows(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    advantages: Tensor | None,
    rewards: Tensor | None,
    group_size: int,
    sequence: Tensor | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    importance: Tensor | None,
    temperature: Tensor | None,
    inv_temperature: float,
    key: str,
    dlogits: Tensor,
) -> Outputs:
    """Fill `dlogits`, which may be `logits`, and return the rest."""
    objective = Objective.from_key(key)
    if use_triton(logits):
        from grpo_fast.kernels import grpo as kernels

        loss, logp, entropy, kl, clip = kernels.grpo_fwd_bwd(
            logits=logits,
            ids=ids,
            mask=mask,
            weight=weight,
            advantages=advantages,
            rewards=rewards,
            group_size=group_size,
            sequence=sequence,
            old_logp=old_logp,
            ref_logp=ref_logp,
            importance=importance,
            temperature=temperature,
            inv_temperature=inv_temperature,
            objective=objective,
            dlogits=dlogits,
        )
        entropy = loss.new_empty(0) if entropy is None else entropy
        return Outputs(loss, logp, entropy, loss.new_empty(0) if kl is None else kl, clip)
    N, T = ids.numel(), logits.shape[1]
    if advantages is None:
        assert rewards is not None
        score = group_advantage_fwd(rewards, group_size, None, "group", SCORE_EPS, True)
        if sequence is None:
            sequence = torch.arange(N, device=ids.device) // max(T, 1)
        advantages = score[sequence]
    with_entropy = objective.entropy_coef != 0
    new = weight.new_zeros
    out = Outputs(
        new(N),
        new(N),
        new(N if with_entropy else 0),
        new(0 if ref_logp is None else N),
        new(N, dtype=torch.int8),
    )
    for rows, (block, dblock) in _rows.row_blocks(logits, dlogits):
        live = _rows.live_rows(mask, rows)
        where = rows if live is None else live + rows.start
        z = block if live is None else block[live]
        direct = live is None and dblock.dtype == torch.float32
        work = dblock if direct else torch.empty(z.shape, dtype=torch.float32, device=z.device)
        scale = inv_temperature if temperature is None else 1 / temperature[where]
        row_ids = ids[where].long()
        e, statistics, u = _rows.exponentials(z, row_ids, scale, work, with_entropy)
        loss, dlogp, kl, clip = policy_terms(
            statistics.logp,
            None if old_logp is None else old_logp[where],
            None if ref_logp is None else ref_logp[where],
            advantages[where],
            None if importance is None else importance[where],
            objective,
        )
        w = weight[where]
        dentropy = None
        if statistics.entropy is not None:
            loss = loss - objective.entropy_coef * statistics.entropy
            dentropy = -objective.entropy_coef * w
            out.entropy[where] = statistics.entropy
        dz = _rows.gradient(e, u, row_ids, weigh(w, dlogp), dentropy, statistics, scale)
        _rows.store(dblock, live, dz)
        out.loss[where], out.logp[where], out.clip[where] = weigh(w, loss), statistics.logp, clip
        if kl is not None:
            out.kl[where] = kl
    return out


@torch.library.custom_op("grpo_fast::grpo", mutates_args=())
def grpo(
    logits: Tensor,  # (B, T, V)
    ids: Tensor,  # (N,)
    mask: Tensor | None,
    weight: Tensor,
    advantages: Tensor | None,
    rewards: Tensor | None,  # (num_sequences,)
    group_size: int,
    sequence: Tensor | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    importance: Tensor | None,
    temperature: Tensor | None,
    inv_temperature: float,
    objective: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logp, entropy, kl, clip, dlogits): `Outputs`, then the gradient of the sum of the losses."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    outputs = _grpo_rows(
        logits,
        ids,
        mask,
        weight,
        advantages,
        rewards,
        group_size,
        sequence,
        old_logp,
        ref_logp,
        importance,
        temperature,
        inv_temperature,
        objective,
        dlogits,
    )
    return (*outputs, dlogits)


@grpo.register_fake
def _(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    advantages: Tensor | None,
    rewards: Tensor | None,
    group_size: int,
    sequence: Tensor | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    importance: Tensor | None,
    temperature: Tensor | None,
    inv_temperature: float,
    objective: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    N = ids.shape[0]
    entropy = weight.new_empty(N if Objective.from_key(objective).entropy_coef else 0)
    kl = weight.new_empty(0 if ref_logp is None else N)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    clip = weight.new_empty(N, dtype=torch.int8)
    return weight.new_empty(N), weight.new_empty(N), entropy, kl, clip, dlogits


@torch.library.custom_op("grpo_fast::grpo_", mutates_args=("logits",))
def grpo_(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    advantages: Tensor | None,
    rewards: Tensor | None,
    group_size: int,
    sequence: Tensor | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    importance: Tensor | None,
    temperature: Tensor | None,
    inv_temperature: float,
    objective: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`grpo` with the gradient written over the logits."""
    return _grpo_rows(
        logits,
        ids,
        mask,
        weight,
        advantages,
        rewards,
        group_size,
        sequence,
        old_logp,
        ref_logp,
        importance,
        temperature,
        inv_temperature,
        objective,
        logits,
    )


@torch.library.custom_op("grpo_fast::scale_rows_", mutates_args=("x",))
def scale_rows_(x: Tensor, factor: Tensor) -> None:
    """`x *= factor[:, None]` on the rows of x (B, T, V); rows whose factor is 1 are not touched."""
    if use_triton(x):
        from grpo_fast.kernels import grpo as kernels

        kernels.scale_rows(factor, x)
    elif bool((factor != 1).any()):
        for rows, (block,) in _rows.row_blocks(x):
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


@torch.autograd.function.once_differentiable
def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple:
    return (None if dloss is None else _hand_over(ctx, dloss), *(None,) * 13)


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
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple:
        return (None if dloss is None else _hand_over(ctx, dloss), *(None,) * 13)


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
        raise RuntimeError(DESTROYED)


def grpo_inplace(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`grpo` with the gradient in the place of the logits; differentiable in them, once."""
    outputs = _Overwrite.apply(logits, *arguments)
    _Destroyed.apply(logits)
    return outputs
