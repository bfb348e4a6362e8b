"""Call the providers of a stem, and count the work that a call has to do at least."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import providers
from benchmarks.inputs.batches import Batch
from benchmarks.measuring import traffic

LOSSES = ("grpo", "linear_grpo", "policy_loss", "sequence_loss")


class Call(NamedTuple):
    """The arguments of one call, and what its gradient is taken in."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    leaves: tuple[Tensor, ...] = ()
    upstream: Tensor | None = None


def prepare(stem: str, provider: str, batch: Batch) -> Call:
    """Make the arguments of a call; not timed."""
    if stem == "group_advantage":
        return Call((batch.rewards, batch.shape.G), {})
    keywords = {"objective": batch.objective, **batch.arguments} if stem in LOSSES else {}
    upstream = batch.upstream if stem in ("logprob", "linear_logprob") else None
    if stem in providers.HIDDEN_PROVIDERS:
        leaves = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
        return Call((*leaves, batch.ids), keywords, leaves, upstream)
    if stem in ("policy_loss", "sequence_loss"):
        logps = batch.logps.requires_grad_()
        return Call((logps,), keywords, (logps,))
    leaf, logits = _logits(batch, provider)
    return Call((logits, batch.ids), keywords, (leaf,), upstream)


def _logits(batch: Batch, provider: str) -> tuple[Tensor, Tensor]:
    """Return (leaf, logits that depend on it): a copy where they may be overwritten."""
    leaf = batch.logits.detach()
    if provider in providers.EXTRA_ROW:
        return (leaf := torch.nn.functional.pad(leaf, (0, 0, 0, 1)).requires_grad_()), leaf
    leaf.requires_grad_()
    return leaf, leaf.clone() if provider in providers.OVERWRITES else leaf


def forward(fn: providers.Function, call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.no_grad():
        return fn(*call.arguments, **call.keywords), ()


def forward_backward(fn: providers.Function, call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
    value = fn(*call.arguments, **call.keywords)
    upstream = None if call.upstream is None else call.upstream.to(value.dtype)
    return value.detach(), torch.autograd.grad(value, call.leaves, upstream)


def work(stem: str, batch: Batch, backward: bool) -> dict[str, Any]:
    """Count what a call has to do.

    Returns:
        bytes: that have to move at least, by the formula in the kernel's docstring.
        flops: of the matrix multiplications that have to be done at least.
        roof: what this machine was measured to do, and the call is held against: "copy" or "read"
            bandwidth, or the rate of matrix multiplications, "gemm".
    """
    N, live, moving = batch.shape.N, batch.live, batch.moving
    if stem in providers.HIDDEN_PROVIDERS:
        rows = moving if stem == "linear_grpo" else N
        flops = (6 if backward else 2) * rows * batch.shape.D * batch.shape.V
        nbytes = (2 if backward else 1) * (batch.hidden.nbytes + batch.weight.nbytes)
        return {"bytes": nbytes, "flops": flops, "roof": "gemm"}
    if stem == "group_advantage":
        moved = traffic.group_advantage(batch.shape.B).least
    elif stem == "policy_loss":
        moved = traffic.policy_loss(N).least + traffic.policy_loss_backward(N).least
    elif stem == "sequence_loss":
        moved = traffic.sequence_loss(N).most + traffic.policy_loss_backward(N).least
    else:
        row = batch.shape.V, batch.logits.element_size()
        if stem == "grpo":
            moved = traffic.grpo(N, live, moving, *row).least
        elif backward:
            moved = traffic.logprob(N, live, *row).least
        else:
            return {"bytes": traffic.logprob_forward(live, *row).least, "flops": 0, "roof": "read"}
    return {"bytes": moved, "flops": 0, "roof": "copy"}
