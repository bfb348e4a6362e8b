"""The parts of the PyTorch path that inductor compiles on a CPU: when, and by what.

PyTorch's operators pass over a block of logits five to eight times. Compiled code reads a row once
for its statistics, and once for its gradient. Compiling takes some seconds, once for each
machine (inductor keeps the result on disk), and less in each process after that. So only large
calls are compiled.

Whether rows are compiled depends on V, not on their number: a row has the same bits in any batch.
"""

import functools
import os
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast import notices

# Smaller vocabularies, and calls with fewer tokens, are left to PyTorch's operators.
VOCABULARY, TOKENS = 1 << 14, 1 << 13
# The number of rows for which code is generated; it runs for any number. A row has to be the work of
# one thread, or its bits would depend on the number of threads: hence four rows or more per thread.
ROWS = 64
# The same for losses of tokens: sequences, and their length. Equal sizes would be one symbol.
EACH, LENGTH = 512, 128
# Compute a value where it is used, and not in a loop of its own.
IN_ONE_LOOP = {
    "compile_threads": 1,
    "realize_opcount_threshold": 1 << 20,
    "realize_reads_threshold": 1 << 20,
}
# Losses of fewer tokens are computed by one thread: waking others takes longer, and each loop waits for
# the last of them, which another process may hold up.
ALONE = 1 << 17
# Each objective is compiled by itself. One whose numbers change in every step is not worth it.
MOST_OBJECTIVES = 8

_LOCK = threading.Lock()
_failure = ""  # why compiling has failed; then it is not tried again


def compiler() -> str | None:
    """Return the C++ compiler that inductor takes, None where there is none."""
    given = os.environ.get("CXX")
    paths = map(shutil.which, [given] if given else ["g++", "clang++"])
    return next((path for path in paths if path), None)


@functools.cache
def why_not() -> str:
    """Return why inductor cannot compile here, "" where it can."""
    if sys.platform != "linux":
        return f"not tried on {sys.platform}"
    return (
        "" if compiler() else "there is no C++ compiler (g++, clang++, or the one that CXX names)"
    )


def summary() -> str:
    """Say which calls on CPU tensors are compiled, and by what; or why none is."""
    asked = notices.setting("GRPO_FAST_COMPILE")
    why = "GRPO_FAST_COMPILE=0" if asked == "0" else why_not() or _failure
    if why:
        return f"nothing ({why})"
    which = f"vocabularies from {VOCABULARY:,} entries on, losses of {TOKENS:,} tokens or more"
    return f"{'calls of any size' if asked == '1' else which}, by inductor with {compiler()}"


def compiles(x: Tensor, size: int, least: int) -> bool:
    """Tell whether functions of `x` are compiled: on a CPU, and `size` is at least `least`.

    `GRPO_FAST_COMPILE=1` compiles calls of any size, 0 none.

    Raises:
        RuntimeError: GRPO_FAST_COMPILE=1, and nothing can be compiled.
        ValueError: another value of GRPO_FAST_COMPILE.
    """
    if x.device.type != "cpu" or not x.numel() or x.is_neg():
        return False
    asked = notices.setting("GRPO_FAST_COMPILE")
    if asked == "1" and why_not():
        raise RuntimeError(f"GRPO_FAST_COMPILE=1, but inductor cannot compile: {why_not()}")
    return asked != "0" and (size >= least or asked == "1") and not why_not() and not _failure


def call(
    function: Callable[..., Any], static: tuple, *tensors: Tensor | None, moving: int = 1
) -> Any:
    """Return `tuple(function(*tensors, *static))` of tensors on a CPU, compiled; None if compiling fails.

    Args:
        function: it has no branches on values. It may write into one of the tensors, which must
            then overlap none of the others.
        static: hashable; each combination is compiled, up to `MOST_OBJECTIVES` of them.
        tensors: each is None, 0-dim, or has the same first `moving` sizes as the others. These may
            differ from call to call, and are not 0. With two of them the second is at least 2.
    """
    if not _worth_it(function, static):
        return None
    given = [x.resolve_neg() for x in tensors if x is not None]
    given = [x if x.ndim > moving else x.contiguous() for x in given]
    kinds = tuple([None if x is None else _kind(x, moving) for x in tensors])
    of_rows = any(x.ndim > moving for x in given)
    alone = not of_rows and max(x.numel() for x in given) < ALONE
    threads = 1 if alone else torch.get_num_threads()
    try:
        with _LOCK:  # inductor compiles in one thread
            compiled = _compiled(function, static, kinds, moving, threads)
    except Exception as error:  # whatever a compiler may raise
        _give_up(f"inductor failed: {type(error).__name__}: {str(error)[:200]}")
        return None
    with torch.no_grad():
        return compiled(*given)


class Kind(NamedTuple):
    """The properties of a tensor for which code is generated."""

    dtype: torch.dtype
    ndim: int
    row: tuple[int, ...]  # the sizes that do not change
    stride: tuple[int, ...]  # () where it follows from the sizes


def _kind(x: Tensor, moving: int) -> Kind:
    if x.ndim > moving:
        return Kind(x.dtype, x.ndim, x.shape[moving:], x.stride())
    return _contiguous(x.dtype, x.ndim)


@functools.cache
def _contiguous(dtype: torch.dtype, ndim: int) -> Kind:
    return Kind(dtype, ndim, (), ())


_seen: dict[Callable[..., Any], set[tuple]] = {}


def _worth_it(function: Callable[..., Any], static: tuple) -> bool:
    """Tell whether these static values are among the first, which are compiled."""
    seen = _seen.setdefault(function, set())
    if static not in seen and len(seen) >= MOST_OBJECTIVES:
        reason = f"more than {MOST_OBJECTIVES} objectives, each of which would be compiled"
        notices.fell_back("uncompiled", reason)
        return False
    seen.add(static)
    return True


def _give_up(reason: str) -> None:
    """Compile nothing more in this process, and say why."""
    global _failure
    _failure = reason
    notices.fell_back("uncompiled", reason)


@functools.lru_cache(maxsize=64)
def _compiled(
    function: Callable[..., Any],
    static: tuple,
    kinds: tuple[Kind | None, ...],
    moving: int,
    threads: int,
) -> Callable[..., Any]:
    """Return the compiled function for tensors of these kinds.

    It has none of the guards of `torch.compile`, which take as long as 2,000 tokens of a loss.
    """
    from torch._dispatch.python import enable_python_dispatcher  # these take 0.1 s to import
    from torch.fx.experimental.proxy_tensor import make_fx

    def of_given(*given: Tensor) -> Any:
        left = iter(given)
        found = function(*(None if kind is None else next(left) for kind in kinds), *static)
        return tuple(found)  # a record is not taken

    mode, examples = _examples(kinds, moving, threads)
    with torch.no_grad():
        with mode, enable_python_dispatcher():  # for views with symbols, in torch 2.8
            graph = make_fx(of_given)(*examples)
        values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        free = [size for value in values for size in value.shape[:moving]]
        fixed = [x for x in free if isinstance(x, int) or x.node.maybe_as_int() is not None]
        if fixed:  # a branch on a size, such as len(x)
            raise RuntimeError(f"{function.__name__} is for tensors of a size {fixed} alone")
        vars(graph).pop("shape_env", None)  # torch 2.8 keeps no code on disk with it
        options = {**IN_ONE_LOOP, "cpp.threads": threads}
        compiled: Callable[..., Any] = torch._inductor.compile(graph, values, options=options)
    return compiled


def _examples(
    kinds: tuple[Kind | None, ...], moving: int, threads: int
) -> tuple[AbstractContextManager[Any], list[Tensor]]:
    """Return tensors of these kinds with symbols for the sizes that move, and the mode to trace in."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    sizes = (EACH, LENGTH) if moving == 2 else (EACH * LENGTH,)
    if any(kind is not None and kind.row for kind in kinds):
        sizes = (max(ROWS, 4 * threads),)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    examples: list[Tensor] = []
    for i, kind in enumerate(kinds):
        if kind is None:
            continue
        shape = (*sizes, *kind.row)[: kind.ndim]
        example = (
            torch.empty_strided(shape, kind.stride, dtype=kind.dtype, device="cpu")
            if kind.stride
            else torch.empty(shape, dtype=kind.dtype, device="cpu")
        )
        how = [DimDynamic.DUCK] * moving + [DimDynamic.STATIC] * len(kind.row)  # equal: one symbol
        context: Any = StatelessSymbolicContext(dynamic_sizes=how[: kind.ndim])
        source = ConstantSource(f"input{i}")
        examples.append(mode.from_tensor(example, symbolic_context=context, source=source))
    return mode, examples
