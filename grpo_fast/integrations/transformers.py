"""The hidden states and the head of a Hugging Face causal LM, for losses that need no logits.

The model is not changed: nothing is patched for longer than one call. Use `with_head` for training. It runs a
loss inside the forward of the model's wrappers (DDP, FSDP, DeepSpeed, PEFT), so that their hooks gather the
weights and reduce the gradients as in any other forward.

It needs transformers >= 5.17 to build a model, but imports nothing of it. PEFT is optional.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grpo_fast.checks import is_dtensor
from grpo_fast.integrations.shared.model_head import (
    COMPILED,
    Head,
    call_head,
    forward_as,
    head_path,
    read_head,
    uncompiled,
)
from grpo_fast.notices import fell_back

__all__ = ["Head", "check_head", "head_of", "hidden_states", "inside_forward", "with_head"]

T = TypeVar("T")


def head_of(model: nn.Module) -> Head:
    """Return the head of a causal LM, wrapped (PEFT, DDP, ...) or not.

    Equivalent to `model.get_output_embeddings()` and the scalars that the model's configuration adds: with
    `hidden_states`, `head_of(model).logits(hidden_states(model, input_ids, attention_mask))` is
    `model(input_ids, attention_mask).logits`.

    The weight is the one that the module has at the moment. Under FSDP or ZeRO-3 use `with_head`, where the
    module has the whole weight. Under transformers' tensor parallelism (`tp_plan="auto"`) the weight has the
    rows of this process, and `tp_group` are the processes that share them.

    Raises:
        TypeError: the head is not a plain linear layer: quantised, or with an adapter on it.
        ValueError: its weight is sharded.
    """
    lm = causal_lm(model)
    return read_head(head_path(lm)[-1], text_config(lm), inside=False)


def hidden_states(
    model: nn.Module, input_ids: Tensor | None, attention_mask: Tensor | None = None, **inputs: Any
) -> Tensor:
    """Compute the last hidden states of a causal LM, which its head reads: (B, S, D).

    Equivalent to `model(input_ids, attention_mask, output_hidden_states=True).hidden_states[-1]`, without the
    logits. An adapter that prepends virtual tokens makes S larger.

    Args:
        model: wrapped (PEFT, DDP, ...) or not.
        input_ids, attention_mask: (B, S).
        inputs: other arguments of the backbone: `position_ids`, `inputs_embeds`, ...
    """
    inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
    function = functools.partial(backbone_output, compiler=compiler_of(model))
    return inside_forward(model, function, **inputs)


def backbone_output(
    lm: Any, /, *args: Any, compiler: Callable[[Any], Any] | None = None, **inputs: Any
) -> Tensor:
    """Compute the last hidden states of a bare causal LM, called with its own arguments.

    Args:
        compiler: compiles the backbone, if given.
    """
    backbone = backbone_of(lm)
    inputs["use_cache"] = False
    if compiler is not None:
        backbone = compiler(backbone)
    return backbone(*args, **inputs).last_hidden_state


def backbone_of(lm: Any) -> Any:
    """Return the part of a bare causal LM that computes the last hidden states.

    Raises:
        TypeError: the model has no such part.
    """
    backbone = lm.base_model
    if backbone is lm:  # Llama 4's text models name an attribute that only the multimodal model has
        backbone = getattr(lm, "model", lm)
    if backbone is lm:
        raise TypeError(
            f"{type(lm).__name__}: has no backbone apart from itself (base_model_prefix="
            f"{lm.base_model_prefix!r}), so its hidden states cannot be had without its logits"
        )
    return backbone


def compiler_of(model: nn.Module) -> Callable[[Any], Any] | None:
    """Return `torch.compile` with the options of the model's own compilation; None if it is not compiled."""
    found = None
    for module in wrappers(model):
        if COMPILED in module._modules:
            found = module.dynamo_ctx
        elif vars(module).get("_compiled_call_impl") is not None:
            name = type(module).__name__
            fell_back("compiled_in_place", f"{name} was compiled in place (model.compile())")
    return found


def with_head(
    model: nn.Module,
    function: Callable[[Tensor, Head], T],
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    *,
    last: int | None = None,
    dtype: torch.dtype | None = None,
    **inputs: Any,
) -> T:
    """Run `function(hidden, head)` inside the forward of the model, of its wrappers and of its head.

    The value of the function replaces the model's output, so the hooks of DDP, FSDP and DeepSpeed see it. The
    head's weight is gathered while the function runs, and again for its backward. Tensors, and tuples, lists
    and dicts of tensors, pass through all of these hooks; other values may not.

    Args:
        function: takes the hidden states and the head, and returns a loss or anything else.
        input_ids, attention_mask, inputs: as in `hidden_states`.
        last: pass on only the hidden states that score the last `last` tokens, shifted: `hidden[:, t]` is at
            the position before token S - last + t. Default: all (B, S, D), as the model computes them.
        dtype: the dtype of the hidden states. Default: that in which the model's own head takes them,
            autocast's or the weight's. With torch.float32 also a half-precision head has float32 products.

    Example:
        >>> out = with_head(
        ...     model,
        ...     lambda hidden, head: head.logits(hidden),
        ...     input_ids,
        ...     attention_mask,
        ...     last=completion_ids.shape[1],
        ... )
    """

    compiler = compiler_of(model)

    def forward(lm: Any, /, *args: Any, **kwargs: Any) -> T:
        hidden = backbone_output(lm, *args, compiler=compiler, **kwargs)
        if last is not None:
            if not 0 < last < hidden.shape[1]:
                raise ValueError(
                    f"with_head: last={last}: want 1 to {hidden.shape[1] - 1}: the first has none before it"
                )
            hidden = hidden[:, -last - 1 : -1]
        return call_head(lm, text_config(lm), hidden, function, dtype)

    inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
    return inside_forward(model, forward, **inputs)


def inside_forward(model: nn.Module, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Run `model(*args, **kwargs)` with `function(lm, ...)` in place of the forward of the causal LM inside.

    `lm` is the bare model. The wrappers around it run with their hooks, which may move, cast or add
    arguments. They do not change variables that the function closes over.
    """
    lm = causal_lm(model)

    def forward(*args: Any, **kwargs: Any) -> T:
        return function(lm, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for module in wrappers(model):
            stack.enter_context(uncompiled(module))
        stack.enter_context(forward_as(_bypassing(model) or lm, forward))
        return model(*args, **kwargs)


def _bypassing(model: nn.Module) -> nn.Module | None:
    """Return the PEFT wrapper that has the bare model's forward as its own, and so would not call ours.

    `disable_adapter` makes such a wrapper of a prompt adapter.
    """
    for module in model.modules():
        own = vars(module)
        if own.get("_adapters_disabled") and "forward" in own:
            return module
    return None


def causal_lm(model: nn.Module) -> Any:
    """Return the bare causal LM inside the wrappers of DDP, FSDP, DeepSpeed, torch.compile and PEFT."""
    return wrappers(model)[-1]


def wrappers(model: nn.Module) -> list[Any]:
    """Return a model and the modules that it wraps, down to the bare causal LM."""
    path: list[Any] = [model]
    while True:
        outer = path[-1]
        # Ask the class: instances of FSDP, DeepSpeed and torch.compile pass on attributes of the inner model.
        if hasattr(type(outer), "get_base_model"):  # PEFT
            inner = outer.get_base_model()
        elif hasattr(type(outer), "get_output_embeddings"):
            return path
        else:
            inner = getattr(
                outer, COMPILED if COMPILED in vars(outer)["_modules"] else "module", None
            )
        if not isinstance(inner, nn.Module):
            raise TypeError(
                "want a Hugging Face causal LM (get_output_embeddings), wrapped or not, "
                f"got {type(outer).__name__}"
            )
        path.append(inner)


def is_sharded(model: nn.Module) -> bool:
    """Tell whether processes share the weights (FSDP, ZeRO-3), so that all have to run the same layers."""
    return any(is_dtensor(x) or hasattr(x, "ds_id") for x in model.parameters()) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    )


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Check that the hidden states and the head of a model give its own logits, on four tokens.

    Some architectures have layers or factors between backbone and logits that are not in their configuration.
    The model may be wrapped. If it is sharded, every process has to call this.

    Raises:
        ValueError: the logits differ by more than 1e-3 of the largest (in half precision by more than eight
            units of its rounding).
    """
    lm = causal_lm(model)
    ids = torch.arange(1, 5, device=lm.device)[None]

    def logits(hidden: Tensor, head: Head) -> Tensor:
        if hidden.shape[-1] != head.weight.shape[1]:
            raise ValueError(
                f"{type(lm).__name__}: its last hidden states have {hidden.shape[-1]} features and its "
                f"head takes {head.weight.shape[1]}: there are layers between them, and it cannot be used "
                "without its logits"
            )
        return head.logits(hidden)

    with evaluating(model):
        want = model(input_ids=ids, use_cache=False).logits
        got = with_head(model, logits, ids)
    tolerance = max(1e-3, 8 * max(torch.finfo(x.dtype).eps for x in (got, want)))
    error = (got.float() - want.float()).abs().max() / want.abs().max().clamp(min=1e-30)
    if not error <= tolerance:
        raise ValueError(
            f"{type(lm).__name__}: its logits are not those of its last hidden states, output embeddings "
            f"and configuration (they differ by {error:.1e} of the largest): it cannot be used without its "
            "logits"
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each module back into the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def text_config(lm: Any) -> Any:
    """Return the configuration of the language model, also from a vision-language model."""
    return lm.config.get_text_config()
