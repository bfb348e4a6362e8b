"""Fuzz the public functions against the oracle: `python -m tests.fuzz`, or `make fuzz`.

Each failure is printed with the line that repeats it. The exit code is 1 if there was one.
"""

import argparse
import collections
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "fuzzing.md"
MOST_FAILURES = 5  # of a function; then it is left alone


def options() -> argparse.Namespace:
    parse = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__.splitlines()[0]
    )
    parse.add_argument("--cases", type=int, default=20_000, help="of all functions together")
    parse.add_argument("--seed", type=int, default=0, help="of the first case of each function")
    parse.add_argument("--only", action="append", metavar="FUNCTION", help="may be repeated")
    parse.add_argument("--backend", choices=("torch", "triton"), default="torch")
    parse.add_argument("--jobs", type=int, default=1, help="processes")
    parse.add_argument("--minutes", type=float, default=1e9, help="start no chunk after these")
    parse.add_argument("--save", action="store_true", help="write the table of docs/fuzzing.md")
    return parse.parse_args()


def results(given: argparse.Namespace, names: list[str]):
    """Run all chunks; yield their results."""
    from tests.fuzz.running import tasks, work

    end, failures = time.time() + 60 * given.minutes, collections.Counter()
    todo = [(*task, given.backend) for task in tasks(names, given.cases, given.seed)]
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        for i in range(0, len(todo), 4 * given.jobs):
            if time.time() > end:
                return
            now = [x for x in todo[i : i + 4 * given.jobs] if failures[x[0]] < MOST_FAILURES]
            for result in map(work, now) if given.jobs == 1 else pool.map(work, now):
                failures[result.name] += len(result.failures)
                yield result


def main() -> int:
    given = options()
    if given.backend == "triton":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    from tests.fuzz.running import CASES, LAUNCHES

    names = given.only or list(LAUNCHES if given.backend == "triton" else CASES)
    for name in names:
        if name not in CASES:
            sys.exit(f"tests.fuzz: --only {name!r} is unknown; choose from {', '.join(CASES)}")
    start, counts = time.time(), {name: [0, 0, 0] for name in names}
    for result in results(given, names):
        found = result.cases, result.undecided, len(result.failures)
        counts[result.name] = [x + y for x, y in zip(counts[result.name], found, strict=True)]
        for failure in result.failures:
            print(f"{failure.name}: {failure.error}\n  {failure.about}", flush=True)
            print(f"  again: {failure.command}", flush=True)
    for name, (cases, undecided, failed) in counts.items():
        print(f"{cases:6} cases, {undecided:4} undecided, {failed:3} failed  {name}")
    minutes = (time.time() - start) / 60
    cases, undecided, failed = map(sum, zip(*counts.values(), strict=True))
    print(f"{cases} cases in {minutes:.1f} minutes, {undecided} undecided, {failed} failed")
    if given.save:
        save(given, counts, minutes)
    return int(failed > 0)


def save(given: argparse.Namespace, counts: dict[str, list[int]], minutes: float) -> None:
    """Write the table of a backend into docs/fuzzing.md."""
    import torch

    clean = git("status", "--porcelain") == ""
    commit = git("rev-parse", "--short", "HEAD") if clean else "COMMIT"
    command = " ".join(["python -m tests.fuzz", *(x for x in sys.argv[1:] if x != "--save")])
    about = (
        f"{cpu()}, {given.jobs} at a time, torch {torch.__version__}; commit {commit}; "
        f"{time.strftime('%Y-%m-%d')}; `{command}`; {minutes:.0f} minutes:"
    )
    lines = [*wrapped(about), "", "| function | cases | undecided | failed |", "|---|--:|--:|--:|"]
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    for name, row in [*((f"`{name}`", row) for name, row in counts.items()), ("all", total)]:
        lines.append(f"| {name} | " + " | ".join(f"{x:,}" for x in row) + " |")
    first, last = f"<!-- fuzz: {given.backend} -->", f"<!-- end: {given.backend} -->"
    text, count = re.subn(
        f"{first}.*?{last}",
        lambda _: "\n\n".join([first, "\n".join(lines), last]),
        PAGE.read_text(),
        flags=re.DOTALL,
    )
    assert count == 1, f"{PAGE} has no {first}"
    PAGE.write_text(text)


def wrapped(text: str) -> list[str]:
    """The text in lines of at most 100 columns."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= 100:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def git(*command: str) -> str | None:
    """The output of git; None if it fails."""
    found = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    return None if found.returncode else found.stdout.strip()


def cpu() -> str:
    """The processor, in words."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    maker = "AMD EPYC" if "EPYC" in "".join(names) else "".join(names[:1]) or "CPU"
    return f"{maker} ({len(os.sched_getaffinity(0))} cores)"


if __name__ == "__main__":
    sys.exit(main())
