"""Triton's interpreter without work that it repeats: the same results, in a third of the time.

It prepares `triton.language` for each launch and again for each call of a device function, and looks through
several modules for what to replace. Here the replacements are remembered, and a device function finds those
of its kernel in place. And it makes a table of the dtypes for each look into it. `quick_types.py` has the
short cuts for types and operators.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
from triton import language as tl
from triton.runtime import interpreter

from tests.support import quick_types

DTYPES = {
    tl.int1: np.dtype(bool),
    tl.bfloat16: np.dtype(np.uint16),  # stored as bits, as are those of 8 bits
    **{
        getattr(tl, name): np.dtype(name)
        for name in (
            *("float16", "float32", "float64", "int8", "int16", "int32", "int64"),
            *("uint8", "uint16", "uint32", "uint64"),
        )
    },
}
POINTER = np.dtype(np.uint64)
Modules = tuple[bool, ...]


def numpy_dtype(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`_get_np_dtype` with one table for all calls; `original` knows the dtypes that are not in it."""

    def get(dtype: Any) -> Any:
        if isinstance(dtype, tl.block_type):
            dtype = dtype.element_ty
        if isinstance(dtype, tl.pointer_type):
            return POINTER
        found = DTYPES.get(dtype)
        return original(dtype) if found is None else found

    return get


def patch_lang(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`_patch_lang` that remembers what it replaces for functions that see the same modules.

    What the functions within a kernel need is restored with what the kernel needs.
    """
    remembered: dict[tuple[Modules, ...], list[tuple[Any, str, Any]]] = {}
    seen: list[Modules] = []  # by the functions of the launch that runs, in order

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:
            seen.clear()
            super().restore()

    launch = Scope()

    @functools.cache
    def modules_of(fn: Any) -> Modules:
        values = list(fn.__globals__.values())
        return tuple(any(x is module for x in values) for module in (tl, tl.core))

    def patch(fn: Any) -> Any:
        modules = modules_of(fn)
        if modules not in seen:
            key = (*seen, modules)
            if key not in remembered:
                scope = original(fn)
                changes = [(thing, name) for thing, name, _ in scope._changes]
                remembered[key] = [(x, name, getattr(x, name)) for x, name in changes]
                scope.restore()
            for thing, name, new in remembered[key]:
                launch.set_attr(thing, name, new)
            seen.append(modules)
        return launch

    return patch


CHANGES = {
    (interpreter, "_patch_lang"): patch_lang,
    (interpreter, "_get_np_dtype"): numpy_dtype,
    **quick_types.SHORT_CUTS,
}
ORIGINAL = {(thing, name): getattr(thing, name, None) for thing, name in CHANGES}


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """The interpreter, quicker within; as it is where its version has other parts than those known here."""
    with contextlib.ExitStack() as stack:
        if hasattr(interpreter, "_LangPatchScope") and all(ORIGINAL.values()):
            for (thing, name), change in CHANGES.items():
                new = change(ORIGINAL[thing, name])
                stack.enter_context(mock.patch.object(thing, name, new))
        yield


@contextlib.contextmanager
def slow() -> Iterator[None]:
    """The interpreter as it is, also within `quick`."""
    with contextlib.ExitStack() as stack:
        for (thing, name), original in ORIGINAL.items():
            stack.enter_context(mock.patch.object(thing, name, original))
        yield
