"""run_all: its plan, its clock, and what it does about a provider that takes the process down."""

import itertools
import json
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks import providers
from benchmarks.conftest import limited
from benchmarks.inputs import shapes
from benchmarks.measuring import machine
from benchmarks.report import committed, headline
from benchmarks.run import runner

CRASHING = """
import os

from benchmarks import providers
from benchmarks.measuring import machine
from benchmarks.measuring.measure import cases

TABLE = providers.PROVIDERS["group_advantage"]
TABLE["crashing"] = lambda: lambda *args: os.abort()
for name in list(TABLE):
    if name not in ("eager", "crashing", "grpo_fast"):
        del TABLE[name]
TABLE["grpo_fast"] = TABLE.pop("grpo_fast")  # behind the one that crashes
bench_forward = cases("group_advantage", [("micro-batch", "full")], backward=False)
"""
WHO = "crash bench_forward[micro-batch-full-crashing]"
ROOFS = json.dumps({"bandwidth": {"copy": 1e10, "read": 1e10}, "gemm": {"float32": 1e11}})


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # set by tests/conftest.py
    monkeypatch.setenv(machine.CALIBRATION_VARIABLE, ROOFS)
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "19274bf")
    return machine.environment()


def crashing_piece(tmp_path, *more, text=CRASHING):
    path = tmp_path / "bench_crash.py"
    path.write_text(textwrap.dedent(text))
    config = str(runner.ROOT / "pyproject.toml")
    arguments = ("-c", config, "-p", "benchmarks.conftest", *more, str(path))
    return runner.Piece("crash", arguments, results=tmp_path / "r.json")


def test_a_crash_loses_one_number(tmp_path, environment):
    piece = crashing_piece(tmp_path)
    outcome = runner.run_piece(piece, 300, environment)
    assert outcome.text == f"crashed in {WHO}"
    document = json.loads(piece.results.read_text())
    measured = [x["extra_info"]["provider"] for x in document["benchmarks"]]
    assert measured == ["eager", "grpo_fast"]
    assert document["machine_info"]["absent"] == {WHO: "crashed: SIGABRT"}
    assert document["machine_info"]["bandwidth"]["copy"] == 1e10
    assert document["machine_info"]["commit"] == "19274bf"
    assert all(x["stats"]["median"] > 0 for x in document["benchmarks"])


# They leave a file when they hang: their time is over then, however long they took to start.
HANGS = "[open({there!r}, 'w'), __import__('time').sleep(600)]"
SLOW = """
import signal

def test_fails():
    assert {right}

def test_takes_long():
    signal.signal(signal.SIGINT, signal.{signal})
    {hangs}
"""


def slow_piece(folder, right, sign):
    folder.mkdir()
    path = folder / "test_slow.py"
    hangs = HANGS.format(there=str(folder / "hangs"))
    path.write_text(SLOW.format(right=right, signal=sign, hangs=hangs))
    return runner.Piece("slow", ("-c", "/dev/null", "--rootdir", str(folder), str(path)))


def test_what_is_out_of_time_counts(tmp_path, environment, monkeypatch):
    """It leaves what it has measured, and what failed before; all at once, as each waits for its end."""
    monkeypatch.setattr(runner, "GRACE", 2.0)
    (tmp_path / "measuring").mkdir()
    text = CRASHING.replace("os.abort()", HANGS.format(there=str(tmp_path / "measuring" / "hangs")))
    pieces = {"measuring": crashing_piece(tmp_path / "measuring", text=text)}
    # It stops, or has to be killed.
    for right, sign in itertools.product((True, False), ("default_int_handler", "SIG_IGN")):
        pieces[f"{right} {sign}"] = slow_piece(tmp_path / f"{right} {sign}", right, sign)
    wait = runner._wait

    def wait_for_the_hang(process, seconds):
        there = Path(process.args[-1]).parent / "hangs"
        until = time.monotonic() + seconds
        while not there.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        return wait(process, 0.1)

    monkeypatch.setattr(runner, "_wait", wait_for_the_hang)
    with ThreadPoolExecutor(len(pieces)) as pool:
        limits = itertools.repeat(120)
        found = pool.map(runner.run_piece, pieces.values(), limits, itertools.repeat(environment))
        first, *outcomes = found
    assert first == runner.Outcome("out of time", late=True)
    document = json.loads(pieces["measuring"].results.read_text())
    assert [x["extra_info"]["provider"] for x in document["benchmarks"]] == ["eager"]
    for outcome, right in zip(outcomes, (True, True, False, False), strict=True):
        assert outcome.text == ("out of time" if right else "failed, then out of time")
        code = runner.exit_code({"slow": outcome})
        assert code == (runner.UNFINISHED if right else runner.FAILED)


@pytest.mark.parametrize("who", ["grpo_fast", "trl"])
def test_a_wrong_7b_step_before_the_time_is_out_counts(tmp_path, monkeypatch, who):
    class Process:
        def __init__(self, *_, **__):
            absent = {f"7B step, lora, {who}": "wrong result: loss 1, eager has 2"}
            path.write_text(json.dumps({"machine_info": {"absent": absent}}))

    path = tmp_path / "step.json"
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(runner, "_wait", lambda *_: None)
    piece = runner.Piece("7B step", (f"--out={path}",), 1, runner.STEP, path)
    outcome = runner.run_piece(piece, 60, {})
    assert (outcome.failed, outcome.late) == (who == "grpo_fast", True)


def test_a_calibration_that_hangs_is_named(monkeypatch):
    def hangs(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(SystemExit, match="calibration: out of time after 7 s"):
        runner.calibrate({}, 7)


def test_a_process_without_its_gpu_gives_way_to_another(tmp_path, environment, monkeypatch):
    """An illegal access leaves the process alive and every later call failing."""
    text = CRASHING.replace(
        'TABLE["crashing"] =', 'machine.lost = lambda: LOST\nLOST = []\nTABLE["crashing"] ='
    )
    text = text.replace("os.abort()", "LOST.append(1)")
    piece = crashing_piece(tmp_path, text=text)
    assert runner.run_piece(piece, 300, environment).text == f"crashed in {WHO}"
    document = json.loads(piece.results.read_text())
    measured = [x["extra_info"]["provider"] for x in document["benchmarks"]]
    assert measured == ["eager", "grpo_fast"]
    assert document["machine_info"]["absent"][WHO] == "crashed: SIGKILL"


def test_which_gpu_it_was_is_written_down(monkeypatch):
    said = ["580.1, GPU-aa", "580.1, GPU-aa\n580.1, GPU-bb", "NVIDIA-SMI has failed", ""]
    asked = []
    monkeypatch.setattr(machine, "_output_of", lambda *a: asked.append(a) or said.pop(0))
    assert machine._from_the_driver() == {"driver": "580.1", "gpu_uuid": "GPU-aa"}
    assert machine._from_the_driver() == {"driver": "580.1", "gpu_uuid": "GPU-aa, GPU-bb"}
    assert machine._from_the_driver() == {"driver": None, "gpu_uuid": None}
    assert machine._from_the_driver() == {"driver": None, "gpu_uuid": None}
    assert asked[0][1] == "--query-gpu=driver_version,uuid"


@pytest.mark.parametrize("stem", ["grpo", "linear_grpo"])
def test_what_compiles_for_minutes_comes_last(environment, stem):
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only"]
    command += ["--full", f"benchmarks/bench_{stem}.py"]
    command += [f"--library={x}" for x in providers.OWN]
    done = subprocess.run(
        command, cwd=runner.ROOT, env=environment, capture_output=True, text=True, check=True
    )
    order = ["-compile]" in x for x in done.stdout.splitlines() if "::" in x]
    assert any(order)
    assert order == sorted(order)


@pytest.mark.parametrize("error, lost", [(None, False), (RuntimeError, True)])
def test_a_gpu_is_lost_when_it_cannot_be_waited_for(monkeypatch, error, lost):
    def synchronize():
        if error:
            raise error("CUDA error: an illegal memory access was encountered")

    assert machine.lost() is False or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert machine.lost() is lost


def test_the_first_case_of_every_kernel_comes_first(environment):
    """A library's process may be stopped early: by then it has done what tells most."""
    stems = ("linear_grpo", "grpo", "logprob", "linear_logprob")
    files = [f"benchmarks/bench_{stem}.py" for stem in stems]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "--full"]
    command += ["--library=trl", *files]
    done = subprocess.run(
        command, cwd=runner.ROOT, env=environment, capture_output=True, text=True, check=True
    )
    found = [x.split("/bench_")[1] for x in done.stdout.splitlines() if "::" in x]
    order = [x.split(".py")[0] for x in found]
    assert order[:6] == ["grpo", "logprob", "logprob", "linear_grpo", *["linear_logprob"] * 2]
    cases = [
        x.partition("[")[2].removesuffix("-trl]") for x in found if x.startswith("linear_grpo")
    ]
    assert cases == [f"{shape}-{variant}" for shape, variant in shapes.hidden_cases()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU every case is the default")
def test_a_cpu_measures_one_case_of_each_kernel(environment):
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "benchmarks/bench_grpo.py"]
    done = subprocess.run(
        command, cwd=runner.ROOT, env=environment, capture_output=True, text=True, check=True
    )
    found = [x.partition("[")[2] for x in done.stdout.splitlines() if "::" in x]
    where = f"{next(iter(shapes.CPU))}-full-"
    assert found == [f"{where}{name}]" for name in ("eager", "grpo_fast", providers.INPLACE)]


def test_the_plan(tmp_path):
    pieces = {piece.name: piece for piece in runner.plan(tmp_path, "19274bf")}
    names = list(pieces)
    assert sum(piece.weight for piece in pieces.values()) == pytest.approx(100)
    stems = set(providers.PROVIDERS)
    assert set(runner.STEMS) == stems
    assert stems <= set(committed.STEMS)
    assert stems <= {*headline.STEMS, *headline.CASES}
    assert len(runner.STEMS) == len(set(runner.STEMS))
    order = ("test test_logprob", "benchmarks", "7B step", "TRL step", "benchmarks, the rest")
    places = [names.index(name) for name in order]
    assert places == sorted(places)
    assert "test test_layout" not in names
    first, rest = pieces["benchmarks"], pieces["benchmarks, the rest"]
    assert (first.resume, rest.resume) == (False, True)
    assert (first.results, first.arguments) == (rest.results, rest.arguments)
    assert {"--resume", "--full"} < set(rest.command(60, rest.resume))
    files = [piece.results for piece in pieces.values() if piece.results and not piece.resume]
    assert len(files) == len(set(files))


def test_what_is_not_needed_goes_to_the_pieces_behind(tmp_path, monkeypatch):
    limits = []
    pieces = [runner.Piece("a", (), 30), runner.Piece("b", (), 10), runner.Piece("c", (), 10)]
    monkeypatch.setattr(
        runner,
        "run_piece",
        lambda piece, limit, _: limits.append(limit) or runner.Outcome("passed"),
    )
    runner.run(pieces, 100, "19274bf", tmp_path)
    assert limits == pytest.approx([60, 50, 100], abs=1)


def failing(tmp_path, *names):
    """A piece whose tests with these names fail."""
    path = tmp_path / "test_some.py"
    values = ", ".join(repr(name) for name in ("eager", *names))
    path.write_text(
        "import pytest\n\n"
        f"@pytest.mark.parametrize('name', [{values}], ids=lambda x: f'shape-full-{{x}}')\n"
        "def test_it(name):\n    assert name == 'eager'\n"
    )
    return runner.Piece("some", ("-c", "/dev/null", "--rootdir", str(tmp_path), str(path)))


@pytest.mark.parametrize(
    "names, outcome",
    [
        ((), "passed"),
        (("trl", "cce-exact"), "passed, but for other libraries"),
        (("trl", "grpo_fast"), "failed"),
        (("grpo_fast-inplace",), "failed"),
    ],
)
def test_failures_of_other_libraries_are_told_apart(tmp_path, environment, names, outcome):
    piece = failing(tmp_path, *names)
    found = runner.run_piece(piece, 60, environment)
    assert found == runner.Outcome(outcome, failed=outcome == "failed")
    assert runner.exit_code({"some": found}) == (runner.FAILED if found.failed else 0)


@pytest.mark.parametrize("name, own", [("cce", False), ("grpo_fast-bf16", True)])
def test_crashes_of_other_libraries_are_told_apart(tmp_path, monkeypatch, name, own):
    crash = runner.Outcome("crashed: SIGSEGV", failed=True)
    done = iter([crash, runner.Outcome("passed")])
    ends = iter([f"linear_grpo bench_x[qwen-full-{name}]", None])
    monkeypatch.setattr(runner, "_run_once", lambda *_: next(done))
    monkeypatch.setattr(runner.recorder, "note_end", lambda *_: next(ends))
    outcome = runner.run_piece(runner.Piece("some", (), results=tmp_path / "r.json"), 60, {})
    assert outcome.failed == own


def test_a_benchmark_that_hangs_takes_its_process_down():
    code = "from benchmarks.conftest import limited\nimport time\nwith limited(0.2): time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], cwd=runner.ROOT, timeout=50)
    assert done.returncode == 1
    with limited(None), limited(60):
        pass


def test_parts_of_a_run_keep_each_others_outcome(tmp_path):
    path = tmp_path / "outcome-19274bf.txt"
    runner.keep(tmp_path, "19274bf", {"a": "passed", "b": "out of time"})
    runner.keep(tmp_path, "19274bf", {"b": "crashed in x: y", "c": "failed"})
    assert path.read_text().splitlines() == ["a: passed", "b: crashed in x: y", "c: failed"]


def test_code_of_an_unknown_commit_is_not_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(machine.COMMIT_VARIABLE, raising=False)
    monkeypatch.setattr(machine, "_output_of", lambda *_: "")
    monkeypatch.setattr(runner, "run", lambda *_: {})
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="set GRPO_FAST_COMMIT"):
        runner.main([f"--out={out}"])
    assert not out.exists()
    arguments = [f"--out={out}", "--only=none"]
    assert runner.main([*arguments, "--list"]) == 0
    assert runner.main([*arguments, "--allow-unknown"]) == 0
    assert "commit unknown" in capsys.readouterr().out


def test_the_exit_code():
    fine, late = runner.Outcome("passed"), runner.Outcome("out of time", late=True)
    assert runner.exit_code({"a": fine}) == 0
    assert runner.exit_code({"a": fine, "b": late}) == runner.UNFINISHED
    assert (
        runner.exit_code({"a": late, "b": runner.Outcome("failed", failed=True)}) == runner.FAILED
    )


def test_roofs_are_measured_once(monkeypatch):
    monkeypatch.setenv(machine.CALIBRATION_VARIABLE, ROOFS)
    machine.calibration.cache_clear()
    try:
        assert machine.calibration() == json.loads(ROOFS)
    finally:
        machine.calibration.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="sizes of a CPU")
def test_matrix_multiplication_is_calibrated(monkeypatch):
    monkeypatch.setitem(machine.GEMM_SIZE, "cpu", 128)
    machine.gemm_rates.cache_clear()
    rates = machine.gemm_rates()
    machine.gemm_rates.cache_clear()
    assert rates.keys() == {"float32"}
    assert rates["float32"] > 1e6
