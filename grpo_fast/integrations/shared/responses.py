"""The losses of a micro-batch of responses in the form of slime and miles.

The batch has lists with one tensor per response. All sequences lie end to end, prompts included.
"""

from typing import Any

import torch
from torch import Tensor

from grpo_fast.loss import LossOutput, grpo_loss, policy_loss
from grpo_fast.objective import Objective


def from_logits(
    args: Any,
    batch: dict[str, Any],
    logits: Tensor,
    objective: Objective,
    tokens: dict[str, Any],
    with_entropy: bool,
) -> LossOutput:
    """Compute the loss in one pass over (1, T, V) logits.

    Rows of prompts are masked. A token of a response is scored by the row before it.
    """
    T, device = logits.shape[1], logits.device
    where, ids = scored_entries(batch, device)

    def spread(x: Tensor) -> Any:
        return x.new_zeros(T).index_copy(0, where, x)

    out = grpo_loss(
        logits[0],
        spread(ids),
        cu_seqlens=boundaries([*batch["total_lengths"], T - sum(batch["total_lengths"])], device),
        temperature=getattr(args, "rollout_temperature", 1.0),
        num_items=1.0,
        objective=objective,
        return_entropy=with_entropy,
        inplace=not args.recompute_loss_function and not logits.is_leaf,
        **{name: spread(x) for name, x in tokens.items()},
    )
    entropy = None if out.entropy is None else out.entropy[where]
    return out._replace(logps=out.logps[where], entropy=entropy)


def scored_entries(batch: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the rows of the logits that score the responses' tokens, and the ids of these tokens."""
    rows, start = [], 0
    for total, response in zip(batch["total_lengths"], batch["response_lengths"], strict=True):
        rows.append(torch.arange(start + total - response - 1, start + total - 1))
        start += total
    targets = zip(batch["unconcat_tokens"], batch["response_lengths"], strict=True)
    ids = torch.cat([tokens[len(tokens) - n :] for tokens, n in targets])
    return torch.cat(rows).to(device, non_blocking=True), ids.to(device)


def from_log_probs(
    scored: dict[str, list[Tensor]], logits: Tensor, objective: Objective, tokens: dict[str, Any]
) -> LossOutput:
    """Compute the loss from the host's own log-probs and entropies, one tensor per response."""
    logps = torch.cat(scored["log_probs"])
    entropy = torch.cat(scored["entropy"]) if "entropy" in scored else None
    out = policy_loss(
        logps,
        entropy=entropy if objective.needs_entropy else None,
        cu_seqlens=boundaries([len(x) for x in scored["log_probs"]], logps.device),
        num_items=1.0,
        objective=objective,
        **tokens,
    )
    loss = out.loss if logps.numel() else out.loss + 0 * logits.sum()
    return out._replace(loss=loss, entropy=None if entropy is None else entropy.detach())


def boundaries(lengths: list[int], device: torch.device) -> Tensor:
    """Return the `cu_seqlens` of sequences of these lengths, end to end."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, non_blocking=True)


def reducer_weights(reduce: Any, like: Tensor) -> Tensor:
    """Return the factor by which a reducer multiplies each token; a reducer is linear."""
    with torch.enable_grad():
        probe = torch.zeros_like(like, dtype=torch.float32, requires_grad=True)
        (weights,) = torch.autograd.grad(reduce(probe), probe, materialize_grads=True)
    return weights
