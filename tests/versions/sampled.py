"""A plugin for pytest: some cases of every test, and what they found, as JSON.

`python -m tests.versions` loads it in each environment. Of each file it keeps the first of every N cases, and
of every 2 N interpreted ones, which are slow. It records all warnings of something deprecated.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = ("grpo_fast", "kernels", "tests", "benchmarks", "examples")
DEPRECATED = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
MOST = 20  # failures that are named
SLOWER = "Guards may run slower on Python 3.13.0"  # the compiler of torch, of this patch release


class Record:
    """What the run found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
        self.failures: list[str] = []
        self.ours: set[str] = set()
        self.others: set[str] = set()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            kind = "skipped" if report.outcome == "skipped" else report.outcome
            self.counts[kind] += 1
            if report.outcome == "failed":
                self.failures.append(described(report))

    def pytest_collectreport(self, report):
        if report.outcome == "failed":
            self.counts["failed"] += 1
            self.failures.append(described(report))

    def pytest_warning_recorded(self, warning_message):
        if issubclass(warning_message.category, DEPRECATED):
            text = " ".join(str(warning_message.message).split())[:200]
            path = Path(warning_message.filename).resolve()
            if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in OURS:
                self.ours.add(f"{path.relative_to(ROOT)}:{warning_message.lineno}: {text}")
            else:
                self.others.add(f"{package(path)}: {text}")

    def pytest_sessionfinish(self):
        found = {
            **self.counts,
            "failures": self.failures[:MOST],
            "deprecations": sorted(self.ours),
            "of other packages": sorted(self.others),
        }
        self.path.write_text(json.dumps(found))


def described(report) -> str:
    """The name of a failed test, and the first line of its error."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else str(report.longrepr)).strip().splitlines()
    return f"{report.nodeid}: {lines[0][:200] if lines else ''}"


def package(path: Path) -> str:
    """The package that a file belongs to."""
    parts = path.parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1]
    return path.name


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, help="write what was found to this file")
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="cases of which one runs")


def pytest_configure(config):
    for kind in DEPRECATED:  # after those of pyproject.toml, so before them in effect
        config.addinivalue_line("filterwarnings", f"default::{kind.__name__}")
    config.addinivalue_line("filterwarnings", f"ignore:{SLOWER}:RuntimeWarning")
    config.pluginmanager.register(Record(config.getoption("--record")))


def pytest_collection_modifyitems(config, items):
    counts, kept, left_out = {}, [], []
    for item in items:
        interpreted = "triton" in item.nodeid
        which = item.path, interpreted
        counts[which] = counts.get(which, -1) + 1
        step = config.getoption("--one-in") * (1 + interpreted)
        (kept if counts[which] % step == 0 else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
