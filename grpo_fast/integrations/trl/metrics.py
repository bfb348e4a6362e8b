"""TRL's metrics of a micro-batch, with the same names and meanings."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl.trainer.utils import nanmax, nanmin

from grpo_fast.diagnostics import token_diagnostics


class Scored(NamedTuple):
    """The results of the loss of a micro-batch; all but `loss` are detached."""

    loss: Tensor  # the loss that TRL returns
    policy_loss: Tensor  # without the entropy bonus, and not divided by the accumulation steps
    logps: Tensor
    entropy: Tensor
    kl: Tensor | None  # its mean over live tokens
    bonus_mask: Tensor  # the tokens of the entropy bonus


def report(trainer: Any, mode: str, inputs: dict[str, Any], mask: Tensor, scored: Scored) -> None:
    """Add the metrics to `trainer._metrics[mode]`, with one collective and one host sync."""
    tokens = mask.sum().float()
    rows = torch.full_like(tokens, len(mask))
    sums: dict[str, tuple[Tensor, Tensor]] = {}  # name -> (sum, count)

    def add(name: str, x: Tensor) -> None:
        # As in TRL: one column has a value per sequence, several a value per live token.
        if x.shape[1] == 1:
            sums[name] = x.sum().float(), rows
        else:
            sums[name] = torch.where(mask, x, 0).sum().float(), tokens

    add("entropy", torch.where(mask, scored.entropy, 0))
    if trainer.beta:
        assert scored.kl is not None
        sums["kl"] = scored.kl * tokens, sums["entropy"][1]
    extremes: dict[str, Tensor] = {}
    if trainer.loss_type == "vespo":
        add("vespo/phi_seq_mean", phi(trainer, inputs, mask, scored.logps))
    elif trainer.loss_type != "sapo":
        low, high = clipped(trainer, inputs, mask, scored.logps)
        if trainer.loss_type == "cispo":
            add("cispo_clip_ratio", high.float())
        else:
            add("clip_ratio/low_mean", low.float())
            add("clip_ratio/high_mean", high.float())
            add("clip_ratio/region_mean", (low | high).float())
            extremes["clip_ratio/low_min"] = nanmin(row_means(low.float(), mask))
            extremes["clip_ratio/high_max"] = nanmax(row_means(high.float(), mask))
    bonus = torch.where(scored.bonus_mask, scored.entropy, 0)
    window = torch.stack([bonus.sum(), scored.bonus_mask.sum().float()])
    if trainer.use_adaptive_entropy and mode == "train":
        if trainer._entropy_window_stats is not None:
            window = trainer._entropy_window_stats + window
        trainer._entropy_window_stats = window
    packed = [*sums.values(), (scored.policy_loss, torch.zeros_like(tokens)), tuple(window)]
    flat = [x.float() for pair in packed for x in pair] + list(extremes.values())
    gathered = trainer.accelerator.gather(torch.stack(flat)[None])  # (devices, values)
    totals = gathered.double().sum(0)
    end = 2 * len(packed)  # of the sums; then come the extremes
    ends = [nanmin(gathered[:, end : end + 1]), nanmax(gathered[:, end + 1 :])] if extremes else []
    means = gathered[:, 2 * len(sums)].double().nanmean()
    values = torch.stack([*totals[:end], means, *(x.double() for x in ends)]).tolist()

    metrics = trainer._metrics[mode]
    for i, name in enumerate(sums):
        metrics[name].append(values[2 * i] / max(values[2 * i + 1], 1.0))
    for name, value in zip(extremes, values[end + 1 :], strict=True):
        metrics[name].append(value)
    if trainer._entropy_bonus_enabled:
        metrics["policy_loss"].append(values[end])
        if mode == "train" and trainer.accelerator.sync_gradients:
            if trainer.use_adaptive_entropy:
                adapt_entropy(trainer, values[end - 2] / max(values[end - 1], 1.0))
            metrics["entropy_coef"].append(trainer.entropy_coef)


def adapt_entropy(trainer: Any, world_entropy: float) -> None:
    """Move the entropy coefficient as TRL's controller does, once for each optimiser step."""
    args = trainer.args
    if world_entropy <= args.entropy_target:
        raised = trainer.entropy_coef + args.entropy_coef_delta
        trainer.entropy_coef = min(raised, args.entropy_coef_max)
    else:
        lowered = trainer.entropy_coef - args.entropy_coef_delta
        trainer.entropy_coef = max(lowered, args.entropy_coef_min)
    trainer._last_world_entropy = world_entropy
    trainer._entropy_window_stats = None


def clipped(
    trainer: Any, inputs: dict[str, Any], mask: Tensor, logps: Tensor
) -> tuple[Tensor, Tensor]:
    """Return TRL's flags of the tokens, or sequences, that are clipped below and above.

    They are not those of `token_diagnostics`: TRL sets its flags after the clamp to `delta`, and a sequence
    without a live token has one, too.
    """
    old, advantages = inputs.get("old_per_token_logps"), per_row(inputs["advantages"])
    own = dataclasses.replace(trainer.current_objective(), beta=0.0)
    given = logps, old, advantages.expand_as(logps)
    ratio = token_diagnostics(*given, mask=mask, objective=own).ratio
    if trainer.importance_sampling_level == "sequence":  # one column: that of any live token
        ratio = ratio.gather(1, mask.int().argmax(1, keepdim=True))
    if trainer.loss_type == "cispo":
        low, high = 0.0, trainer.epsilon_high
    else:
        low, high = 1 - trainer.epsilon_low, 1 + trainer.epsilon_high
        if trainer.args.delta is not None:
            ratio = ratio.clamp(max=trainer.args.delta)
    return (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)


def phi(trainer: Any, inputs: dict[str, Any], mask: Tensor, logps: Tensor) -> Tensor:
    """Compute VESPO's weights by TRL's own formula, for the metric; the loss computes its own."""
    old = inputs.get("old_per_token_logps")
    args = trainer.args
    return trainer.get_gamma_weights(
        advantages=per_row(inputs["advantages"]),
        log_ratio_per_token=torch.zeros_like(logps) if old is None else logps - old,
        mask=mask,
        importance_sampling_ratio=inputs.get("importance_sampling_ratio"),
        k_pos=args.vespo_k_pos,
        lambda_pos=args.vespo_lambda_pos,
        k_neg=args.vespo_k_neg,
        lambda_neg=args.vespo_lambda_neg,
    )


def per_row(advantages: Tensor) -> Tensor:
    """Return (B,) advantages as (B, 1), and others unchanged."""
    return advantages[:, None] if advantages.ndim == 1 else advantages


def row_means(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each row over its live tokens, (B,); NaN for a row without any."""
    if x.shape[1] == 1:
        return x.squeeze(1)
    return torch.where(mask, x, 0).sum(1) / mask.sum(1)
