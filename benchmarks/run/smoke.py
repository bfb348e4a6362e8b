"""Does every kernel compile, launch and agree with float64 on this device? `benchmarks/run_all --smoke`.

    python -m benchmarks.run.smoke bfloat16 --out smoke.json     # one group of checks, in this process

Each group of `smoke_checks` is a process with a time limit of its own, all at the same time: nothing is
timed. A check that raises, or is wrong, costs its own line; one that hangs, or takes the process down, is
named by the file that the process leaves behind.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.measuring import machine
from benchmarks.measuring import recorder as results
from benchmarks.run import failures
from benchmarks.run.smoke_checks import GROUPS

COMMAND = "benchmarks/run_all --smoke"
TESTS = (
    *("test_logprob", "test_ids", "test_linear_edges", "test_linear_logprob", "test_weights"),
    *("test_grpo", "test_linear_model", "test_linear_upstream", "test_policy_loss"),
    "test_reduction_weights",
    *("test_sequence_loss", "test_selection", "test_diagnostics", "test_linear_grpo"),
    *("test_loss", "test_group_advantage", "test_index_arithmetic"),
)
FAILURES = "failures.txt"
GRACE = 6.0  # seconds to stop in after an interrupt


def run_group(name: str, out: Path | None) -> int:
    """All checks of a group, the file written before and after each; how many are not right."""
    document: dict[str, Any] = {"group": name, "checks": [], "running": None}
    failed = 0
    for case, check in GROUPS[name]():
        document["running"] = case
        if out:
            results.write(out, document)
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
    if out:
        results.write(out, document)
    return failed


def run(out: Path, commit: str, seconds: float) -> int:
    """All groups and this project's tests of kernels at the same time; 1 if anything is not right."""
    folder = out / f"smoke-{commit}"
    folder.mkdir(parents=True, exist_ok=True)
    environment = machine.environment() | {"PYTHONUNBUFFERED": "1"}
    environment[failures.VARIABLE] = str(folder / FAILURES)
    commands = {name: _group(name, folder / f"{name}.json") for name in GROUPS}
    commands["tests"] = _tests(folder)
    start = time.monotonic()
    running = {}
    for name, command in commands.items():
        with open(folder / f"{name}.log", "w") as log:
            running[name] = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    ended: dict[str, str] = {}
    while running and time.monotonic() - start < seconds:
        for name, process in list(running.items()):
            code = process.poll()
            if code is not None:
                ended[name] = _meaning(code)
                print(f"smoke: {name}: {ended[name]} after {time.monotonic() - start:.0f} s")
                del running[name]
        time.sleep(0.2)
    for process in running.values():
        os.killpg(process.pid, signal.SIGINT)  # pytest then says what it has seen
    until = time.monotonic() + GRACE
    for name, process in running.items():
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        ended[name] = "out of time"
    return _summary(out / f"smoke-{commit}.json", folder, ended)


def _group(name: str, path: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.run.smoke", name, "--out", str(path)]


def _tests(folder: Path) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-p", "no:benchmark"]  # it warns of xdist, and a warning is an error
    try:
        import xdist  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:
        workers = 1
    else:
        workers = max(1, (os.cpu_count() or 1) * 3 // 4)
        command += ["-n", str(workers), "--dist", "worksteal"]
    command += ["-k", "triton or not torch"]  # PyTorch's operators are not what is new on a device
    command += [f"--junitxml={folder / 'tests.xml'}", "-p", "benchmarks.run.failures"]
    return [*command, *(f"tests/{stem}.py" for stem in TESTS)]


def _meaning(code: int) -> str:
    if code < 0:
        return f"crashed: {signal.Signals(-code).name}"
    return "right" if code == 0 else "not right"


def _summary(path: Path, folder: Path, ended: dict[str, str]) -> int:
    document: dict[str, Any] = {"machine_info": _info(), "benchmarks": [], "smoke": {}}
    for name in GROUPS:
        part = folder / f"{name}.json"
        found = json.loads(part.read_text()) if part.exists() else {"checks": [], "running": None}
        document["smoke"][name] = {"ended": ended[name], **found}
        bad = [f"{x['case']}: {x['message']}" for x in found["checks"] if x["outcome"] != "right"]
        if found["running"]:
            bad.append(f"{found['running']}: {ended[name]}")
        print(f"{name}: {len(found['checks'])} checks, {len(bad)} not right: {ended[name]}")
        print("".join(f"  {line[:400]}\n" for line in bad), end="")
    log, failed = folder / "tests.log", folder / FAILURES
    found = failed.read_text().splitlines() if failed.exists() else []
    document["smoke"]["tests"] = {"ended": ended["tests"], "failed": found}
    print(f"tests: {ended['tests']}\n{log.read_text()[-6000:]}")
    results.write(path, document)
    return int(any(outcome != "right" for outcome in ended.values()))


def _info() -> dict[str, Any]:
    return machine.describe_without_roofs() | {"command": COMMAND, "absent": {}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    return int(run_group(options.group, options.out) > 0)


if __name__ == "__main__":
    sys.exit(main())
