"""compute-sanitizer as a step of run_all, with a program in its place that prints what it prints."""

import json
import os
import sys
import textwrap

import pytest
import torch

from benchmarks.measuring import machine
from benchmarks.run import bounds, runner, sanitize, smoke

# Lines as compute-sanitizer 2026.3 prints them (its manual).
WRITE = """
========= Invalid __global__ write of size 4 bytes
=========     at {kernel}+0x160 in rows.py:112
=========     by thread (3,0,0) in block (0,0,0)
=========     Address 0x7f6510c00404 is out of bounds
=========     and is 5 bytes after the nearest allocation at 0x7f6510c00000 of size 1,024 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: launch [0x2f1] in _cuda.so
=========
"""
RACE = """
========= Error: Race reported between Write access at _grpo_kernel+0x90 in rows.py:41
=========     and Read access at _grpo_kernel+0x100 in rows.py:51 [508 hazards]
=========
"""
CONTROL = WRITE.format(kernel="_control_kernel")
HEAD = "========= COMPUTE-SANITIZER\n_grpo_kernel: 1 dense\n"
CLEAN = HEAD + "3 launches\n========= ERROR SUMMARY: 0 errors\n"
SEEN = HEAD + "3 launches\n" + CONTROL + "========= ERROR SUMMARY: 1 error\n"
NO_RACE = (
    HEAD + "3 launches\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
)
FINE = {"memcheck": SEEN, "racecheck": NO_RACE, "synccheck": CLEAN, "initcheck": CLEAN}


def test_a_clean_log():
    found = sanitize.read(SEEN, control=True)
    assert found == {"ended": "right", "errors": 0, "first": None, "launches": 3}
    assert sanitize.read(NO_RACE, control=False)["errors"] == 0


def test_the_first_error_is_read_and_the_control_not_counted():
    wrong = WRITE.format(kernel="_grpo_kernel")
    log = HEAD + wrong + wrong + "3 launches\n" + CONTROL + "========= ERROR SUMMARY: 3 errors\n"
    found = sanitize.read(log, control=True)
    assert (found["ended"], found["errors"]) == ("2 errors", 2)
    assert found["first"] == (
        "Invalid __global__ write of size 4 bytes; at _grpo_kernel+0x160 in rows.py:112; "
        "by thread (3,0,0) in block (0,0,0); Address 0x7f6510c00404 is out of bounds"
    )


def test_a_race_is_read():
    log = HEAD + RACE + "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    found = sanitize.read(log, control=False)
    assert found["ended"] == "1 error"
    assert found["first"].startswith("Error: Race reported between Write access at _grpo_kernel")


@pytest.mark.parametrize(
    "log, ended",
    [
        (CLEAN, "blind: the kernel that is wrong on purpose was not reported"),
        (SEEN.replace("3 launches", "killed"), "did not launch everything"),
        (HEAD, "no summary"),
        ("", "no summary"),
    ],
)
def test_what_says_nothing_is_not_right(log, ended):
    assert sanitize.read(log, control=True)["ended"] == ended


SCRIPT = """
import json, os, signal, sys, time
tool = sys.argv[sys.argv.index("--tool") + 1]
text, how = json.load(open({said!r}))[tool]
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
assert (sys.argv[-1] == "--control") == (tool == "memcheck")
print(text, flush=True)
if how == "hangs":
    time.sleep(60)
if how == "crashes":
    os.kill(os.getpid(), signal.SIGSEGV)
sys.exit(how)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`sanitize.run` with a sanitizer that prints these texts: exit code, document, what was printed."""

    def run(seconds=20.0, **changes):
        said = {tool: (text, 0) for tool, text in FINE.items()} | changes
        (tmp_path / "said.json").write_text(json.dumps(said))
        fake = tmp_path / "compute-sanitizer"
        script = SCRIPT.format(said=str(tmp_path / "said.json"))
        fake.write_text(f"#!{sys.executable} -S\n{script}")
        fake.chmod(0o755)
        alone = [sys.executable, "-S", "-c", "print('3 launches')"]
        monkeypatch.setattr(sanitize, "PROGRAM", alone)
        monkeypatch.setattr(smoke, "GRACE", 0.5)
        code = sanitize.run(tmp_path / "s.json", str(fake), seconds)
        document = json.loads((tmp_path / "s.json").read_text())
        return code, document, capsys.readouterr().out

    return run


def test_all_right_is_zero(run):
    code, document, out = run()
    assert code == 0
    found = document["sanitizer"]
    assert {name: x["ended"] for name, x in found.items()} == dict.fromkeys(
        ("launches", *sanitize.TOOLS), "right"
    )
    assert {x["launches"] for x in found.values()} == {3}
    assert document["benchmarks"] == []
    assert document["machine_info"]["command"] == "benchmarks/run_all --sanitize"
    assert "compute-sanitizer: racecheck: right\n" in out


def test_errors_crashes_and_hangs_are_named(run):
    wrong = HEAD + WRITE.format(kernel="_grpo_kernel") + "3 launches\n" + CONTROL
    code, document, out = run(
        seconds=3.0,
        memcheck=(wrong + "========= ERROR SUMMARY: 2 errors\n", 1),
        racecheck=(HEAD, "crashes"),
        synccheck=(HEAD, "hangs"),
        initcheck=(CLEAN, 7),
    )
    assert code == 1
    assert {name: x["ended"] for name, x in document["sanitizer"].items()} == {
        "launches": "right",
        "memcheck": "1 error",
        "racecheck": "crashed: SIGSEGV",
        "synccheck": "out of time",
        "initcheck": "not right",
    }
    assert "memcheck: 1 error: Invalid __global__ write of size 4 bytes; at _grpo_kernel+0x" in out
    assert "  _grpo_kernel: 1 dense\n" in out, "where the others ended"


def test_only_late_is_unfinished(run):
    assert run(seconds=1.0, synccheck=(HEAD, "hangs"))[0] == sanitize.UNFINISHED


def executable(folder):
    folder.mkdir(parents=True)
    path = folder / "compute-sanitizer"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_where_it_is_looked_for(tmp_path, monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "[site]")])
    monkeypatch.setattr(sanitize, "TOOLKIT", str(tmp_path / "none"))
    assert sanitize.find() is None
    packaged = executable(tmp_path / "[site]" / "nvidia" / "cu13" / "bin")
    assert sanitize.find() == str(packaged)
    toolkit = executable(tmp_path / "cuda" / "bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert sanitize.find() == str(toolkit)
    on_path = executable(tmp_path / "path")
    assert sanitize.find() == str(on_path)
    on_path.chmod(0o644)
    assert sanitize.find() == str(toolkit)


@pytest.mark.parametrize("there", [True, False])
def test_without_it_or_without_a_gpu_a_line_says_so(there, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "find", lambda: "compute-sanitizer" if there else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "s.json"
    assert sanitize.main([f"--out={out}"]) == 0
    why = "there is no NVIDIA GPU" if there else "compute-sanitizer was not found"
    assert f"memory is not checked: {why}" in capsys.readouterr().out
    assert not out.exists()


def test_its_time_is_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitize, "find", lambda: "compute-sanitizer")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize.time, "time", lambda: 1000.0)
    given = []
    monkeypatch.setattr(sanitize, "run", lambda out, path, seconds: given.append(seconds) or 0)
    assert sanitize.main([f"--out={tmp_path}/s.json", "--until=1100"]) == 0
    assert sanitize.main([f"--out={tmp_path}/s.json"]) == 0
    assert given == [100 - 2 * smoke.GRACE, sanitize.SECONDS - 2 * smoke.GRACE]


def test_the_step_of_run_all(tmp_path, monkeypatch):
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "19274bf")
    pieces = {piece.name: piece for piece in runner.plan(tmp_path, "19274bf")}
    names = list(pieces)
    assert names.index("benchmarks, the rest") < names.index("sanitizer")
    assert "sanitizer" not in [x.name for x in runner.plan(tmp_path, "19274bf", tests=False)]
    line = pieces["sanitizer"].command(60, resume=False)
    assert {"benchmarks.run.sanitize", "--until", f"{tmp_path}/sanitizer-19274bf.json"} < set(line)
    ran, seconds = [], []

    def note(pieces, limit, *_):
        ran.extend(piece.name for piece in pieces)
        seconds.append(limit)
        return {}

    monkeypatch.setattr(runner, "run", note)
    monkeypatch.setattr(runner.smoke, "run", lambda *_, **__: ran.append("smoke") or 1)
    assert runner.main([f"--out={tmp_path}", "--sanitize"]) == 0
    assert runner.main([f"--out={tmp_path}", "--sanitize", "--smoke"]) == 1
    assert ran == ["sanitizer", "smoke", "sanitizer"]
    assert all(520 < x <= 528 for x in seconds)


@pytest.mark.parametrize(
    "code, late, failed", [(0, False, False), (2, True, False), (1, False, True)]
)
def test_how_the_step_ends(code, late, failed, tmp_path, monkeypatch):
    line = [sys.executable, "-S", "-c", f"raise SystemExit({code})"]
    monkeypatch.setattr(runner.Piece, "command", lambda *_: line)
    outcome = runner.run_piece(runner.sanitizer(tmp_path, "19274bf"), 60, dict(os.environ))
    assert (outcome.late, outcome.failed) == (late, failed)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="writes outside a tensor")
def test_the_program_counts_its_launches_and_is_wrong_on_purpose(capsys):
    assert bounds.main(["_weigh_rows_kernel", "--control"]) == 0
    out = capsys.readouterr().out
    assert "_weigh_rows_kernel: 1\n_weigh_rows_kernel: 2049\n2 launches\n" in out
    assert "_control_kernel: OutOfBoundsError: _control_kernel wrote 1.0 to element 256" in out
    assert bounds.main(["no such launch"]) == 0


def test_a_launch_that_raises_costs_its_line(monkeypatch, capsys):
    def broken():
        raise ValueError("no such kernel")

    monkeypatch.setattr(bounds, "KERNELS", {"a": lambda: [("1", broken), ("2", lambda: None)]})
    assert bounds.main([]) == 1
    out = capsys.readouterr().out
    assert out == textwrap.dedent("""\
        a: 1
        a: 1: ValueError: no such kernel
        a: 2
        2 launches
        """)
