"""Stop processes that are late, and know what had failed in them until then.

After an interrupt or a kill neither the exit code nor a report says so. As a plugin of pytest this
module writes down each failure, where the environment names a file.
"""

import os
import signal
import subprocess
import time
from collections.abc import Collection

import pytest

VARIABLE = "GRPO_FAST_FAILURES"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get(VARIABLE)
    if report.failed and path:
        with open(path, "a") as file:
            file.write(f"{report.nodeid} ({report.when})\n")


def stop(processes: Collection[subprocess.Popen], grace: float) -> None:
    """Interrupt processes that lead their own session; kill those that go on after `grace` seconds."""
    for process in processes:
        os.killpg(process.pid, signal.SIGINT)  # pytest then says what it has seen
    until = time.monotonic() + grace
    for process in processes:
        _end(process, max(0.0, until - time.monotonic()))


def _end(process: subprocess.Popen, seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
