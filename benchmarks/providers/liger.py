"""Liger Kernel: GRPO on logits in Triton, the chunked GRPO loss, and its cross-entropies."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import shapes
from benchmarks.providers.common import IGNORED, Function, loss_type, need_gpu
from grpo_fast import Objective


def _options(objective: Objective) -> dict[str, Any]:
    return {
        "temperature": 1.0,
        "beta": objective.beta,
        "loss_type": loss_type(objective),
        "importance_sampling_level": objective.ratio,
    }


def grpo() -> Function:
    """Load the kernel, which works in place by default and takes the logits of T + 1 positions."""
    need_gpu("Liger's GRPO kernel", interpreted=True)
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def call(logits: Tensor, ids: Tensor, *, objective: Objective, **given: Any) -> Tensor:
        reference = given["ref_logps"] if objective.beta else None
        loss, _ = triton_grpo_loss(
            *(logits, given["old_logps"], reference, ids, given["advantages"], given["mask"]),
            eps_low=objective.epsilon_low,
            eps_high=objective.epsilon_high,
            reduce=True,
            **_options(objective),
        )
        return loss

    return call


def linear_grpo() -> Function:
    """Load `LigerFusedLinearGRPOLoss`, one sequence a chunk, its default."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def call(
        hidden: Tensor, weight: Tensor, ids: Tensor, *, objective: Objective, **given: Any
    ) -> Tensor:
        head = LigerFusedLinearGRPOLoss(
            compiled=torch.cuda.is_available(),
            use_ref_model=objective.beta != 0,
            epsilon_low=objective.epsilon_low,
            epsilon_high=objective.epsilon_high,
            **_options(objective),
        )
        mask, old = given["mask"], given["old_logps"]
        weights = torch.ones_like(old) if mask is None else mask.to(old.dtype)
        loss, _ = head(
            *(hidden, weight, ids, weights, given["advantages"]),
            ref_per_token_logps=given["ref_logps"] if objective.beta else None,
            old_per_token_logps=old,
        )
        return loss

    return call


def linear_logprob() -> Function:
    """Load the scaled cross-entropy per token: CuTe kernels on Hopper, chunks of PyTorch elsewhere."""
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as module

    # It imports the kernels of this device when it is called; what they lack is to be known now.
    module._resolve_implementation(shapes.device())
    head = module.LigerFusedLinearScaledCrossEntropyFunction

    def call(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return -head.apply(hidden.flatten(0, 1), weight, ids.flatten(), 1.0, IGNORED).view_as(ids)

    return call


def cross_entropy() -> Function:
    """Load the fused linear cross-entropy with its defaults."""
    need_gpu("Liger's fused linear cross-entropy", interpreted=True)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def call(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        loss = liger_fused_linear_cross_entropy(hidden.flatten(0, 1), weight, ids.flatten())
        return loss[0] if isinstance(loss, tuple) else loss

    return call
