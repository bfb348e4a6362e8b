"""Log-probs and losses of completions, from hidden states and shared prompts, or from logits."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from grpo_fast import ops, shared_prompt
from grpo_fast.integrations.transformers import Head, check_head
from grpo_fast.loss import grpo_loss, linear_grpo_loss
from grpo_fast.notices import fell_back
from grpo_fast.objective import Objective
from grpo_fast.ops.linear_logprob import linear_logprob
from grpo_fast.shared_prompt import Plan, passes
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.rollout import Rollout, completion_logits

T = TypeVar("T")
# One row without padding; prompts side by side, and their completions; each completion with its prompt.
Layout = Literal["packed", "shared", "apart"]
LAYOUTS: dict[str, Layout] = {
    "packed": "packed",
    "unshared": "apart",
}  # of routes; others: "shared"


@dataclass
class MicroBatch:
    """Completions that pass through the model together.

    Attributes:
        plan: which of them share a prompt; None if the losses come from logits.
        layout: how they pass through the model.
        old_logps, entropy, ref_logps, importance: (B, T); `Learner` fills them in.
        mismatch: (tokens,) the policy's log-probs minus those of another engine that sampled.
        idle: it has no part in the loss; it keeps processes that share the weights in step.
    """

    rollout: Rollout
    advantages: Tensor
    plan: Plan | None = None
    layout: Layout = "apart"
    old_logps: Tensor | None = None
    entropy: Tensor | None = None
    ref_logps: Tensor | None = None
    importance: Tensor | None = None
    mismatch: Tensor | None = None
    idle: bool = False


class Scored(NamedTuple):
    """The loss of a micro-batch, its values per token, (B, T), and the statistics of `LossOutput`."""

    loss: Tensor
    logps: Tensor
    entropy: Tensor | None
    statistics: Tensor


class Forward:
    """The forward of a policy, as a configuration asks for it.

    The logits of a batch are never in memory, unless the model has layers between its last hidden states and
    its logits: then a line says so, and each completion has its own row.
    """

    def __init__(
        self, policy: Policy, config: TrainConfig, objective: Objective, shown: bool = True
    ) -> None:
        self.policy, self.config, self.objective, self.shown = policy, config, objective, shown
        self.from_logits = False
        self.route = "unshared" if config.share_prompts == "off" else config.share_prompts
        self._said: set[str] = set()
        self._compared: weakref.WeakSet[Any] = weakref.WeakSet()
        try:
            check_head(policy.model)
        except (TypeError, ValueError) as error:
            if config.share_prompts not in ("auto", "off"):
                raise ValueError(f"share_prompts={config.share_prompts!r}: {error}") from error
            self.from_logits = True
            fell_back("from_logits", str(error), tell=print, quiet=not shown)

    def compare(self, model: Any) -> None:
        """Find out which routes are exact for a model, if there is one, before micro-batches are planned."""
        if model is None or self.from_logits or self.route != "auto" or model in self._compared:
            return
        self._compared.add(model)
        with self.policy.autocast():
            passes.compare(model, self.config.gradient_checkpointing)

    def micro_batch(self, rollout: Rollout, advantages: Tensor) -> MicroBatch:
        """Plan the forward of some completions."""
        if self.from_logits:
            return MicroBatch(rollout, advantages)
        plan = shared_prompt.plan(
            rollout.prompt_ids,
            rollout.completion_ids,
            prompt_mask=rollout.prompt_mask,
            completion_mask=rollout.mask,
        )
        choice = shared_prompt.choose(self.policy.model, plan, self.route)
        if choice.route not in self._said and self.route == "auto" and self.shown:
            self._said.add(choice.route)
            print(choice.line)
        return MicroBatch(rollout, advantages, plan, LAYOUTS.get(choice.route, "shared"))

    @property
    def layout(self) -> Layout:
        """Return the layout with the fewest tokens that a micro-batch may have."""
        if self.from_logits:
            return "apart"
        return "packed" if self.route == "auto" else LAYOUTS.get(self.route, "shared")

    @torch.no_grad()
    def log_probs(self, model: Any, batch: MicroBatch) -> Tensor:
        """Compute the log-probs of the completions, (B, T)."""
        rollout, plan, temperature = batch.rollout, batch.plan, self.config.temperature
        if plan is None:
            logits = self._logits(model, rollout)
            ids = rollout.completion_ids
            return ops.logprob(logits, ids, temperature=temperature, mask=rollout.mask)

        def score(hidden: Tensor, head: Head) -> Tensor:
            return linear_logprob(
                hidden, head.weight, plan.targets, temperature=temperature, **head.options
            )

        return plan.padded(self._with_head(model, plan, score))

    def loss(self, batch: MicroBatch, with_entropy: bool, **given: Any) -> Scored:
        """Compute the loss of a micro-batch.

        Args:
            with_entropy: compute log-probs and entropy of all tokens.
            given: `num_items` and `loss_scale` of the losses.
        """
        rollout, plan = batch.rollout, batch.plan
        given |= {
            "advantages": batch.advantages,
            "temperature": self.config.temperature,
            "objective": self.objective,
            "return_entropy": with_entropy,
        }
        values = {
            "old_logps": batch.old_logps,
            "ref_logps": batch.ref_logps,
            "importance_weights": batch.importance,
        }
        if plan is None:
            logits = self._logits(self.policy.model, rollout)
            given |= values | {"mask": rollout.mask, "inplace": True}
            out = grpo_loss(logits, rollout.completion_ids, **given)
            return Scored(out.loss, out.logps, out.entropy, out.statistics)
        given |= {name: x if x is None else plan.packed(x) for name, x in values.items()}
        given["cu_seqlens"] = plan.cu_seqlens

        def score(hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
            out = linear_grpo_loss(hidden, head.weight, plan.targets, **head.options, **given)
            entropy = () if out.entropy is None else (out.entropy,)
            return out.loss, out.statistics, out.logps, *entropy

        loss, statistics, *scores = self._with_head(self.policy.model, plan, score)
        logps, entropy = [*(plan.padded(x) for x in scores), None][:2]
        assert logps is not None
        return Scored(loss, logps, entropy, statistics)

    def _with_head(self, model: Any, plan: Plan, score: Callable[[Tensor, Head], T]) -> T:
        """Run `score(hidden, head)`, with the hidden states in the dtype of the activations."""
        kind = self.policy.device.type

        def as_given(hidden: Tensor, head: Head) -> T:
            with torch.autocast(kind, enabled=False):
                return score(hidden, head)

        recompute = self.config.gradient_checkpointing
        with self.policy.autocast():
            return shared_prompt.with_head(
                model, plan, as_given, route=self.route, recompute=recompute
            )

    def _logits(self, model: Any, rollout: Rollout) -> Tensor:
        recompute = self.config.gradient_checkpointing
        with self.policy.autocast(), shared_prompt.layers_recomputed(model, recompute):
            return completion_logits(model, rollout)
