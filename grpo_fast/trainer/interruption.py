"""Signals: the first one ends a run after its step, a second one at once. The weights are saved."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Stopped(KeyboardInterrupt):
    """The exception of a second signal, which does not wait for the step; `args` has its number."""


@dataclass
class Interruption:
    """The signals of a run.

    Attributes:
        signal: the first signal, or None.
        depth: the number of `undivided` blocks that are running.
        second: a second signal that came in such a block, or None.
    """

    signal: int | None = None
    depth: int = 0
    second: int | None = None


_current = Interruption()
_previous: dict[int, Any] = {}  # the handlers that ours replace


def _in_a_child() -> None:
    """Restore the handlers in a child, which a reward function may fork: signals end it as usual."""
    for number, handler in _previous.items():
        with contextlib.suppress(ValueError):
            signal.signal(number, handler)
    _previous.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_child)


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Record the first SIGINT, SIGTERM or SIGHUP, for a stop after the step; a second one raises `Stopped`.

    A SIGHUP that is ignored (nohup) stays ignored. Outside the main thread Python handles no signals, and
    this does nothing.
    """
    global _current
    interruption = _current = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    owner = os.getpid()

    def note(number: int, frame: object) -> None:
        if os.getpid() != owner:  # a child, before its handlers were restored
            _in_a_child()
            signal.raise_signal(number)
        elif interruption.signal is None:
            interruption.signal = number
            _tell("stopping after this step; press Ctrl-C again to save and stop at once")
        elif interruption.depth:
            interruption.second = number
            _tell("stopping as soon as the weights are whole")
        else:
            interruption.depth += 1  # a third one must not end the save that follows
            raise Stopped(number)

    for s in SIGNALS:
        if s in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(s) != signal.SIG_IGN:
            _previous[s] = signal.signal(s, note)
    try:
        yield interruption
    finally:
        for number, handler in _previous.items():
            signal.signal(number, handler)
        _previous.clear()


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Delay a second signal until the end of the block, in which weights are changed or written."""
    state = _current
    state.depth += 1
    try:
        yield
    finally:
        state.depth -= 1
    if not state.depth and state.second is not None:
        number, state.second = state.second, None
        state.depth += 1
        raise Stopped(number)


def _tell(text: str) -> None:
    # print may be in the middle of a write that the handler interrupted; the terminal may be closed.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
