"""Functions on tensors as operators of PyTorch, without the cost of an operator where nothing looks at it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)


def operator(
    name: str,
    function: Callable[..., Any],
    schema: str | None = None,
    *,
    fake: Callable[..., Any],
    backward: Callable[..., tuple] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Return `function` as the operator `grpo_fast::<name>`.

    What traces a program needs the operator: `torch.compile`, `torch.func`, and every mode or
    subclass of tensors that sees operators. Else the function is called directly, because the
    layers of an operator written in Python take 40 to 80 us a call (torch 2.13, on a CPU).

    Args:
        function: takes and returns tensors, changes none of them, and returns none of them.
        schema: as `torch.library.custom_op` takes it; None: from the annotations of `function`.
        fake: the function on tensors without values.
        backward, setup_context: of its gradient, as in `torch.autograd.Function`; None: the results
            have none.

    Returns:
        A function of positional arguments. Its attribute `traced` is the operator itself.
    """
    traced = torch.library.custom_op(f"grpo_fast::{name}", function, mutates_args=(), schema=schema)
    traced.register_fake(fake)
    if backward is None:
        direct = torch.no_grad()(function)
    else:
        traced.register_autograd(backward, setup_context=setup_context)
        members = {"forward": _forward_of(function, setup_context), "backward": backward}
        statics = {key: staticmethod(value) for key, value in members.items()}
        kind: Any = type(f"grpo_fast_{name}", (torch.autograd.Function,), statics)
        direct = kind.apply

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if watched(*args):
            return traced(*args)
        if torch.autograd._profiler_enabled():
            with torch.profiler.record_function(f"grpo_fast::{name}"):
                return direct(*args)
        return direct(*args)

    call.traced = traced  # type: ignore[attr-defined]
    return call


def _forward_of(function: Callable[..., Any], setup_context: Any) -> Callable[..., Any]:
    """Return the forward of a Function; with one of two parts PyTorch looks at the signature each time."""

    def forward(ctx: Any, *args: Any) -> Any:
        found = function(*args)
        if setup_context is not None:
            setup_context(ctx, args, found)
        return found

    return forward


def watched(*args: Any) -> bool:
    """Tell whether something sees operators: a tracer, a mode, a transform, or a tensor without values."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    tensors = [x for x in args if isinstance(x, Tensor)]
    return bool([x for x in tensors if type(x) not in PLAIN or x.is_meta])
