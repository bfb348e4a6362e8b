"""Constant weights for the losses: corrections of a mismatch of policies, and which tokens count.

Each function returns float32 (`kl_cov` returns bool). A loss of `grpo_fast.loss` takes the result
as `importance_weights`, which weigh the surrogate alone, as `token_weights`, which weigh everything
that a token contributes, or multiplied into `mask`, which also takes tokens out of the
denominators. docs/weights.md says which trainer uses which.

Tokens are padded (B, T), or packed (N,) with `cu_seqlens` where sequences matter. A masked token is
never read and may hold NaN. Nothing is differentiated, and nothing waits for the GPU.
"""

from grpo_fast.weights.divergence import binary_divergence, kpop
from grpo_fast.weights.importance import (
    geometric_mean,
    icepop,
    importance_weights,
    truncated_importance,
)
from grpo_fast.weights.selection import clip_cov, kl_cov, m2po, top_entropy, varied_groups

__all__ = [
    "binary_divergence",
    "clip_cov",
    "geometric_mean",
    "icepop",
    "importance_weights",
    "kl_cov",
    "kpop",
    "m2po",
    "top_entropy",
    "truncated_importance",
    "varied_groups",
]
