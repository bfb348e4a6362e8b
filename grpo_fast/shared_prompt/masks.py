"""The attention masks of rows that hold a prompt and its completions, in the form that a model takes.

transformers makes the masks of a model from functions of two places: causal, in a window, in chunks. The
functions here ask them about places in a sequence, not in a row, and add which tokens of a row belong to one
sequence. So each kind of layer gets its own mask.
"""

import contextvars
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import create_masks_for_generate

from grpo_fast.shared_prompt.plans import Rows

NAME = "grpo_fast_shared_prompt"  # under which transformers finds `_mask`
# What makes the masks: of a function of two places in a sequence, and the lengths of queries and keys.
MAKE: contextvars.ContextVar[Callable[..., Any]] = contextvars.ContextVar("make")
# How the implementations of attention take a mask.
BOOLEAN, FLOAT, BLOCKS = ("sdpa",), ("eager",), ("flex_attention",)


def masks_for(config: Any, rows: Rows, dtype: torch.dtype, cache: Any = None) -> Any:
    """Return the masks of a model for rows: one, or a dict with one for each kind of layer.

    Args:
        config: the configuration of the language model.
        dtype: that of the embeddings.
        cache: of the prompts, for `Plan.tails`.
    """
    attention = config._attn_implementation
    if attention in BLOCKS:
        make: Callable[..., Any] = functools.partial(_block_mask, rows)
    else:
        make = functools.partial(_dense_mask, rows, attention in BOOLEAN)
    return masks_by(make, config, rows.ids, rows.positions, dtype, rows.first.shape[1], cache)


def masks_by(
    make: Callable[..., Any],
    config: Any,
    ids: Tensor,
    positions: Tensor,
    dtype: torch.dtype,
    length: int,
    cache: Any = None,
) -> Any:
    """Return what `make(mask_function, ...)` gives for each kind of layer, in the form that a model takes.

    Args:
        ids, positions: (K, S), of the tokens that the model is given.
        length: the number of tokens in a row, with those in the cache.
        config, dtype, cache: as in `masks_for`.
    """
    AttentionMaskInterface.register(NAME, _mask)
    own = copy.copy(config)
    own._attn_implementation_internal = NAME
    empty = torch.empty(*ids.shape, 0, dtype=dtype, device=ids.device)
    # With a mask of padding transformers does not take positions that start again for new sequences.
    padding = ids.new_ones(len(ids), length)
    token = MAKE.set(make)
    try:
        return create_masks_for_generate(own, empty, padding, cache, positions)
    finally:
        MAKE.reset(token)


def _mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    kv_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Any:
    """Make one mask; transformers calls this with the function of one kind of layer."""
    return MAKE.get()(
        mask_function, q_length=q_length, kv_length=kv_length, kv_offset=kv_offset, dtype=dtype
    )


def _dense_mask(
    rows: Rows,
    boolean: bool,
    mask_function: Callable[..., Any],
    *,
    q_length: int,
    kv_length: int,
    kv_offset: int,
    dtype: torch.dtype,
) -> Tensor:
    """Make a mask with an entry for each pair of tokens.

    A layer with a window has the last keys of the prompts only, from place `kv_offset` on.
    """
    K = len(rows.ids)
    batch, head = torch.arange(K, device=rows.ids.device).view(K, 1, 1, 1), rows.ids.new_zeros(())
    own, depth = (x[:, None, -q_length:, None] for x in (rows.first, rows.depth))
    keys = (x[:, kv_offset : kv_offset + kv_length] for x in (rows.first, rows.last, rows.depth))
    first, last, place = (x[:, None, None] for x in keys)
    seen = (first <= own) & (own <= last) & mask_function(batch, head, depth, place)
    if boolean:
        return seen
    zero = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, zero, torch.finfo(dtype).min)


def _block_mask(rows: Rows, mask_function: Callable[..., Any], **_: Any) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        own = rows.first[b, q]
        inside = (rows.first[b, kv] <= own) & (own <= rows.last[b, kv])
        return inside & mask_function(b, h, rows.depth[b, q], rows.depth[b, kv])

    K, S = rows.ids.shape
    device = rows.ids.device
    # Compiled it needs no (S, S) tensor.
    return create_block_mask(
        seen, K, None, S, S, device=str(device), _compile=device.type == "cuda"
    )
