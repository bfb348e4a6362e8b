"""Two commits of a tiny repository, measured in turns."""

import math
import subprocess

import pytest

from benchmarks.experiments import compare

BENCHMARK = """
import time

def bench_sleep(benchmark):
    benchmark.pedantic(time.sleep, args=({seconds},), rounds=5)

def bench_same(benchmark):
    benchmark.pedantic(time.sleep, args=(0.002,), rounds=5)
"""
CONFIG = """
[tool.pytest.ini_options]
python_files = ["bench_*.py"]
python_functions = ["bench_*"]
"""


def git(folder, *arguments):
    name = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    subprocess.run(["git", *name, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "repository"
    (root / "benchmarks").mkdir(parents=True)
    (root / "pyproject.toml").write_text(CONFIG)
    git(root.parent, "init", "-q", str(root))
    for seconds in (0.03, 0.01):
        (root / "benchmarks" / "bench_x.py").write_text(BENCHMARK.format(seconds=seconds))
        git(root, "add", ".")
        git(root, "commit", "-qm", str(seconds))
    return root


def test_two_commits_in_turns(repository, capsys):
    assert compare.main(["HEAD~", "HEAD", "benchmarks", "--rounds", "2"], root=repository) == 0
    printed = capsys.readouterr()
    turns = [line.split(": ")[1] for line in printed.err.splitlines()]
    assert turns == ["base", "head", "head", "base"]
    row = next(line for line in printed.out.splitlines() if "| sleep |" in line)
    ratio = float(row.split("|")[4])
    assert ratio > 1.5
    assert row.endswith("| faster |")
    trees = subprocess.run(
        ["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True
    )
    assert len(trees.stdout.splitlines()) == 1, "the worktrees are gone"


def test_the_working_tree(repository, capsys):
    path = repository / "benchmarks" / "bench_x.py"
    path.write_text(path.read_text() + "\ndef bench_new(benchmark):\n    benchmark(int)\n")
    assert compare.main(["HEAD", ".", "--rounds", "2"], root=repository) == 0
    assert "| new |  |  |  |  | only in head |" in capsys.readouterr().out


def test_a_difference_within_the_spread_is_none():
    base = [{"x": 1.00}, {"x": 1.10}]
    row = compare.table(base, [{"x": 0.95}, {"x": 1.05}]).splitlines()[2]
    assert row.endswith("| no difference |")
    row = compare.table(base, [{"x": 2.0}, {"x": 1.2}]).splitlines()[2]
    assert row.endswith("| slower |")


def test_by_default_chance_alone_rarely_makes_a_difference(repository, monkeypatch, capsys):
    """Of all orders of the rounds of two equal commits, two keep them apart."""
    asked = []
    monkeypatch.setattr(compare, "alternate", lambda *a: asked.append(a[3]) or ([], []))
    assert compare.main(["HEAD~", "HEAD"], root=repository) == 0
    (rounds,) = asked
    assert 2 / math.comb(2 * rounds, rounds) < 0.01
    assert math.comb(2 * rounds, rounds) == 2 * 126, "what the help says"
    with pytest.raises(SystemExit):
        compare.main(["--help"])
    printed = capsys.readouterr().out
    assert f"default: {rounds}" in printed
    assert "in 126 by chance with 5 rounds" in printed


def test_bad_arguments(repository):
    with pytest.raises(SystemExit, match="no-such-commit"):
        compare.main(["no-such-commit", "HEAD"], root=repository)
    with pytest.raises(SystemExit):
        compare.main(["HEAD", "HEAD", "--rounds", "1"], root=repository)
    with pytest.raises(SystemExit, match="no results"):
        compare.main(["HEAD~", "HEAD", "benchmarks/none.py"], root=repository)
