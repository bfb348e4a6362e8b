"""Say whether every kernel compiles, launches and agrees with float64 on this device.

    benchmarks/run_all --smoke
    python -m benchmarks.run.smoke bfloat16 --out smoke.json     # one group, in this process

Each group of `smoke_groups` is a process of its own. All run at the same time: nothing is timed. A
check that raises, or is wrong, costs its own line. A check that hangs, or takes the process down,
is named by the file that the process leaves behind.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT, command_line
from benchmarks.measuring import machine, recorder
from benchmarks.run import failures
from benchmarks.run.smoke_groups import GROUPS

COMMAND = "benchmarks/run_all --smoke"
TESTS = (
    *("test_logprob", "test_ids", "test_linear_edges", "test_linear_logprob", "test_weights"),
    *("test_grpo", "test_linear_model", "test_linear_upstream", "test_policy_loss"),
    *("test_reduction_weights", "test_sequence_loss", "test_selection", "test_diagnostics"),
    *("test_linear_grpo", "test_loss", "test_group_advantage", "test_index_arithmetic"),
)
SECONDS = 170.0  # for everything, at most
GRACE = 6.0  # seconds to stop in after an interrupt


def run_group(name: str, out: Path) -> int:
    """Run all checks of a group, writing the file around each; return how many are not right."""
    document: dict[str, Any] = {"group": name, "checks": [], "running": None}
    failed = 0
    for case, check in GROUPS[name]():
        document["running"] = case
        recorder.write(out, document)
        start = time.monotonic()
        row: dict[str, Any] = {"case": case}
        try:
            row |= {"outcome": "right", "errors": check()}
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as reason:
            failed += 1
            kind = "wrong" if isinstance(reason, AssertionError) else "raised"
            row |= {"outcome": kind, "message": f"{type(reason).__name__}: {str(reason)[:2000]}"}
            row["where"] = traceback.format_exc(limit=-3).replace(f"{ROOT}{os.sep}", "")
            print(f"{name}: {case}: {kind}: {row['message']}", flush=True)
        row["seconds"] = round(time.monotonic() - start, 3)
        document["checks"].append(row)
        if machine.lost():
            break
    else:
        document["running"] = None
    recorder.write(out, document)
    return failed


def run(out: Path, commit: str, seconds: float, tests: bool = True) -> int:
    """Run all groups and the tests of kernels at the same time; return 1 if any is not right."""
    folder = out / f"smoke-{commit}"
    folder.mkdir(parents=True, exist_ok=True)
    failed = folder / "failures.txt"
    more = {failures.VARIABLE: str(failed)}
    running = {}
    for name in (*GROUPS, *["tests"] * tests):
        command = _tests() if name == "tests" else _group(name, folder / f"{name}.json")
        running[name] = start(command, folder / f"{name}.log", more)
    ended = wait(running, seconds)
    info = machine.describe(roofs=False) | {"command": COMMAND, "absent": {}}
    groups = {name: _ended(name, folder / f"{name}.json", ended[name]) for name in GROUPS}
    names = failed.read_text().splitlines() if failed.exists() else []
    if tests:
        groups["tests"] = {"ended": ended["tests"], "failed": names}
        print(f"tests: {ended['tests']}\n{(folder / 'tests.log').read_text()[-6000:]}")
    document = {"machine_info": info, "benchmarks": [], "smoke": groups}
    recorder.write(out / f"smoke-{commit}.json", document)
    return int(any(outcome != "right" for outcome in ended.values()))


def start(command: Sequence[str], log: Path, variables: dict[str, str]) -> subprocess.Popen:
    """Start a process that leads its own session, and writes into a log."""
    with open(log, "w") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=machine.environment() | {"PYTHONUNBUFFERED": "1"} | variables,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait(
    running: dict[str, subprocess.Popen], seconds: float, who: str = "smoke"
) -> dict[str, str]:
    """Say how each process ended; those that are late are interrupted, then killed."""
    start, ended = time.monotonic(), {}
    while running and time.monotonic() - start < seconds:
        for name, process in list(running.items()):
            if (code := process.poll()) is not None:
                crash = code < 0 and f"crashed: {signal.Signals(-code).name}"
                ended[name] = crash or ("not right" if code else "right")
                print(f"{who}: {name}: {ended[name]} after {time.monotonic() - start:.0f} s")
                del running[name]
        time.sleep(0.2)
    failures.stop(running.values(), GRACE)
    return ended | dict.fromkeys(running, "out of time")


def _group(name: str, path: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.run.smoke", name, "--out", str(path)]


def _tests() -> list[str]:
    command = ["nice"] if shutil.which("nice") else []  # the groups come first
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-p", "no:benchmark"]  # it warns of xdist, and a warning is an error
    if importlib.util.find_spec("xdist"):
        workers = max(1, (os.cpu_count() or 1) * 3 // 4)
        command += ["-n", str(workers), "--dist", "worksteal"]
    command += ["-k", "triton or not torch"]  # PyTorch's operators are not what is new on a device
    files = [str(path) for path in (ROOT / "tests").rglob("test_*.py") if path.stem in TESTS]
    return [*command, "-p", failures.__name__, *files]


def _ended(name: str, path: Path, ended: str) -> dict[str, Any]:
    """Return what is known of a group; what is not right is printed."""
    found = json.loads(path.read_text()) if path.exists() else {"checks": [], "running": None}
    bad = [f"{x['case']}: {x['message']}" for x in found["checks"] if x["outcome"] != "right"]
    if found["running"]:
        bad.append(f"{found['running']}: {ended}")
    print(f"{name}: {len(found['checks'])} checks, {len(bad)} not right: {ended}")
    print("".join(f"  {line[:400]}\n" for line in bad), end="")
    return {"ended": ended, **found}


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    return int(run_group(options.group, options.out) > 0)


if __name__ == "__main__":
    sys.exit(main())
