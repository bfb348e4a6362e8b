"""The numbers of a step, computed from its record by the functions of grpo_fast."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast import diagnostics
from grpo_fast.loss import policy_loss
from grpo_fast.objective import Objective
from grpo_fast.ops import group_advantage
from grpo_fast.trainer.explain.record import StepRecord

# The options of an objective that the page computes with; others must have their defaults.
EXPLAINED = {
    "reduction", "max_length", "epsilon_low", "epsilon_high", "beta",
}  # fmt: skip
# They have no effect without a KL; with one they must have their defaults.
OF_KL = {"kl", "kl_gap_clip", "kl_value_clip", "kl_gradient"}


class Settings(NamedTuple):
    """The values that the sliders change.

    Attributes:
        rewards: of the completions that are used, the first ones of the group.
        update: the number of the update that is looked at, from 1.
    """

    rewards: list[float]
    epsilon_low: float
    epsilon_high: float
    beta: float
    update: int = 1


class Numbers(NamedTuple):
    """The quantities of an update, for the completions that are used.

    Attributes:
        mean, std: of the rewards; the std divides by G - 1.
        advantages: one per completion.
        ratios, kl, coefficients: one per token. A coefficient is the derivative of the loss in the log-prob.
        clipped: one per token: 1, it has no gradient above the clip range; -1, below; 0, it has one.
        loss, loss_after: at the log-probs before and after the update.
        kl_mean, clip_fraction: means over the tokens.
    """

    mean: float
    std: float
    advantages: list[float]
    ratios: list[list[float]]
    clipped: list[list[int]]
    kl: list[list[float]]
    coefficients: list[list[float]]
    loss: float
    loss_after: float
    kl_mean: float
    clip_fraction: float


def check(objective: Objective, preset: str) -> None:
    """Refuse an objective that is not explained: one outside the clipped GRPO family.

    Raises:
        ValueError: the message names the preset and the option.
    """
    told = f"objective={preset!r} is not explained"
    if preset == "dapo_zv":
        raise ValueError(f"{told}: it leaves silent groups out of its denominator")
    for field in dataclasses.fields(Objective):
        value = getattr(objective, field.name)
        if field.name in EXPLAINED or (field.name in OF_KL and not objective.beta):
            continue
        if value != field.default:
            raise ValueError(
                f"{told}: its {field.name} is {value!r}, and only {field.default!r} is. The stages are those "
                "of the clipped objective: grpo, dapo, dr_grpo, bnpo"
            )


def settings_of(record: StepRecord, update: int = 1) -> Settings:
    """Return the settings with which a step was made."""
    objective = record.to_objective()
    rewards = [c.reward for c in record.completions]
    low, high = objective.epsilon_low, objective.epsilon_high
    return Settings(rewards, low, high, objective.beta, update)


def objective_of(record: StepRecord, settings: Settings) -> Objective:
    """Return the objective of a step with the clip range and the weight of the KL of `settings`."""
    objective = record.to_objective()
    return Objective(
        reduction=objective.reduction,
        max_length=objective.max_length,
        epsilon_low=settings.epsilon_low,
        epsilon_high=settings.epsilon_high,
        beta=settings.beta,
    )


def compute(record: StepRecord, settings: Settings) -> Numbers:
    """Compute the numbers of an update."""
    G = len(settings.rewards)
    rewards = torch.tensor(settings.rewards, dtype=torch.float64)
    advantages = group_advantage(rewards, group_size=G, scale=record.scale_rewards)
    old, mask = padded(record.logps[0][:G])
    ref, _ = padded(record.ref_logps[:G])
    objective = objective_of(record, settings)
    lengths = mask.sum(1).tolist()

    def loss_at(k: int) -> tuple[Tensor, Tensor]:
        logps = padded(record.logps[k][:G])[0].requires_grad_()
        out = policy_loss(
            logps,
            advantages=advantages,
            mask=mask,
            old_logps=old,
            ref_logps=ref if settings.beta else None,
            objective=objective,
        )
        return out.loss, logps

    loss, logps = loss_at(settings.update - 1)
    (coefficients,) = torch.autograd.grad(loss, logps)
    found = diagnostics.token_diagnostics(
        logps.detach(), old, advantages, mask=mask, objective=dataclasses.replace(objective, beta=0)
    )
    kl = diagnostics.kl_estimate(logps.detach(), ref)
    sides = found.clipped_high.int() - found.clipped_low.int()

    def rows(x: Tensor) -> list[list]:
        return [row[:n].tolist() for row, n in zip(x, lengths, strict=True)]

    return Numbers(
        mean=rewards.mean().item(),
        std=rewards.std().item(),
        advantages=advantages.tolist(),
        ratios=rows(found.ratio),
        clipped=rows(sides),
        kl=rows(kl),
        coefficients=rows(coefficients),
        loss=loss.item(),
        loss_after=loss_at(settings.update)[0].item(),
        kl_mean=kl[mask].double().mean().item(),
        clip_fraction=found.clipped[mask].double().mean().item(),
    )


def of_updates(record: StepRecord) -> list[Numbers]:
    """Compute the numbers of every update, with the settings with which the step was made.

    Raises:
        ValueError: as `check`.
    """
    check(record.to_objective(), record.source.preset)
    updates = range(1, len(record.updates) + 1)
    return [compute(record, settings_of(record, k)) for k in updates]


def padded(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Return lists of numbers as (B, T) float32, with 0 at their ends, and the mask of what is theirs."""
    T = max(map(len, rows))
    values = torch.tensor([[*row, *[0.0] * (T - len(row))] for row in rows], dtype=torch.float32)
    mask = torch.tensor([[t < len(row) for t in range(T)] for row in rows])
    return values, mask
