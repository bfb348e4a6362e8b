"""`GRPOTrainer`: TRL's trainer with the head and the loss of grpo_fast.

TRL 1.15 and 1.16 have the same loss, options and metrics; nothing here depends on which of them is installed.
"""

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import trl
from torch import Tensor

from grpo_fast.integrations.transformers import Head, causal_lm, check_head
from grpo_fast.integrations.trl import metrics
from grpo_fast.integrations.trl.head import log_probs
from grpo_fast.integrations.trl.metrics import Scored, per_row
from grpo_fast.integrations.trl.options import BY_ITEMS, DEFAULTS, objective
from grpo_fast.integrations.trl.sharing import Sharing
from grpo_fast.loss import linear_grpo_loss, policy_loss
from grpo_fast.notices import fell_back, logged, note, switch
from grpo_fast.objective import Objective
from grpo_fast.ops.backend import implementation

# The inputs of a batch that is not text alone.
MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)

# The options that TRL's loss reads from the trainer; it reads the others from its arguments.
HELD = (
    "beta",
    "entropy_coef",
    "importance_sampling_level",
    "loss_type",
    "max_completion_length",
    "off_policy_mask_threshold",
    "top_entropy_quantile",
)

# Steps of TRL's loss that the fused one does not call, or not always.
STEPS = ("_get_per_token_logps_and_entropies", "get_gamma_weights", "get_off_policy_mask")
LOSSES = ("compute_loss", "_compute_loss")


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's `GRPOTrainer` with the same arguments, options and metrics; head and loss are fused.

    Equivalent to `trl.GRPOTrainer`: the same loss and gradient up to rounding, without logits in memory. Old
    and reference log-probs come from the same operator.

    `train` prints one line that says what is fused, or why nothing is and what to change. TRL's own code
    computes the loss of batches with images, the loss with the auxiliary loss of a mixture of experts, and
    that of a subclass with `STEPS` of its own.

    Args:
        share_prompts: the completions of a micro-batch that have the same prompt share its forward
            (`grpo_fast.shared_prompt`). "auto" shares where it is exact and pays; "packed", "mask", "flex",
            "fork" or "bounded" is a route that must be possible; "off" gives each completion its own row, as
            TRL does.
        args, kwargs: those of TRL's trainer.

    Raises:
        ValueError: at the first loss, if the model's logits are not those of its last hidden states and its
            head (`check_head`).
    """

    # Attributes of TRL's trainer, which saves them with checkpoints.
    entropy_coef: float
    _last_world_entropy: float
    _entropy_window_stats: Tensor | None

    def __init__(self, *args: Any, share_prompts: str = "auto", **kwargs: Any) -> None:
        self._sharing = Sharing(share_prompts, self._say)
        super().__init__(*args, **kwargs)
        self.current_objective()  # raises where an option cannot be translated
        self._head_is_checked = False
        self._said: set[str] = set()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Print one line that says what is fused, and train."""
        reason = self._why_not_fused({})
        if reason:
            fell_back("trl_loss", reason, tell=self._say)
        else:
            self._say(self._what_is_fused())
        return super().train(*args, **kwargs)

    def _say(self, line: str, again: bool = True) -> None:
        """Print a line on the main process."""
        if self.accelerator.is_main_process and (again or line not in self._said):
            print(f"grpo_fast: {line}", flush=True)
        self._said.add(line)

    def _say_once(self, line: str) -> None:
        """Print a line on the main process, unless it has been printed."""
        self._say(line, again=False)

    def _what_is_fused(self) -> str:
        """Return the line that `train` prints where the loss is fused."""
        kind = type(causal_lm(self.model)).__name__
        where = implementation(torch.empty(0, device=self.accelerator.device))
        fused = f"({kind}, {self.loss_type}, {where})"
        parts = "head and loss"
        if self.top_entropy_quantile < 1:
            parts = "head, then loss (top_entropy_quantile < 1 needs all log-probs first),"
        elif self.off_policy_mask_threshold is not None and self.use_vllm:
            parts = "head, then loss (off_policy_mask_threshold needs all log-probs first),"
        line = f"{parts} fused {fused}"
        own = [name for name in LOSSES if self._overrides(name)]
        if own:
            line += f" where {type(self).__name__}.{own[0]} calls GRPOTrainer's"
        return line

    def current_objective(self) -> Objective:
        """Return the objective of this step: callbacks may change the options, which TRL reads each time."""
        options = {name: getattr(self.args, name) for name in DEFAULTS}
        options |= {name: getattr(self, name) for name in HELD}
        options |= {"epsilon": self.epsilon_low, "epsilon_high": self.epsilon_high}
        return objective(options)

    def _why_not_fused(self, inputs: Mapping[str, Any]) -> str | None:
        """Say why TRL's own loss has to run on these inputs, and what to change; None where ours can run."""
        if self.aux_loss_enabled:
            return (
                f"router_aux_loss_coef={self.router_aux_loss_coef} adds the auxiliary loss of a mixture of "
                "experts; GRPOConfig(router_aux_loss_coef=0.0) trains without it, and fused"
            )
        own = [name for name in STEPS if self._overrides(name)]
        if own:
            return (
                f"{type(self).__name__} has its own {', '.join(own)}, which the fused loss does not call; "
                "it is fused without"
            )
        found = [name for name in MULTIMODAL if inputs.get(name) is not None]
        if found:
            return f"the inputs are not text alone ({', '.join(found)}); batches of text are fused"
        return None

    def _overrides(self, name: str) -> bool:
        """Tell whether a subclass or this object has a method of its own of this name."""
        return name in vars(self) or getattr(type(self), name) is not getattr(GRPOTrainer, name)

    def _agreed(self, reason: str | None) -> str | None:
        """Return one answer on every process, also where only some of them have images.

        Both losses gather metrics, but not the same number of times. Processes with different answers would
        wait for each other forever.
        """
        if not self._is_vlm or self.accelerator.num_processes == 1:
            return reason
        mine = torch.tensor([reason is not None], device=self.accelerator.device)
        someone = bool(self.accelerator.gather(mine).any())
        if reason is None and someone:
            return "the inputs of another process are not text alone; batches of text are fused"
        return reason

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute old and reference log-probs by the operator that also scores the policy."""
        reason = self._why_not_fused(inputs)
        if switch("GRPO_FAST_STRICT"):  # then all processes raise, and none waits for the others
            reason = self._agreed(reason)
        if reason is not None:
            fell_back("trl_loss", reason, tell=self._say_once)
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
                **inputs,
            )
        size = batch_size or len(input_ids)
        parts = []
        for ids, attention in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            parts.append(self._log_probs(model, ids, attention, logits_to_keep, compute_entropy))
        logps, entropy = (torch.cat([part[i] for part in parts]) for i in range(2))
        return logps, entropy if compute_entropy else None, None

    def _log_probs(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, T: int, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """Compute log-probs and entropy of the last T tokens, (B, T); 0 where there is no attention."""
        ids, mask = input_ids[:, -T:], attention_mask[:, -T:].bool()

        def score(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
            with self._as_given(hidden):
                logps, entropy = log_probs(
                    hidden,
                    head,
                    ids,
                    mask=mask,
                    temperature=self.temperature,
                    with_entropy=with_entropy,
                )
            entropy = torch.zeros_like(logps) if entropy is None else entropy
            return torch.where(mask, logps, 0), torch.where(mask, entropy, 0)

        with self.accelerator.autocast():
            return self._sharing.with_head(
                model, score, input_ids, attention_mask, T, self._head_dtype()
            )

    def _head_dtype(self) -> torch.dtype | None:
        """Return the dtype of the products with the head; None for that of the model's own head."""
        return torch.float32 if self.args.cast_lm_head_to_fp32 else None

    @staticmethod
    def _as_given(hidden: Tensor) -> AbstractContextManager[Any]:
        """Turn autocast off: the hidden states have its dtype already."""
        return torch.autocast(hidden.device.type, enabled=False)

    @logged("TRL GRPOTrainer loss")
    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        reason = self._agreed(self._why_not_fused(inputs))
        if reason is not None:
            fell_back("trl_loss", reason, tell=self._say_once)
            note("not fused, TRL's own loss")
            return super()._compute_loss(model, inputs)
        if not self._head_is_checked:
            # Only now the model has its final device and its wrappers. A compilation would not pay for four
            # tokens.
            with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                check_head(model)
            self._head_is_checked = True
        mode = "train" if self.model.training else "eval"
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        # TRL divides by the tokens of all devices and of all micro-batches of a generation. Our loss times
        # `unit` is divided by one device's share of the tokens of one optimiser step.
        unit, num_items = 1.0, None
        if self.loss_type in BY_ITEMS:
            num_items = inputs["num_items_in_batch"].clamp(min=1)
            unit = float(self.accelerator.num_processes)
            unit *= self.args.steps_per_generation if mode == "train" else 1
        arguments = {
            "mask": mask,
            "old_logps": inputs.get("old_per_token_logps"),
            "ref_logps": inputs["ref_per_token_logps"] if self.beta else None,
            "importance_weights": self._importance_weights(inputs),
            "num_items": num_items,
        }
        compute = self._log_probs_first if self._masks_by_log_probs(inputs) else self._at_once
        note("head, then loss" if compute == self._log_probs_first else "head and loss fused")
        scored = compute(model, inputs, arguments, unit, steps)
        if self.loss_type in BY_ITEMS:  # as TRL reports it
            scored = scored._replace(policy_loss=scored.policy_loss / steps)
        metrics.report(self, mode, inputs, mask, scored)
        return scored.loss

    def _masks_by_log_probs(self, inputs: dict[str, Any]) -> bool:
        """Tell whether a mask depends on log-probs, in a way that the objective does not cover."""
        by_sampler = self.off_policy_mask_threshold is not None and (
            "sampling_per_token_logps" in inputs
        )
        return by_sampler or self.top_entropy_quantile < 1

    def _importance_weights(self, inputs: dict[str, Any]) -> Tensor | None:
        """Return the weights of vLLM's correction, and those of VESPO, where TRL uses them."""
        if self.loss_type == "vespo":
            return inputs.get("importance_sampling_ratio")
        if self.use_vllm and self.vllm_importance_sampling_correction:
            return inputs["importance_sampling_ratio"]
        return None

    def _bonus_coefficient(self) -> float:
        """Return the entropy coefficient of this optimiser step."""
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            return 0.0
        return self.entropy_coef

    def _terms(
        self, inputs: dict[str, Any], mask: Tensor, logps: Tensor
    ) -> tuple[Objective, Tensor]:
        """Return the objective without entropy bonus, and its advantages.

        The objective has an off-policy mask by the distance to the old policy. TRL may use the distance to
        the sampler, or none, on policy. Then the advantages are 0 where TRL's mask drops a token: it has no
        policy term, and keeps its KL.
        """
        chosen = dataclasses.replace(
            self.current_objective(),
            top_entropy_quantile=1.0,
            entropy_coef=0.0,
            entropy_reduction="same",
        )
        advantages, old = inputs["advantages"], inputs.get("old_per_token_logps")
        sampler = inputs.get("sampling_per_token_logps", old)
        if self.off_policy_mask_threshold is None or (sampler is old and old is not None):
            return chosen, advantages
        advantages = per_row(advantages)
        kept = self.get_off_policy_mask(
            advantages,
            logps,
            logps.detach() if sampler is None else sampler,
            mask.to(logps.dtype),
            self.off_policy_mask_threshold,
        )
        advantages = torch.where(kept.bool(), advantages, 0)
        if advantages.shape != mask.shape:
            advantages = advantages.squeeze(1)
        return dataclasses.replace(chosen, off_policy_threshold=None), advantages

    def _at_once(
        self,
        model: Any,
        inputs: dict[str, Any],
        arguments: dict[str, Any],
        unit: float,
        steps: int,
    ) -> Scored:
        """Compute loss and gradient in one pass over the head."""
        input_ids, attention_mask = _sequences(inputs)
        ids, mask = inputs["completion_ids"], arguments["mask"]
        # If TRL's mask needs log-probs here, it is on policy, and their values do not matter.
        chosen, advantages = self._terms(inputs, mask, torch.zeros_like(mask, dtype=torch.float32))
        coefficient = self._bonus_coefficient()
        if coefficient:
            chosen = dataclasses.replace(
                chosen, entropy_coef=coefficient / unit, entropy_reduction="token_mean"
            )

        def score(hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
            with self._as_given(hidden):
                out = linear_grpo_loss(
                    hidden,
                    head.weight,
                    ids,
                    advantages=advantages,
                    temperature=self.temperature,
                    objective=chosen,
                    loss_scale=unit / steps,
                    return_entropy=True,
                    **head.options,
                    **arguments,
                )
            assert out.entropy is not None
            means = [out.metrics[name] for name in ("entropy", "kl") if name in out.metrics]
            return out.loss, out.logps, out.entropy, *means

        with self.accelerator.autocast():
            loss, logps, entropy, mean_entropy, *kl = self._sharing.with_head(
                model, score, input_ids, attention_mask, ids.shape[1], self._head_dtype()
            )
        # TRL reports the loss without the bonus; the pass has subtracted it.
        without_bonus = steps * loss.detach() + coefficient * mean_entropy
        return Scored(loss, without_bonus, logps, entropy, kl[0] if kl else None, mask)

    def _log_probs_first(
        self,
        model: Any,
        inputs: dict[str, Any],
        arguments: dict[str, Any],
        unit: float,
        steps: int,
    ) -> Scored:
        """Compute log-probs and entropy first, and then the loss: masks by log-probs need them."""
        input_ids, attention_mask = _sequences(inputs)
        ids, mask = inputs["completion_ids"], arguments["mask"]
        logps, entropy = self._log_probs(model, input_ids, attention_mask, ids.shape[1], True)
        chosen, advantages = self._terms(inputs, mask, logps)
        bonus_mask = mask
        if self.top_entropy_quantile < 1:  # a quantile over the tokens of all devices
            bonus_mask = self.get_high_entropy_mask(
                entropy.detach(), mask, 1 - self.top_entropy_quantile
            )
            advantages = torch.where(bonus_mask, per_row(advantages), 0)
        out = policy_loss(
            logps, advantages=advantages, objective=chosen, loss_scale=unit, **arguments
        )
        total = (out.loss + self._entropy_bonus(entropy, bonus_mask)) / steps
        kl = out.metrics.get("kl")
        return Scored(total, out.loss.detach(), out.logps, entropy.detach(), kl, bonus_mask)

    def _entropy_bonus(self, entropy: Tensor, mask: Tensor) -> Tensor:
        """Return the entropy bonus as a loss: a mean over the tokens of `mask`, for every loss type."""
        bonus = Objective(
            surrogate="reinforce", reduction="token_mean", entropy_coef=self._bonus_coefficient()
        )
        nothing = torch.zeros_like(entropy)
        return policy_loss(
            nothing, advantages=nothing, mask=mask, entropy=entropy, objective=bonus
        ).loss


def _sequences(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Join prompts and completions: ids and attention mask, (B, P + T)."""
    ids, attention = (
        torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1)
        for name in ("ids", "mask")
    )
    return ids, attention
