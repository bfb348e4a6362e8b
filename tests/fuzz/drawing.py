"""What a case draws, by name; and the comparison of a result with the oracle."""

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

FLOOR = 1e-5  # of `assert_as_accurate`


class UndecidedError(Exception):
    """A rounding decides what the result of this case is, so that it shows nothing."""


class Draws:
    """The choices of a case, made by its seed. `about` has those that are not the simplest.

    The simplest choice comes first everywhere. Each choice has a random number of its own, by its name:
    so one can be made simpler without a change of the others.

    Args:
        simplest: the names of choices that are not drawn.
    """

    def __init__(
        self, seed: int, backend: str = "torch", simplest: frozenset[str] = frozenset()
    ) -> None:
        self.seed, self.backend, self.simplest = seed, backend, simplest
        self.about: dict[str, Any] = {}
        self.made: Counter[str] = Counter()
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, name: str, *options: Any) -> Any:
        place, self.made[name] = 0, self.made[name] + 1
        if name not in self.simplest:
            place = Random(f"{self.seed} {name} {self.made[name]}").randrange(len(options))
        if options[place] is not options[0]:
            self.about[name] = options[place]
        return options[place]

    def flag(self, name: str, often: bool = False) -> bool:
        """False more often than not, unless `often`."""
        return self.pick(name, False, True) if often else self.pick(name, False, False, False, True)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).float()

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def some(self, share: float, *shape: int) -> Tensor:
        """A share of True."""
        return torch.rand(shape, generator=self.generator) < share


def same_kind(
    name: str, got: Tensor, truth: Tensor, plain: Tensor, near: tuple[Tensor, ...]
) -> Tensor:
    """Where to compare numbers; elsewhere the result must be as little finite as the truth in its dtype."""
    finite = torch.stack([x.to(got.dtype).isfinite() for x in (truth, *near)])
    possible, lost = finite.all(0), ~finite.any(0)  # neither: a rounding decides
    wrong = lost & got.isfinite()
    # The truth is finite, but plain PyTorch's way to it leaves the range of the dtype: so may ours.
    excused = ~plain.isfinite() & ~got.isfinite()
    wrong |= possible & ~got.isfinite() & ~excused
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        at = tuple(place)
        raise AssertionError(
            f"{name}: {got[at].item()} at {place}, want {truth[at].item()}, plain {plain[at].item()}"
        )
    return possible & got.isfinite()


def compare(
    name: str,
    got: Tensor,
    truth: Tensor,
    plain: Tensor,
    near: tuple[Tensor, ...] = (),
    floor: float = FLOOR,
    scale: float = 0.0,
    by_rows: bool = False,
    rounding: Tensor | None = None,
) -> None:
    """Assert that each element is right: error(got) <= 2 error(plain PyTorch) + 3 sensitivities + floor.

    Args:
        truth, plain: the oracle in float64, and in the dtype of plain PyTorch.
        near: the truth for log-probs that are off by a rounding. It tells what a rounding may change, for
            example on which side of a bound a ratio is.
        scale: the size of the terms that the result is a sum of.
        by_rows: the largest error and the largest entry are those of the element's own row, so that one huge
            row does not excuse the others.
        rounding: a bound of what roundings by design change in each element; None: there are none.
    """
    if tuple(got.shape) != tuple(truth.shape):
        raise AssertionError(f"{name}: shape {tuple(got.shape)}, want {tuple(truth.shape)}")
    dtype, got = got.dtype, got.detach()
    truth, plain = truth.detach().double(), plain.detach().double()
    near = tuple(x.detach().double() for x in near)
    if not got.numel():
        return
    where = same_kind(name, got, truth, plain, near)
    if not where.any():
        return
    got, error_of_plain = got.double(), (plain - truth).abs()
    error_of_plain = torch.where(where, error_of_plain.nan_to_num(0, 0, 0), 0)
    largest = torch.where(where, truth, 0).abs()
    if by_rows:
        least = 1e-9 * largest.max()
        error_of_plain, largest = (x.amax(-1, keepdim=True) for x in (error_of_plain, largest))
        largest = largest.clamp(min=least)
    else:
        error_of_plain, largest = error_of_plain.max(), largest.max()
    allowed = (2 * error_of_plain).expand_as(truth).clone()
    for other in near:
        allowed += 3 * (other - truth).abs().nan_to_num(0, 0, 0)
    if rounding is not None:
        allowed += rounding.nan_to_num(0, 0, 0)
    # Below 1e-18 a confident token has digits that float64 has not; the last is for subnormals.
    unit = torch.finfo(dtype)
    allowed += floor * largest.clamp(min=scale) + 1e-18 + 2 * unit.smallest_normal * unit.eps
    wrong = where & ~((got - truth).abs() <= allowed)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {got[at].item():.9g} at {list(at)}, want {truth[at].item():.9g}, plain PyTorch has "
            f"{plain[at].item():.9g}, allowed error {allowed[at].item():.3g}"
        )


def refused(call: Callable[[], Any], *names: str) -> None:
    """Assert that a call raises ValueError or TypeError, and that the message has one of the names."""
    try:
        call()
    except (ValueError, TypeError) as error:
        if not any(name in str(error) for name in names):
            raise AssertionError(f"the error does not name {names[0]}: {error}") from error
    except Exception as error:
        raise AssertionError(
            f"want ValueError or TypeError that names {names[0]}, got {type(error).__name__}: {error}"
        ) from error
    else:
        raise AssertionError(f"accepted silently, want an error that names {names[0]}")
