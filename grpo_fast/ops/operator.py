"""Functions on tensors as operators of PyTorch, without the cost of an operator where nothing looks at it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from grpo_fast.operands import Modes, traced
from grpo_fast.records import flat, number_of_fields, schema, unflatten

NO_TENSORS = {bool, int, float, str, torch.dtype, Modes}


def operator(
    name: str,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    results: str,
    *,
    fake: Callable[..., Any],
    backward: Callable[..., tuple] | None = None,
    setup_context: Callable[..., None] | None = None,
    differentiable: int = 1,
    mutates: bool = False,
) -> Callable[..., Any]:
    """Return `function` as the operator `grpo_fast::<name>`.

    What traces a program needs the operator: `torch.compile`, `torch.func`, and every mode or
    subclass of tensors that sees operators. Else the function is called directly, because the
    layers of an operator written in Python take 40 to 80 us a call (torch 2.13, on a CPU). An
    operator takes the fields of records one by one; a direct call takes the records themselves.

    Args:
        function: takes tensors and records, returns tensors, and returns none of what it takes. A
            result may be None; the operator returns a tensor without elements in its place.
        arguments: the names of its arguments and their types, as `records.schema` takes them.
        results: the types of its results, as schemas write them: "(Tensor, Tensor)".
        fake: the function on tensors without values.
        backward, setup_context: of its gradient, as in `torch.autograd.Function`; None: the results
            have none. `setup_context` gets the records, and `backward` returns the gradients of the
            first tensors.
        differentiable: how many of the first arguments gradients flow to.
        mutates: whether the function changes its first argument, a tensor. It changes no other.

    Returns:
        A function of positional arguments, the same as those of `function`. Its attribute `traced`
        is the operator itself, and `by_fields` the function that this calls.
    """
    kinds = tuple(arguments.values())
    by_fields = _taking_fields(function, kinds)
    declared = f"({schema(**arguments)}) -> {results}"
    changed: tuple[str, ...] = ()
    if mutates:
        declared, changed = declared.replace("Tensor ", "Tensor(a!) ", 1), (next(iter(arguments)),)
    as_operator = torch.library.custom_op(
        f"grpo_fast::{name}", by_fields, mutates_args=changed, schema=declared
    )
    as_operator.register_fake(_taking_fields(fake, kinds))
    direct: Callable[..., Any]
    if backward is None or setup_context is None:
        direct = _changing_first(function) if mutates else torch.no_grad()(function)
    else:
        as_operator.register_autograd(
            _padded(backward, number_of_fields(*kinds)),
            setup_context=_of_fields(setup_context, kinds),
        )
        leading = kinds[:differentiable]
        direct = _differentiable(name, function, backward, setup_context, leading)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if watched(*args):
            return as_operator(*flat(*args))
        if torch.autograd._profiler_enabled():
            with torch.profiler.record_function(f"grpo_fast::{name}"):
                return direct(*args)
        return direct(*args)

    call.traced, call.by_fields = as_operator, by_fields  # type: ignore[attr-defined]
    return call


def _taking_fields(function: Callable[..., Any], kinds: tuple[Any, ...]) -> Callable[..., Any]:
    """Return `function` as operators call it: with the fields of its records, and results without None."""

    def by_fields(*given: Any) -> Any:
        found = function(*unflatten(given, *kinds))
        if not isinstance(found, tuple):
            return found
        like = given[0]
        return tuple(
            torch.empty(0, dtype=torch.float32, device=like.device) if x is None else x
            for x in found
        )

    return by_fields


def _of_fields(setup_context: Callable[..., None], kinds: tuple[Any, ...]) -> Callable[..., None]:
    """Return `setup_context` for an operator, whose inputs are the fields of records."""

    def of_fields(ctx: Any, inputs: tuple, output: Any) -> None:
        setup_context(ctx, tuple(unflatten(inputs, *kinds)), output)

    return of_fields


def _padded(backward: Callable[..., tuple], total: int) -> Callable[..., tuple]:
    """Return `backward` with a gradient of None for the inputs after those it returns, `total` in all."""

    @functools.wraps(backward)
    def padded(ctx: Any, *upstream: Any) -> tuple:
        found = backward(ctx, *upstream)
        return (*found, *(None,) * (total - len(found)))

    return padded


def _differentiable(
    name: str,
    function: Callable[..., Any],
    backward: Callable[..., tuple],
    setup_context: Callable[..., None],
    leading: tuple[Any, ...],
) -> Callable[..., Any]:
    """Return a function that calls `function` as an `torch.autograd.Function`.

    That looks at each of its inputs. So only the tensors that gradients may flow to are inputs of
    their own; all others come in one tuple.

    Args:
        leading: the types of the arguments that gradients flow to; they come first.
    """
    count = len(leading)

    def forward(ctx: Any, *given: Any) -> Any:
        *tensors, rest = given
        inputs = (*unflatten(tensors, *leading), *rest)
        found = function(*inputs)
        setup_context(ctx, inputs, found)
        return found

    members = {
        "forward": forward,
        "backward": _padded(backward, number_of_fields(*leading) + 1),
    }
    statics = {key: staticmethod(value) for key, value in members.items()}
    kind: Any = type(f"grpo_fast_{name}", (torch.autograd.Function,), statics)

    def direct(*args: Any) -> Any:
        return kind.apply(*flat(*args[:count]), args[count:])

    return direct


def _changing_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a direct call of a function that changes its first argument, as autograd has to know."""

    def direct(x: Tensor, *rest: Any) -> Any:
        with torch.no_grad():
            found = function(x, *rest)
        torch.autograd.graph.increment_version(x)
        return found

    return direct


def watched(*args: Any) -> bool:
    """Tell whether something sees operators: a tracer, a mode, a transform, or a tensor without values."""
    return traced() or _has_special(args)


def _has_special(args: Sequence[Any]) -> bool:
    """Tell whether there is a subclass of tensors or a tensor without values, also within records."""
    for x in args:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            if x.is_meta:
                return True
        elif x is None or kind in NO_TENSORS:
            continue
        elif isinstance(x, Tensor) or (isinstance(x, tuple) and _has_special(x)):
            return True
    return False
