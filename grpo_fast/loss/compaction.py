"""Which tokens may have a gradient: the matrix products with the head leave out all others."""

import torch
from torch import Tensor

from grpo_fast.loss.arguments import LossArguments
from grpo_fast.ops.group_advantage import without_rounding, z_scores
from grpo_fast.sequences import one_per_sequence, sequence_of_token, spread

Given = tuple[Tensor | None, LossArguments]  # a mask, (N,) bool, and checked arguments


def keep_of(ids: Tensor, as_given: Given, on_device: Given) -> Tensor | None:
    """Find the tokens that may have a gradient, (N,) bool; return None if all may.

    The result is computed on the host if everything it depends on is there: then nobody waits for
    the device.

    Args:
        as_given: the mask and the arguments where the caller has them. on_device: the same on the
            device of the ids.
    """
    mask, given = as_given
    deciding = (mask, given.advantages, given.rewards, given.token_weights, given.cu_seqlens)
    if all(x is None or x.is_cpu for x in deciding):
        return carries_gradient(ids, *as_given)
    return carries_gradient(ids, *on_device)


def carries_gradient(like: Tensor, mask: Tensor | None, given: LossArguments) -> Tensor | None:
    """Find the tokens that may have a gradient, (N,) bool; return None if all may.

    The result is on the device of the arguments.

    Args:
        like: (B, T) or (N,), for its shape. mask: (N,) bool. given: checked arguments.
    """
    modes, cu_seqlens = given.objective.terms.modes, given.cu_seqlens
    N, T = like.numel(), like.shape[-1]
    sequence = None if cu_seqlens is None else sequence_of_token(cu_seqlens, N)
    if modes.by_entropy:  # the entropy of every unmasked token decides
        return mask

    def per_token(x: Tensor) -> Tensor:
        if x.shape == like.shape:
            return x.reshape(-1)
        x = x.reshape(-1)
        return spread(x, (len(x), T), sequence)

    conditions = [] if mask is None else [mask]
    if given.token_weights is not None:
        conditions.append(given.token_weights.reshape(-1) != 0)
    if not (modes.has_kl or modes.has_bonus):
        if not modes.has_penalty:  # a penalty acts without an advantage, too
            conditions.append(per_token(_advantages(given)) != 0)
        # Importance weights on the GPU are ignored here where the other conditions are on the host.
        importance = None if modes.surrogate == "vespo" else given.importance_weights
        if importance is not None and all(x.device == importance.device for x in conditions):
            conditions.append(per_token(importance) != 0)
    if not conditions:
        return None
    alive = conditions[0]
    for condition in conditions[1:]:
        alive = alive & condition
    if modes.needs_sequences:
        alive = _whole_sequences(alive, T, cu_seqlens, sequence)
        alive = alive if mask is None else alive & mask
    return alive


def _advantages(given: LossArguments) -> Tensor:
    """Return the advantages, or compute them from the rewards, one per sequence."""
    if given.advantages is not None:
        return given.advantages
    rewards = one_per_sequence(given.rewards)
    return z_scores(without_rounding(rewards), given.group_size or 1)[:, None]


def _whole_sequences(
    alive: Tensor, T: int, cu_seqlens: Tensor | None, sequence: Tensor | None
) -> Tensor:
    """Mark all tokens of the sequences that have a marked token, (N,) bool.

    The ratio is that of the sequence, so one token that counts gives a gradient to all of them.
    """
    if cu_seqlens is None or sequence is None:
        rows = alive.view(-1, max(T, 1))
        return rows.any(1)[:, None].expand(rows.shape).reshape(-1)
    count = torch.nn.functional.pad(alive.cumsum(0), (1, 0))[cu_seqlens.long()]
    return (count.diff() > 0)[sequence]
