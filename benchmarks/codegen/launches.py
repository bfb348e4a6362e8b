"""Record a launch instead of making it, and compile it for a GPU that need not be there."""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, mangle_type


class Launch(NamedTuple):
    fn: Any  # a triton.JITFunction
    arguments: dict[str, Any]  # compile options included


def record(case: Callable[[], object]) -> Launch:
    """Return the one launch that `case` makes, instead of making it."""
    launches = []

    def run(fn: Any, *, grid: Any, warmup: bool, **arguments: Any) -> None:
        launches.append(Launch(fn, arguments))

    with (
        mock.patch.object(JITFunction, "run", run),
        # Triton 3.4 has none in the class; it is not interpreted there by `codegen`.
        mock.patch.object(InterpretedFunction, "run", run, create=True),
    ):
        case()
    (launch,) = launches
    return launch


class Specialisation(NamedTuple):
    """Triton's view of the arguments: their types, the values that are constants, known divisors."""

    signature: dict[str, Any]  # of a tuple the types of its members
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]


def specialise(launch: Launch) -> Specialisation:
    """Specialise a launch as `fn[grid](**arguments)` would: None and 1 are constants, 16 a known divisor."""
    found = Specialisation({}, {}, {})
    for i, parameter in enumerate(launch.fn.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            found.signature[parameter.name] = "constexpr"
            found.constants[(i,)] = value
        else:
            special = not parameter.do_not_specialize
            found.signature[parameter.name] = _specialise_one(value, (i,), special, found)
    return found


def _specialise_one(value: Any, path: tuple[int, ...], special: bool, found: Specialisation) -> Any:
    """Return the type of an argument, for a tuple those of its members; the rest goes into `found`."""
    if isinstance(value, tuple):
        # All members are specialised, as Triton 3.4 does it.
        types = [_specialise_one(x, (*path, i), True, found) for i, x in enumerate(value)]
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    number = type(value) is int
    if value is None or (special and number and value == 1):
        found.constants[path] = value
        return "constexpr"
    if special and (isinstance(value, torch.Tensor) or (number and value % 16 == 0)):
        found.attributes[path] = [["tt.divisibility", 16]]
    return mangle_type(value)


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    """Compile a launch as `fn[grid](**arguments)` would on `target`."""
    names = {parameter.name for parameter in launch.fn.params}
    options = {name: x for name, x in launch.arguments.items() if name not in names}
    source = ASTSource(launch.fn, *specialise(launch))
    return triton.compile(source, target=target, options=options)
