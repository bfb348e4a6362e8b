"""The part of pytest-benchmark's fixture that the benchmarks use, for machines that have pytest alone."""

import gc
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.measuring import machine


class Timer:
    def __init__(self, name: str) -> None:
        self.name = name
        self.group: str | None = None
        self.extra_info: dict[str, Any] = {}
        self.stats: Any = None

    def pedantic(
        self,
        target: Callable[..., object],
        setup: Callable[[], tuple[tuple, dict]],
        rounds: int,
        warmup_rounds: int,
    ) -> None:
        times = []
        enabled = gc.isenabled()
        gc.disable()
        try:
            for i in range(warmup_rounds + rounds):
                args, kwargs = setup()
                start = machine.synced_time()
                target(*args, **kwargs)
                if i >= warmup_rounds:
                    times.append(machine.synced_time() - start)
        finally:
            if enabled:
                gc.enable()
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
        stats = SimpleNamespace(
            min=min(times),
            max=max(times),
            mean=statistics.mean(times),
            stddev=statistics.stdev(times),
            median=middle,
            iqr=high - low,
            rounds=len(times),
        )
        self.stats = SimpleNamespace(stats=stats)
        print(f"{self.name}: {middle * 1e3:.3f} ms, IQR {(high - low) * 1e3:.3f} ms")


@pytest.fixture
def benchmark(request: pytest.FixtureRequest) -> Timer:
    return Timer(request.node.name)
