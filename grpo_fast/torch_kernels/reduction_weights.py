"""The weight of each token in the loss: the twin of `kernels/reduction_weights.py`."""

import torch
from torch import Tensor

from grpo_fast.checks import share_of
from grpo_fast.records import Weighing, Weights
from grpo_fast.sequences import sequence_of_token


def reduction_weights_fwd(
    like: Tensor, weighing: Weighing, reduction: str, max_length: int, by_tokens: bool
) -> Weights:
    """Compute the weights of tokens under a reduction; fp32, or float64 where `like` is.

    Args:
        like: has the shape of the tokens, (B, T), or packed (N,).
        max_length: the denominator of "fixed_length".
        by_tokens: whether to compute the weights of a mean over all tokens as well.
    """
    shaped = weighing._replace(
        mask=_like(weighing.mask, like),
        floating=_like(weighing.floating, like),
        token_weights=_like(weighing.token_weights, like),
    )
    weight, *others = weights_of_rows(like, shaped, reduction, max_length, by_tokens)
    return Weights(weight.reshape(-1), *(None if x is None else x.reshape(-1) for x in others))


def _like(x: Tensor | None, like: Tensor) -> Tensor | None:
    return None if x is None else x.view(like.shape)


def weights_of_rows(
    like: Tensor, weighing: Weighing, reduction: str, max_length: int, by_tokens: bool
) -> Weights:
    """Compute `reduction_weights_fwd` in the shape of `like`, which `weighing` has too."""
    mask, floating, token_weights, boundaries, num_items, loss_scale = weighing
    device = like.device
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    live = torch.ones_like(like, dtype=torch.bool) if mask is None else mask
    share = None if floating is None else share_of(floating, dtype)
    weighs = live if share is None else share
    counts = live if share is None else share != 0
    sequence = None if boundaries is None else sequence_of_token(boundaries, len(like))
    sequences = 1 if like.ndim == 1 else like.shape[0]
    if boundaries is not None:
        sequences = len(boundaries) - 1
    if reduction == "token_mean":
        if num_items is None:
            items = total_of(weighs, dtype)
        else:
            items = torch.as_tensor(num_items, dtype=dtype, device=device).clamp(min=1)
        each = 1 / items
    elif reduction == "sequence_mean":
        if mask is None and boundaries is None:
            length = torch.full((), like.shape[-1], dtype=dtype, device=device)
        else:
            length = _lengths(weighs, boundaries, sequence, dtype)
        each = 1 / (length.where(length != 0, 1) * max(sequences, 1))
    else:
        most = max_length if reduction == "fixed_length" else 1
        each = torch.full((), 1 / (max(sequences, 1) * (most or 1)), dtype=dtype, device=device)
    extra = torch.ones_like(like, dtype=dtype)
    if token_weights is not None:
        extra = torch.where(live, token_weights.to(dtype), 0)
    if loss_scale is not None:
        # Select, not multiply: a token of weight 0 must stay at 0 if the scale is inf or NaN.
        factor = torch.as_tensor(loss_scale, dtype=dtype, device=device)
        extra = torch.where(extra == 0, 0, extra * factor)
    weight = torch.where(counts, each * weighs.to(dtype), 0) * extra
    entropy_weight = None
    if by_tokens:
        entropy_weight = weighs.to(dtype) * extra / total_of(weighs, dtype)
    return Weights(weight, share, entropy_weight, sequence)


def total_of(weighs: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of a mask, bool or floating, as the denominator of a mean: 1 where it is 0."""
    total = weighs.sum(dtype=torch.float64) if weighs.is_floating_point() else weighs.sum()
    return total.where(total != 0, 1).to(dtype)


def _lengths(
    weighs: Tensor, boundaries: Tensor | None, sequence: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the sum of the mask over the sequence of each token, (N,); of padded ones, (B, 1)."""
    if boundaries is None or sequence is None:
        # Compiled code adds term by term, which only a count takes without a loss of digits.
        wide = torch.float64 if weighs.is_floating_point() else dtype
        return weighs.sum(-1, keepdim=True, dtype=wide).to(dtype)
    # Differences of a running count are exact and need no atomics.
    running = weighs.double().cumsum(0) if weighs.is_floating_point() else weighs.cumsum(0)
    count = torch.nn.functional.pad(running, (1, 0))[boundaries.long()]
    return count.diff()[sequence].to(dtype)
