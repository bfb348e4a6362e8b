"""Hidden states to log-probs where an operand is float64: the specification itself, in chunks of tokens.

The kernels and their twins compute in float32. A model in float64 wants all of its digits, and is small: here
`grpo_fast.reference` runs on one chunk of rows after the other, differentiated by autograd. The backward
computes the logits of each chunk again, so that those of one chunk exist at a time.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpo_fast import reference
from grpo_fast.ops._head import row_limit
from grpo_fast.ops._head_arguments import Options, Parameters


def log_probs(
    hidden: Tensor,
    parameters: Parameters,
    options: Options,
    ids: Tensor,
    live: Tensor | None,
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy), both (N,) float64 and differentiable; unspecified where not live.

    Args:
        hidden: (N, D). ids: (N,). live: (N,) bool, or None for all.
        temperature: a number, a 0-dim tensor, or one per token in any shape.
    """
    if live is not None:
        hidden = torch.where(live[:, None], hidden, 0)
        ids = torch.where(live, ids, 0)
    by_row = None
    if isinstance(temperature, Tensor):
        by_row = temperature.detach().to(ids.device).reshape(-1).expand(len(ids))
        if live is not None:
            by_row = torch.where(live, by_row, 1)

    def score(
        hidden: Tensor, ids: Tensor, temperature: float | Tensor, *parameters: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weight, bias, lora_a, lora_b = parameters
        assert weight is not None
        lora = None
        if lora_a is not None and lora_b is not None:
            lora = lora_a, lora_b, options.lora_scaling
        logits = reference.head_logits(
            hidden,
            weight,
            bias,
            options.softcap,
            options.logit_scale,
            options.vocab_size,
            lora,
        )
        return reference.logprob(logits, ids, temperature), reference.entropy(logits, temperature)

    step = row_limit(hidden, options)
    found = [
        checkpoint(
            score,
            hidden[rows],
            ids[rows],
            temperature if by_row is None else by_row[rows],
            *parameters,
            use_reentrant=False,
        )
        for rows in (slice(i, i + step) for i in range(0, max(len(hidden), 1), step))
    ]
    logp, entropy = (torch.cat(x) for x in zip(*found, strict=True))
    return logp, entropy
