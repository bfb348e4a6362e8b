"""The adapter of AReaL, 1.0.4 to main of August 2026: its PPO, SAPO and CISPO losses of the actor.

    scheduling_spec:  # of the actor
      - cmd: python -m grpo_fast.integrations.areal  # instead of: python -m areal.infra.rpc.rpc_server

starts the workers, which never run the training script, with `patch()`. AReaL has no registry: `patch()`
replaces `ppo_actor_loss_fn`, `sapo_loss_fn` and, if it exists, `cispo_loss_fn` in the module that calls them.
In SPMD mode the script trains itself: call `patch()` there. Arguments, loss, gradient and statistics are
those of main. Rejection sampling is AReaL's own code. Tensors are (B, T) or packed (N,) with `cu_seqlens`.
"""

import dataclasses
import importlib
import runpy
from typing import Any

import torch
from torch import Tensor

from grpo_fast.integrations.shared.call import (
    LossCall,
    changed_by_clamp,
    sequence_mean,
    token_average,
)

ACTOR = "areal.trainer.ppo.actor"
Result = tuple[Tensor, dict[str, Any]]


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
) -> Result:
    """Replace AReaL's function of this name: PPO, with the ratio to the proximal policy.

    The loss is a mean over `loss_mask`.

    `rejection_sampling` takes tokens out of the sum but not out of the denominator. It weighs the others by
    the ratio of the proximal to the behaviour policy.
    """
    high = eps_clip if eps_clip_higher is None else eps_clip_higher
    options = {"epsilon_low": eps_clip, "epsilon_high": high, "dual_clip": c_clip}
    tokens = _Tokens(logprobs, proximal_logprobs, advantages, loss_mask, cu_seqlens)
    tokens = tokens.rejecting(old_logprobs, rejection_sampling)
    loss, stat = _result(tokens, tokens.call("grpo", options, importance_sampling_level))
    return loss, stat | _counts(loss_mask)


def sapo_loss_fn(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    tau_pos: float,
    tau_neg: float,
    loss_mask: Tensor,
    importance_sampling_level: str = "token",
    cu_seqlens: Tensor | None = None,
) -> Result:
    """Replace AReaL's function of this name: SAPO, a mean over `loss_mask`."""
    tokens = _Tokens(logprobs, old_logprobs, advantages, loss_mask, cu_seqlens)
    taus = {"tau_pos": tau_pos, "tau_neg": tau_neg}
    call = tokens.call("sapo", taus, importance_sampling_level)
    loss, stat = _result(tokens, call)
    # A gate is minus the loss of an advantage of 1, or of one of -1.
    one = torch.ones_like(logprobs)
    up, down = -call.replace(advantages=one).token.loss, call.replace(advantages=-one).token.loss
    gate = torch.where(call.advantages > 0, up, down)
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
) -> Result:
    """Replace the function of this name in AReaL 2.0: CISPO, a mean over `loss_mask`."""
    if eps_clip_higher is None or eps_clip_higher <= 0:
        raise ValueError(f"eps_clip_higher: want a positive number, got {eps_clip_higher}")
    options = {"epsilon_low": eps_clip, "epsilon_high": eps_clip_higher}
    tokens = _Tokens(logprobs, proximal_logprobs, advantages, loss_mask, cu_seqlens)
    tokens = tokens.rejecting(old_logprobs, rejection_sampling)
    return _result(tokens, tokens.call("cispo", options, "token"))


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The tokens of one call: `loss_mask` is the denominator, `live` are those that are not rejected."""

    logps: Tensor
    old: Tensor
    advantages: Tensor
    loss_mask: Tensor
    cu_seqlens: Tensor | None
    behaviour: Tensor | None = None
    rejected: Any = None  # the result of AReaL's rejection sampling

    @property
    def mask(self) -> Tensor:
        return self.loss_mask if self.rejected is None else self.rejected.loss_mask

    @property
    def live(self) -> Tensor:
        return self.mask != 0

    def rejecting(self, behaviour: Tensor | None, config: Any) -> "_Tokens":
        """Return the tokens after AReaL's own rejection sampling, if it is configured."""
        if config is None:
            return self
        if behaviour is None:
            raise ValueError("old_logprobs: needed with rejection_sampling")
        home = importlib.import_module("areal.utils.functional.functional")
        result = home.apply_rejection_sampling(
            proximal_logprobs=self.old,
            old_logprobs=behaviour,
            loss_mask=self.loss_mask,
            cu_seqlens=self.cu_seqlens,
            config=config,
        )
        return dataclasses.replace(self, behaviour=behaviour, rejected=result)

    def call(self, preset: str, options: dict[str, Any], level: str) -> LossCall:
        """Build the call of the loss at AReaL's `importance_sampling_level`."""
        if level not in ("token", "sequence"):
            raise ValueError(
                f"importance_sampling_level={level!r} is unknown; choose from token, sequence"
            )
        if self.old is None:
            raise ValueError("proximal_logprobs (old_logprobs of SAPO): needed, got None")
        packed, advantages = self.logps.ndim == 1, self.advantages
        boundaries = self.cu_seqlens if packed else None
        if level == "sequence":
            if packed and boundaries is None:
                raise ValueError(
                    "cu_seqlens: needed with packed tokens and importance_sampling_level='sequence'"
                )
            # Every token has the mean advantage of its sequence.
            advantages = sequence_mean(advantages, self.mask, boundaries).where(self.live, 0)
        return LossCall(
            preset=f"areal/{preset}",
            options=options | {"ratio": level},
            average=token_average(self.loss_mask.sum()),
            logps=self.logps,
            old_logps=self.old,
            advantages=advantages,
            mask=self.mask,
            importance_weights=None if self.rejected is None else self.rejected.behave_imp_weight,
            cu_seqlens=boundaries,
        )


def _counts(loss_mask: Tensor) -> dict[str, float]:
    """Count the tokens, and those in the mask, before any is rejected; Python numbers."""
    total, valid = loss_mask.numel(), int(loss_mask.count_nonzero())
    return {
        "n_total_tokens": float(total),
        "n_valid_tokens": float(valid),
        "n_masked_tokens": float(total - valid),
        "masked_token_ratio": 1.0 - valid / max(total, 1),
    }


def _result(tokens: _Tokens, call: LossCall) -> Result:
    """Return the loss, and the statistics that all of AReaL's losses have."""
    live, rejected = tokens.live, tokens.rejected
    counted = tokens.loss_mask != 0
    if call.objective.ratio == "token":
        # In AReaL's statistics a rejected token has a ratio, but is no part of the ratio of its sequence.
        token = call.replace(mask=tokens.loss_mask).token
    else:
        token = call.token
    if call.objective.surrogate == "cispo":
        weight, clipped = token.ratio, live & changed_by_clamp(token)
    else:
        by_token = call.objective.ratio == "token"
        weight = token.ratio.where(counted if by_token else live, 0)
        clipped = counted & token.clipped
    stat = {
        "loss": token.loss,
        "importance_weight": weight,
        "approx_kl": call.change,
        "clip_mask": clipped,
        "dual_clip_mask": counted & token.clipped_dual,
    }
    if rejected is not None and tokens.behaviour is not None:
        weight = rejected.behave_imp_weight.detach()
        kept = live & (weight > 0)
        stat |= {
            "loss": stat["loss"] * weight,
            "behave_approx_kl": (tokens.old - tokens.behaviour).detach().where(kept, 0),
            "behave_imp_weight": weight,
            "behave_mask": kept,
            "filtered_fraction": rejected.filtered_fraction,
        }
    return call.out.loss, stat


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


if __name__ == "__main__":
    importlib.import_module("grpo_fast.integrations.areal").patch()
    runpy.run_module("areal.infra.rpc.rpc_server", run_name="__main__", alter_sys=True)
