"""Guard bands around every buffer that an interpreted kernel receives.

Each buffer is copied into a larger one that is filled with NaN, or with a value that no index, flag or mask
should have: before it, behind it, and in the gaps between its rows. What a kernel reads there enters its
results; what it writes there is found afterwards.

Some reads stay unseen: those whose value a kernel drops, and those beyond the bands. `watched` looks at the
address of every access instead. It takes longer, so that the tests of bounds alone use it.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

BAND = 4096  # elements
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
INTEGERS = {torch.int8: 85, torch.int32: -77_777, torch.int64: -77_777, torch.bool: True}


class OutOfBoundsError(AssertionError):
    """A kernel accessed something outside the tensors that it was given."""


class _Guarded:
    """The tensors of one storage, of any dtypes, in a buffer of their own."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = [x.detach() for x in tensors]
        like = max(tensors, key=Tensor.element_size)
        size = like.element_size()
        first = min(x.storage_offset() * x.element_size() for x in tensors) // size
        last = max((x.storage_offset() + _extent(x)) * x.element_size() for x in tensors)
        length = -(-last // size) - first + 2 * BAND
        mixed = any(x.dtype != like.dtype for x in tensors)
        if mixed:
            # Every bit set: NaN, whichever floating dtype it is read in.
            self.buffer = torch.full((length * size,), 255, dtype=torch.uint8).view(like.dtype)
        else:
            self.buffer = torch.full(
                (length,), INTEGERS.get(like.dtype, torch.nan), dtype=like.dtype
            )
        # The bits are compared, in elements where all have one size.
        self.unit = 1 if mixed else size
        self.bits = self.buffer.view(BITS[self.unit])
        self.free = torch.ones_like(self.bits, dtype=torch.bool)
        shift = (BAND - first) * size
        self.inside = [self._at(self.buffer, x, shift) for x in tensors]
        for x, mine in zip(self.tensors, self.inside, strict=True):
            _once(mine).copy_(_once(x))
            if mixed:
                _once(self._bytes_at(self.free, x, shift)).fill_(False)
            else:
                free = self.free.as_strided(mine.shape, mine.stride(), mine.storage_offset())
                _once(free).fill_(False)
        self.before = self.bits.clone()

    @staticmethod
    def _at(buffer: Tensor, x: Tensor, shift: int) -> Tensor:
        offset = x.storage_offset() + shift // x.element_size()
        return buffer.view(x.dtype).as_strided(x.shape, x.stride(), offset)

    @staticmethod
    def _bytes_at(buffer: Tensor, x: Tensor, shift: int) -> Tensor:
        size = x.element_size()
        strides = [size * n for n in x.stride()]
        return buffer.as_strided((*x.shape, size), (*strides, 1), x.storage_offset() * size + shift)

    def finish(self, kernel: str) -> None:
        """Check the bands, and hand back what changed."""
        changed = (self.bits != self.before).logical_and_(self.free)
        if bool(changed.any()):
            where = int(changed.nonzero()[0, 0]) * self.unit // self.buffer.element_size()
            raise OutOfBoundsError(
                f"{kernel} wrote {self.buffer[where].item()} to {self._place(where)}"
            )
        for x, mine in zip(map(_once, self.tensors), map(_once, self.inside), strict=True):
            if bool((_bits(x) != _bits(mine)).any()):
                x.data.copy_(mine)  # `data`: it does not count as a change of what autograd saved

    def _place(self, where: int) -> str:
        """Name an element of the buffer."""
        shapes = [tuple(x.shape) for x in self.tensors]
        return f"element {where - BAND} of a buffer of {len(self.buffer) - 2 * BAND} that holds {shapes}"

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        """Say which addresses lie in the buffer, its bands included."""
        first = self.buffer.data_ptr()
        return (addresses >= first) & (addresses < first + self.buffer.nbytes)

    def foreign(self, addresses: np.ndarray, width: int) -> str:
        """Name the first element that belongs to no tensor, of accesses within the buffer; "": none."""
        start = addresses - self.buffer.data_ptr()
        free = self.free.numpy()
        wrong = free[start // self.unit] | free[(start + width - 1) // self.unit]
        if not wrong.any():
            return ""
        return self._place(int(start[wrong][0]) // self.buffer.element_size())


def _once(x: Tensor) -> Tensor:
    """Return x without the repetitions of an expanded dimension."""
    for dimension, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[dimension] > 1:
            x = x.narrow(dimension, 0, 1)
    return x


def _extent(x: Tensor) -> int:
    """Count the elements from the first to the last of x."""
    if not x.numel():
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(BITS[x.element_size()])


# Rows may be given by a pointer in front of them, and the entries from there to the first row.
BEFORE = {"logits_ptr": "before", "x_ptr": "before", "dlogits_ptr": "dbefore"}


def _members(values: Iterable[Any]) -> Iterator[Any]:
    """The values, those in named tuples one by one."""
    for x in values:
        yield from _members(x) if hasattr(x, "_fields") else [x]


def _moved(x: Tensor, n: int) -> Tensor:
    """Return x, moved by n entries in its storage."""
    return x.as_strided(x.shape, x.stride(), x.storage_offset() + n)


_off: list[bool] = []


@contextlib.contextmanager
def unguarded() -> Iterator[None]:
    """Kernels get the buffers themselves: for a test that follows addresses."""
    _off.append(True)
    try:
        yield
    finally:
        _off.pop()


KERNELS = Path(__file__).resolve().parents[2] / "kernels"
_watches: list["Watch"] = []


class Watch:
    """Which kernels were launched, and the buffers of the launch that runs."""

    def __init__(self) -> None:
        self.kernels: list[str] = []
        self.guards: list[_Guarded] = []

    def look(self, verb: str, pointers: Any, mask: Any = None) -> None:
        """Raise if an access is outside the tensors of the launch."""
        addresses = np.atleast_1d(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data != 0, addresses.shape)]
        addresses = addresses.ravel().astype(np.int64)
        width = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        for guard in self.guards:
            if not len(addresses):
                return
            inside = guard.holds(addresses)
            if inside.any() and (place := guard.foreign(addresses[inside], width)):
                raise OutOfBoundsError(f"{self.kernels[-1]} {verb} {place}, at {_line()}")
            addresses = addresses[~inside]
        if len(addresses):
            raise OutOfBoundsError(
                f"{self.kernels[-1]} {verb} {len(addresses)} elements far from every tensor, at {_line()}"
            )


def _line() -> str:
    """Name the line of a kernel that is running."""
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.resolve().parent == KERNELS:
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "a line outside kernels/"


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    """Every load, store and atomic must be within the tensors that its launch was given."""
    from triton.runtime.interpreter import InterpreterBuilder

    watch = Watch()

    def looking(name: str, verb: str, place: int | None, at: int = 0) -> Any:
        """Look at the pointers, argument `at`, and at the mask, argument `place`, before the call."""
        original = getattr(InterpreterBuilder, name)

        def call(builder: Any, *args: Any) -> Any:
            watch.look(verb, args[at], None if place is None else args[place])
            return original(builder, *args)

        return mock.patch.object(InterpreterBuilder, name, call)

    _watches.append(watch)
    try:
        with (
            looking("create_masked_load", "reads", 1),
            looking("create_masked_store", "writes", 2),
            looking("create_atomic_rmw", "writes", 3, at=1),
            looking("create_atomic_cas", "writes", None),
        ):
            yield watch
    finally:
        _watches.pop()


def guarded(run: Callable[..., Any]) -> Callable[..., Any]:
    """`GridExecutor.__call__` with bands around what it is given."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _off:
            return run(self, *args, **kwargs)
        before = {name: kwargs.get(distance, 0) for name, distance in BEFORE.items()}
        kwargs = {
            name: _moved(x, before[name]) if before.get(name) else x for name, x in kwargs.items()
        }
        given = [x for x in _members([*args, *kwargs.values()]) if isinstance(x, Tensor)]
        by_storage: dict[int, list[Tensor]] = {}
        for x in given:
            by_storage.setdefault(x.untyped_storage()._cdata, []).append(x)
        guards = [_Guarded(tensors) for tensors in by_storage.values()]
        inside = {
            id(x): mine
            for guard, tensors in zip(guards, by_storage.values(), strict=True)
            for x, mine in zip(tensors, guard.inside, strict=True)
        }

        def guarded_one(x: Any, name: str = "") -> Any:
            if hasattr(x, "_fields"):
                return type(x)(*map(guarded_one, x))
            if not isinstance(x, Tensor):
                return x
            mine = inside[id(x)]
            return _moved(mine, -before[name]) if before.get(name) else mine

        for watch in _watches:
            watch.kernels.append(self.fn.__name__)
            watch.guards = guards
        try:
            result = run(
                self,
                *map(guarded_one, args),
                **{name: guarded_one(x, name) for name, x in kwargs.items()},
            )
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OutOfBoundsError):
                cause = cause.__cause__  # the interpreter has wrapped it, once per function
            raise cause or error from None
        for guard in guards:
            guard.finish(self.fn.__name__)
        return result

    return call
