"""Log-probs from hidden states where an operand is float64: PyTorch's operators, in chunks of tokens.

The kernels compute in float32. A float64 model needs all digits, and it is small. So autograd
differentiates here, and the backward computes the logits of each chunk again: only the logits of
one chunk exist at a time.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpo_fast.ops.head.arguments import Options, Parameters
from grpo_fast.ops.head.chunk_length import row_limit
from grpo_fast.records import Z_SCORE, Grouping, Targets
from grpo_fast.torch_kernels.group_advantage import group_scores


def log_probs(
    hidden: Tensor,
    parameters: Parameters,
    options: Options,
    targets: Targets,
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies, both (N,) float64 and differentiable; unspecified where masked.

    Args:
        hidden: (N, D).
        targets: their temperatures are float32, and not used.
        temperature: a number, a 0-dim tensor, or one per token in any shape.
    """
    ids, live = targets.ids, targets.mask
    if live is not None:
        hidden = torch.where(live[:, None], hidden, 0)
        ids = torch.where(live, ids, 0)
    by_row = None
    if isinstance(temperature, Tensor):
        by_row = temperature.detach().to(ids.device).reshape(-1).expand(len(ids))
        if live is not None:
            by_row = torch.where(live, by_row, 1)

    step = row_limit(hidden, options)
    found = [
        checkpoint(
            _score,
            (hidden[rows], ids[rows], temperature if by_row is None else by_row[rows]),
            parameters,
            options,
            use_reentrant=False,
        )
        for rows in (slice(i, i + step) for i in range(0, max(len(hidden), 1), step))
    ]
    logp, entropy = (torch.cat(x) for x in zip(*found, strict=True))
    return logp, entropy


def _score(
    tokens: tuple[Tensor, Tensor, float | Tensor], parameters: Parameters, options: Options
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies of the rows of `tokens`: (hidden states, ids, temperature)."""
    hidden, ids, temperature = tokens
    weight, bias, lora_a, lora_b = parameters
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if lora_a is not None and lora_b is not None:
        logits = logits + options.lora_scaling * (hidden @ lora_a.T) @ lora_b.T
    logits = options.logit_scale * logits[:, : options.vocab_size]
    if options.softcap is not None:
        logits = options.softcap * (logits / options.softcap).tanh()
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None].to(logits.dtype)
    logp = (logits / temperature).log_softmax(-1)
    # A banned token has p = 0 and log p = -inf: 0 * inf would make the whole entropy NaN.
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)
    return logp.gather(-1, ids[:, None].long()).squeeze(-1), entropy


def z_scores(rewards: Tensor, group_size: int) -> Tensor:
    """Score rewards (B,) in float64, as `grpo_fast.ops.group_advantage.z_scores` does in float32."""
    return group_scores(rewards.double(), Grouping(group_size), Z_SCORE)
