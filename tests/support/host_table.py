"""The table of cases that compare an adapter with its host's own loss, and the comparison itself."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from tests.support.hosts import agrees

CPU = torch.device("cpu")
Case = Callable[[dict[str, Any]], None]
CASES: dict[str, dict[str, Case]] = {}


def case(host: str, name: str, function: Callable[..., None], *arguments: Any) -> None:
    """Add a case to the table of a host."""
    table = CASES.setdefault(host, {})
    assert name not in table, (host, name)
    table[name] = functools.partial(function, *arguments)


def same(ours: Any, theirs: Any, b: Any, until: Any = (), without: Any = ()) -> dict[str, Any]:
    """Compare loss, gradient and metrics; return the metrics of `ours`.

    Both are functions of (x, batch) that return (loss, metrics).

    Args:
        without: metrics that are another value on purpose, or missing in one of the two.
    """
    (metrics,) = agrees(ours, lambda x, b: theirs(x, b)[0], b, until)
    exact = {
        name: torch.where(b.mask, x, 0).double() if x.is_floating_point() else x
        for name, x in vars(b).items()
    }
    x = exact.pop("logp").requires_grad_()
    _, want = theirs(x, SimpleNamespace(**exact))
    got = {name: y for name, y in metrics.items() if name not in without}
    want = {name: y for name, y in want.items() if name not in without}
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_same_metric(got[name], value, b.mask, name)
    return metrics


def assert_same_metric(got: Any, want: Any, mask: Any, name: str) -> None:
    """Compare a metric: a number, or values of tokens where these are live."""
    if want is None:
        assert got is None, name
        return
    got, want = torch.as_tensor(got).double(), torch.as_tensor(want).double().detach()
    if want.dim():
        live = mask.expand(want.shape) if want.shape != mask.shape else mask
        got, want = got.expand(want.shape)[live], want[live]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")
