"""The head of a causal LM: find it inside its wrappers, read it, and run a function in its place.

A head may have wrappers of its own: PEFT (a trainable copy), FSDP, `torch.compile`, accelerate. Their hooks
and forwards run as usual. The forward of the linear layer inside them is replaced for one call.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from grpo_fast.ops.head.vocab_parallel import rows_of_all

T = TypeVar("T")

# The names that configurations have for the factor of the logits, and for their cap. The first that is set
# counts.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# The attributes in which wrappers hold what they wrap. The forwards of the first two wrappers are left out;
# that of FSDP runs.
COMPILED = "_orig_mod"
PASSED_OVER = (COMPILED, "_checkpoint_wrapped_module")
WRAPPED = "_fsdp_wrapped_module"

INSTEAD_OF_QUANTISED = (
    "leave the head out of the quantisation (llm_int8_skip_modules=['lm_head'], "
    "modules_to_not_convert=['lm_head']), or put a plain torch.nn.Linear in its place "
    "(model.dequantize(), model.set_output_embeddings)"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """The head of a language model: logits are `softcap(logit_scale * (hidden @ weight.T + bias))`.

    Attributes:
        weight: (V, D), the model's own parameter (tied or not): gradients reach it. Under tensor parallelism
            it has the rows of this process.
        bias: (V,) or None.
        softcap: the c in c tanh(x / c), or None.
        logit_scale: the factor of the logits, before the cap.
        tp_group: the processes that share the rows, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    tp_group: dist.ProcessGroup | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that `linear_logprob` and `linear_grpo_loss` take besides the weight."""
        return {
            "bias": self.bias,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "tp_group": self.tp_group,
        }

    def dtype_for(self, hidden: Tensor) -> torch.dtype:
        """Return the dtype in which the model's own head takes hidden states: autocast's, or the weight's.

        A linear layer needs operands of one dtype. A model whose hidden states have another dtype (Mamba)
        converts them.
        """
        wide = torch.float64 in (hidden.dtype, self.weight.dtype)  # autocast leaves float64 alone
        if torch.is_autocast_enabled(hidden.device.type) and not wide:
            return torch.get_autocast_dtype(hidden.device.type)
        return self.weight.dtype

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits (..., V) of hidden states (..., D) as the model does, all of them in memory."""
        hidden = hidden.to(self.dtype_for(hidden))
        if self.tp_group is None:
            logits = nn.functional.linear(hidden, self.weight, self.bias)
        else:
            logits = _gathered_logits(hidden, self.weight, self.bias, self.tp_group)
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        return logits


def _gathered_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup
) -> Tensor:
    """Compute `linear(hidden, weight, bias)` with the rows of all processes.

    hidden gets the whole gradient.
    """
    mesh = DeviceMesh.from_group(group, hidden.device.type)
    rows = sum(rows_of_all(len(weight), group, weight.device))
    shape = (rows, weight.shape[1])
    whole: Any = DTensor.from_local(hidden, mesh, run_check=False)
    sharded = [
        DTensor.from_local(
            *(x, mesh, [Shard(0)]),
            run_check=False,
            shape=torch.Size(shape[: x.ndim]),
            stride=(shape[1], 1)[-x.ndim :],
        )
        for x in (weight, bias)
        if x is not None
    ]
    logits: Any = nn.functional.linear(whole, *sharded)
    return logits.full_tensor()


def head_path(lm: Any) -> list[nn.Module]:
    """Return the output embeddings of a causal LM and the modules inside, down to the linear layer.

    Raises:
        TypeError: the innermost module is not a plain linear layer.
    """
    name = type(lm).__name__
    module = lm.get_output_embeddings()
    if module is None:
        raise TypeError(f"{name}: has no output embeddings")
    path = [module]
    while (inner := _inside(name, path[-1])) is not None:
        path.append(inner)
    _check_linear(path[-1])
    return path


def _inside(name: str, module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper, or None.

    Wrappers pass attributes on, so only the attributes of their own tell what they are.
    """
    for key in (*PASSED_OVER, WRAPPED):
        if key in module._modules:
            return module._modules[key]
    if hasattr(module, "base_layer") or "token_adapter" in module._modules:
        raise TypeError(
            f"{name}: an adapter on the head ({type(module).__name__}) would have no effect: leave the "
            "output embeddings out of its target modules; trainable_token_indices reach a tied head as "
            "well: untie it"
        )
    if "modules_to_save" in module._modules:  # PEFT's trainable copies, unless adapters are off
        wrapper: Any = module
        names = [] if wrapper.disable_adapters else wrapper.active_adapters
        names = [name for name in names if name in wrapper.modules_to_save]
        return wrapper.modules_to_save[names[0]] if names else wrapper.original_module
    return None


def _check_linear(module: nn.Module) -> None:
    """Check that the output of a module is `hidden @ weight.T + bias`, with a weight that can be read."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if not isinstance(module, nn.Linear):
        raise TypeError(
            f"want a head that is a torch.nn.Linear, got {kind}: if it is quantised, {INSTEAD_OF_QUANTISED}; "
            "a wrapper of another library has to come off for training"
        )
    if type(module).forward is not nn.Linear.forward:
        raise TypeError(
            f"want a head that is a torch.nn.Linear, got {kind}, whose forward is its own: its logits need "
            f"not be hidden @ weight.T + bias. If it is quantised, {INSTEAD_OF_QUANTISED}"
        )
    weight = module.weight
    of_its_own = type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__
    known = isinstance(weight, (DTensor, torch._subclasses.FakeTensor))
    packed = (
        weight.ndim == 2
        and weight.shape[1] != module.in_features
        and not isinstance(weight, DTensor)
    )
    if not weight.dtype.is_floating_point or packed or (of_its_own and not known):
        raise TypeError(
            f"want a head that is a torch.nn.Linear with floating weights, got {kind} with a "
            f"{type(weight).__name__} of {weight.dtype} {tuple(weight.shape)}: it is quantised; "
            f"{INSTEAD_OF_QUANTISED}"
        )


def read_head(linear: Any, config: Any, inside: bool) -> Head:
    """Read the head from a linear layer, with the weight that it has at the moment.

    Args:
        config: the configuration of the language model.
        inside: True while the forwards of all modules around the layer run.
    """
    weight, bias, group = linear.weight, linear.bias, None
    if isinstance(weight, DTensor) and _is_tensor_parallel(linear, weight):
        if weight.placements == (Shard(0),):
            group = weight.device_mesh.get_group()
            weight, bias = (x.to_local() if isinstance(x, DTensor) else x for x in (weight, bias))
        else:  # the columns are spread, or nothing is
            weight, bias = (
                x.full_tensor() if isinstance(x, DTensor) else x for x in (weight, bias)
            )
    if isinstance(weight, DTensor) or weight.ndim != 2:
        raise ValueError(
            f"the head's weight is sharded ({type(weight).__name__} of {weight.numel()} elements): "
            + (
                "no wrapper gathered it for the forward of the head: let the module that owns it be part of "
                "the unit of the whole model (fully_shard(model)) or a unit of its own, a tied head of one "
                "with the embeddings (fully_shard([embeddings, head]))"
                if inside
                else "use it inside the wrapped model's forward, with with_head"
            )
        )
    softcap = _first(config, SOFTCAPS)
    softcap = None if softcap is None else float(softcap)
    return Head(weight, bias, softcap, _logit_scale(config), group)


def _is_tensor_parallel(linear: Any, weight: DTensor) -> bool:
    """Tell whether each process keeps its rows: by transformers' plan, or on a mesh named "tp"."""
    mesh = weight.device_mesh
    planned = getattr(linear, "_is_hooked", False) or "tp" in (mesh.mesh_dim_names or ())
    return bool(planned) and mesh.ndim == 1


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
    """Return the first of these attributes that exists and is not None."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), None)


def call_head(
    lm: Any,
    config: Any,
    hidden: Tensor,
    function: Callable[[Tensor, Head], T],
    dtype: torch.dtype | None = None,
) -> T:
    """Run `function(hidden, head)` in place of the head's own forward, inside those of its wrappers.

    Args:
        dtype: the dtype of the hidden states; None for that in which the model's own head takes them.
    """
    path = head_path(lm)

    def forward(hidden: Tensor) -> T:
        if isinstance(hidden, DTensor):
            raise TypeError(
                "the hooks of the head make a DTensor of the hidden states (parallelize_module): leave the "
                "head out of its plan; or call linear_grpo_loss and linear_logprob with "
                "hidden_states(model, ...), head.weight.to_local() and tp_group=mesh.get_group()"
            )
        head = read_head(path[-1], config, inside=True)
        return function(hidden.to(dtype or head.dtype_for(hidden)), head)

    with contextlib.ExitStack() as stack:
        for module in path:
            stack.enter_context(uncompiled(module))
        stack.enter_context(forward_as(path[-1], forward))
        return path[0](hidden)


@contextlib.contextmanager
def forward_as(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let the next `module(...)` call `function`, inside the module's hooks.

    The module has its own forward again when `function` runs.
    """
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


@contextlib.contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Let `module(...)` run the code that `torch.compile` has compiled, with its hooks, uncompiled.

    A compiled forward would ignore the replacement, or would be compiled again for each one.
    """
    inner = next((module._modules[key] for key in PASSED_OVER if key in module._modules), None)
    changed: dict[str, Any] = {}
    if inner is not None:
        changed["forward"] = inner.__call__
    if vars(module).get("_compiled_call_impl") is not None:  # compiled in place
        changed["_compiled_call_impl"] = None
    held = {key: vars(module)[key] for key in changed if key in vars(module)}
    vars(module).update(changed)
    try:
        yield
    finally:
        for key in changed:
            vars(module).pop(key)
        vars(module).update(held)
