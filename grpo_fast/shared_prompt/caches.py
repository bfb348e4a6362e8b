"""Caches of prompts that autograd can differentiate: made, copied, and repeated for completions."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin


def new_cache(config: Any) -> Any:
    """Return an empty cache for a model of this configuration, which never overwrites a state in place."""
    cache = DynamicCache(config=config)
    for layer in cache.layers:
        _assign_states(layer)
    return cache


def copied(cache: Any, function: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
    """Return a cache whose states are `function` of those of another; the other one does not change."""
    new = copy.copy(cache)
    new.layers = [_copied_layer(layer, function) for layer in cache.layers]
    return new


def forked(cache: Any, index: Tensor) -> Any:
    """Return the cache with row `index[b]` of each state at row b, for completions that go on from it."""
    return copied(cache, lambda x: x.index_select(0, index.to(x.device)))


def adopt(cache: Any, other: Any) -> None:
    """Give a cache the states of another."""
    cache.layers = copied(other).layers


def states(cache: Any) -> Iterator[Tensor]:
    """Yield all states, in the order in which `with_states` takes them."""
    for layer in cache.layers:
        for value in vars(layer).values():
            for x in value.values() if isinstance(value, dict) else (value,):
                if _is_state(x):
                    yield x


def with_states(cache: Any, values: list[Tensor]) -> Any:
    """Return a copy of a cache with other states, in the order of `states`."""
    left = iter(values)
    return copied(cache, lambda _: next(left))


def is_recurrent(cache: Any) -> bool:
    """Tell whether a layer keeps a state of a convolution or a recurrence, and not only keys and values."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


def _is_state(x: object) -> bool:
    """Tell whether x is a state: it has a batch dimension. The empty tensors of a new cache do not."""
    return isinstance(x, Tensor) and x.ndim > 1


def _copied_layer(layer: Any, function: Callable[[Tensor], Tensor]) -> Any:
    new = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            value = {key: function(x) if _is_state(x) else x for key, x in value.items()}
        elif _is_state(value):
            value = function(value)
        setattr(new, name, value)
    _assign_states(new)
    return new


def _assign_states(layer: Any) -> None:
    """Let a layer replace the states of convolutions and recurrences; its own methods copy into them.

    Autograd needs the old values: the completions start from them.
    """
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        own = vars(layer)
        own["update_conv_state"] = functools.partial(_update_conv_state, layer)
        own["update_recurrent_state"] = functools.partial(_update_recurrent_state, layer)


def _update_conv_state(
    layer: Any,
    conv_states: Tensor,
    state_idx: int = 0,
    conv_kernel_size: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Add inputs of a convolution to its state; return all that the convolution reads.

    Before the first token there are zeros.
    """
    size = layer.conv_kernel_size[state_idx] or conv_kernel_size or conv_states.shape[-1]
    layer.conv_kernel_size[state_idx] = size
    layer.is_conv_states_initialized[state_idx] = True
    layer.dtype, layer.device = conv_states.dtype, conv_states.device
    if layer.has_previous_state[state_idx]:
        found = torch.cat([layer.conv_states[state_idx], conv_states], -1)
    else:
        layer.has_previous_state[state_idx] = True
        found = torch.nn.functional.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
    layer.conv_states[state_idx] = found[..., -size:]
    return found


def _update_recurrent_state(
    layer: Any, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any
) -> Tensor:
    """Replace the state of a recurrence, and return it."""
    layer.is_recurrent_states_initialized[state_idx] = True
    layer.recurrent_states[state_idx] = recurrent_states
    return recurrent_states
