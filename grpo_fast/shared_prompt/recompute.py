"""Gradient checkpointing of a model's layers that also works with a cache."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo_fast.shared_prompt.caches import adopt, copied

FLAG = "gradient_checkpointing"


def checkpointed_layers(model: nn.Module) -> list[Any]:
    """Return the layers of a model that transformers can recompute."""
    return [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer)]


def asks_for_recomputation(model: nn.Module) -> bool:
    """Tell whether a model in training recomputes its layers (`gradient_checkpointing_enable`)."""
    return any(getattr(x, FLAG, False) and x.training for x in model.modules())


@contextlib.contextmanager
def layers_recomputed(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Let each layer of a model recompute its activations in the backward pass, also with a cache.

    transformers' own checkpointing drops the cache. Here each layer gets a copy of the cache as it was before
    the layer, when it runs and again when it is recomputed. It also works in evaluation mode, without
    dropout.

    Raises:
        ValueError: the model has no layers that can be recomputed.
    """
    layers = checkpointed_layers(model)
    if enabled and not layers:
        raise ValueError(
            f"gradient checkpointing: {type(model).__name__} has no layers that can be recomputed"
        )
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if vars(module).get(FLAG):
                stack.enter_context(_attribute(module, FLAG, False))
        for layer in layers if enabled else ():
            # Accelerate's hooks (a model spread over devices) are in `forward`, and call `_old_forward`.
            name = "_old_forward" if hasattr(layer, "_hf_hook") else "forward"
            forward = _without_flag(layer, getattr(layer, name))
            stack.enter_context(_attribute(layer, name, partial(_recomputed, forward)))
        yield


@contextlib.contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a module, and restore it."""
    own = vars(module)
    had, before = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if had:
            own[name] = before
        else:
            own.pop(name, None)


def _without_flag(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that does not checkpoint by itself, also when it runs in the backward pass."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _attribute(layer, FLAG, False):
            return forward(*args, **kwargs)

    return run


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a layer so that its activations are recomputed in the backward pass."""
    cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if cache is None:
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)
    before = copied(cache)

    def run(*args: Any) -> tuple[Any, Any]:
        own = copied(before)

        def replaced(x: Any) -> Any:
            return own if x is cache else x

        given = {name: replaced(x) for name, x in kwargs.items()}
        return forward(*map(replaced, args), **given), own

    out, after = checkpoint(run, *args, use_reentrant=False)
    adopt(cache, after)
    return out
