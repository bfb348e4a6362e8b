"""The attention masks of rows that hold a prompt and its completions, in the form that a model takes.

transformers makes the masks of a model from functions of two places: causal, in a window, in chunks. The
functions here ask them about places in a sequence, not in a row, and add which tokens of a row belong to one
sequence. So each kind of layer gets its own mask.
"""

import contextvars
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import create_masks_for_generate

from grpo_fast.shared_prompt.plans import Rows

NAME = "grpo_fast_shared_prompt"  # under which transformers finds `_mask`
ROWS: contextvars.ContextVar[Rows] = contextvars.ContextVar("rows")
# How the implementations of attention take a mask.
BOOLEAN, FLOAT, BLOCKS = ("sdpa",), ("eager",), ("flex_attention",)


def masks_for(config: Any, rows: Rows, dtype: torch.dtype, cache: Any = None) -> Any:
    """Return the masks of a model: one, or a dict with one for each kind of layer.

    Args:
        config: the configuration of the language model.
        dtype: that of the embeddings.
        cache: of the prompts, for `Plan.tails`.
    """
    AttentionMaskInterface.register(NAME, _mask)
    own = copy.copy(config)
    own._attn_implementation_internal = NAME
    own.grpo_fast_attention = config._attn_implementation
    empty = torch.empty(*rows.ids.shape, 0, dtype=dtype, device=rows.ids.device)
    token = ROWS.set(rows)
    try:
        # With a mask of padding transformers does not take positions that start again for new sequences.
        padding = torch.ones_like(rows.first)
        return create_masks_for_generate(own, empty, padding, cache, rows.positions)
    finally:
        ROWS.reset(token)


def _mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    config: Any,
    kv_offset: int = 0,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Any:
    """Make one mask; transformers calls this with the function of one kind of layer.

    A layer with a window has the last keys of the prompts only, from place `kv_offset` on.
    """
    rows = ROWS.get()
    if config.grpo_fast_attention in BLOCKS:
        return _block_mask(rows, mask_function)
    K = len(rows.ids)
    batch, head = torch.arange(K, device=rows.ids.device).view(K, 1, 1, 1), rows.ids.new_zeros(())
    own, depth = (x[:, None, -q_length:, None] for x in (rows.first, rows.depth))
    keys = (x[:, kv_offset : kv_offset + kv_length] for x in (rows.first, rows.last, rows.depth))
    first, last, place = (x[:, None, None] for x in keys)
    seen = (first <= own) & (own <= last) & mask_function(batch, head, depth, place)
    if config.grpo_fast_attention in BOOLEAN:
        return seen
    zero = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, zero, torch.finfo(dtype).min)


def _block_mask(rows: Rows, mask_function: Callable[..., Any]) -> Any:
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
