"""Describe the machine that measures, and how fast it moves memory and multiplies."""

import functools
import importlib.util
import itertools
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.inputs import shapes

# On a GPU as much as the largest logits: launch and synchronisation must not count.
CALIBRATION_BYTES = {"cuda": 1 << 32, "cpu": 1 << 28}
CALIBRATION_ROUNDS = 10
GEMM_SIZE = {"cuda": 8192, "cpu": 1536}
GEMM_DTYPES = {"cuda": (torch.bfloat16, torch.float32), "cpu": (torch.float32,)}
CALIBRATION_VARIABLE = "GRPO_FAST_CALIBRATION"  # what another process of the same run has measured
COMMIT_VARIABLE = "GRPO_FAST_COMMIT"  # where a copy of the tree without .git knows its commit from
UNKNOWN = "unknown"
DRIVER_FIELDS = {"driver": "driver_version", "gpu_uuid": "uuid"}  # our names, nvidia-smi's
COMMAND_VARIABLE = "GRPO_FAST_COMMAND"
SWITCH = "GRPO_FAST_ON_CHIP"


def environment() -> dict[str, str]:
    """Return the environment of a new process, without pytest-xdist's: nothing is timed under that."""
    return {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}


def synced_time() -> float:
    """Read a clock after the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def lost() -> bool:
    """Say whether an error took the GPU from this process: from then on every call fails."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@functools.cache
def bandwidth() -> dict[str, float]:
    """Measure bytes per second of a plain copy (read plus written bytes) and of a plain read."""
    kind = shapes.device().type
    source = torch.zeros(CALIBRATION_BYTES[kind] // 4, device=kind)
    target = torch.ones_like(source)
    copy = 2 * source.nbytes / fastest(lambda: target.copy_(source))
    # Two reductions: which of them streams at full speed depends on the device.
    read = min(fastest(source.sum), fastest(source.view(torch.int32).amax))
    return {"copy": copy, "read": source.nbytes / read}


@functools.cache
def gemm_rates() -> dict[str, float]:
    """Measure FLOP per second of a large square product, by dtype; float32 without TF32."""
    kind = shapes.device().type
    size = GEMM_SIZE[kind]
    rates = {}
    for dtype in GEMM_DTYPES[kind]:
        a, b, out = (torch.randn(size, size, device=kind).to(dtype) for _ in range(3))
        seconds = fastest(functools.partial(torch.mm, a, b, out=out))
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
    return rates


@functools.cache
def calibration() -> dict[str, dict[str, float]]:
    """Return the roofs of this run: measured here, or by the process that started it."""
    given = os.environ.get(CALIBRATION_VARIABLE)
    if given:
        return json.loads(given)
    return {"bandwidth": bandwidth(), "gemm": gemm_rates()}


def fastest(fn: Callable[[], object], rounds: int = CALIBRATION_ROUNDS) -> float:
    """Return the seconds of the fastest of some calls, after one to warm up."""
    fn()
    times = []
    for _ in range(rounds):
        start = synced_time()
        fn()
        times.append(synced_time() - start)
    return min(times)


def between_events(run: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Run between two events on the device; their distance is known once it has ended."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    return start, end


def commit() -> str:
    """Return `git describe --always --dirty`, or what the environment says, or "unknown"."""
    if os.environ.get(COMMIT_VARIABLE):
        return os.environ[COMMIT_VARIABLE]
    return _output_of("git", "describe", "--always", "--dirty") or UNKNOWN


def is_clean(name: str) -> bool:
    """Say whether a commit's name tells exactly which code ran."""
    return re.fullmatch(r"(.*-g)?[0-9a-f]{7,40}", name) is not None


def name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {_cpu_model()} ({os.cpu_count()} cores)"


def slug() -> str:
    """Turn `name()` into the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name().lower()).strip("-")


def describe(roofs: bool = True) -> dict[str, Any]:
    """Describe the machine, its software, the code and, if wanted, the measured roofs."""
    cuda = torch.cuda.is_available()
    code = commit()
    command = os.environ.get(COMMAND_VARIABLE, "pytest benchmarks")
    if os.environ.get(SWITCH) == "1":  # another kernel
        command = f"{SWITCH}=1 {command}"
    return {
        "device": name(),
        "device_type": "cuda" if cuda else "cpu",
        **(_from_the_driver() if cuda else dict.fromkeys(DRIVER_FIELDS)),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": code,
        "dirty": not is_clean(code),
        "command": command,
        **(calibration() if roofs else {}),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _version(package: str) -> str | None:
    found = importlib.util.find_spec(package)
    return importlib.import_module(package).__version__ if found else None


def _from_the_driver() -> dict[str, str | None]:
    """Ask for the driver's version, and which of several equal GPUs this is."""
    query = f"--query-gpu={','.join(DRIVER_FIELDS.values())}"
    lines = _output_of("nvidia-smi", query, "--format=csv,noheader").splitlines()
    rows = [x.split(", ") for x in lines]
    columns = zip(*(row for row in rows if len(row) == len(DRIVER_FIELDS)), strict=True)
    found = [", ".join(dict.fromkeys(column)) for column in columns]
    return dict(itertools.zip_longest(DRIVER_FIELDS, found))


def _output_of(*command: str) -> str:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return result.stdout.strip()


if __name__ == "__main__":
    print(json.dumps(calibration()))
