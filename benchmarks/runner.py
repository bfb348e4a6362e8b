"""Run the tests and then every benchmark in a given time, whatever crashes on the way (`benchmarks/run_all`).

Each file runs in a process of its own. One that overruns its share of the time is interrupted, so that it
still writes what it measured, and killed if it does not stop.
"""

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import machine

ROOT = Path(__file__).resolve().parents[1]
# The tests that say most about a device, and the benchmarks by importance with their weight in the time.
FIRST_TESTS = (
    "test_grpo",
    "test_logprob",
    "test_linear_grpo",
    "test_linear_logprob",
    "test_policy_loss",
    "test_sequence_loss",
    "test_group_advantage",
)
BENCHMARKS = {
    "grpo": 4,
    "linear_grpo": 4,
    "logprob": 3,
    "linear_logprob": 2,
    "policy_loss": 1,
    "sequence_loss": 1,
    "group_advantage": 1,
}
# Tests of files, wheels and processes: they say nothing about a device.
OFF_DEVICE = ("test_benchmarks", "test_layout", "test_memory", "test_packaging")
TEST_SHARE = 0.35  # of the time, before the benchmarks; tests without a place there run at the end
GRACE = 10.0  # seconds to write results after an interrupt
NO_TESTS = 5  # pytest's exit code
FAILED, UNFINISHED = 1, 2  # ours


@dataclasses.dataclass(frozen=True)
class Piece:
    name: str
    arguments: tuple[str, ...]  # of pytest
    weight: float  # of the time that is left, against the pieces of its stage that come after it


def stages(out: Path, commit: str, tests: bool = True) -> list[tuple[float, list[Piece]]]:
    """(the share of all time by which a stage ends, its pieces), in order."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    first = [ROOT / "tests" / f"{stem}.py" for stem in FIRST_TESTS]
    first = [path for path in first if path in files]
    rest = [path for path in files if path not in first and path.stem not in OFF_DEVICE]
    benchmarks = [
        Piece(
            f"benchmark {stem}",
            (
                f"benchmarks/bench_{stem}.py",
                f"--benchmark-json={out / f'{stem}-{commit}.json'}",
                "--benchmark-columns=median,iqr,rounds",
                "--benchmark-sort=fullname",
            ),
            weight,
        )
        for stem, weight in BENCHMARKS.items()
    ]
    if not tests:
        return [(1.0, benchmarks)]
    return [
        (TEST_SHARE, [_test_piece(path) for path in first]),
        (1.0, benchmarks),
        *((1.0, [_test_piece(path)]) for path in rest),  # each may take all that is left
    ]


def _test_piece(path: Path) -> Piece:
    return Piece(f"test {path.stem}", (str(path.relative_to(ROOT)),), 1)


def run_piece(piece: Piece, seconds: float, environment: dict[str, str]) -> str:
    """Run it; "passed", "failed" or "out of time"."""
    if seconds <= GRACE:
        return "out of time"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *piece.arguments]
    # A session of its own, so that an interrupt reaches whatever pytest started, and nothing else.
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    for limit, sign in ((seconds - GRACE, signal.SIGINT), (GRACE, signal.SIGKILL)):
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, sign)
            continue
        if limit == GRACE:
            break  # it had to be interrupted
        return "passed" if code in (0, NO_TESTS) else "failed"
    process.wait()
    return "out of time"


def run(plan: Sequence[tuple[float, list[Piece]]], seconds: float, commit: str) -> dict[str, str]:
    """What became of each piece."""
    environment = os.environ | {
        machine.COMMIT_VARIABLE: commit,
        machine.COMMAND_VARIABLE: "benchmarks/run_all",
        "PYTHONUNBUFFERED": "1",
    }
    start = time.monotonic()
    outcome: dict[str, str] = {}
    for share, pieces in plan:
        for i, piece in enumerate(pieces):
            left = share * seconds - (time.monotonic() - start)
            limit = left * piece.weight / sum(p.weight for p in pieces[i:])
            print(f"=== {piece.name}: {limit:.0f} s of {left:.0f} s left", flush=True)
            outcome[piece.name] = run_piece(piece, limit, environment)
    return outcome


def summary(outcome: dict[str, str]) -> Iterator[str]:
    for name, result in outcome.items():
        yield f"{result:12} {name}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/run_all", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the JSON files (default: results/)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    parser.add_argument("--list", action="store_true", help="print what would run, in order")
    parser.add_argument("--no-tests", action="store_true", help="only the benchmarks")
    options = parser.parse_args(arguments)
    commit = machine.commit()
    out = (options.out or ROOT / "benchmarks" / "results" / machine.slug()).resolve()
    plan = stages(out, commit, tests=not options.no_tests)
    if options.list:
        print("\n".join(piece.name for _, pieces in plan for piece in pieces))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    print(f"commit {commit}, results in {out}", flush=True)
    outcome = run(plan, 60 * options.minutes, commit)
    print("\n".join(summary(outcome)), flush=True)
    if "failed" in outcome.values():
        return FAILED
    return UNFINISHED if "out of time" in outcome.values() else 0


if __name__ == "__main__":
    sys.exit(main())
