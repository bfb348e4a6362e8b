"""Options of the benchmarks, and what is written besides the times: machine, commit, who is missing."""

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import inputs, machine, measure, providers
from benchmarks.results import Recorder


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("grpo_fast")
    group.addoption("--results", type=Path, help="JSON file, written anew after each measurement")
    group.addoption("--library", action="append", help="only this library's providers; repeatable")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("TRITON_INTERPRET=1: the time of an interpreter means nothing")
    config.option.showcapture = "no"  # the log of torch.compile, thousands of lines on a failure
    path = config.getoption("results", default=None)
    measure.RECORDER[:] = [Recorder(path)] if path else []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("library", default=None)
    if wanted:
        items[:] = [item for item in items if _library(item) in wanted]
    for item in items:
        # Providers warn as they compile; this project's own warnings are errors in tests/.
        item.add_marker(pytest.mark.filterwarnings("ignore"))
        item.add_marker(pytest.mark.benchmark(timer=machine.synced_time, disable_gc=True))


def _library(item: pytest.Item) -> str | None:
    call = getattr(item, "callspec", None)
    return providers.library(call.params["provider"]) if call else None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    inputs.rotation.cache_clear()
    machine_info.clear()  # hostname, kernel build, every CPU flag
    machine_info |= machine.describe() | {"absent": dict(measure.ABSENT)}


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    commit_info.clear()
    commit_info["id"] = machine.commit()


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict
) -> None:
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
