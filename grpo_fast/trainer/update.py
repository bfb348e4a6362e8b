"""The GRPO update: optimiser steps on a batch of completions and their rewards."""

import contextlib
import functools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer, get_scheduler
from transformers.training_args import OptimizerNames

from grpo_fast import ops, weights
from grpo_fast.checks import is_dtensor
from grpo_fast.loss import fold_statistics, metrics_from
from grpo_fast.metrics import STATISTICS
from grpo_fast.trainer import model as models
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.forward import Forward, Layout, MicroBatch
from grpo_fast.trainer.model import Policy
from grpo_fast.trainer.parallel import Team, shard
from grpo_fast.trainer.rollout import Rollout
from grpo_fast.trainer.workload import BUSY


class Masters:
    """Float32 copies of bfloat16 weights, and their float32 gradients.

    Every backward pass adds to the gradient of the copy. The optimizer changes the copies, and `publish`
    rounds them to the weights: so no update is lost because it is small beside its weight.
    """

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights
        self.copies = [
            nn.Parameter(p.detach().float()) if p.dtype == torch.bfloat16 else p for p in weights
        ]
        for p, master in zip(weights, self.copies, strict=True):
            if master is not p:
                p.register_post_accumulate_grad_hook(functools.partial(_collect, master))

    @torch.no_grad()
    def publish(self) -> None:
        """Round the copies to the weights."""
        for p, master in zip(self.weights, self.copies, strict=True):
            if master is not p:
                p.copy_(master)


def _collect(master: nn.Parameter, p: Tensor) -> None:
    if p.grad is None:
        return
    if master.grad is None:
        master.grad = p.grad.float()
    else:
        master.grad += p.grad
    p.grad = None


# Of transformers: those that need neither the model nor a mode of their own, and whose state is in tensors.
OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_8bit", "adamw_torch_4bit", "adafactor", "sgd",
    "adagrad", "rmsprop", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit",
    "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "ademamix", "ademamix_8bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
)  # fmt: skip


def scheduler_of(optimizer: torch.optim.Optimizer, config: TrainConfig) -> Any:
    """Return the learning rate schedule of a configuration, which takes a step at each update."""
    per_step = config.num_iterations
    warmup, steps = config.lr_warmup_steps * per_step, config.steps * per_step
    return get_scheduler(config.lr_scheduler, optimizer, warmup, steps)


def optimizer_of(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimiser of a configuration, by its name in transformers.

    Raises:
        ValueError: there is none of this name, or its library is missing.
    """
    if config.optim not in OPTIMIZERS:
        raise ValueError(f"optim={config.optim!r} is unknown; choose from {', '.join(OPTIMIZERS)}")
    rounds = config.optim in ("adamw_torch_8bit", "adamw_torch_4bit")
    bare = config.weights == "bfloat16_only"
    if bare and not rounds:
        raise ValueError(
            f"weights='bfloat16_only': with optim={config.optim!r} small updates would be rounded away; "
            "adamw_torch_8bit and adamw_torch_4bit (torchao) round them at random, or take --weights bfloat16"
        )
    arguments: Any = SimpleNamespace(
        optim=OptimizerNames(config.optim),
        optim_args="bf16_stochastic_round=1" if bare else None,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
    )
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        return kind(parameters, **{"weight_decay": config.weight_decay, **options})
    except (ImportError, ValueError, TypeError, AttributeError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"optim={config.optim!r}: {text}") from error


def check_optimizer(config: TrainConfig) -> None:
    """Refuse an optimizer that cannot be made.

    Raises:
        ValueError: as `optimizer_of`.
    """
    optimizer_of([nn.Parameter(torch.zeros(1))], config)


class Learner:
    """The optimiser, the schedule and the reference model of a policy.

    Args:
        reference: the model before GRPO; None: as `policy` is now. It is needed where beta is above 0.
    """

    def __init__(
        self,
        policy: Policy,
        config: TrainConfig,
        team: Team | None = None,
        reference: Any = None,
    ) -> None:
        self.policy, self.config = policy, config
        self.team = team or Team(policy.device)
        self.objective = config.to_objective()
        self.updates = 0  # optimiser steps so far
        self.advantages: Tensor | None = None  # (B,) of the last batch of this process
        self.reference = None
        if self.has_reference and not policy.adapted:
            self.reference = reference or models.reference(policy)
        self.sharded = config.fsdp and self.team.size > 1
        if self.sharded:
            policy.model = shard(policy.model, policy.dtype)
            if self.reference is not None:
                self.reference = shard(self.reference, policy.dtype)
        self.forward = Forward(policy, config, self.objective, self.team.main)
        self.masters = Masters(policy.trained) if policy.masters else None
        self.parameters = self.masters.copies if self.masters else policy.trained
        self.optimizer = optimizer_of(self.parameters, config)
        self.scheduler = scheduler_of(self.optimizer, config)

    @property
    def has_reference(self) -> bool:
        """Tell whether the loss has a KL to the policy before GRPO."""
        return bool(self.objective.beta)

    def update(self, rollout: Rollout, rewards: Tensor) -> dict[str, float]:
        """Make `config.num_iterations` optimiser steps on one batch; return the metrics over all of them.

        Args:
            rollout: the completions of this process.
            rewards: (B,), groups of `config.group_size` consecutive completions; NaN: without a reward.

        Raises:
            FloatingPointError: the loss or a gradient is not finite; this step did not change the weights.
        """
        micro_batches, counts = self.prepare(rollout, rewards)
        learning_rate = float(self.scheduler.get_last_lr()[0])
        steps = []
        for _ in range(self.config.num_iterations):
            loss, norm, statistics = self.backward(micro_batches, counts)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
            self.optimizer.step()
            if self.masters:
                self.masters.publish()
            self.scheduler.step()
            self.updates += 1
            steps.append((loss, norm, statistics))
        losses, norms, gathered = zip(*steps, strict=True)
        folded = metrics_from(fold_statistics(self.team.gathered(torch.cat(gathered))))
        metrics = {name: value.item() for name, value in folded.items() if name != "tokens"}
        metrics["kl"] = metrics["kl"] if self.has_reference else math.nan
        return (
            metrics
            | self.measured(micro_batches, rollout)
            | {
                "loss": sum(losses) / len(losses),
                "clip_fraction": sum(
                    v for k, v in metrics.items() if k.startswith("clip_fraction_")
                ),
                "grad_norm": sum(norms) / len(norms),
                "learning_rate": learning_rate,
            }
        )

    def prepare(
        self, rollout: Rollout, rewards: Tensor
    ) -> tuple[list[MicroBatch], dict[str, Tensor | int]]:
        """Cut a batch into micro-batches, with advantages, reference and old log-probs as needed.

        Returns:
            The micro-batches, without completions that have no gradient; and the denominators of the loss
            over all processes: "tokens" and "sequences".
        """
        config, team = self.config, self.team
        advantages = ops.group_advantage(
            team.gathered(rewards),
            group_size=config.group_size,
            scale=config.scale_rewards,
            nan="skip",
        )
        advantages = advantages.view(team.size, -1)[team.rank].to(self.policy.device)
        counted = torch.ones_like(advantages, dtype=torch.bool)
        if config.without_silent_groups:
            groups = (advantages != 0).view(-1, config.group_size)
            counted = groups.any(1).repeat_interleave(config.group_size)
        tokens = team.total(rollout.mask[counted].sum())
        counts: dict[str, Tensor | int] = {
            "tokens": tokens.clamp(min=1),
            "sequences": max(1, int(team.total(counted.sum()))),
        }
        alive = (self.needs_all | (advantages != 0)) & counted
        self.advantages = advantages

        self.policy.model.eval()  # as in the backward
        self.forward.compare(self.policy.model)
        self.forward.compare(self.reference)
        micro_batches = []
        for rows in micro_batches_of(rollout, alive, config, self.forward.layout):
            micro_batches += self.planned(rollout, advantages, rows, self.forward.layout)
        missing = team.most(len(micro_batches)) - len(micro_batches) if self.sharded else 0
        for _ in range(missing):
            micro_batches.append(self.forward.micro_batch(rollout[:1], advantages[:1]))
            micro_batches[-1].idle = True
        for batch in micro_batches:
            if self.has_reference:
                with self.before_grpo() as model:
                    batch.ref_logps = self.forward.log_probs(model, batch)
            if batch.rollout.sampling_logps is not None:
                self.correct(batch)
        return micro_batches, counts

    def planned(
        self, rollout: Rollout, advantages: Tensor, rows: Tensor, layout: Layout
    ) -> list[MicroBatch]:
        """Plan the forward of some completions, in several micro-batches if they have too many tokens.

        Args:
            layout: in which they are few enough; the forward may take another one.
        """
        batch = self.forward.micro_batch(rollout[rows], advantages[rows.to(advantages.device)])
        if batch.layout == layout:
            return [batch]
        only = torch.zeros(len(advantages), dtype=torch.bool)
        only[rows] = True
        parts = micro_batches_of(rollout, only, self.config, batch.layout)
        if len(parts) == 1:
            return [batch]
        return [x for part in parts for x in self.planned(rollout, advantages, part, batch.layout)]

    @property
    def needs_all(self) -> bool:
        """Tell whether completions with an advantage of 0 have a gradient, too."""
        modes = self.objective.terms.modes
        return modes.has_kl or modes.has_bonus or modes.has_penalty or modes.by_entropy

    @contextlib.contextmanager
    def before_grpo(self) -> Iterator[Any]:
        """Give the model before GRPO."""
        if self.reference is not None:
            yield self.reference
        else:
            with self.policy.without_adapter() as model:
                yield model

    def correct(self, batch: MicroBatch) -> None:
        """Weigh the tokens of another engine by the ratio of the policy to what it sampled from."""
        config, sampled = self.config, batch.rollout.sampling_logps
        assert sampled is not None
        old = self.forward.log_probs(self.policy.model, batch)
        batch.old_logps = old if config.num_iterations > 1 else None
        batch.mismatch = (old - sampled)[batch.rollout.mask]
        if config.mismatch != "none":
            batch.importance = weights.importance_weights(
                old,
                sampled,
                mask=batch.rollout.mask,
                level="token",
                mode=config.mismatch,
                high=config.mismatch_cap,
            )

    def backward(
        self, micro_batches: list[MicroBatch], counts: dict[str, Tensor | int]
    ) -> tuple[float, float, Tensor]:
        """Compute the clipped gradients of the loss of the whole batch.

        Args:
            counts: the denominators that `prepare` returns.

        Returns:
            The loss, the norm before clipping, and the statistics of `LossOutput`, (micro-batches, 16).
        """
        model, config, team = self.policy.model, self.config, self.team
        # With dropout the policy that is scored would not be the policy that sampled.
        model.eval()
        for p in self.parameters:
            p.grad = None
        token_mean = self.objective.reduction == "token_mean"
        total = torch.zeros((), device=self.policy.device)
        # The first row is that of no tokens, in case there are none.
        nothing = [0.0] * (len(STATISTICS) - 2) + [math.inf, -math.inf]
        statistics = torch.tensor([nothing], device=self.policy.device)
        for batch in micro_batches:
            first = batch.entropy is None  # the first step on these completions
            out = self.forward.loss(
                batch,
                with_entropy=first,
                num_items=counts["tokens"] if token_mean else None,
                # The other reductions are means over sequences.
                loss_scale=None if token_mean else len(batch.advantages) / counts["sequences"],
            )
            if first:
                batch.entropy = out.entropy
                if batch.old_logps is None and config.num_iterations > 1:
                    batch.old_logps = out.logps.detach()
            # FSDP2 averages gradients over the processes.
            share = 0 if batch.idle else team.size if self.sharded else 1
            (out.loss * share).backward()
            if not batch.idle:
                total += out.loss.detach()
                statistics = torch.cat([statistics, out.statistics[None].to(statistics)])
        if not self.sharded:
            team.sum_gradients(self.parameters)
        if not micro_batches:  # the optimizer takes its step nevertheless, as with gradients of 0
            for p in self.parameters:
                if p.grad is None:  # else other processes have gradients
                    p.grad = torch.zeros_like(p)
        norm: Any = nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        norm = norm.full_tensor() if is_dtensor(norm) else norm
        return team.total(total).item(), norm.item(), statistics

    def measured(self, micro_batches: list[MicroBatch], rollout: Rollout) -> dict[str, float]:
        """Return the metrics of the completions that passed through the model, over all processes."""
        batches = [b for b in micro_batches if not b.idle]
        entropies = [b.entropy[b.rollout.mask] for b in batches if b.entropy is not None]
        found = {"entropy": _sum_and_count(entropies)}
        off = [b.mismatch for b in batches if b.mismatch is not None]
        if rollout.sampling_logps is not None:
            found["mismatch_kl"] = _sum_and_count([d.exp() - 1 - d for d in off])
        gathered = self.team.objects(found)
        metrics = {}
        for name in found:
            sums, counts = zip(*(one[name] for one in gathered), strict=True)
            metrics[name] = sum(sums) / sum(counts) if sum(counts) else math.nan
        forwarded = sum(self.team.objects(sum(len(b.advantages) for b in batches)))
        metrics["forwarded"] = forwarded / (len(rollout.prompts) * self.team.size)
        if rollout.sampling_logps is not None:
            largest = max([d.max().exp().item() for d in off if len(d)], default=math.nan)
            metrics["mismatch_ratio_max"] = max(self.team.objects(largest))
        return metrics


def _sum_and_count(values: list[Tensor]) -> tuple[float, int]:
    return sum(x.double().sum().item() for x in values), sum(x.numel() for x in values)


class Size(NamedTuple):
    """The completions of a micro-batch so far: how many there are, and how long.

    Attributes:
        real: tokens, with each prompt once.
        prompts, widest: the number of prompts, and the length of the longest.
        completions, longest: the number of completions, and the length of the longest.
    """

    real: int = 0
    prompts: int = 0
    widest: int = 0
    completions: int = 0
    longest: int = 0

    def plus(self, width: int, length: int, new_prompt: bool) -> "Size":
        """Return the size with one more completion."""
        return Size(
            self.real + length + new_prompt * width,
            self.prompts + new_prompt,
            max(self.widest, width),
            self.completions + 1,
            max(self.longest, length),
        )

    @property
    def padded(self) -> int:
        """The number of tokens where prompts side by side have one length, and completions as well."""
        return self.prompts * self.widest + self.completions * self.longest


def micro_batches_of(
    rollout: Rollout, alive: Tensor, config: TrainConfig, layout: Layout
) -> list[Tensor]:
    """Put completions into micro-batches: lists of their indices.

    Completions of one prompt stay together as far as possible, and prompts of like length come together.
    Where prompts are not shared, completions of like length do.

    Args:
        alive: (B,) bool; the others have no gradient and are left out.
        layout: how the completions pass through the model. Padding counts as tokens.
    """
    lengths = rollout.mask.sum(1).tolist()
    widths = rollout.prompt_mask.sum(1).tolist()
    some = alive.nonzero()[:, 0].tolist()
    if layout != "apart":
        ids = rollout.prompt_ids.tolist()
        groups: dict[tuple[int, ...], list[int]] = {}
        for b in sorted(some, key=lambda b: lengths[b]):
            groups.setdefault(tuple(ids[b][-widths[b] :]), []).append(b)
        found_groups = sorted(groups.values(), key=lambda rows: widths[rows[0]])
    else:
        # By length of the completion, up to 15 %, and then of the prompt.
        found_groups = [
            [b]
            for b in sorted(
                some, key=lambda b: (round(7 * math.log(max(1, lengths[b]))), widths[b])
            )
        ]
    limit, most = config.micro_batch_tokens, config.micro_batch_size
    found: list[list[int]] = []
    size = Size()
    for rows in found_groups:
        for b in rows:
            more = size.plus(widths[b], lengths[b], new_prompt=b == rows[0])
            full = limit is not None and (more.real if layout == "packed" else more.padded) > limit
            full = full or (most is not None and more.completions > most)
            # Prompts side by side are padded: not where fewer keep the device busy.
            busy = layout != "packed" and b == rows[0] and size.padded >= BUSY
            full = full or (busy and limit is not None)
            if not found or full:
                found.append([])
                more = Size().plus(widths[b], lengths[b], new_prompt=True)
            size = more
            found[-1].append(b)
    return [torch.tensor(rows) for rows in found]
