"""Compile `kernels/on_chip.py` for GPUs that need not be there, and report the code; needs Triton 3.8.

    python -m benchmarks.on_chip.codegen [--json] [sm_90 sm_100]

Not in `benchmarks.codegen`, whose published numbers are of the pinned Triton: 3.7 cannot compile this kernel.
"""

import argparse
import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks import ROOT
from benchmarks.codegen.assembly import LOAD, STORE, Instruction, read_nvidia, width
from benchmarks.codegen.launches import Launch, compile_launch, record
from grpo_fast import Objective
from grpo_fast.kernels import on_chip
from grpo_fast.records import Rewards, Targets, Tokens

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32)}
B, T = 4, 16
N = B * T
CLUSTER_BARRIER = r"UCGABAR_ARV"


@dataclasses.dataclass(frozen=True)
class Case:
    """A launch: how long the rows are, and what comes beside them."""

    V: int = 152_064
    dtype: torch.dtype = torch.bfloat16
    entropy: bool = False
    bonus: bool = False
    extras: bool = False
    packed: bool = False
    plan: on_chip.Plan | None = None

    def launch(self) -> Launch:
        def vector(given: bool = True, dtype: torch.dtype = torch.float32) -> Any:
            return torch.empty(N, dtype=dtype, device="meta") if given else None

        logits = torch.empty(B, T, self.V, dtype=self.dtype, device="meta")
        extra = vector(self.extras)
        objective = Objective(beta=0.04, entropy_coef=0.01 if self.bonus else 0.0)
        return record(
            lambda: on_chip.grpo_fwd_bwd(
                logits,
                Targets(vector(dtype=torch.int64), vector(dtype=torch.bool), extra, 1.0),
                Tokens(vector(), vector(), vector(), vector(), *[extra] * 4),
                Rewards(None, 2, vector(self.packed, torch.int64)),
                self.entropy,
                objective,
                dlogits=logits,
                spread=self.plan,
            )
        )


CASES = {
    "grpo": Case(),
    "grpo fp16": Case(dtype=torch.float16),
    "grpo entropy": Case(entropy=True),
    "grpo bonus extras": Case(bonus=True, extras=True, packed=True),
    "grpo V 1000": Case(V=1000),
    "grpo V 50304 bonus": Case(V=50_304, bonus=True),
    "grpo V 262144 extras": Case(V=262_144, extras=True),
}


@dataclasses.dataclass(frozen=True)
class Report:
    case: str
    target: str
    ctas: int
    threads: int  # of a thread block
    strips: int
    keep: str
    registers: int
    stack: int  # bytes, where registers spill to
    shared: int
    cluster_barriers: int
    loads: dict[str, int]  # bits of an access -> how many there are
    stores: dict[str, int]

    def thread_blocks(self) -> int:
        """How many of them the registers of a multiprocessor hold."""
        return 65_536 // (-(-self.registers // 8) * 8 * self.threads)


def inspect(case: str, target: str) -> Report:
    launch = CASES[case].launch()
    spread = launch.arguments["SPREAD"]
    kernel = compile_launch(launch, TARGETS[target])
    registers, stack, listing = read_nvidia(kernel)
    ops = [x.op for x in listing if isinstance(x, Instruction)]

    def widths(pattern: str) -> dict[str, int]:
        found = collections.Counter(width(op) for op in ops if re.match(pattern, op))
        return {str(bits): n for bits, n in sorted(found.items())}

    return Report(
        case=case,
        target=target,
        ctas=spread.CTAS,
        threads=spread.THREADS,
        strips=spread.STRIPS,
        keep=spread.KEEP,
        registers=registers,
        stack=stack,
        shared=kernel.metadata.shared,
        cluster_barriers=sum(bool(re.match(CLUSTER_BARRIER, op)) for op in ops),
        loads=widths(LOAD),
        stores=widths(STORE),
    )


def collect() -> list[Report]:
    """Reports of all cases on all targets, from a process that does not interpret Triton."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.on_chip.codegen", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return [Report(**x) for x in json.loads(done.stdout)]


def line(report: Report) -> str:
    row: dict[str, Any] = dataclasses.asdict(report)
    return f"| {' | '.join(str(x) for x in [*row.values(), report.thread_blocks()])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("targets", nargs="*", help="all by default")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args()
    targets = options.targets or TARGETS
    reports = [inspect(case, target) for target in targets for case in CASES]
    if options.json:
        json.dump([dataclasses.asdict(x) for x in reports], sys.stdout)
        return
    print(f"Triton {triton.__version__}")
    names = [*(field.name for field in dataclasses.fields(Report)), "thread blocks"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    print("\n".join(map(line, reports)))


if __name__ == "__main__":
    main()
