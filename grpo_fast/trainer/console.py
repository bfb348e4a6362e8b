"""Standard output and error of a run, which does not end when the terminal or pipe is closed."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Stream:
    """A text stream that goes on silently once it cannot be written to."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:  # a sample in a terminal that has no such character
            encoding = self._stream.encoding or "ascii"
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError:
            self._let_go()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._let_go()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _let_go(self) -> None:
        """Send the rest of the output to the null device, as Python's documentation advises."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            place, nowhere = self._stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, place)
            os.close(nowhere)


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Keep prints and progress bars from raising when nobody reads them any more."""
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        out, err = (_Stream(stream or nowhere) for stream in (sys.stdout, sys.stderr))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            yield
        finally:
            out.flush()
            err.flush()
