"""What pytest-benchmark writes besides the times: the machine, the commit, and who is missing."""

from typing import Any

import pytest

from benchmarks import inputs, machine, measure


def pytest_configure(config: pytest.Config) -> None:
    config.option.showcapture = "no"  # the log of torch.compile, thousands of lines on a failure


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # Providers warn as they compile; this project's own warnings are errors in tests/.
        item.add_marker(pytest.mark.filterwarnings("ignore"))
        item.add_marker(pytest.mark.benchmark(timer=machine.synced_time, disable_gc=True))


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
