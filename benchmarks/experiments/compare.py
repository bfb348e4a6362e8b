"""Compare two commits, measured in turns on this machine.

    python -m benchmarks.experiments.compare main HEAD benchmarks/bench_grpo.py --rounds 7
    python -m benchmarks.experiments.compare HEAD . -k qwen    # "." is the working tree as it stands

Each commit gets a git worktree in a temporary folder; the order changes from round to round (A B, B
A, ...), so that a machine that warms up favours neither. A ratio is base over head: above 1 is
faster. A difference counts only where no round of one is within the rounds of the other: of two
that are equal that happens to one benchmark in 126 by chance with 5 rounds of each, to one in 10
with 3.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import ROOT, command_line
from benchmarks.measuring import machine
from benchmarks.report import markdown

WORKING_TREE = "."
ROUNDS = 5
Times = dict[str, float]  # median seconds by benchmark


def git(*arguments: str, folder: Path) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextlib.contextmanager
def tree(commit: str, root: Path, place: Path) -> Iterator[Path]:
    """Check out a commit for a while; the working tree stays where it is."""
    if commit == WORKING_TREE:
        yield root
        return
    git("worktree", "add", "--detach", str(place), commit, folder=root)
    try:
        yield place
    finally:
        git("worktree", "remove", "--force", str(place), folder=root)


def measure(folder: Path, arguments: Sequence[str], out: Path) -> Times:
    """Run the benchmarks of a tree once."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"--benchmark-json={out}", *(arguments or ["benchmarks"])]
    environment = machine.environment() | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if not out.exists():
        raise SystemExit(f"{folder}: no results\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    entries = json.loads(out.read_text())["benchmarks"]
    return {
        f"{x['extra_info'].get('stem', '')} {x['name'].removeprefix('bench_')}".strip(): (
            x["stats"]["median"]
        )
        for x in entries
    }


def alternate(
    base: Path, head: Path, arguments: Sequence[str], rounds: int, out: Path
) -> tuple[list[Times], list[Times]]:
    """Measure both trees in turns."""
    times: dict[str, list[Times]] = {"base": [], "head": []}
    for i in range(rounds):
        order = [("base", base), ("head", head)][:: 1 if i % 2 == 0 else -1]
        for which, folder in order:
            print(f"round {i + 1} of {rounds}: {which}", file=sys.stderr, flush=True)
            times[which].append(measure(folder, arguments, out / f"{which}-{i}.json"))
    return times["base"], times["head"]


def table(base: list[Times], head: list[Times]) -> str:
    rows = []
    for name in sorted(set().union(*base, *head)):
        a, b = ([times[name] for times in rounds if name in times] for rounds in (base, head))
        if not a or not b:
            rows.append([name, *[""] * 4, f"only in {'head' if b else 'base'}"])
            continue
        one, two = statistics.median(a), statistics.median(b)
        apart = min(a) > max(b) or max(a) < min(b)
        verdict = ("faster" if one > two else "slower") if apart else "no difference"
        spread = f"{min(a) / max(b):.3f} to {max(a) / min(b):.3f}"
        times = [f"{x * 1e3:.3f}" for x in (one, two)]
        rows.append([name, *times, f"{one / two:.3f}", spread, verdict])
    columns = ["benchmark", "base, ms", "head, ms", "base / head", "range of the rounds", ""]
    return markdown.table(columns, rows, left=(0, 5))


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = command_line(__doc__)
    parser.add_argument("base", help="a commit")
    parser.add_argument("head", help="a commit, or . for the working tree")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of both (default: {ROUNDS})")
    options, rest = parser.parse_known_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: one round tells nothing about the spread, want 2")
    with (
        tempfile.TemporaryDirectory() as temporary,
        tree(options.base, root, Path(temporary, "base")) as base,
        tree(options.head, root, Path(temporary, "head")) as head,
    ):
        results = alternate(base, head, rest, options.rounds, Path(temporary))
    print(table(*results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
