"""Words about the library's own doing: its switches, its fallbacks, and a line for each call.

`GRPO_FAST_STRICT` is read when something falls back, and costs nothing otherwise. `GRPO_FAST_LOG` is read
once, when this module is imported: reading it in each call would take longer than the rest of the check.
`log_calls` switches the lines on and off later.
"""

import contextlib
import functools
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
LOGGER = logging.getLogger("grpo_fast")

# The environment variables of the library: the values that each takes, and what they do.
VARIABLES = {
    "GRPO_FAST_BACKEND": (
        ("triton", "torch"),
        "forces the Triton kernels (triton) or PyTorch's operators (torch)",
    ),
    "GRPO_FAST_COMPILE": (
        ("0", "1"),
        "0: nothing on a CPU is compiled; 1: calls of any size are",
    ),
    "GRPO_FAST_LOG": (("0", "1"), "1: logs a line for each call"),
    "GRPO_FAST_ON_CHIP": (("0", "1"), "1: grpo_loss uses the kernel that reads each row once"),
    "GRPO_FAST_STRICT": (("0", "1"), "1: a fallback is an error"),
    "GRPO_FAST_VALIDATE": (("0", "1"), "1: also checks values of tensors on a GPU; the host waits"),
}


def setting(name: str) -> str:
    """Return the value of one of `VARIABLES`, "" where it is not set.

    Raises:
        ValueError: it has a value that it does not take.
    """
    given = os.environ.get(name, "")
    choices = VARIABLES[name][0]
    if given and given not in choices:
        raise ValueError(f"{name}={given!r}: want {' or '.join(choices)}")
    return given


def switch(name: str) -> bool:
    """Tell whether one of `VARIABLES` is 1.

    Raises:
        ValueError: a value other than 0 and 1.
    """
    return setting(name) == "1"


class FallbackError(RuntimeError):
    """Something fell back, and GRPO_FAST_STRICT=1 makes that an error."""


class Fallback(NamedTuple):
    """A substitute that runs where the usual path cannot, and what to do about it."""

    what: str
    cure: str = ""


# Every fallback of the library. docs/doctor.md explains each.
FALLBACKS = {
    "triton": Fallback(
        "PyTorch's operators run on a GPU in place of the kernels",
        "The results are the same, but they take longer: pip install 'triton>=3.4'",
    ),
    "on_chip": Fallback(
        "GRPO_FAST_ON_CHIP=1 has no effect here", "The results are the same without it"
    ),
    "float64": Fallback(
        "the head runs in float64 by PyTorch's operators",
        "The kernels compute in float32: convert hidden and the head to float32 or half precision",
    ),
    "float32_copies": Fallback(
        "the head is multiplied in float32, which is right but slower",
        "PyTorch 2.10 or newer multiplies halves with a float32 result; logits_dtype='bf16' multiplies "
        "halves here and rounds the logits",
    ),
    "uncompiled": Fallback(
        "the CPU path runs by PyTorch's operators, uncompiled",
        "The results are the same, but they take longer; GRPO_FAST_COMPILE=0 asks for this",
    ),
    "slabs": Fallback(
        "gradients of the head are multiplied and added in two steps",
        "PyTorch 2.10 or newer does both in one",
    ),
    "inplace": Fallback(
        "grpo_loss(inplace=True) has no effect, and the gradient has memory of its own",
        "Leave inplace out of a compiled step, or call grpo_loss outside of it",
    ),
    "compiled_in_place": Fallback(
        "a model runs uncompiled where its forward is replaced, in with_head and hidden_states",
        "Compile its backbone instead (model.base_model.compile()), or the whole as torch.compile(model)",
    ),
    "unshared": Fallback("prompts not shared", "share_prompts='off' (TRL) asks for this"),
    "trl_head": Fallback("TRL's own log-prob head runs"),
    "trl_loss": Fallback("not fused, TRL's own loss runs"),
    "host_log_probs": Fallback(
        "the trainer's own function computes the log-probs, and the loss is computed from them"
    ),
    "verl": Fallback("nothing is registered with verl"),
    "from_logits": Fallback(
        "losses from logits, and no shared prompts", "Choose a model that docs/models.md lists"
    ),
    "lock": Fallback(
        "the run is not locked, take care that one process writes to it",
        "Choose an output_dir on a file system with locks",
    ),
}  # fmt: skip

_TOLD: set[tuple[str, str]] = set()


def fell_back(
    name: str,
    reason: str,
    *,
    cure: str | None = None,
    tell: Callable[[str], Any] | None = None,
    quiet: bool = False,
) -> None:
    """Say that something fell back, or raise where GRPO_FAST_STRICT=1.

    Code that `torch.compile` traces says nothing, but raises: with `fullgraph=True` the compiler's error
    quotes the message, otherwise the error is raised when the code runs.

    Args:
        name: a key of `FALLBACKS`.
        reason: why.
        cure: replaces the one of the table, where it depends on the reason.
        tell: takes the message, each time. Default: a warning, once for each reason.
        quiet: say nothing, since the documents or the caller's own message do. Only GRPO_FAST_STRICT=1
            objects.

    Raises:
        FallbackError: GRPO_FAST_STRICT=1.
        ValueError: GRPO_FAST_STRICT has a value other than 0 and 1.
    """
    what, usual = FALLBACKS[name]
    cure = usual if cure is None else cure
    text = f"{what}: {reason}" + (f". {cure}" if cure else "")
    if switch("GRPO_FAST_STRICT"):
        if torch.compiler.is_compiling():
            # An error while the compiler traces would only make it run the caller uncompiled, where
            # nothing falls back, and then compile parts of that. After a break this call itself raises.
            torch._dynamo.graph_break(msg=f"FallbackError: GRPO_FAST_STRICT=1: {text}")
        raise FallbackError(f"GRPO_FAST_STRICT=1: {text}")
    if quiet or torch.compiler.is_compiling():
        return
    if tell is not None:
        tell(text)
    elif (name, reason) not in _TOLD:
        _TOLD.add((name, reason))
        warnings.warn(f"grpo_fast: {text}", stacklevel=3)


def forget() -> None:
    """Forget which warnings were given, so that each is given again."""
    _TOLD.clear()


class Call(NamedTuple):
    """One call of a public function.

    Attributes:
        operator: its name.
        given: its tensors: shapes, dtypes and device. "" without any.
        notes: what ran, in the order in which it was noted: of each path its kernels, then schedules and
            chunks.
    """

    operator: str
    given: str
    notes: dict[str, dict[str, None]]

    @property
    def line(self) -> str:
        """Return the line that is logged."""
        return (
            f"{self.operator}: {self.given}; {self.ran}"
            if self.given
            else f"{self.operator}: {self.ran}"
        )

    @property
    def ran(self) -> str:
        """Return what ran, as one text."""
        parts = [f"{key}: {', '.join(x)}" if x else key for key, x in self.notes.items()]
        return "; ".join(parts) or "nothing to compute"


class _Open(threading.local):
    """The calls that are running in a thread, the outermost first."""

    def __init__(self) -> None:
        self.calls: list[Call] = []


_OPEN = _Open()
_SINKS: list[Callable[[Call], None]] = []
_ACTIVE = (
    False  # whether there are sinks; the one thing that a call looks at while nothing is logged
)


def note(text: str, kernel: str | None = None) -> None:
    """Add what runs to the line of the call that is running in this thread, if there is one.

    Args:
        kernel: what belongs to `text`, the path that it takes.
    """
    if _ACTIVE and _OPEN.calls:
        kernels = _OPEN.calls[-1].notes.setdefault(text, {})
        if kernel:
            kernels.setdefault(kernel)


def noting() -> bool:
    """Tell whether a note would be read, so that none has to be made otherwise."""
    return _ACTIVE and bool(_OPEN.calls)


def logged(name: str, inner: bool = False) -> Callable[[F], F]:
    """Return a decorator of a function that is logged: a line for each call of it.

    Code that `torch.compile` traces logs nothing, but the operators in it do, when they run.

    Args:
        name: what the line calls it.
        inner: an operator. It logs a line only where no other call is running: in compiled code.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            if not _ACTIVE or torch.compiler.is_compiling() or (inner and _OPEN.calls):
                return function(*args, **kwargs)
            return _recorded(name, function, args, kwargs)

        return call  # type: ignore[return-value]

    return decorate


def _recorded(name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function, and hand what was noted to the sinks."""
    call = Call(name, described(args, kwargs), {})
    _OPEN.calls.append(call)
    try:
        return function(*args, **kwargs)
    except BaseException as error:
        call.notes[f"raised {type(error).__name__}"] = {}
        raise
    finally:
        _OPEN.calls.pop()
        for sink in _SINKS:
            sink(call)


def described(args: Any, kwargs: Any) -> str:
    """Return shapes and dtypes of the first tensors among some arguments, and the device of the first."""
    named = [("", x) for x in args] + [(f"{key} ", x) for key, x in kwargs.items()]
    tensors = [(key, x) for key, x in named if isinstance(x, Tensor)]
    shown = [
        f"{key}{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for key, x in tensors[:3]
    ]
    return f"{', '.join(shown)} on {tensors[0][1].device}" if tensors else ""


def _write(call: Call) -> None:
    """Log the line of a call; print it on stderr, if there is no handler that could take it.

    A handler of our own would write each line a second time once the program has one.
    """
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    if LOGGER.hasHandlers():
        LOGGER.info(call.line)
    elif LOGGER.isEnabledFor(logging.INFO) and sys.stderr is not None:
        print(f"{LOGGER.name}: {call.line}", file=sys.stderr)


def log_calls(on: bool = True) -> None:
    """Log a line for each call from now on, as GRPO_FAST_LOG=1 does, or stop.

    The lines go to the logger "grpo_fast", at level INFO. If that has no handler, they go to stderr.
    """
    global _ACTIVE
    if on and _write not in _SINKS:
        _SINKS.append(_write)
    if not on and _write in _SINKS:
        _SINKS.remove(_write)
    _ACTIVE = bool(_SINKS)


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Collect the calls that are made meanwhile."""
    global _ACTIVE
    found: list[Call] = []
    _SINKS.append(found.append)
    _ACTIVE = True
    try:
        yield found
    finally:
        _SINKS.remove(found.append)
        _ACTIVE = bool(_SINKS)


if os.environ.get("GRPO_FAST_LOG") == "1":
    log_calls()
