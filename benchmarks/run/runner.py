"""Run the tests, then every benchmark, within a given time, whatever crashes on the way.

The order: the rates of this machine; the tests that say most about a device; the benchmarks, the
first case of each first; the 7B step; shared prompts; a step of TRL's trainer; the other cases;
compute-sanitizer over every kernel; the other tests.
What overruns its part of the time is interrupted, and killed if it does not stop. Results are
written after every measurement: an end at any time loses one. After a crash a new process goes on
behind the benchmark that crashed, which the results name.
"""

import dataclasses
import importlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import FOLDER, ROOT, command_line, conftest, providers
from benchmarks.measuring import machine, recorder
from benchmarks.run import failures, sanitize, smoke

OFF_DEVICE = ("test_memory", "test_trl_step")  # they say nothing about a device, as those of:
OTHER_ROOMS = ("benchmarks", "project")
# All in one process, as far as none crashes: they share inputs, and what float64 makes of them.
STEMS = (
    *("grpo", "logprob", "linear_grpo", "linear_cross_entropy", "linear_logprob"),
    *("policy_loss", "sequence_loss", "group_advantage"),
)
FIRST_TESTS = tuple(f"test_{stem}" for stem in STEMS if stem != "linear_cross_entropy")
GRACE = 4.0  # seconds to stop in after an interrupt: what was measured is on disk by then
RESTARTS = 8  # after crashes of one piece
CASE_SHARE = 4  # one benchmark may take this part of the time of its piece
NO_TESTS = 5  # pytest's exit code
FAILED, UNFINISHED = 1, 2  # ours
STEP = "benchmarks.step_7b"
SHARED = "benchmarks.shared_prompt"
WITH_ROWS = (STEP, SHARED)  # programs that take the time they have, and write rows of their own
SANITIZER, NAMED = sanitize.__name__, "sanitizer"
OUT_OF_TIME = "out of time"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A process, and its weight as the time that is left is shared with the pieces after it."""

    name: str
    arguments: tuple[str, ...]  # of the module
    weight: float = 1.0
    module: str = "pytest"
    results: Path | None = None  # where it writes
    resume: bool = False  # go on where an earlier piece had to stop

    def command(self, seconds: float, resume: bool) -> list[str]:
        command = [sys.executable, "-m", self.module]
        if self.module == "pytest":
            command += ["-q", "-p", "no:cacheprovider", "-p", failures.__name__]
        if self.module in (*WITH_ROWS, SANITIZER):
            command += ["--until", f"{time.time() + seconds:.0f}"]  # imports count
        if self.results and self.module == "pytest":
            command += ["--full", f"--results={self.results}"] + ["--resume"] * resume
        return [*command, *self.arguments]


@dataclasses.dataclass(frozen=True)
class Outcome:
    text: str
    failed: bool = False  # by a fault of this project's
    late: bool = False


def plan(out: Path, commit: str, tests: bool = True) -> list[Piece]:
    """List every piece, in order; the weights of all add up to about 100."""
    kernels = tuple(f"benchmarks/bench_{stem}.py" for stem in STEMS)
    trainer = ("benchmarks/bench_trl_step.py",)
    everything = Piece("benchmarks", kernels, 36, results=out / f"kernels-{commit}.json")
    step_file = out / f"step_7b-{commit}.json"
    shared_file = out / f"shared_prompt-{commit}.json"
    prompts = (
        *("--prompt", "512", "1024", "2048", "--group=8", "--completion=256"),
        f"--out={shared_file}",
        *(
            "--providers",
            "unshared",
            "auto",
            "packed",
            "mask",
            "fork",
            "bounded",
            "backward",
            "prefix-grouper",
        ),
    )
    measured = [
        everything,
        Piece("7B step", (f"--out={step_file}",), 15, STEP, step_file),
        Piece("shared prompts", prompts, 10, SHARED, shared_file),
        Piece("TRL step", trainer, 12, results=out / f"trl_step-{commit}.json"),
        dataclasses.replace(everything, name="benchmarks, the rest", weight=6, resume=True),
    ]
    if not tests:
        return measured
    files = {path.stem: path for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    rest = [stem for stem, path in files.items() if path.parent.name not in OTHER_ROOMS]
    rest = [stem for stem in rest if stem not in FIRST_TESTS + OFF_DEVICE]

    def pieces(stems: Sequence[str], weight: float) -> list[Piece]:
        paths = [(stem, str(files[stem].relative_to(ROOT))) for stem in stems if stem in files]
        return [Piece(f"test {stem}", (path,), weight / len(paths)) for stem, path in paths]

    return [*pieces(FIRST_TESTS, 10), *measured, sanitizer(out, commit), *pieces(rest, 3)]


def sanitizer(out: Path, commit: str) -> Piece:
    """Return the piece that watches every kernel; it ends by itself when its time is over."""
    return Piece(NAMED, ("--out", str(out / f"sanitizer-{commit}.json")), 8, SANITIZER)


def run_piece(piece: Piece, seconds: float, environment: dict[str, str]) -> Outcome:
    """Run a piece, and again behind each benchmark that takes its process down."""
    end = time.monotonic() + seconds
    environment = environment | {conftest.LIMIT_VARIABLE: str(seconds / CASE_SHARE)}
    crashes: list[str] = []
    for attempt in range(1 + RESTARTS):
        resume = piece.resume or attempt > 0
        outcome = _run_once(piece, end - time.monotonic(), environment, resume)
        why = OUT_OF_TIME if outcome.late else outcome.text
        running = recorder.note_end(piece.results, why) if piece.results else None
        if running is None or outcome.late:
            break
        crashes.append(running)
    if not crashes:
        return outcome
    own = not all(map(_of_another_library, crashes))
    failed = own or (outcome.failed and running is None)
    return Outcome(f"crashed in {'; '.join(crashes)}", failed, outcome.late)


def _run_once(piece: Piece, seconds: float, environment: dict[str, str], resume: bool) -> Outcome:
    if seconds <= GRACE:
        return Outcome(OUT_OF_TIME, late=True)
    with tempfile.TemporaryDirectory() as folder:
        failed = Path(folder) / "failed"
        environment = environment | {failures.VARIABLE: str(failed)}
        command = piece.command(seconds - GRACE, resume)
        # A session of its own, so that an interrupt reaches whatever it started, and nothing else.
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        code = _wait(process, seconds - GRACE)
        names = failed.read_text().splitlines() if failed.exists() else []
    others_only = bool(names) and all(map(_of_another_library, names))
    if code is None:  # pytest's exit code is then that of an interrupt, whatever failed before
        own = bool(names and not others_only) or _rows_failed(piece)
        return Outcome(f"failed, then {OUT_OF_TIME}" if own else OUT_OF_TIME, own, late=True)
    if code < 0:
        return Outcome(f"crashed: {signal.Signals(-code).name}", failed=True)
    if code in (0, NO_TESTS):
        return Outcome("passed")
    if piece.module == SANITIZER and code == sanitize.UNFINISHED:
        return Outcome(OUT_OF_TIME, late=True)
    return Outcome("passed, but for other libraries") if others_only else Outcome("failed", True)


def _of_another_library(benchmark: str) -> bool:
    """Say whether a benchmark, `bench_x[shape-variant-provider]`, is another library's."""
    names = {name for table in providers.PROVIDERS.values() for name in table}
    peers = [name for name in names if providers.library(name) not in providers.OWN]
    return any(f"-{name}]" in benchmark for name in peers)


def _rows_failed(piece: Piece) -> bool:
    """Say whether a program with rows of its own has written down a failure of this project's."""
    if piece.module not in WITH_ROWS or piece.results is None or not piece.results.exists():
        return False
    # Not at the top: shared prompts need transformers, and the rest runs without it.
    rows = importlib.import_module(f"{piece.module}.rows")
    return bool(rows.own_failures(json.loads(piece.results.read_text())))


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Return the exit code; None if the process had to be interrupted."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        failures.stop([process], GRACE)
    return None


def calibrate(environment: dict[str, str], seconds: float) -> None:
    """Measure the roofs once, in a process that gives the device back, for all the others."""
    command = [sys.executable, "-m", machine.__name__]
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


def run(pieces: Sequence[Piece], seconds: float, commit: str, out: Path) -> dict[str, Outcome]:
    """Run all pieces; `out` gets the list of outcomes after each."""
    environment = machine.environment() | {
        machine.COMMIT_VARIABLE: commit,
        machine.COMMAND_VARIABLE: "benchmarks/run_all",
        "PYTHONUNBUFFERED": "1",
    }
    end = time.monotonic() + seconds
    if any(piece.results for piece in pieces):
        calibrate(environment, max(seconds, 1))
    outcomes: dict[str, Outcome] = {}
    for i, piece in enumerate(pieces):
        left = end - time.monotonic()
        limit = left * piece.weight / sum(p.weight for p in pieces[i:])
        print(f"=== {piece.name}: up to {limit:.0f} s; {left:.0f} s left in all", flush=True)
        outcomes[piece.name] = run_piece(piece, limit, environment)
        keep(out, commit, {name: x.text for name, x in outcomes.items()})
    return outcomes


def keep(out: Path, commit: str, outcomes: dict[str, str]) -> None:
    """Write the outcomes next to those of an earlier part."""
    path = out / f"outcome-{commit}.txt"
    known = {}
    if path.exists():
        known = dict(line.split(": ", 1) for line in path.read_text().splitlines())
    path.write_text("".join(f"{name}: {text}\n" for name, text in (known | outcomes).items()))


def exit_code(outcomes: dict[str, Outcome]) -> int:
    """Return 1 if a test or an own benchmark failed, 2 if something did not get its time, else 0."""
    if any(x.failed for x in outcomes.values()):
        return FAILED
    return UNFINISHED if any(x.late for x in outcomes.values()) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__, prog="benchmarks/run_all")
    add = parser.add_argument
    add("--out", type=Path, help="folder of the JSON files (default: benchmarks/results/<device>)")
    add("--minutes", type=float, default=8.8, help="for everything (default: 8.8)")
    add("--list", action="store_true", help="print what would run, in order")
    add(
        "--no-tests",
        action="store_true",
        help="only the benchmarks, or with --smoke only its checks",
    )
    add("--smoke", action="store_true", help="is every kernel right here? 3 minutes, no times")
    add(
        "--sanitize",
        action="store_true",
        help="only watch every kernel with compute-sanitizer, with --smoke after its checks",
    )
    add("--only", action="append", help="pieces whose name holds this; repeatable")
    add("--allow-unknown", action="store_true", help="measure code whose commit is unknown")
    options = parser.parse_args(arguments)
    commit = machine.commit()
    out = (options.out or FOLDER / "results" / machine.slug()).resolve()
    pieces = plan(out, commit, tests=not options.no_tests)
    if options.sanitize:
        pieces = [sanitizer(out, commit)]
    if options.only:
        pieces = [p for p in pieces if any(word in p.name for word in options.only)]
    if options.list:
        print("\n".join(piece.name for piece in pieces))
        return 0
    if commit == machine.UNKNOWN and not options.allow_unknown:
        raise SystemExit(
            "the commit is unknown, and no such results can be published: set "
            f"{machine.COMMIT_VARIABLE} to the output of `git describe --always --dirty` of the "
            "original, or --allow-unknown"
        )
    out.mkdir(parents=True, exist_ok=True)
    print(f"commit {commit}, results in {out}", flush=True)
    end = time.monotonic() + 60 * options.minutes
    code = 0
    if options.smoke:
        seconds = min(60 * options.minutes, smoke.SECONDS)
        code = smoke.run(out, commit, seconds, tests=not options.no_tests)
        if not options.sanitize:
            return code
    outcomes = run(pieces, end - time.monotonic(), commit, out)
    print("\n".join(f"{name}: {x.text}" for name, x in outcomes.items()), flush=True)
    return code or exit_code(outcomes)
