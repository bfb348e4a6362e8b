"""Add the benchmarks' options, choose and order the cases, and record what was measured."""

import contextlib
import faulthandler
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import providers
from benchmarks.measuring import machine, measure
from benchmarks.measuring.recorder import Recorder

# Order of the files, by their names; those of tokens alone come last.
KINDS = ("bench_grpo", "bench_logprob", "bench_linear_grpo", "bench_linear")
# What runs on a CPU without --full: the first case of each kernel, of these libraries.
QUICK = ("eager", "grpo_fast")
# Seconds that one benchmark may take on a GPU, where the environment names them. `run_all` does,
# and goes on in a new process.
LIMIT_VARIABLE = "GRPO_FAST_LIMIT"


@contextlib.contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """End this process if what is inside takes longer, and say where it was."""
    if seconds is not None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("grpo_fast")
    group.addoption("--full", action="store_true", help="every case and library, on a CPU too")
    group.addoption("--results", type=Path, help="JSON file, written anew after each measurement")
    group.addoption("--resume", action="store_true", help="leave out what --results has already")
    group.addoption("--library", action="append", help="only this library's providers; repeatable")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("TRITON_INTERPRET=1: the time of an interpreter means nothing")
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install -e '.[bench]'")
    config.option.showcapture = "no"  # the log of torch.compile, thousands of lines on a failure
    path = config.getoption("results", default=None)
    resume = config.getoption("resume", default=False)
    measure.RECORDER[:] = [Recorder(path, resume)] if path else []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    turns = _turns(items)
    if not torch.cuda.is_available() and not config.getoption("full", default=True):
        left = [x for x in items if turns[x] == 0 and _library(x) in (*QUICK, None)]
        config.hook.pytest_deselected(items=[x for x in items if x not in left])
        items[:] = left
    wanted = config.getoption("library", default=None)
    if wanted:
        items[:] = [item for item in items if _library(item) in wanted]
    if measure.RECORDER:
        done = measure.RECORDER[0].document["finished"]
        items[:] = [item for item in items if _key(item) not in done]

    def place(item: pytest.Item) -> tuple[bool, int, int]:
        kind = next((i for i, word in enumerate(KINDS) if word in item.path.stem), len(KINDS))
        return _library(item) == "compile", turns[item], kind

    # The first case of every file, then the second: what there is no time for matters least. Cases
    # from hidden states are next to each other, as they share their inputs. What is compiled comes
    # last.
    items.sort(key=place)
    for item in items:
        # Providers warn as they compile; this project's own warnings are errors in tests/.
        item.add_marker(pytest.mark.filterwarnings("ignore"))
        item.add_marker(pytest.mark.benchmark(timer=machine.synced_time, disable_gc=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not measure.RECORDER:
        return (yield)
    measure.RECORDER[0].start(_key(item))
    limit = os.environ.get(LIMIT_VARIABLE) if torch.cuda.is_available() else None
    with limited(float(limit) if limit else None):
        result = yield
    if machine.lost():  # `run_all` goes on in a new process
        os.kill(os.getpid(), signal.SIGKILL)
    measure.RECORDER[0].finish(_key(item))
    return result


def _turns(items: list[pytest.Item]) -> dict[pytest.Item, int]:
    """Number each item by its case: 0 for the first case of its file, 1 for the second, and so on."""
    seen: dict[Path, dict[Any, int]] = {}
    turns = {}
    for item in items:
        case = _case(item)
        where = (case.shape, case.variant) if case else None
        known = seen.setdefault(item.path, {})
        turns[item] = known.setdefault(where, len(known))
    return turns


def _case(item: pytest.Item) -> Any:
    call = getattr(item, "callspec", None)
    return call.params.get("case") if call else None


def _library(item: pytest.Item) -> str | None:
    case = _case(item)
    return providers.library(case.provider) if case else None


def _key(item: pytest.Item) -> str:
    return f"{item.path.stem.removeprefix('bench_')} {item.name}"
