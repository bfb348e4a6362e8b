"""verl's log-prob functions, by this library; `verl.patch_logprobs()` puts them in place."""

from typing import Any

from torch import Tensor

from grpo_fast.ops import linear_logprob, logprob


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """verl's function of the same name: log-probs of `labels`, float32 whatever the dtype of `logits`.

    Equivalent to `logits.float().log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)`.

    Args:
        logits: (..., V).
        labels: (...).
        inplace_backward: accepted since verl passes it; the gradient gets memory of its own either way,
            and the logits stay what they are.
    """
    V = logits.shape[-1]
    return logprob(logits.reshape(-1, V), labels.reshape(-1)).view(labels.shape)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl's function of the same name: log-probs of `labels` and entropies, without the logits in memory.

    Equivalent to `logprob((hidden @ weight.T).view(-1, V), labels.view(-1), temperature=temperature,
    return_entropy=True)`, differentiable in both outputs.

    Args:
        hidden: (..., D).
        weight: (V, D).
        labels: (...).
        reduction: of the log-probs: "none", "sum" or "mean".
        dist_process_group: ranks that share the vocabulary; not supported.

    Returns:
        (log-probs, float32 (N,) or 0-dim; entropies, float32 (N,) in nats).
    """
    if dist_process_group is not None:
        raise ValueError(
            "linear_cross_entropy: dist_process_group is not supported: use one rank per vocabulary"
        )
    if reduction.lower() not in ("none", "sum", "mean"):
        raise ValueError(f"reduction={reduction!r} is unknown; choose from none, sum, mean")
    logps, entropy = linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=temperature,
        return_entropy=True,
    )
    if reduction.lower() == "none":
        return logps, entropy
    return logps.sum() if reduction.lower() == "sum" else logps.mean(), entropy
