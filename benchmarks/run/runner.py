"""Tests, then every benchmark, in a given time, whatever crashes on the way (`benchmarks/run_all`).

Calibration; the tests that say most about a device; the benchmarks of this project and of other libraries,
the first case of each first; the 7B step; a step of TRL's trainer; the other cases; the other tests. What
overruns its share of the time is interrupted, and killed if it does not stop. Results are written after every
measurement: an end at any time loses one. After a crash a new process goes on behind the benchmark that
crashed, which the results name.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import ROOT, providers
from benchmarks.measuring import machine
from benchmarks.measuring import recorder as results
from benchmarks.run import failures, smoke
from benchmarks.step_7b import step as step_7b

# The tests that say most about a device, and the benchmarks, by importance, with their weight in the time.
FIRST_TESTS = {
    "test_grpo": 4,
    "test_logprob": 2,
    "test_linear_grpo": 4,
    "test_linear_logprob": 2,
    "test_policy_loss": 1,
    "test_sequence_loss": 1,
    "test_group_advantage": 1,
}
# All in one process, as far as none crashes: they share inputs, and what float64 makes of them.
STEMS = (
    *("grpo", "logprob", "linear_grpo", "linear_cross_entropy", "linear_logprob"),
    *("policy_loss", "sequence_loss", "group_advantage"),
)
# Tests of files, wheels and processes: they say nothing about a device.
OFF_DEVICE = (
    "test_benchmarks",
    "test_benchmark_peers",
    "test_compare",
    "test_cost_model",
    "test_layout",
    "test_memory",
    "test_on_chip_build",
    "test_packaging",
    "test_report",
    "test_runner",
    "test_smoke",
    "test_step_7b",
    "test_trl_step",
    "test_variants",
)
# By what share of all time a stage ends; tests without a place in the first stage run at the end.
TESTS_END, BENCHMARKS_END, STEP_END, TRL_END, REST_END = 0.10, 0.56, 0.75, 0.87, 0.97
# Seconds to stop in after an interrupt: what was measured is on disk by then.
GRACE = 4.0
SMOKE_SECONDS = 170.0
RESTARTS = 8  # after crashes of one piece
NO_TESTS = 5  # pytest's exit code
FAILED, UNFINISHED = 1, 2  # ours
STEP = "benchmarks.step_7b"
BUNDLE = "results.tar.gz"
OUT_OF_TIME = "out of time"
FAILED_LATE = f"failed, then {OUT_OF_TIME}"
CRASHED_IN = "crashed in "
PEERS_FAILED = "passed, but for other libraries"


@dataclasses.dataclass(frozen=True)
class Piece:
    name: str
    arguments: tuple[str, ...]  # of the module
    weight: float  # of the time that is left, against the pieces of its stage that come after it
    module: str = "pytest"
    results: Path | None = None  # where it writes
    peer: bool = False  # its failures are another library's
    resume: bool = False  # go on where an earlier piece had to stop

    def command(self, seconds: float, resume: bool) -> list[str]:
        command = [sys.executable, "-m", self.module]
        if self.module == "pytest":
            command += ["-q", "-p", "no:cacheprovider", "-p", failures.__name__]
        if self.module == STEP:
            command += ["--until", f"{time.time() + seconds:.0f}"]  # imports count
        if self.results and self.module == "pytest":
            command += [f"--results={self.results}"] + ["--resume"] * resume
        return [*command, *self.arguments]


def stages(out: Path, commit: str, tests: bool = True) -> list[tuple[float, list[Piece]]]:
    """(the share of all time by which a stage ends, its pieces), in order."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    first = [ROOT / "tests" / f"{stem}.py" for stem in FIRST_TESTS]
    first = [path for path in first if path in files]
    rest = [path for path in files if path not in first and path.stem not in OFF_DEVICE]
    everything = Piece("benchmarks", _files(STEMS), 1, results=out / f"kernels-{commit}.json")
    rest_of_it = dataclasses.replace(everything, name="benchmarks, the rest", resume=True)
    step = out / f"step_7b-{commit}.json"
    trainer = ("benchmarks/bench_trl_step.py",)
    plan = [
        (BENCHMARKS_END, [everything]),
        (STEP_END, [Piece("7B step", (f"--out={step}",), 1, STEP, step)]),
        (
            TRL_END,
            [Piece("TRL step", trainer, 1, results=out / f"trl_step-{commit}.json", peer=True)],
        ),
        (REST_END, [rest_of_it]),
    ]
    if not tests:
        return plan
    return [
        (TESTS_END, [_test_piece(path) for path in first]),
        *plan,
        *((1.0, [_test_piece(path)]) for path in rest),  # each may take all that is left
    ]


def _files(stems: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"benchmarks/bench_{stem}.py" for stem in stems)


def _test_piece(path: Path) -> Piece:
    weight = FIRST_TESTS.get(path.stem, 1)
    return Piece(f"test {path.stem}", (str(path.relative_to(ROOT)),), weight)


def run_piece(piece: Piece, seconds: float, environment: dict[str, str]) -> str:
    """Run it, again behind a benchmark that crashes: "passed", "failed", "crashed ..." or why it is late."""
    start = time.monotonic()
    crashes = []
    for attempt in range(1 + RESTARTS):
        left = seconds - (time.monotonic() - start)
        outcome = _run_once(piece, left, environment, resume=piece.resume or attempt > 0)
        if not piece.results or outcome in ("passed", "failed", PEERS_FAILED):
            break
        late = outcome.endswith(OUT_OF_TIME)
        running = results.note_end(piece.results, OUT_OF_TIME if late else outcome)
        if late or running is None:
            break
        crashes.append(running)
    return f"{CRASHED_IN}{'; '.join(crashes)}" if crashes else outcome


def _run_once(piece: Piece, seconds: float, environment: dict[str, str], resume: bool) -> str:
    if seconds <= GRACE:
        return OUT_OF_TIME
    with tempfile.TemporaryDirectory() as folder:
        failed = Path(folder) / "failed"
        environment = environment | {failures.VARIABLE: str(failed)}
        command = piece.command(seconds - GRACE, resume)
        # A session of its own, so that an interrupt reaches whatever it started, and nothing else.
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        code = _wait(process, seconds - GRACE)
        names = failed.read_text().splitlines() if failed.exists() else []
    others_only = bool(names) and all(_of_another_library(name) for name in names)
    if code is None:  # pytest's exit code is then that of an interrupt, whatever failed before
        own = (names and not others_only) or _step_failed(piece)
        return FAILED_LATE if own else OUT_OF_TIME
    if code < 0:
        return f"crashed: {signal.Signals(-code).name}"
    if code in (0, NO_TESTS):
        return "passed"
    return PEERS_FAILED if others_only else "failed"


def _of_another_library(benchmark: str) -> bool:
    """Whether a benchmark's name, `bench_x[shape-variant-provider]`, says that it is a peer's."""
    names = {name for table in providers.PROVIDERS.values() for name in table}
    peers = [name for name in names if providers.library(name) not in providers.OWN]
    return any(f"-{name}]" in benchmark for name in peers)


def _step_failed(piece: Piece) -> bool:
    """Whether the 7B step has written down a failure of this project's."""
    if piece.module != STEP or piece.results is None or not piece.results.exists():
        return False
    return bool(step_7b.own_failures(json.loads(piece.results.read_text())))


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    """The exit code; None if the process had to be interrupted."""
    for limit, sign in ((seconds, signal.SIGINT), (GRACE, signal.SIGKILL)):
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, sign)
            continue
        return None if sign == signal.SIGKILL else code
    process.wait()
    return None


def calibrate(environment: dict[str, str], seconds: float) -> None:
    """Measure the roofs once, in a process that gives the device back, for all the others."""
    command = [sys.executable, "-m", "benchmarks.measuring.machine"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise SystemExit(f"calibration: {OUT_OF_TIME} after {seconds:.0f} s") from None
    if done.returncode:
        raise SystemExit(f"calibration failed\n{done.stderr}")
    environment[machine.CALIBRATION_VARIABLE] = done.stdout
    print(f"roofs: {done.stdout.strip()}", flush=True)


def run(
    plan: Sequence[tuple[float, list[Piece]]], seconds: float, commit: str, out: Path | None = None
) -> dict[str, str]:
    """What became of each piece; `out` gets the list after each."""
    environment = machine.environment() | {
        machine.COMMIT_VARIABLE: commit,
        machine.COMMAND_VARIABLE: "benchmarks/run_all",
        "PYTHONUNBUFFERED": "1",
    }
    start = time.monotonic()
    if any(piece.results for _, pieces in plan for piece in pieces):
        calibrate(environment, max(seconds, 1))
    outcome: dict[str, str] = {}
    for share, pieces in plan:
        for i, piece in enumerate(pieces):
            spent = time.monotonic() - start
            limit = (share * seconds - spent) * piece.weight / sum(p.weight for p in pieces[i:])
            total = seconds - spent
            print(f"=== {piece.name}: up to {limit:.0f} s; {total:.0f} s left in all", flush=True)
            outcome[piece.name] = run_piece(piece, limit, environment)
            if out:
                keep(out / f"outcome-{commit}.txt", outcome)
                bundle(out, commit)
    return outcome


def keep(path: Path, outcome: dict[str, str]) -> None:
    """Write down what became of pieces, next to what is known of those that an earlier part has run."""
    known = {}
    if path.exists():
        known = dict(line.split(": ", 1) for line in path.read_text().splitlines())
    path.write_text("\n".join(summary(known | outcome)) + "\n")


def bundle(out: Path, commit: str) -> None:
    """All files of a commit in one, for machines that give few files back."""
    temporary = out / f"{BUNDLE}.part"
    with tarfile.open(temporary, "w:gz") as archive:
        for path in sorted(out.glob(f"*-{commit}.*")):
            archive.add(path, path.name)
    os.replace(temporary, out / BUNDLE)


def summary(outcome: dict[str, str]) -> Iterator[str]:
    for name, result in outcome.items():
        yield f"{name}: {result}"


def exit_code(plan: Sequence[tuple[float, list[Piece]]], outcome: dict[str, str]) -> int:
    """1 if a test or one of this project's benchmarks failed, 2 if something did not get its time."""
    own = [outcome[p.name] for _, pieces in plan for p in pieces if not p.peer]
    fine = ("passed", PEERS_FAILED, OUT_OF_TIME)
    if any(result not in fine and not _peers_crashed(result) for result in own):
        return FAILED
    late = any(result.endswith(OUT_OF_TIME) for result in outcome.values())
    return UNFINISHED if late else 0


def _peers_crashed(outcome: str) -> bool:
    crashes = outcome.removeprefix(CRASHED_IN).split("; ")
    return outcome.startswith(CRASHED_IN) and all(_of_another_library(x) for x in crashes)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/run_all", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the JSON files (default: results/)")
    parser.add_argument("--minutes", type=float, default=8.8, help="for everything (default: 8.8)")
    parser.add_argument("--list", action="store_true", help="print what would run, in order")
    parser.add_argument("--no-tests", action="store_true", help="only the benchmarks")
    parser.add_argument(
        "--smoke", action="store_true", help="no numbers: is every kernel right here? 3 minutes"
    )
    parser.add_argument("--only", action="append", help="pieces whose name holds this; repeatable")
    parser.add_argument(
        "--allow-unknown", action="store_true", help="measure code whose commit is unknown"
    )
    options = parser.parse_args(arguments)
    commit = machine.commit()
    out = (options.out or ROOT / "benchmarks" / "results" / machine.slug()).resolve()
    plan = stages(out, commit, tests=not options.no_tests)
    if options.only:
        plan = [
            (share, [p for p in pieces if any(word in p.name for word in options.only)])
            for share, pieces in plan
        ]
        last = max((i for i, (_, pieces) in enumerate(plan) if pieces), default=0)
        plan = [(1.0 if i == last else s, pieces) for i, (s, pieces) in enumerate(plan)]
    if options.list:
        print("\n".join(piece.name for _, pieces in plan for piece in pieces))
        return 0
    if commit == machine.UNKNOWN and not options.allow_unknown:
        raise SystemExit(
            f"the commit is unknown, and no such results can be published: set {machine.COMMIT_VARIABLE} "
            "to the output of `git describe --always --dirty` of the original, or --allow-unknown"
        )
    out.mkdir(parents=True, exist_ok=True)
    print(f"commit {commit}, results in {out}", flush=True)
    if options.smoke:
        return smoke.run(out, commit, min(60 * options.minutes, SMOKE_SECONDS))
    outcome = run(plan, 60 * options.minutes, commit, out)
    print("\n".join(summary(outcome)), flush=True)
    return exit_code(plan, outcome)
