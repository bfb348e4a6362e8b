"""Options of the benchmarks, and what is written besides the times: machine, commit, who is missing."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import providers
from benchmarks.inputs import batches as inputs
from benchmarks.measuring import machine, measure, timing
from benchmarks.measuring import recorder as results

PLUGIN = "benchmark"  # pytest-benchmark's name among pytest's plugins
# In the names of files, in this order; those of tokens alone come last.
KINDS = ("bench_grpo", "bench_logprob", "bench_linear_grpo", "bench_linear")
# Seconds of one benchmark on a GPU. After them it hangs, and `run_all` goes on in a new process.
LIMIT = 60.0


@contextlib.contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Kill this process if what is inside takes longer."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("grpo_fast")
    group.addoption("--results", type=Path, help="JSON file, written anew after each measurement")
    group.addoption("--resume", action="store_true", help="leave out what --results has already")
    group.addoption("--library", action="append", help="only this library's providers; repeatable")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("TRITON_INTERPRET=1: the time of an interpreter means nothing")
    if not config.pluginmanager.hasplugin(PLUGIN):
        config.pluginmanager.register(timing, "grpo_fast-timing")
    config.option.showcapture = "no"  # the log of torch.compile, thousands of lines on a failure
    path = config.getoption("results", default=None)
    resume = config.getoption("resume", default=False)
    measure.RECORDER[:] = [results.Recorder(path, resume)] if path else []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("library", default=None)
    if wanted:
        items[:] = [item for item in items if _library(item) in wanted]
    if measure.RECORDER:
        done = measure.RECORDER[0].finished()
        items[:] = [item for item in items if _key(item) not in done]
    _first_cases_first(items)
    for item in items:
        # Providers warn as they compile; this project's own warnings are errors in tests/.
        item.add_marker(pytest.mark.filterwarnings("ignore"))
        if config.pluginmanager.hasplugin(PLUGIN):
            item.add_marker(pytest.mark.benchmark(timer=machine.synced_time, disable_gc=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not measure.RECORDER:
        return (yield)
    measure.RECORDER[0].start(_key(item))
    with limited(LIMIT if torch.cuda.is_available() else None):
        result = yield
    if machine.lost():  # `run_all` goes on in a new process
        os.kill(os.getpid(), signal.SIGKILL)
    measure.RECORDER[0].finish(_key(item))
    return result


def _first_cases_first(items: list[pytest.Item]) -> None:
    """The first case of every file, then the second of every file: what there is no time for matters least.

    Within a case those that start from hidden states come after those on logits, next to each other, since
    they share their inputs; then those of tokens alone. What torch.compile compiles, for minutes, comes last.
    """
    cases: dict[Path, dict[Any, int]] = {}

    def place(item: pytest.Item) -> tuple[bool, int, int]:
        call = getattr(item, "callspec", None)
        case = [x for name, x in call.params.items() if name != "provider"] if call else []
        seen = cases.setdefault(item.path, {})
        turn = seen.setdefault(tuple(case), len(seen))
        kind = next((i for i, word in enumerate(KINDS) if word in item.path.stem), len(KINDS))
        return _library(item) == "compile", turn, kind

    items.sort(key=place)


def _library(item: pytest.Item) -> str | None:
    call = getattr(item, "callspec", None)
    return providers.library(call.params["provider"]) if call else None


def _key(item: pytest.Item) -> str:
    return results.key(item.path.stem.removeprefix("bench_"), item.name)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    inputs.rotation.cache_clear()
    machine_info.clear()  # hostname, kernel build, every CPU flag
    machine_info |= machine.describe() | {"absent": dict(measure.ABSENT)}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    commit_info.clear()
    commit_info["id"] = machine.commit()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict
) -> None:
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
