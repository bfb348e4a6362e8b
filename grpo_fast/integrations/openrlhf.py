"""The adapter of OpenRLHF 0.11.2: its `PolicyLoss`.

    python -m grpo_fast.integrations.openrlhf ...  # instead of: python -m openrlhf.cli.train_ppo_ray

In your own script, call `patch()` before the actors start (OpenRLHF has no registry). Constructor, arguments,
loss, gradient and returned statistics are the same. The KL and entropy terms stay OpenRLHF's.
"""

import importlib
import runpy
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.integrations.shared.call import (
    LossCall,
    clip_fraction,
    masked_mean,
    sequence_average,
    sequence_mean,
    token_average,
)
from grpo_fast.integrations.shared.options import Entry, entry, objective_of
from grpo_fast.integrations.shared.packages import VERSIONS, require
from grpo_fast.weights import binary_divergence

SUPPORTED = VERSIONS["openrlhf"]
ACTOR = "openrlhf.trainer.ray.ppo_actor"
NAMES: dict[str, Entry] = {
    "epsilon_low": entry("clip_eps_low"),
    "epsilon_high": entry("clip_eps_high"),
    "dual_clip": entry("dual_clip"),
}


class PolicyLoss(nn.Module):
    """A replacement of `openrlhf.models.PolicyLoss`, with the arguments of 0.11.2; see there.

    Raises:
        ValueError: a choice is unknown, or OpenRLHF refuses the combination.
        TypeError: an argument belongs to another release.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: tuple[float, float] | list[float] = (0.5, 5.0),
        **others: Any,
    ) -> None:
        super().__init__()
        if others:  # 0.11.0's `enable_vllm_is_correction`, for one
            raise TypeError(
                f"PolicyLoss: unknown arguments {sorted(others)}: this needs openrlhf >= 0.11.2, < 0.12"
            )
        self.policy_loss_type = policy_loss_type
        self.token_level_loss = token_level_loss and policy_loss_type == "ppo"
        self.is_correction_level = is_correction_level
        self.is_correction_mode = is_correction_mode
        self.is_correction_gating = is_correction_gating
        self.is_correction_threshold = is_correction_threshold
        self.options = {
            "epsilon_low": clip_eps_low,
            "epsilon_high": clip_eps_high,
            "dual_clip": dual_clip,
        }
        self._check()

    def _check(self) -> None:
        level, mode, gating = (
            self.is_correction_level,
            self.is_correction_mode,
            self.is_correction_gating,
        )
        for name, value, choices in (
            ("policy_loss_type", self.policy_loss_type, ("ppo", "gspo")),
            ("is_correction_level", level, ("off", "token", "seq")),
            ("is_correction_mode", mode, ("mask", "clip")),
            ("is_correction_gating", gating, ("ratio", "binary_kl", "tv")),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r} is unknown; choose from {', '.join(choices)}")
        if mode == "clip" and (level == "seq" or gating != "ratio"):
            raise ValueError(
                "is_correction_mode='clip' needs is_correction_level='token' and "
                f"is_correction_gating='ratio', got {level!r} and {gating!r}"
            )
        threshold = self.is_correction_threshold
        if gating != "ratio" and level != "off" and threshold[0] > 0:
            raise ValueError(
                f"is_correction_threshold={tuple(threshold)}: a divergence ({gating}) is bounded from "
                "above alone"
            )
        if level != "off" and not threshold[0] <= threshold[1]:
            raise ValueError(
                f"is_correction_threshold: want (low, high), low <= high, got {tuple(threshold)}"
            )
        objective_of(f"openrlhf/{self.policy_loss_type}", self.options, NAMES)

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return (loss, clip ratio, E[old - new], E[rollout - old], share outside the band).

        All tensors are (B, T). The last two are None without a correction.
        """
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        if self.is_correction_level != "off" and rollout_log_probs is None:
            raise ValueError(
                f"rollout_log_probs: needed, since is_correction_level={self.is_correction_level!r}"
            )
        behaviour, weights, rollout_kl, dropped = old_log_probs, None, None, None
        if self.is_correction_level != "off":
            assert rollout_log_probs is not None
            if self.policy_loss_type == "gspo":
                behaviour = rollout_log_probs  # the ratio itself is to the sampler
            else:
                weights, dropped = self._correct(old_log_probs, rollout_log_probs, mask)
                rollout_kl = masked_mean(rollout_log_probs - old_log_probs, mask)
        if self.token_level_loss:
            how = token_average(batch_num_tokens, 1.0 if batch_num_tokens is None else dp_size)
        else:
            ranks = 1 if global_batch_size is None else dp_size
            how = sequence_average("sequence_mean", mask, global_batch_size, ranks)
        call = LossCall(
            preset=f"openrlhf/{self.policy_loss_type}",
            options=self.options,
            names=NAMES,
            average=how,
            logps=log_probs,
            old_logps=behaviour,
            advantages=advantages,
            mask=mask,
            importance_weights=weights,
        )
        kl = masked_mean(old_log_probs - log_probs, mask)
        return call.out.loss, clip_fraction(call), kl, rollout_kl, dropped

    def _correct(self, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of the mismatch correction, and the share of tokens or sequences outside."""
        low, high = self.is_correction_threshold
        seq, live = self.is_correction_level == "seq", mask != 0

        def per_unit(x: Tensor) -> Tensor:  # the mean of a sequence, or the value of a token
            return sequence_mean(x, mask)[:, :1] if seq else x

        gap = torch.where(live, (old - rollout).detach().float(), 0)
        if self.is_correction_gating == "ratio":
            statistic = per_unit(gap).exp()
        else:
            kind = self.is_correction_gating.removeprefix("binary_")
            statistic = per_unit(binary_divergence(rollout, old, kind=kind, mask=live, floor=1e-6))
        # A missing log-prob makes NaN. The mask drops it, and the clamp keeps it.
        if self.is_correction_mode == "clip":
            weights, outside = statistic.clamp(low, high), (statistic < low) | (statistic > high)
        else:
            outside = ~((statistic >= low) & (statistic <= high))
            weights = gap.exp().where(~outside, 0)
        return weights, outside.float().mean() if seq else masked_mean(outside, mask)


def patch() -> None:
    """Give the policy actors that start after this call our `PolicyLoss`, also in processes of their own.

    The process of an actor imports OpenRLHF again, so a name replaced here is not replaced there. Ray sends
    the class of the actor with the globals that it uses, and the trainer is one of them. Ours is a local
    class, so Ray sends it by value.

    Raises:
        ImportError: OpenRLHF is not installed, or its version is not 0.11.2 or a later 0.11.
    """
    require("openrlhf", *SUPPORTED)
    home: Any = importlib.import_module(ACTOR)
    if hasattr(home.ActorPPOTrainer, "loss_of_grpo_fast"):
        return

    class ActorPPOTrainer(home.ActorPPOTrainer):
        loss_of_grpo_fast = PolicyLoss

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            actor, correction = self.args.actor, self.args.algo.advantage
            self.actor_loss_fn = self.loss_of_grpo_fast(
                clip_eps_low=actor.eps_clip_low_high[0],
                clip_eps_high=actor.eps_clip_low_high[1],
                dual_clip=actor.dual_clip,
                token_level_loss=actor.loss_agg_mode == "token-mean",
                policy_loss_type=actor.policy_loss_type,
                is_correction_level=correction.is_correction_level,
                is_correction_mode=correction.is_correction_mode,
                is_correction_gating=correction.is_correction_gating,
                is_correction_threshold=correction.is_correction_threshold,
            )

    home.ActorPPOTrainer = ActorPPOTrainer


if __name__ == "__main__":
    # Imported by its name: Ray's workers cannot import what is in __main__.
    importlib.import_module("grpo_fast.integrations.openrlhf").patch()
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)
