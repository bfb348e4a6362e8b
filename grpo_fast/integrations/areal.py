"""AReaL 1.0.4 and 2.0: its PPO, SAPO and CISPO actor losses, by this library.

    import grpo_fast.integrations.areal
    grpo_fast.integrations.areal.patch()

in the training script replaces `ppo_actor_loss_fn`, `sapo_loss_fn` and, where there is one, `cispo_loss_fn`
in the module that calls them (AReaL has no registry). The same arguments, loss, gradient and per-token
statistics; rejection sampling is AReaL's own. Tensors are (B, T) or packed (N,) with `cu_seqlens`.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from grpo_fast import reference
from grpo_fast.loss import policy_loss
from grpo_fast.objective import Objective

ACTOR = "areal.trainer.ppo.actor"


def ppo_actor_loss_fn(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    eps_clip: float,
    loss_mask: Tensor,
    eps_clip_higher: float | None = None,
    c_clip: float | None = None,
    rejection_sampling: Any = None,
    importance_sampling_level: str = "token",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """AReaL's function of the same name: PPO on the ratio to the proximal policy, a mean over `loss_mask`.

    `rejection_sampling` may take tokens out, but not out of the mean, and weighs the others by the ratio of
    the proximal to the behaviour policy.
    """
    high = eps_clip if eps_clip_higher is None else eps_clip_higher
    options = {"epsilon_low": eps_clip, "epsilon_high": high, "dual_clip": c_clip}
    result = _rejected(proximal_logprobs, old_logprobs, loss_mask, cu_seqlens, rejection_sampling)
    mask = loss_mask if result is None else result.loss_mask
    loss, stat = _loss(
        "grpo",
        options,
        logprobs,
        proximal_logprobs,
        advantages,
        mask,
        loss_mask,
        None if result is None else result.behave_imp_weight,
        importance_sampling_level,
        cu_seqlens,
    )
    ratio, A = stat["importance_weight"], stat.pop("advantages")
    live = mask != 0
    free = -A * ratio
    bound = -A * ratio.clamp(1 - eps_clip, 1 + high)
    clipped = torch.maximum(free, bound)
    stat["clip_mask"] = live & (free < bound)
    none = torch.zeros_like(live)
    stat["dual_clip_mask"] = none if c_clip is None else live & (c_clip * A.abs() < clipped)
    stat["loss"] = clipped if c_clip is None else torch.minimum(clipped, c_clip * A.abs())
    return loss, _with_rejection(stat, result, proximal_logprobs, old_logprobs)


def sapo_loss_fn(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    tau_pos: float,
    tau_neg: float,
    loss_mask: Tensor,
    importance_sampling_level: str = "token",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """AReaL's function of the same name: SAPO, a mean over `loss_mask`."""
    loss, stat = _loss(
        "sapo",
        {"tau_pos": tau_pos, "tau_neg": tau_neg},
        logprobs,
        old_logprobs,
        advantages,
        loss_mask,
        loss_mask,
        None,
        importance_sampling_level,
        cu_seqlens,
    )
    A, x = stat.pop("advantages"), stat["importance_weight"] - 1
    up, down = ((tau * x).sigmoid() * (4 / tau) for tau in (tau_pos, tau_neg))
    gate = torch.where(A > 0, up, down)
    none = torch.zeros_like(loss_mask, dtype=torch.bool)
    stat |= {"loss": -gate * A, "clip_mask": none, "dual_clip_mask": none.clone()}
    names = ("sapo_soft_gate", "sapo_scaled_gate_pos", "sapo_scaled_gate_neg")
    return loss, stat | dict(zip(names, (gate, up, down), strict=True))


def cispo_loss_fn(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    advantages: Tensor,
    eps_clip: float,
    loss_mask: Tensor,
    eps_clip_higher: float | None = None,
    old_logprobs: Tensor | None = None,
    rejection_sampling: Any = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The function of the same name in AReaL 2.0: CISPO, a mean over `loss_mask`."""
    if eps_clip_higher is None or eps_clip_higher <= 0:
        raise ValueError(f"eps_clip_higher: want a positive number, got {eps_clip_higher}")
    result = _rejected(proximal_logprobs, old_logprobs, loss_mask, cu_seqlens, rejection_sampling)
    mask = loss_mask if result is None else result.loss_mask
    loss, stat = _loss(
        "cispo",
        {"epsilon_low": eps_clip, "epsilon_high": eps_clip_higher},
        logprobs,
        proximal_logprobs,
        advantages,
        mask,
        loss_mask,
        None if result is None else result.behave_imp_weight,
        "token",
        cu_seqlens,
    )
    ratio, A = stat["importance_weight"], stat.pop("advantages")
    bounded = ratio.clamp(1 - eps_clip, 1 + eps_clip_higher)
    live = mask != 0
    stat |= {
        "loss": -bounded * A * logprobs.detach(),
        "clip_mask": live & (bounded != ratio),
        "dual_clip_mask": torch.zeros_like(live),
    }
    return loss, _with_rejection(stat, result, proximal_logprobs, old_logprobs)


def _rejected(
    proximal: Tensor,
    old: Tensor | None,
    loss_mask: Tensor,
    cu_seqlens: Tensor | None,
    config: Any,
) -> Any:
    """AReaL's own rejection sampling, or None where it is not configured."""
    if config is None:
        return None
    if old is None:
        raise ValueError("old_logprobs: needed with rejection_sampling")
    return importlib.import_module("areal.utils.functional.functional").apply_rejection_sampling(
        proximal_logprobs=proximal,
        old_logprobs=old,
        loss_mask=loss_mask,
        cu_seqlens=cu_seqlens,
        config=config,
    )


def _with_rejection(
    stat: dict[str, Any], result: Any, proximal: Tensor, old: Tensor | None
) -> dict[str, Any]:
    if result is None or old is None:
        return stat
    kept = (result.loss_mask != 0) & (result.behave_imp_weight > 0)
    return stat | {
        "loss": stat["loss"] * result.behave_imp_weight,
        "behave_approx_kl": torch.where(kept, (proximal - old).detach(), 0),
        "behave_imp_weight": result.behave_imp_weight.detach(),
        "behave_mask": kept,
        "filtered_fraction": result.filtered_fraction,
    }


def _loss(
    preset: str,
    options: dict[str, Any],
    logps: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    counted: Tensor,
    weights: Tensor | None,
    level: str,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, dict[str, Any]]:
    """The loss, and what the statistics of both functions share; `counted` is the denominator's mask."""
    if level not in ("token", "sequence"):
        raise ValueError(
            f"importance_sampling_level={level!r} is unknown; choose from token, sequence"
        )
    live, d = mask != 0, (logps - old).detach()
    by_sequence = level == "sequence"
    if by_sequence:
        if d.ndim == 1 and cu_seqlens is None:
            raise ValueError(
                "cu_seqlens: needed with packed tokens and importance_sampling_level='sequence'"
            )
        boundaries = cu_seqlens if d.ndim == 1 else None
        # One advantage per sequence, the mean of its tokens', and the ratio of the sequence.
        advantages = torch.where(live, reference.sequence_mean(advantages, live, boundaries), 0)
        ratio = reference.sequence_mean(d, live, boundaries).exp()
    else:
        ratio = d.exp()
    if preset == "grpo" or by_sequence:
        ratio = torch.where(live, ratio, 0)
    out = policy_loss(
        logps,
        advantages=advantages,
        mask=live,
        old_logps=old,
        importance_weights=weights,
        num_items=(counted != 0).sum(),
        cu_seqlens=cu_seqlens if logps.ndim == 1 else None,
        objective=Objective.preset(
            f"areal/{preset}", ratio="sequence" if by_sequence else "token", **options
        ),
    )
    return out.loss, {"importance_weight": ratio, "approx_kl": d, "advantages": advantages.detach()}


def patch() -> None:
    """Replace AReaL's functions, in this process.

    Raises:
        ImportError: AReaL is not installed, or its actor has no such functions.
    """
    try:
        actor: Any = importlib.import_module(ACTOR)
        _ = actor.ppo_actor_loss_fn, actor.sapo_loss_fn
    except (ImportError, AttributeError) as error:
        raise ImportError(f"this needs AReaL >= 1.0 with the losses in {ACTOR}") from error
    actor.ppo_actor_loss_fn, actor.sapo_loss_fn = ppo_actor_loss_fn, sapo_loss_fn
    if hasattr(actor, "cispo_loss_fn"):  # AReaL 2.0
        actor.cispo_loss_fn = cispo_loss_fn
