"""Replacements of verl's log-prob functions; `grpo_fast.integrations.verl.patch_logprobs()` installs them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_fast.ops import linear_logprob, logprob
from grpo_fast.overwritten import check_not_overwritten


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Compute the log-probs of `labels` like verl's function of this name, float32 for logits of any dtype.

    Equivalent to `logits.float().log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)`.

    Args:
        logits: (..., V).
        labels: (...).
        inplace_backward: accepted because verl passes it, and ignored: the gradient has memory of its own,
            and the logits are not changed.
    """
    check_not_overwritten("logprobs_from_logits", logits)  # before `reshape`, which may copy
    V = logits.shape[-1]
    return logprob(logits.reshape(-1, V), labels.reshape(-1)).view(labels.shape)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute log-probs of `labels` and entropies like verl's function, without the logits in memory.

    Equivalent to `logprob((hidden @ weight.T).view(-1, V), labels.view(-1), temperature=temperature,
    return_entropy=True)`, differentiable in both outputs.

    Args:
        hidden: (..., D).
        weight: (V, D), or this rank's rows of it.
        labels: (...), ids of the whole vocabulary.
        reduction: "none", "sum" or "mean": what to do with the log-probs.
        dist_process_group: the ranks that share the vocabulary. Each has its rows of `weight`, consecutive in
            the order of the ranks; all other arguments are equal. All ranks get the same results. As with
            verl's kernel, the caller sums the gradients of `hidden` over the ranks (Megatron does so where it
            gathers `hidden` from sequence-parallel ranks): each rank returns an equal share.

    Returns:
        (log-probs, float32 (N,) or 0-dim; entropies, float32 (N,) in nats).

    Raises:
        ValueError: the reduction is unknown.
        TypeError: dist_process_group is not a process group.
    """
    if reduction.lower() not in ("none", "sum", "mean"):
        raise ValueError(f"reduction={reduction!r} is unknown; choose from none, sum, mean")
    ranks = 1
    if dist_process_group is not None:
        if not isinstance(dist_process_group, dist.ProcessGroup):
            raise TypeError(f"dist_process_group: want a ProcessGroup, got {dist_process_group!r}")
        ranks = dist_process_group.size()
    hidden = hidden.reshape(-1, hidden.shape[-1])
    logps, entropy = linear_logprob(
        hidden if ranks == 1 else _ShareGradient.apply(hidden, ranks),
        weight,
        labels.reshape(-1),
        temperature=temperature,
        return_entropy=True,
        tp_group=None if ranks == 1 else dist_process_group,
    )
    if reduction.lower() == "none":
        return logps, entropy
    return logps.sum() if reduction.lower() == "sum" else logps.mean(), entropy


class _ShareGradient(torch.autograd.Function):
    """`_ShareGradient.apply(x, n)` returns x, and in the backward the gradient divided by n.

    `linear_logprob` gives each of n ranks the whole gradient. A caller that sums over the ranks would count
    it n times.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> Tensor:
        ctx.n = n
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx / ctx.n, None
