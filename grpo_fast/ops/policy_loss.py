"""The objective on log-probs, and a step's statistics (kernels: `grpo_fast.kernels.policy_loss`)."""

from typing import Any

import torch
from torch import Tensor

from grpo_fast._operands import Modes
from grpo_fast.objective import Objective
from grpo_fast.ops._autograd import without_graph
from grpo_fast.ops._backend import launch, use_triton
from grpo_fast.ops._metrics import LOSS, METRICS, STATISTICS, metrics_from
from grpo_fast.ops._terms import (
    CLIP_DUAL,
    CLIP_HIGH,
    CLIP_LOW,
    exp_remainders,
    token_policy_terms,
    weigh,
)


@torch.library.custom_op("grpo_fast::policy_loss", mutates_args=())
def policy_loss_fwd(
    logp: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    importance: Tensor | None,
    score: Tensor | None,
    modes: str,
    numbers: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted loss, its derivative in logp, KL ((0,) without ref_logp), clip flags; all (N,)."""
    objective = Objective.from_terms(Modes.of(modes), numbers)
    if use_triton(logp):
        from grpo_fast.kernels import policy_loss as kernels

        loss, dlogp, kl, clip = launch(
            kernels.policy_loss_fwd,
            logp,
            *(logp, mask, weight, advantages, old_logp, ref_logp, importance, score),
            objective,
        )
        return loss, dlogp, logp.new_empty(0) if kl is None else kl, clip

    def live(x: Tensor | None) -> Tensor | None:
        return x if x is None or mask is None else torch.where(mask, x, 0)

    logp, old_logp, ref_logp, advantages, importance, score = (  # type: ignore[assignment]
        live(x) for x in (logp, old_logp, ref_logp, advantages, importance, score)
    )
    weight = weight if mask is None else torch.where(mask, weight, 0)
    loss, dlogp, kl, clip = token_policy_terms(
        logp, old_logp, ref_logp, advantages, score, importance, objective
    )
    loss, dlogp = weigh(weight, loss), weigh(weight, dlogp)
    return loss, dlogp, logp.new_empty(0) if kl is None else kl, clip


def fake(
    logp: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What an operator that returns (loss, dlogp, kl, clip) returns, without its values."""
    kl = logp.new_empty(0) if ref_logp is None else torch.empty_like(logp)
    clip = logp.new_empty(logp.shape, dtype=torch.int8)
    return torch.empty_like(logp), torch.empty_like(logp), kl, clip


policy_loss_fwd.register_fake(fake)


def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Of an operator that returns (loss, dlogp, ...)."""
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.arguments = len(inputs)


@without_graph("policy_loss")
def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple:
    """Of the same, differentiable in its first argument, logp."""
    (dlogp,) = ctx.saved_tensors
    return (None if dloss is None else dloss * dlogp, *(None,) * (ctx.arguments - 1))


policy_loss_fwd.register_autograd(backward, setup_context=setup_context)


@torch.library.custom_op("grpo_fast::token_statistics", mutates_args=())
def token_statistics(
    mask: Tensor | None,
    share: Tensor | None,
    loss: Tensor,
    logp: Tensor,
    old_logp: Tensor | None,
    importance: Tensor | None,
    kl: Tensor | None,
    entropy: Tensor | None,
    clip: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`STATISTICS` (16,), `METRICS` (14,), and the sum of the losses (), fp32, of (N,) tokens.

    Nothing of a masked token enters.

    share: (N,) what a token weighs in the sums, the loss apart, which is weighted. None: 1.
    """
    if use_triton(logp) and logp.numel():
        from grpo_fast.kernels import policy_loss as kernels

        return launch(
            kernels.token_statistics_fwd,
            logp,
            mask,
            share,
            loss,
            logp,
            old_logp,
            importance,
            kl,
            entropy,
            clip,
        )

    def chosen(x: Tensor | None, default: float) -> Tensor:
        if x is None:
            return logp.new_full((), default)
        return x.float() if mask is None else torch.where(mask, x, default).float()

    def total(x: Tensor) -> Tensor:
        return x.sum(dtype=torch.float32) if x.ndim else x.float() * logp.numel()

    live = logp.new_ones(()) if mask is None else mask.float()
    d = chosen(logp, 0) - chosen(old_logp, 0) if old_logp is not None else logp.new_zeros(())
    ratio, weight = d.exp(), chosen(importance, 1)
    flags = clip if mask is None else torch.where(mask, clip, 0)
    rho = ratio * weight * live
    outside = (weight < 0.5) | (weight > 2)
    sums = [
        live,
        chosen(loss, 0),
        ratio * live,
        -d,
        exp_remainders(d)[1],
        *((flags & bit) != 0 for bit in (CLIP_LOW, CLIP_HIGH, CLIP_DUAL)),
        chosen(kl, 0),
        chosen(entropy, 0),
        weight * live,
        outside.float() * live,
        rho,
        rho.square(),
    ]
    least, most = logp.new_full((), torch.inf), logp.new_full((), -torch.inf)
    if logp.numel():
        everywhere = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
        least = torch.where(everywhere, ratio, least).amin()
        most = torch.where(everywhere, ratio, most).amax()
    if share is not None:
        weighs = chosen(share, 0)
        sums = [x if i == LOSS else weighs * x for i, x in enumerate(sums)]
    statistics = torch.stack([*(total(x) for x in sums), least.float(), most.float()])
    metrics = torch.stack(list(metrics_from(statistics).values()))
    return statistics, metrics, statistics[LOSS].clone()


@token_statistics.register_fake
def _(mask: Tensor | None, share: Tensor | None, loss: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(
        loss.new_empty(n, dtype=torch.float32) for n in ((len(STATISTICS),), (len(METRICS),), ())
    )
