"""Liger Kernel: GRPO on logits in Triton, the chunked GRPO loss, and its cross-entropies."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import shapes
from benchmarks.providers.common import IGNORED, Function, UnavailableError, need_gpu
from grpo_fast import Objective

LOSS_TYPES = {"sequence_mean": "grpo", "token_mean": "bnpo"}


def _options(objective: Objective) -> dict[str, Any]:
    if objective.surrogate != "clip" or objective.reduction not in LOSS_TYPES:
        raise UnavailableError(f"no loss type for {objective}")
    return {
        "temperature": 1.0,
        "beta": objective.beta,
        "loss_type": LOSS_TYPES[objective.reduction],
        "importance_sampling_level": objective.ratio,
    }


def grpo() -> Function:
    """In place, its default. Takes the logits of T + 1 positions, as the model returns them."""
    need_gpu("Liger's GRPO kernel")
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def call(
        logits: Tensor,
        ids: Tensor,
        *,
        mask: Tensor | None,
        advantages: Tensor,
        old_logps: Tensor,
        ref_logps: Tensor,
        objective: Objective,
    ) -> Tensor:
        loss, _ = triton_grpo_loss(
            logits,
            old_logps,
            ref_logps if objective.beta else None,
            ids,
            advantages,
            mask,
            eps_low=objective.epsilon_low,
            eps_high=objective.epsilon_high,
            reduce=True,
            **_options(objective),
        )
        return loss

    return call


def linear_grpo() -> Function:
    """`LigerFusedLinearGRPOLoss`, one sequence a chunk, its default."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def call(
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        *,
        mask: Tensor | None,
        advantages: Tensor,
        old_logps: Tensor,
        ref_logps: Tensor,
        objective: Objective,
    ) -> Tensor:
        head = LigerFusedLinearGRPOLoss(
            compiled=torch.cuda.is_available(),
            use_ref_model=objective.beta != 0,
            epsilon_low=objective.epsilon_low,
            epsilon_high=objective.epsilon_high,
            **_options(objective),
        )
        weights = torch.ones_like(old_logps) if mask is None else mask.to(old_logps.dtype)
        loss, _ = head(
            hidden,
            weight,
            ids,
            weights,
            advantages,
            ref_per_token_logps=ref_logps if objective.beta else None,
            old_per_token_logps=old_logps,
        )
        return loss

    return call


def linear_logprob() -> Function:
    """The scaled cross-entropy per token: CuTe kernels on Hopper, chunks of PyTorch elsewhere."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
        _resolve_implementation,
    )

    # It imports the kernels of this device when it is called; what they lack is to be known now.
    _resolve_implementation(shapes.device())

    def call(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        loss = LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden.flatten(0, 1), weight, ids.flatten(), 1.0, IGNORED
        )
        return -loss.view_as(ids)

    return call


def cross_entropy() -> Function:
    """The fused linear cross-entropy, its defaults."""
    need_gpu("Liger's fused linear cross-entropy")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def call(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        loss = liger_fused_linear_cross_entropy(hidden.flatten(0, 1), weight, ids.flatten())
        return loss[0] if isinstance(loss, tuple) else loss

    return call
