"""Compile every kernel for GPUs that need not be there, and report registers, stack and loops.

The launchers run on tensors without storage (device "meta"), and each launch is compiled with the
specialisation that Triton would choose at run time; then the assembly is read.

    python -m benchmarks.codegen [--save | --on-chip] [sm_80 sm_90 sm_100 gfx942]
    python -m benchmarks.codegen sm_90 --case "policy_loss topr" --case "grpo topr"    # seconds

`--save` writes `codegen.json`, from which RESULTS.md and the cost model take their numbers.
`--on-chip` compiles `kernels/on_chip.py` alone, which needs Triton 3.8.
"""

import dataclasses
import difflib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

from benchmarks import ROOT, command_line
from benchmarks.codegen import assembly
from benchmarks.codegen import saved as compiled
from benchmarks.codegen.assembly import Loop
from benchmarks.codegen.cases import CASES
from benchmarks.codegen.launches import compile_launch, record
from benchmarks.on_chip import cases as on_chip_cases
from grpo_fast.kernels import grpo, schedules

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ACCESSES = {"loads": assembly.LOAD, "stores": assembly.STORE}


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of compiling one launch."""

    case: str
    kernel: str
    target: str
    itemsize: int
    threads: int
    registers: int
    stack: int  # bytes, where registers spill to
    shared: int
    barriers: int
    loops: list[Loop]
    offsets: dict[str, list[str]]  # as `assembly.offsets_of` finds them
    hide_nan: int  # minima and maxima that return the other operand
    lanes: list[str]  # in which orders the lanes of a tile are added up
    cluster_barriers: int
    accesses: dict[str, dict[str, int]]  # "loads" and "stores": bits of an access -> how many

    def row_loops(self) -> list[Loop]:
        return [loop for loop in self.loops if loop.kind != "other"]

    def main_loops(self) -> dict[str, Loop]:
        """Choose by kind the loop that moves most at once: the others see to what is left over."""
        return {
            loop.kind: loop
            for loop in sorted(self.row_loops(), key=lambda loop: sum(loop.loads + loop.stores))
        }

    def resident_programs(self) -> int:
        """Count the programs that the registers of a multiprocessor (a compute unit) hold."""
        if self.target.startswith("gfx"):
            return 512 // (-(-self.registers // 8) * 8) * 256 // self.threads
        return 65_536 // (-(-self.registers // 8) * 8 * self.threads)


def inspect(case: str, target: str, on_chip: bool = False, registers: int = 64) -> Report:
    """Compile a case for a target.

    Args:
        registers: the limit of programs that wait for each other, on GPUs of compute capability 9.0: 64 as on
            an H100, 48 as on an H200.
    """
    gpu = TARGETS[target]
    hopper = target == "sm_90"
    with (
        mock.patch.object(schedules, "WARP_SIZE", gpu.warp_size),
        mock.patch.object(grpo, "registers_to_wait", return_value=registers if hopper else None),
    ):
        launch = record(cases_of(on_chip)[case])
    kernel = compile_launch(launch, gpu)
    read = assembly.read_nvidia if gpu.backend == "cuda" else assembly.read_amd
    used, stack, listing = read(kernel)
    ttir = kernel.asm["ttir"]
    T = getattr(launch.arguments.get("TILES"), "T", 0)
    big = launch.arguments.get("logits_ptr", launch.arguments.get("x_ptr"))
    return Report(
        case=case,
        kernel=launch.fn.__name__,
        target=target,
        itemsize=4 if big is None else big.element_size(),
        threads=launch.arguments["num_warps"] * gpu.warp_size,
        registers=used,
        stack=stack,
        shared=kernel.metadata.shared,
        barriers=assembly.count(assembly.BARRIER, listing),
        loops=[] if big is None else assembly.read_loops(listing),
        offsets=assembly.offsets_of(ttir),
        lanes=assembly.lane_orders(kernel.asm["ttgir"], T),
        hide_nan=len(re.findall(r"arith\.(?:min|max)numf", ttir)),
        cluster_barriers=assembly.count(assembly.CLUSTER_BARRIER, listing),
        accesses={name: assembly.widths(pattern, listing) for name, pattern in ACCESSES.items()},
    )


def cases_of(on_chip: bool) -> dict[str, Any]:
    """Return the launches to compile, by name: of `kernels/on_chip.py`, or of the other kernels."""
    return on_chip_cases.CASES if on_chip else CASES


def collect(
    targets: Iterable[str] = TARGETS,
    jobs: int = 2,
    on_chip: bool = False,
    cases: Iterable[str] = (),
) -> list[Report]:
    """Report cases, all by default, compiled in processes that do not interpret Triton."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}

    def run(target: str) -> list[Report]:
        command = [sys.executable, "-m", "benchmarks.codegen", "--json", target]
        command += ["--on-chip"] * on_chip + [f"--case={case}" for case in cases]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        found = json.loads(done.stdout)
        return [Report(**x | {"loops": [Loop(**loop) for loop in x["loops"]]}) for x in found]

    with ThreadPoolExecutor(jobs) as pool:
        return [report for reports in pool.map(run, targets) for report in reports]


def summary(report: Report) -> dict[str, Any]:
    """Reduce a report to the numbers that are published."""
    loops = report.main_loops()
    return {
        "target": report.target,
        "case": report.case,
        "registers": report.registers,
        "resident_programs": report.resident_programs(),
        "stack": report.stack,
        "shared": report.shared,
        "barriers": report.barriers,
        "per_element": {k: round(x.per_element(report.itemsize), 2) for k, x in loops.items()},
        "bits": sorted({b for x in loops.values() for b in x.loads + x.stores}),
    }


def save(reports: list[Report], path: Path = compiled.SAVED) -> None:
    rows = ",\n".join(json.dumps(summary(x)) for x in reports)
    about = f'"triton": "{triton.__version__}", "sources": "{compiled.digest()}"'
    path.write_text(f'{{{about}, "rows": [\n{rows}\n]}}\n')


def main() -> None:
    parser = command_line(__doc__, "python -m benchmarks.codegen")
    parser.add_argument("targets", nargs="*", metavar="target", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--case", action="append", help="only this case of `CASES`; repeatable")
    parser.add_argument("--json", action="store_true", help="for programs")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--save", action="store_true", help=f"write {compiled.SAVED.name}")
    which.add_argument("--on-chip", action="store_true", help="kernels/on_chip.py instead")
    args = parser.parse_args()
    known, known_cases = on_chip_cases.TARGETS if args.on_chip else TARGETS, cases_of(args.on_chip)
    targets, cases = args.targets or list(known), args.case or ()
    for target in set(targets) - {*known}:
        parser.error(f"target {target!r} is unknown; choose from {', '.join(known)}")
    for case in set(cases) - known_cases.keys():
        near = ", ".join(difflib.get_close_matches(case, known_cases))
        hint = f"; there are {near}" if near else ""
        parser.error(f"--case {case!r} is unknown{hint}; `CASES` in cases.py has the list")
    if args.save and (args.targets or args.case):
        parser.error("--save writes all targets and cases: leave targets and --case out")
    if args.json:
        chosen = cases or known_cases
        reports = [inspect(case, target, args.on_chip) for target in targets for case in chosen]
        json.dump([dataclasses.asdict(x) for x in reports], sys.stdout)
        return
    reports = collect(targets, on_chip=args.on_chip, cases=cases)
    print(compiled.table(map(summary, reports)))
    if args.save:
        save(reports)
