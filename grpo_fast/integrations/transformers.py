"""Hidden states and head of a Hugging Face causal LM, for losses that never see its logits.

The model is left as it is: nothing is patched for longer than one call. `with_head` is the entry for
training: it runs a loss inside the forward of whatever wraps the model (DDP, FSDP, DeepSpeed, PEFT), so that
their hooks gather the weights and reduce the gradients as they do for any other forward.

Needs: transformers >= 5.17 to build a model; nothing of it is imported here. PEFT is optional.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["Head", "check_head", "head_of", "hidden_states", "inside_forward", "with_head"]

T = TypeVar("T")

# What configurations call the factor of the logits, and their cap; the first that is set counts.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """What turns hidden states into logits: `softcap(logit_scale * (hidden @ weight.T + bias))`.

    Attributes:
        weight: (V, D), the model's own parameter (tied or not): gradients reach it.
        bias: (V,) or None.
        softcap: c of c tanh(x / c), or None.
        logit_scale: factor of the logits, before the cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that `linear_logprob` and `linear_grpo_loss` take besides the weight."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V): what the model itself computes. Materialises the logits."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        return logits


def head_of(model: nn.Module) -> Head:
    """The head of a causal LM, wrapped (PEFT, DDP, ...) or not.

    Equivalent to `model.get_output_embeddings()` and the scalars that the model's configuration adds: with
    `hidden_states`, `head_of(model).logits(hidden_states(model, input_ids, attention_mask))` is
    `model(input_ids, attention_mask).logits`.

    The weight is what the module holds at the moment: under FSDP or ZeRO-3 call it where that is the whole
    weight, in `with_head`.

    Raises:
        TypeError: the head is not a plain linear layer: quantised, or with an adapter on it.
        ValueError: its weight is sharded.
    """
    lm = causal_lm(model)
    return _read_head(_head_module(lm), _text_config(lm))


def hidden_states(
    model: nn.Module, input_ids: Tensor | None, attention_mask: Tensor | None = None, **inputs: Any
) -> Tensor:
    """The last hidden states of a causal LM, those its head reads: (B, S, D).

    Equivalent to `model(input_ids, attention_mask, output_hidden_states=True).hidden_states[-1]`, without the
    logits. An adapter that prepends virtual tokens makes S larger.

    Args:
        model: wrapped (PEFT, DDP, ...) or not.
        input_ids, attention_mask: (B, S).
        inputs: whatever else the backbone takes: `position_ids`, `inputs_embeds`, ...
    """
    inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
    return inside_forward(model, backbone_output, **inputs)


def backbone_output(lm: Any, /, *args: Any, **inputs: Any) -> Tensor:
    """The last hidden states of a bare causal LM, called with its own arguments."""
    backbone = lm.base_model
    if backbone is lm:
        raise TypeError(
            f"{type(lm).__name__}: has no backbone apart from itself (base_model_prefix="
            f"{lm.base_model_prefix!r}), so its hidden states cannot be had without its logits"
        )
    inputs["use_cache"] = False
    return backbone(*args, **inputs).last_hidden_state


def with_head(
    model: nn.Module,
    function: Callable[[Tensor, Head], T],
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    *,
    last: int | None = None,
    **inputs: Any,
) -> T:
    """`function(hidden, head)`, run inside the forward of the model, of its wrappers and of its head.

    What the function returns takes the place of the model's output, so the hooks of DDP, FSDP and DeepSpeed
    see it: the head's weight is gathered while the function runs, and again for its backward. Only tensors,
    and tuples, lists and dicts of them, are sure to pass through all of these hooks.

    Args:
        function: from the hidden states and the head to a loss, or anything else.
        input_ids, attention_mask, inputs: as in `hidden_states`.
        last: only the hidden states that score the last so many tokens, shifted: `hidden[:, t]` is that of
            the position before token S - last + t. Default: all (B, S, D), as the model computes them.

    Example:
        >>> out = with_head(
        ...     model,
        ...     lambda hidden, head: head.logits(hidden),
        ...     input_ids,
        ...     attention_mask,
        ...     last=completion_ids.shape[1],
        ... )
    """

    def forward(lm: Any, /, *args: Any, **kwargs: Any) -> T:
        hidden = backbone_output(lm, *args, **kwargs)
        if last is not None:
            if not 0 < last < hidden.shape[1]:
                raise ValueError(
                    f"with_head: last={last}: want 1 to {hidden.shape[1] - 1}: the first has none before it"
                )
            hidden = hidden[:, -last - 1 : -1]
        module, config = _head_module(lm), _text_config(lm)

        def score(hidden: Tensor) -> T:
            return function(hidden, _read_head(module, config))

        with _forward_as(module, score):
            return module(hidden)

    inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
    return inside_forward(model, forward, **inputs)


def inside_forward(model: nn.Module, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """`model(*args, **kwargs)` with `function(lm, ...)` in place of the forward of the causal LM inside it.

    `lm` is the bare model; the wrappers around it run, and with them their hooks: they may move, cast or add
    arguments. What the function closes over, they do not touch.
    """
    lm = causal_lm(model)

    def forward(*args: Any, **kwargs: Any) -> T:
        return function(lm, *args, **kwargs)

    with _forward_as(_bypassing(model) or lm, forward):
        return model(*args, **kwargs)


def _bypassing(model: nn.Module) -> nn.Module | None:
    """The PEFT wrapper that holds the bare model's forward as its own, and so would not call ours.

    That is what `disable_adapter` does to a prompt adapter.
    """
    for module in model.modules():
        own = vars(module)
        if own.get("_adapters_disabled") and "forward" in own:
            return module
    return None


def causal_lm(model: nn.Module) -> Any:
    """The bare causal LM inside DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers."""
    inner: Any = model
    while not hasattr(inner, "get_output_embeddings") or hasattr(inner, "get_base_model"):
        if hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
            continue
        outer, inner = inner, getattr(inner, "module", getattr(inner, "_orig_mod", None))
        if not isinstance(inner, nn.Module):
            raise TypeError(
                "want a Hugging Face causal LM (get_output_embeddings), wrapped or not, "
                f"got {type(outer).__name__}"
            )
    return inner


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Hold the hidden states and the head of a model against its own logits, on four tokens.

    Some architectures have layers, or factors, between backbone and logits that their configuration does not
    tell. The model may be wrapped; where it is sharded, every process has to call this.

    Raises:
        ValueError: they do not give the model's logits, up to 1e-3 of the largest (in half precision up to
            eight units of its rounding).
    """
    lm = causal_lm(model)
    ids = torch.arange(1, 5, device=lm.device)[None]

    def logits(hidden: Tensor, head: Head) -> Tensor:
        return head.logits(hidden.to(head.weight.dtype))

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        want = model(input_ids=ids, use_cache=False).logits
        got = with_head(model, logits, ids)
    finally:
        for module in training:
            module.training = True
    tolerance = max(1e-3, 8 * max(torch.finfo(x.dtype).eps for x in (got, want)))
    error = (got.float() - want.float()).abs().max() / want.abs().max().clamp(min=1e-30)
    if not error <= tolerance:
        raise ValueError(
            f"{type(lm).__name__}: its logits are not those of its last hidden states, output embeddings "
            f"and configuration (they differ by {error:.1e} of the largest): it cannot be used without its "
            "logits"
        )


def _text_config(lm: Any) -> Any:
    """The language model's configuration, also of a vision-language model."""
    return lm.config.get_text_config()


def _head_module(lm: Any) -> Any:
    module = lm.get_output_embeddings()
    if module is None:
        raise TypeError(f"{type(lm).__name__}: has no output embeddings")
    if hasattr(module, "base_layer"):
        raise TypeError(
            f"{type(lm).__name__}: an adapter on the head ({type(module).__name__}) would have no effect: "
            "leave the output embeddings out of its target modules"
        )
    if hasattr(
        module, "modules_to_save"
    ):  # PEFT's trainable copies of the head, unless adapters are off
        names = [] if module.disable_adapters else module.active_adapters
        names = [name for name in names if name in module.modules_to_save]
        module = module.modules_to_save[names[0]] if names else module.original_module
    return module


def _read_head(module: Any, config: Any) -> Head:
    linear = module if isinstance(module, nn.Linear) else getattr(module, "module", module)  # FSDP1
    if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
        raise TypeError(
            f"want a head that is a torch.nn.Linear with floating weights, got {type(linear).__name__}"
        )
    weight, bias = linear.weight, linear.bias
    if isinstance(weight, DTensor) or weight.ndim != 2:
        raise ValueError(
            f"the head's weight is sharded ({type(weight).__name__} of {weight.numel()} elements): "
            "use it inside the wrapped model's forward, with with_head"
        )
    softcap = _first(config, SOFTCAPS)
    return Head(weight, bias, None if softcap is None else float(softcap), _logit_scale(config))


def _logit_scale(config: Any) -> float:
    scale = _first(config, SCALES)
    if scale is None:
        scaling = getattr(config, "logits_scaling", None)
        if scaling is None:
            return 1.0
        # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies.
        return float(scaling) if config.model_type == "hyperclovax" else 1 / scaling
    return float(scale)


def _first(config: Any, names: tuple[str, ...]) -> float | None:
    """The first of these attributes that is there and not None."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), None)


@contextlib.contextmanager
def _forward_as(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """`module(...)` calls `function`, within the module's hooks; its own forward is back when it does."""
    # Accelerate's hooks (a model spread over devices) are in `forward`; what they wrap is `_old_forward`.
    name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    own = name in vars(module)
    original = getattr(module, name)

    def restore() -> None:
        if own:
            setattr(module, name, original)
        else:
            vars(module).pop(name, None)

    def forward(*args: Any, **kwargs: Any) -> Any:
        restore()  # the function may call the module itself
        return function(*args, **kwargs)

    setattr(module, name, forward)
    try:
        yield
    finally:
        restore()
