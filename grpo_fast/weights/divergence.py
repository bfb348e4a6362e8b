"""The divergence of two policies at the sampled token, and weights that depend on it."""

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
    """Return 1 for tokens at which two policies are close to each other, else 0.

    A token is kept if both KL divergences of the outcomes "this token" and "any other token" are at
    most `delta`:

        >>> old, sampling = -torch.rand(2, 3), -torch.rand(2, 3)
        >>> there = binary_divergence(old, sampling, kind="kl")
        >>> back = binary_divergence(sampling, old, kind="kl")
        >>> want = (torch.maximum(there, back) <= 0.05).float()
        >>> torch.testing.assert_close(kpop(old, sampling, 0.05), want)

    Args:
        old_logps, sampling_logps, mask: as in `importance_weights`. A token with a missing (NaN)
            log-prob is kept.
        delta: in nats.

    Returns:
        Float32, of the shape of `old_logps`; 0 where masked.
    """
    op = "kpop"
    check_number(op, "delta", delta)
    live, old, sampling = live_tokens(op, mask, old_logps=old_logps, sampling_logps=sampling_logps)
    old, sampling = (x.double().clamp(max=0) for x in (old, sampling))  # rounding: not above 0
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
    """Return the divergence of two policies at each token.

    The outcomes are "this token" and "any other token":

        >>> logps, other = -torch.rand(2, 3), -torch.rand(2, 3)
        >>> p, q = logps.exp(), other.exp()
        >>> torch.testing.assert_close(binary_divergence(logps, other, kind="tv"), (p - q).abs())
        >>> kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        >>> torch.testing.assert_close(binary_divergence(logps, other), kl, rtol=1e-4, atol=1e-5)

    It is not a weight itself: compare it with a threshold.

    Args:
        logps, other_logps: (B, T) or (N,), the log-probs under p and under q.
        kind: "kl", in nats, or "tv", the total variation.
        mask: the same shape; where it is 0 nothing is read.
        floor: p and q are clamped to [floor, 1 - floor].

    Returns:
        Float32, of the shape of `logps`; 0 where masked, NaN where a log-prob is NaN.
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
