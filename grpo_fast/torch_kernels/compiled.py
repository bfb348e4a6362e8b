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
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_fast import notices

# Smaller vocabularies, and calls with fewer tokens, are left to PyTorch's operators.
VOCABULARY, TOKENS = 1 << 14, 1 << 13
# The number of rows for which code is generated; it runs for any number. A row has to be the work of
# one thread, or its bits would depend on the number of threads: hence four rows or more per thread.
ROWS = 64
# The same for losses of tokens: sequences of one length.
LENGTH, EACH = 128, 512
# Compute a value where it is used, and not in a loop of its own.
IN_ONE_LOOP = {
    "compile_threads": 1,
    "realize_opcount_threshold": 1 << 20,
    "realize_reads_threshold": 1 << 20,
}
# Each objective is compiled by itself. One whose numbers change in every step is not worth it.
MOST_OBJECTIVES = 8

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
    if x.device.type != "cpu" or not x.numel():
        return False
    asked = notices.setting("GRPO_FAST_COMPILE")
    if asked == "1" and why_not():
        raise RuntimeError(f"GRPO_FAST_COMPILE=1, but inductor cannot compile: {why_not()}")
    return asked != "0" and (size >= least or asked == "1") and not why_not() and not _failure


def call(
    function: Callable[..., Any], static: tuple, *tensors: Tensor | None, T_len: int | None = None
) -> Any:
    """Return `function(*tensors, *static)` of tensors on a CPU, compiled; None if compiling fails.

    Args:
        function: it has no branches on values. It may write into one of the tensors, which must
            then overlap none of the others.
        static: hashable; each combination is compiled, up to `MOST_OBJECTIVES` of them.
        tensors: the first has R > 0 rows. The others are None, have R rows, or are 0-dim.
        T_len: a length, at least 2, of which R is a multiple, and which may change from call to
            call; `function` takes it as its last argument.
    """
    if not _worth_it(function, static):
        return None
    given = [None if x is None else x.detach() for x in tensors]
    given = [x.contiguous() if x is not None and x.ndim == 1 else x for x in given]
    kinds = tuple(None if x is None else (x.dtype, x.shape[1:], x.stride()) for x in given)
    length = () if T_len is None else (T_len,)
    try:
        compiled = _compiled(function, static, kinds, bool(length), torch.get_num_threads())
    except Exception as error:  # whatever a compiler may raise
        _give_up(f"inductor failed: {type(error).__name__}: {str(error)[:200]}")
        return None
    with torch.no_grad():
        if len(given[0]) > 1:  # type: ignore[arg-type]
            return compiled(*given, *length)
        # The compiler would make code of its own for one row, with other bits.
        twice = [x if x is None or not x.ndim else torch.cat([x, x]) for x in given]
        found = compiled(*twice, *length)
    for x, both in zip(given, twice, strict=True):
        if x is not None and both is not None and x.ndim and x.is_floating_point():
            x.copy_(both[:1])
    return found and tuple(x if x is None else x[:1] for x in found)


def call_padded(function: Callable[..., Any], static: tuple, *tensors: Tensor | None) -> Any:
    """Return `function(*tensors, *static)` of padded tensors on a CPU, compiled; None if compiling fails.

    It is `call` for any number of rows and any length of them, and takes half the time to start.

    Args:
        function: as in `call`; it writes into no tensor.
        static: as in `call`.
        tensors: each is None, (B, T) contiguous with T at least 2, or 0-dim.
    """
    if not _worth_it(function, static):
        return None
    kinds = tuple([None if x is None else (x.dtype, x.ndim) for x in tensors])
    try:
        compiled = _compiled_padded(function, static, kinds, torch.get_num_threads())
    except Exception as error:  # whatever a compiler may raise
        _give_up(f"inductor failed: {type(error).__name__}: {str(error)[:200]}")
        return None
    with torch.no_grad():
        return compiled(*[x for x in tensors if x is not None])


@functools.lru_cache(maxsize=64)
def _compiled_padded(
    function: Callable[..., Any], static: tuple, kinds: tuple, threads: int
) -> Callable[..., Any]:
    """Return the function compiled for tensors of these dtypes and numbers of dimensions."""

    from torch.fx.experimental.proxy_tensor import make_fx  # takes 0.1 s to import

    def of_given(*given: Tensor) -> Any:
        left = iter(given)
        return function(*(None if kind is None else next(left) for kind in kinds), *static)

    sizes = {0: (), 2: (EACH, LENGTH)}  # two sizes: equal ones would be taken for the same
    examples = [torch.zeros(sizes[kind[1]], dtype=kind[0]) for kind in kinds if kind is not None]
    with torch.no_grad():
        graph = make_fx(of_given, tracing_mode="symbolic")(*examples)
        values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        sizes_left = [x for value in values for x in value.shape]
        fixed = [x for x in sizes_left if isinstance(x, int) or x.node.maybe_as_int() is not None]
        if fixed:  # a branch on a size, such as len(x)
            raise RuntimeError(f"{function.__name__} is for tensors of a size {fixed} alone")
        vars(graph).pop("shape_env", None)  # torch 2.8 keeps no code on disk with it
        # Without the guards of `torch.compile`, which take as long as 2,000 tokens.
        compiled: Callable[..., Any] = torch._inductor.compile(graph, values, options=IN_ONE_LOOP)
    return compiled


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
    function: Callable[..., Any], static: tuple, kinds: tuple, with_length: bool, threads: int
) -> Callable[..., Any]:
    """Return the compiled function for tensors of these dtypes, row shapes and strides."""

    def flat(*given: Any) -> Any:
        tensors, length = given[: len(kinds)], given[len(kinds) :]
        return function(*tensors, *static, *length)

    # `torch.compile` keeps what it made, and a limit of 8, for each code object: this one is new.
    code = flat.__code__.replace()
    fresh = types.FunctionType(code, flat.__globals__, function.__name__, None, flat.__closure__)
    compiled = torch.compile(
        fresh,
        fullgraph=True,
        dynamic=True if with_length else None,
        options={"compile_threads": 1},
    )
    length = (LENGTH,) if with_length else ()
    flat_ones = all(kind is None or not kind[1] for kind in kinds)
    rows = LENGTH * EACH if flat_ones else max(ROWS, 4 * threads)
    examples = [
        None if kind is None else _example(kind[0], kind[1], kind[2], rows) for kind in kinds
    ]
    # A number that differs from that of another objective would become an input of the graph, and
    # inductor keeps its first value (torch 2.13).
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=True):
        compiled(*examples, *length)
    return compiled


def _example(dtype: torch.dtype, row: torch.Size, stride: tuple[int, ...], rows: int) -> Tensor:
    """Return zeros with a number of rows that the compiler is not to rely on."""
    if not stride:
        return torch.zeros((), dtype=dtype)
    x = torch.empty_strided((rows, *row), stride, dtype=dtype).zero_()
    torch._dynamo.mark_dynamic(x, 0)
    return x
