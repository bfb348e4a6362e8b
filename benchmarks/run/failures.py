"""Write down each failure as pytest reports it, where the environment names a file.

After an interrupt or a kill neither the exit code nor a report says what had failed until then.
"""

import os

import pytest

VARIABLE = "GRPO_FAST_FAILURES"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get(VARIABLE)
    if report.failed and path:
        with open(path, "a") as file:
            file.write(f"{report.nodeid} ({report.when})\n")
