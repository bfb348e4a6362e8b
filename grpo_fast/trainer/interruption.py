"""Signals: the first one ends a run after its step, a second one at once; neither loses the weights."""

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
    """The second signal, which does not wait for the step; `args` has its number."""


@dataclass
class Interruption:
    """The signals of a run.

    Attributes:
        signal: the first signal, or None.
        depth: how many `undivided` blocks are under way.
        second: a signal that came in one of them, or None.
    """

    signal: int | None = None
    depth: int = 0
    second: int | None = None


_current = Interruption()
_previous: dict[int, Any] = {}  # handlers that ours stand in for


def _in_a_child() -> None:
    """A reward function may fork: what it starts ends by signals as if this module were not there."""
    for number, handler in _previous.items():
        with contextlib.suppress(ValueError):
            signal.signal(number, handler)
    _previous.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_child)


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Note the first SIGINT, SIGTERM or SIGHUP, to stop after the step; a second one raises `Stopped`.

    A SIGHUP that is ignored (nohup) stays ignored. Outside the main thread, where Python handles no
    signals, it does nothing.
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
    """Put a second signal off until the block has ended: in it weights change, or are written."""
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
