"""Watch every kernel with NVIDIA's compute-sanitizer: accesses, races, barriers, values nobody wrote.

    benchmarks/run_all --sanitize
    python -m benchmarks.run.sanitize --out sanitizer.json --until 1767225600

The program is `bounds`. First it runs alone, which fills Triton's cache. Then each tool watches a
process of its own, all at the same time. PyTorch's allocator must not keep memory: within a block
that it has kept, nothing is out of bounds for the sanitizer. At the end of memcheck's process one
kernel is wrong on purpose: if that is not reported, nothing else would have been.

racecheck looks at the shared memory of a program. Programs of one row that meet in global memory
have checks of their own (`smoke_checks.check_waiting`).
"""

import glob
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import command_line
from benchmarks.measuring import machine, recorder
from benchmarks.run import bounds, smoke
from benchmarks.run.bounds import KERNELS, LAUNCHES

COMMAND = "benchmarks/run_all --sanitize"
NAME, TOOLKIT = "compute-sanitizer", "/usr/local/cuda"
PROGRAM = [sys.executable, "-m", bounds.__name__]
CONTROL = bounds._control_kernel.__name__
# Of every tool: an error ends its kernel, the others go on; errors of CUDA's functions are not of
# the kernels, and libraries make some on purpose as they look for what a driver can do.
OPTIONS = ("--destroy-on-device-error", "kernel", "--print-limit", "100")
# PyTorch's kernels are left out. initcheck has to see who wrote what, theirs included.
OURS = [
    x for kernel in (*KERNELS, CONTROL) for x in ("--kernel-name", f"kernel_substring={kernel}")
]
TOOLS: dict[str, Sequence[str]] = {
    "memcheck": ("--report-api-errors", "no", *OURS),
    "racecheck": OURS,
    "synccheck": OURS,
    "initcheck": (),
}
SECONDS = 240.0  # for everything, if nothing else is said
UNFINISHED = 2  # exit code
RIGHT, LATE = "right", "out of time"
SUMMARY = re.compile(
    r"ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?"
)
REPORT = re.compile(r"^========= (?=\S)(.*)((?:\n=========  .*)*)", re.MULTILINE)
OF_THE_TOOL = ("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "Target application")


def find() -> str | None:
    """Return the path of compute-sanitizer: on PATH, of CUDA_HOME, or of NVIDIA's package; or None."""
    folders = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    near = [str(Path(x) / "bin" / NAME) for x in folders if x]
    near.append(f"{TOOLKIT}/bin/{NAME}")
    for folder in sys.path:
        near += glob.glob(str(Path(glob.escape(folder or ".")) / "nvidia" / "*" / "bin" / NAME))
    found = [shutil.which(x) for x in (NAME, *near)]
    return next((x for x in found if x), None)


def read(log: str, control: bool) -> dict[str, Any]:
    """Read what a tool printed.

    Args:
        control: whether the kernel that is wrong on purpose was launched; its error is not counted.

    Returns:
        ended: "right", "3 errors" and the like, or why that is not known; errors: their number, or
        None; first: the first report, with its kernel and address; launches: how many were made.
    """
    reports = [text.strip() + rest for text, rest in REPORT.findall(log)]
    reports = [x for x in reports if not x.startswith(OF_THE_TOOL)]
    wanted = [x for x in reports if CONTROL not in x]
    seen = len(reports) - len(wanted)
    summary = SUMMARY.search(log)
    launches = re.search(r"^(\d+) launches$", log, re.MULTILINE)
    found: dict[str, Any] = {"ended": RIGHT, "errors": None, "first": None}
    found["launches"] = int(launches[1]) if launches else None
    if wanted:
        lines = [line.removeprefix("=========").strip() for line in wanted[0].splitlines()]
        found["first"] = "; ".join(line for line in lines[:4] if "backtrace" not in line)
    if summary is None:
        found["ended"] = "no summary"
        return found
    found["errors"] = int(summary[1] or summary[2]) - seen
    if found["errors"]:
        found["ended"] = f"{found['errors']} error{'s' * (found['errors'] != 1)}"
    elif not launches:
        found["ended"] = "did not launch everything"
    elif control and not seen:
        found["ended"] = "blind: the kernel that is wrong on purpose was not reported"
    return found


def command(sanitizer: str | None, tool: str) -> list[str]:
    """Return the command of the program, alone or under a tool."""
    if sanitizer is None:
        return PROGRAM
    more = ["--control"] * (tool == "memcheck")
    return [sanitizer, "--tool", tool, *OPTIONS, *TOOLS[tool], *PROGRAM, *more]


def run(out: Path, sanitizer: str, seconds: float) -> int:
    """Run the program alone, then under every tool; write what was found; return an exit code."""
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds

    def start(name: str, line: Sequence[str]) -> dict[str, subprocess.Popen]:
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return {name: smoke.start(line, folder / f"{name}.log", variables)}

    ended = smoke.wait(start(LAUNCHES, command(None, "")), seconds, NAME)
    running: dict[str, subprocess.Popen] = {}
    for tool in TOOLS:
        running |= start(tool, command(sanitizer, tool))
    ended |= smoke.wait(running, max(0.0, end - time.monotonic()), NAME)
    alone = read((folder / f"{LAUNCHES}.log").read_text(), control=False)
    found = {LAUNCHES: {"ended": ended[LAUNCHES], "launches": alone["launches"]}}
    for tool in TOOLS:
        log = (folder / f"{tool}.log").read_text()
        found[tool] = read(log, tool == "memcheck")
        # Errors tell more than how the process ended; otherwise it must have ended well.
        if not found[tool]["errors"] and ended[tool] != RIGHT:
            found[tool]["ended"] = ended[tool]
        first = f": {found[tool]['first']}" if found[tool]["first"] else ""
        print(f"{NAME}: {tool}: {found[tool]['ended']}{first}"[:600], flush=True)
        if found[tool]["ended"] != RIGHT and not first:
            print("".join(f"  {line}\n" for line in log.splitlines()[-5:]), end="", flush=True)
    info = machine.describe(roofs=False) | {"command": COMMAND, "absent": {}}
    recorder.write(out, {"machine_info": info, "benchmarks": [], "sanitizer": found})
    outcomes = {x["ended"] for x in found.values()}
    if outcomes <= {RIGHT, LATE}:
        return UNFINISHED if LATE in outcomes else 0
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON file goes")
    parser.add_argument("--until", type=float, help="end by then, in seconds since 1970")
    options = parser.parse_args(arguments)
    sanitizer = find()
    if sanitizer is None or not torch.cuda.is_available():
        why = f"{NAME} was not found" if sanitizer is None else "there is no NVIDIA GPU"
        print(f"{NAME}: memory is not checked: {why}", flush=True)
        return 0
    seconds = SECONDS if options.until is None else options.until - time.time()
    return run(options.out, sanitizer, seconds - 2 * smoke.GRACE)


if __name__ == "__main__":
    sys.exit(main())
