"""The objective on log-probs, and a step's statistics (kernels: `grpo_fast.kernels.policy_loss`)."""

from typing import Any

import torch
from torch import Tensor

from grpo_fast.objective import Objective
from grpo_fast.ops._backend import launch, use_triton

CLIP_LOW, CLIP_HIGH, CLIP_DUAL = 1, 2, 4  # bits of the clip flags, as in kernels/tiles.py

# What `token_statistics` returns, in this order: sums over live tokens, then an extreme each.
STATISTICS = (
    "tokens",
    "loss",
    "ratio",
    "k1",
    "k3",
    "clip_low",
    "clip_high",
    "clip_dual",
    "kl",
    "entropy",
    "importance",
    "importance_outside",
    "rho",
    "rho_squared",
    "ratio_min",
    "ratio_max",
)


def policy_terms(
    logp: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantage: Tensor,
    importance: Tensor | None,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(loss, dloss/dlogp, KL or None, clip flags) of tokens before weighting.

    The twin of `tiles.policy_terms`. In closed form, so that it can run inside an operator, where autograd does not record.
    """
    low, high = 1 - objective.epsilon_low, 1 + objective.epsilon_high
    ratio = torch.ones_like(logp) if old_logp is None else (logp - old_logp).exp()
    bounded = ratio if objective.delta is None else ratio.clamp(max=objective.delta)
    free = bounded * advantage
    clipped = ratio.clamp(low, high) * advantage
    loss = -torch.minimum(free, clipped)
    unbounded = bounded == ratio
    inside = torch.where(free <= clipped, unbounded, (ratio >= low) & (ratio <= high))
    dual = torch.zeros_like(inside)
    if objective.dual_clip is not None:
        ceiling = -objective.dual_clip * advantage
        dual = (advantage < 0) & (ceiling < loss)
        loss = torch.where(dual, ceiling, loss)
    loss = torch.where(advantage == 0, 0, loss)
    # Select, not multiply: the ratio may be inf where no gradient passes.
    dlogp = torch.where(inside & ~dual & (advantage != 0), -ratio * advantage, 0)
    clip = CLIP_LOW * ((ratio < low) & (advantage < 0)).to(torch.int8)
    clip += CLIP_HIGH * ((ratio > high) & (advantage > 0)).to(torch.int8)
    bound = objective.delta or objective.dual_clip
    if bound is not None:
        clip += CLIP_DUAL * ((ratio > bound) & (advantage < 0)).to(torch.int8)
    if importance is not None:
        loss, dlogp = loss * importance, dlogp * importance
    if ref_logp is None:
        return loss, dlogp, None, clip
    kl, dkl = kl_terms(logp, ref_logp, ratio, objective.kl)
    if objective.beta:
        loss, dlogp = loss + objective.beta * kl, dlogp + objective.beta * dkl
    return loss, dlogp, kl, clip


def kl_terms(logp: Tensor, ref_logp: Tensor, ratio: Tensor, kl: str) -> tuple[Tensor, Tensor]:
    """(KL estimate, d/dlogp): the twin of `tiles.kl_terms`."""
    gap = ref_logp - logp
    if kl == "k1":
        return -gap, torch.ones_like(gap)
    if kl == "abs":
        return gap.abs(), -gap.sign()
    if kl == "k2":
        return gap.square() / 2, -gap
    k3 = gap.expm1() - gap
    if kl == "k3_unbiased":
        return ratio * k3, -ratio * gap
    return k3, -gap.expm1()


def weigh(weight: Tensor, x: Tensor) -> Tensor:
    """`weight * x`; 0 where the weight is, whatever x holds there."""
    return torch.where(weight == 0, 0, weight * x)


@torch.library.custom_op("grpo_fast::policy_loss", mutates_args=())
def policy_loss_fwd(
    logp: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    importance: Tensor | None,
    objective: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted loss, its derivative in logp, KL ((0,) without ref_logp), clip flags; all (N,)."""
    terms = Objective.from_key(objective)
    if use_triton(logp):
        from grpo_fast.kernels import policy_loss as kernels

        loss, dlogp, kl, clip = launch(
            kernels.policy_loss_fwd,
            logp,
            logp,
            mask,
            weight,
            advantages,
            old_logp,
            ref_logp,
            importance,
            terms,
        )
        return loss, dlogp, logp.new_empty(0) if kl is None else kl, clip

    def live(x: Tensor | None) -> Tensor | None:
        return x if x is None or mask is None else torch.where(mask, x, 0)

    values = [live(x) for x in (logp, old_logp, ref_logp, advantages, importance)]
    assert values[0] is not None
    assert values[3] is not None
    loss, dlogp, kl, clip = policy_terms(
        values[0], values[1], values[2], values[3], values[4], terms
    )
    weight = weight if mask is None else torch.where(mask, weight, 0)
    return weigh(weight, loss), weigh(weight, dlogp), logp.new_empty(0) if kl is None else kl, clip


@policy_loss_fwd.register_fake
def _(
    logp: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    importance: Tensor | None,
    objective: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kl = logp.new_empty(0) if ref_logp is None else torch.empty_like(logp)
    return (
        torch.empty_like(logp),
        torch.empty_like(logp),
        kl,
        logp.new_empty(logp.shape, dtype=torch.int8),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple:
    (dlogp,) = ctx.saved_tensors
    return (None if dloss is None else dloss * dlogp, *(None,) * 7)


policy_loss_fwd.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("grpo_fast::token_statistics", mutates_args=())
def token_statistics(
    mask: Tensor | None,
    loss: Tensor,
    logp: Tensor,
    old_logp: Tensor | None,
    importance: Tensor | None,
    kl: Tensor | None,
    entropy: Tensor | None,
    clip: Tensor,
) -> Tensor:
    """(16,) fp32, named by `STATISTICS`, of (N,) tokens. Nothing of a masked token enters."""
    if use_triton(logp) and logp.numel():
        from grpo_fast.kernels import policy_loss as kernels

        return launch(
            kernels.token_statistics_fwd,
            logp,
            mask,
            loss,
            logp,
            old_logp,
            importance,
            kl,
            entropy,
            clip,
        )
    live = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask

    def chosen(x: Tensor | None, default: float) -> Tensor:
        return x[live].float() if x is not None else logp.new_full((int(live.sum()),), default)

    d = chosen(logp, 0) - chosen(old_logp, 0) if old_logp is not None else chosen(None, 0)
    ratio, weight, flags = d.exp(), chosen(importance, 1), clip[live]
    rho = ratio * weight
    sums = [
        torch.ones_like(d),
        chosen(loss, 0),
        ratio,
        -d,
        ratio - 1 - d,
        *((flags & bit != 0) for bit in (CLIP_LOW, CLIP_HIGH, CLIP_DUAL)),
        chosen(kl, 0),
        chosen(entropy, 0),
        weight,
        (weight < 0.5) | (weight > 2),
        rho,
        rho.square(),
    ]
    extremes = (
        [ratio.min(), ratio.max()]
        if ratio.numel()
        else [logp.new_tensor(torch.inf), logp.new_tensor(-torch.inf)]
    )
    return torch.stack([*(x.sum(dtype=torch.float32) for x in sums), *extremes])


@token_statistics.register_fake
def _(mask: Tensor | None, loss: Tensor, *rest: Any) -> Tensor:
    return loss.new_empty(len(STATISTICS), dtype=torch.float32)
