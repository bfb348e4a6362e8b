"""run_all --smoke: what is wrong, raises, hangs or takes its process down is named."""

import json
import signal
import subprocess
import sys

import pytest

from benchmarks.measuring import machine
from benchmarks.run import smoke

COMMIT = "19274bf"


def wrong():
    raise AssertionError("dlogits: 0.5 > 0.1")


def raised():
    raise ValueError("no such kernel\nmore of it")


def read(path):
    return json.loads(path.read_text())


def test_a_group_says_what_is_right_wrong_and_raises(tmp_path, monkeypatch, capsys):
    checks = [("good", lambda: {"loss": 1e-6}), ("bad", wrong), ("broken", raised), ("last", dict)]
    monkeypatch.setitem(smoke.GROUPS, "tiny", lambda: iter(checks))
    assert smoke.run_group("tiny", tmp_path / "tiny.json") == 2
    document = read(tmp_path / "tiny.json")
    assert document["running"] is None
    assert [(x["case"], x["outcome"]) for x in document["checks"]] == [
        ("good", "right"),
        ("bad", "wrong"),
        ("broken", "raised"),
        ("last", "right"),
    ]
    good, bad, broken, _ = document["checks"]
    assert good["errors"] == {"loss": 1e-6}
    assert bad["message"] == "AssertionError: dlogits: 0.5 > 0.1"
    assert "in wrong" in bad["where"]
    assert "ValueError: no such kernel" in broken["message"]
    out = capsys.readouterr().out
    assert "tiny: bad: wrong" in out
    assert "good" not in out


def test_a_group_stops_where_the_gpu_is_lost(tmp_path, monkeypatch):
    """Every later call would fail: those are not the kernels' faults."""
    monkeypatch.setitem(smoke.GROUPS, "tiny", lambda: iter([("fatal", raised), ("after", dict)]))
    monkeypatch.setattr(machine, "lost", lambda: True)
    assert smoke.run_group("tiny", tmp_path / "tiny.json") == 1
    document = read(tmp_path / "tiny.json")
    assert (document["running"], len(document["checks"])) == ("fatal", 1)


DEADLY = """
import os, sys
from pathlib import Path
from benchmarks.run import smoke

checks = [("good", dict), ("deadly", os.abort), ("after", dict)]
smoke.GROUPS["tiny"] = lambda: iter(checks)
smoke.run_group("tiny", Path(sys.argv[1]))
"""


def test_the_case_that_killed_the_process_is_known(tmp_path):
    path = tmp_path / "tiny.json"
    command = [sys.executable, "-c", DEADLY, str(path)]
    done = subprocess.run(command, cwd=smoke.ROOT, stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGABRT
    document = read(path)
    assert document["running"] == "deadly"
    assert [x["case"] for x in document["checks"]] == ["good"]


# What a group's process is in these tests: no import of PyTorch, the file written as run_group writes it.
GROUP = """
import json, os, signal, sys, time
name, path = sys.argv[1:]
right = {"case": "a", "outcome": "right", "errors": {}, "seconds": 0.0}
wrong = {"case": "b", "outcome": "wrong", "message": "AssertionError: off", "seconds": 0.0}
document = {"group": name, "checks": [right], "running": None}
if name == "wrong":
    document["checks"].append(wrong)
if name in ("crashing", "hanging"):
    document["running"] = "c"
if name == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if name != "silent":
    open(path, "w").write(json.dumps(document))
if name == "crashing":
    os.kill(os.getpid(), signal.SIGSEGV)
if name in ("hanging", "stubborn"):
    time.sleep(60)
sys.exit(name in ("wrong", "silent"))
"""
TESTS = """
import os
with open(os.environ["GRPO_FAST_FAILURES"], "a") as file:
    file.write("tests/ops/test_grpo.py::test_x (call)\\n")
print("1 failed")
raise SystemExit(1)
"""


@pytest.fixture
def outcome(tmp_path, monkeypatch, capsys):
    """`smoke.run` of groups that are these scripts: exit code, document, what was printed."""

    def run(*names, tests=TESTS, seconds=4.0):
        script = tmp_path / "group.py"
        script.write_text(GROUP)
        monkeypatch.setattr(smoke, "GRACE", 0.5)
        monkeypatch.setattr(smoke, "GROUPS", dict.fromkeys(names))
        command = [sys.executable, "-S", str(script)]
        monkeypatch.setattr(smoke, "_group", lambda name, path: [*command, name, str(path)])
        monkeypatch.setattr(smoke, "_tests", lambda: [sys.executable, "-S", "-c", tests])
        code = smoke.run(tmp_path, COMMIT, seconds)
        return code, read(tmp_path / f"smoke-{COMMIT}.json"), capsys.readouterr().out

    return run


def test_what_fails_crashes_and_hangs_is_named(outcome):
    names = ("fine", "wrong", "crashing", "hanging", "stubborn", "silent")
    code, document, out = outcome(*names)
    assert code == 1
    groups = document["smoke"]
    assert {name: x["ended"] for name, x in groups.items()} == {
        "fine": "right",
        "wrong": "not right",
        "crashing": "crashed: SIGSEGV",
        "hanging": "out of time",
        "stubborn": "out of time",
        "silent": "not right",
        "tests": "not right",
    }
    assert (groups["crashing"]["running"], groups["hanging"]["running"]) == ("c", "c")
    assert groups["silent"]["checks"] == [], "a group without a file has no checks"
    assert groups["tests"]["failed"] == ["tests/ops/test_grpo.py::test_x (call)"]
    assert document["benchmarks"] == []
    assert document["machine_info"]["device"] == machine.name()
    assert document["machine_info"]["command"] == "benchmarks/run_all --smoke"
    for line in (
        "wrong: 2 checks, 1 not right: not right",
        "  b: AssertionError: off",
        "  c: crashed: SIGSEGV",
        "  c: out of time",
        "1 failed",
    ):
        assert line in out


def test_all_right_is_zero(outcome):
    code, document, _ = outcome("fine", "good", tests="", seconds=20.0)
    assert code == 0
    assert document["smoke"]["tests"] == {"ended": "right", "failed": []}


def test_the_process_of_a_group_knows_it(tmp_path):
    command = smoke._group("heads", tmp_path / "heads.json")
    assert command[1:] == [
        "-m",
        "benchmarks.run.smoke",
        "heads",
        "--out",
        str(tmp_path / "heads.json"),
    ]
    dtypes = ["bfloat16", "float16", "float32"]
    dtypes += [f"{name}-odd" for name in dtypes]
    assert {*dtypes, "heads", "objectives", "large", "waiting", "prompts"} == smoke.GROUPS.keys()
    found = {path.stem for path in (smoke.ROOT / "tests").rglob("test_*.py")}
    assert set(smoke.TESTS) <= found
