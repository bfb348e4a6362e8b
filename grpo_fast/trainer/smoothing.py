"""The moving mean of a metric, which the curve, the page and the last line of a run show."""

from collections.abc import Sequence

WINDOW = 10  # steps of a mean


def known(values: Sequence[float | None]) -> list[float]:
    """Return the values that were measured: those that are not None."""
    return [value for value in values if value is not None]


def moving_means(values: Sequence[float | None]) -> list[float | None]:
    """Return at each step the mean of the last `WINDOW` ones, of the values that were measured.

    It is None where none of them was.
    """
    means: list[float | None] = []
    for i in range(len(values)):
        measured = known(values[max(0, i - WINDOW + 1) : i + 1])
        means.append(sum(measured) / len(measured) if measured else None)
    return means
