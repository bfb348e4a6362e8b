"""Is it faster to keep a row of logits on the chip? `kernels/on_chip.py` beside `kernels/grpo.py`.

Reductions across a cluster need Triton >= 3.8, which most machines with a GPU do not have. (Where it is
installed, `GRPO_FAST_ON_CHIP=1` switches the kernel on, and `benchmarks.experiments.variants grpo`
times it.) So the kernel is compiled ahead of time where it is, and launched without Triton through the
driver's own interface:

    python -m benchmarks.on_chip build --out FOLDER [--ptxas PATH]
    python -m benchmarks.on_chip run FOLDER --out FILE.json [--seconds 60] [--only NAME]

`build` needs no GPU, `run` one of compute capability 9.0. A driver refuses what a much newer assembler made:
`--ptxas` takes an older one. Each variant is held against float64 and plain PyTorch, then timed in turns with
`grpo_fast.kernels.grpo`, on the same inputs, in place.
"""

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import shapes
from benchmarks.measuring import machine
from benchmarks.measuring import recorder as files
from benchmarks.on_chip.build import SHAPE, build
from benchmarks.on_chip.check import Rows, check
from benchmarks.on_chip.driver import Kernel

ROUNDS, WARMUP = 20, 3
SECONDS_PER_VARIANT = 25
MOST = 5  # variants that one run measures unless told which
COPIED = 1 << 32  # bytes of the copy that the rates are held against


def summary(events: list[tuple[torch.cuda.Event, torch.cuda.Event]], moved: int) -> dict[str, Any]:
    torch.cuda.synchronize()
    times = [start.elapsed_time(stop) for start, stop in events[WARMUP:]]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {
        "ms": middle,
        "iqr_ms": high - low,
        "fastest_ms": min(times),
        "bytes_per_s": moved / middle * 1e3,
        "times_ms": times,
    }


def measure(kernel: Kernel, device: torch.device) -> dict[str, Any]:
    """Both kernels in turns, in place on the same logits, which are put back before each launch."""
    source = torch.zeros(COPIED // 4, device=device)
    target = torch.ones_like(source)
    copy = functools.partial(target.copy_, source)
    copies = [machine.between_events(copy) for _ in range(WARMUP + ROUNDS)]
    report: dict[str, Any] = {"copy": summary(copies, 2 * COPIED)}
    del source, target, copy
    rows = Rows.make(shapes.CUDA[SHAPE], "full", device)
    x = rows.logits.clone()
    ways: dict[str, Callable[[], object]] = {
        "on_chip": lambda: rows.run(kernel, x, x),
        "grpo_fast": lambda: rows.run_own(x, x),
    }
    events: dict[str, list[Any]] = {name: [] for name in ways}
    for _ in range(WARMUP + ROUNDS):
        for name, way in ways.items():
            x.copy_(rows.logits)
            events[name].append(machine.between_events(way))
    moved = 2 * x.nbytes
    for name, pairs in events.items():
        report[name] = summary(pairs, moved)
        report[name]["of_copy"] = report[name]["bytes_per_s"] / report["copy"]["bytes_per_s"]
    report["finite"] = bool(x.isfinite().all())
    return report


def work(folder: Path, entry: dict[str, Any], out: Path) -> None:
    """Check and time one variant, in a process of its own; what is known is written at once."""
    report: dict[str, Any] = {name: x for name, x in entry.items() if name != "log"}

    def note(**more: Any) -> None:
        report.update(more)
        out.write_text(json.dumps(report))

    try:
        device = torch.device("cuda")
        torch.zeros(1, device=device)  # makes the context current
        note(device=torch.cuda.get_device_name(), torch=torch.__version__)
        kernel = Kernel(folder, entry)
        note(rows_in_flight=kernel.clusters())
        note(check=check(kernel, device))
        note(time=measure(kernel, device))
    except Exception:
        note(error=traceback.format_exc())


def run(folder: Path, out: Path, seconds: float, only: list[str]) -> int:
    """Measure variants until the time is up; `out` holds what is known after each."""
    until = time.monotonic() + seconds
    manifest = json.loads((folder / "manifest.json").read_text())
    known = {entry["name"]: entry for entry in manifest["variants"]}
    names = only or list(known)[:MOST]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--only {unknown[0]}: there are {', '.join(known)}")
    head = {name: x for name, x in manifest.items() if name != "variants"}
    results: dict[str, Any] = {**head, "commit": machine.commit(), "variants": []}
    # Forked, so that none has to import PyTorch again. This process must not touch the GPU itself.
    context = multiprocessing.get_context("fork")
    for name in names:
        left = min(until - time.monotonic(), SECONDS_PER_VARIANT)
        if left < 3:
            results["variants"].append({"name": name, "error": "no time left"})
            continue
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "result.json")
            process = context.Process(target=work, args=(folder, known[name], path))
            start = time.monotonic()
            process.start()
            process.join(left)
            report: dict[str, Any] = {"name": name}
            if process.is_alive():
                process.kill()
                process.join()
                report["error"] = f"not done after {left:.0f} s"
            elif process.exitcode:
                report["error"] = f"exit status {process.exitcode}"
            if path.exists():
                report = {**json.loads(path.read_text()), **report}
            report["wall_s"] = round(time.monotonic() - start, 1)
        results["variants"].append(report)
        files.write(out, results)
        print(line(report), flush=True)
    files.write(out, results)
    print("\n".join(["", HEAD, *map(line, results["variants"])]))
    return int(not any("time" in report for report in results["variants"]))


HEAD = f"{'variant':18} {'rows':>5} {'right':>6} {'ms':>15} {'grpo_fast ms':>15} {'ratio':>6}  of a copy"


def line(report: dict[str, Any]) -> str:
    """One variant's row of the table."""
    name = f"{report['name']:18} {report.get('rows_in_flight', '?'):>5}"
    name += f" {report['check']['right']!s:>6}" if "check" in report else f" {'?':>6}"
    if "time" not in report:
        return f"{name} {report.get('error', '').strip().splitlines()[-1:]}"
    ours, own = report["time"]["on_chip"], report["time"]["grpo_fast"]
    return (
        f"{name} {ours['ms']:8.3f} ±{ours['iqr_ms']:5.3f} {own['ms']:8.3f} ±{own['iqr_ms']:5.3f}"
        f" {own['ms'] / ours['ms']:6.3f}  {ours['of_copy']:.1%}, {own['of_copy']:.1%}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--ptxas", help="an assembler older than Triton's own")
    command = commands.add_parser("run")
    command.add_argument("folder", type=Path)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--seconds", type=float, default=60.0)
    command.add_argument("--only", action="append", default=[], help="a variant; may be repeated")
    given = parser.parse_args()
    if given.command == "build":
        build(given.out, given.ptxas)
        return 0
    return run(given.folder, given.out, given.seconds, given.only)


if __name__ == "__main__":
    sys.exit(main())
