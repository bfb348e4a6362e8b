"""Importance weights that look at the divergence of two policies at the sampled token."""

import torch
from torch import Tensor

from grpo_fast.checks import check_number
from grpo_fast.operands import bound
from grpo_fast.spelling import check_choice
from grpo_fast.torch_kernels.terms import binary_kl
from grpo_fast.weights.live_tokens import live_tokens

DIVERGENCES = ("kl", "tv")


@torch.no_grad()
def kpop(
    old_logps: Tensor, sampling_logps: Tensor, delta: float, *, mask: Tensor | None = None
) -> Tensor:
    """1 where the KLs of the two-outcome distributions (this token, any other) are within `delta`, else 0.

    Equivalent to `torch.maximum(kl(old, sampling), kl(sampling, old)) <= delta` with
    `kl(p, q) = p (log p - log q) + (1 - p) (log(1 - p) - log(1 - q))`. A missing (NaN) log-prob is within.

    Args:
        old_logps, sampling_logps, mask: as in `importance_weights`.
        delta: in nats.

    Returns:
        Float32, of the shape of `old_logps`; 0 where masked.
    """
    op = "kpop"
    check_number(op, "delta", delta)
    live, old, sampling = live_tokens(op, mask, old_logps=old_logps, sampling_logps=sampling_logps)
    old, sampling = (x.double().clamp(max=0) for x in (old, sampling))  # of rounding, above 0
    missing = (old - sampling).isnan()
    kl = torch.maximum(binary_kl(old, sampling), binary_kl(sampling, old))
    return (live & ((kl <= delta) | missing)).float().view(old_logps.shape)


@torch.no_grad()
def binary_divergence(
    logps: Tensor,
    other_logps: Tensor,
    *,
    kind: str = "kl",
    mask: Tensor | None = None,
    floor: float = 0.0,
) -> Tensor:
    """How far two policies are apart at each token, as distributions of "this token" and "any other".

    Equivalent to `(p - q).abs()` for "tv", `p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()` for
    "kl", with `p, q = logps.exp(), other_logps.exp()`. Not a weight itself: compare it with a threshold.

    Args:
        logps, other_logps: (B, T) or (N,), of p and q.
        kind: "kl", in nats, or "tv", the total variation.
        mask: the same shape; where it is 0 nothing is read.
        floor: p and q are clamped to [floor, 1 - floor].

    Returns:
        Float32, of the shape of `logps`; 0 where masked, NaN where a log-prob is.
    """
    op = "binary_divergence"
    check_choice("kind", kind, DIVERGENCES, op)
    check_number(op, "floor", floor, high=0.5)
    live, *both = live_tokens(op, mask, logps=logps, other_logps=other_logps)
    p, q = (x.double().exp() for x in both)
    least = bound(floor, p)
    p, q = p.clamp(least, 1 - least), q.clamp(least, 1 - least)
    if kind == "tv":
        found = (p - q).abs()
    else:  # terms of probability 0 are 0
        others = [(-x.double().expm1()).clamp(least, 1 - least) for x in both]
        pairs = ((p, q), (others[0], others[1]))
        found = sum((a.xlogy(a) - a.xlogy(b) for a, b in pairs), torch.zeros_like(p))
    return torch.where(live, found, 0).float().view(logps.shape)
