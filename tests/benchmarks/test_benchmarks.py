"""The benchmarks' own rules: nothing wrong is timed, nothing of unknown origin is published."""

import dataclasses
import gc
import os
import shutil
import subprocess
import types
import weakref
from pathlib import Path

import pytest
import torch

from benchmarks import providers
from benchmarks.inputs import shapes
from benchmarks.inputs.batches import make_batch
from benchmarks.measuring import calls, gate, machine, measure, memory
from benchmarks.providers import eager
from benchmarks.report import tables
from benchmarks.run import runner
from tests.support.results import Benchmark

SHAPE = shapes.Shape(B=4, T=6, V=101, G=2)
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def batch(request):
    return make_batch(SHAPE, getattr(request, "param", "full"), CPU, torch.float32)


def result(stem, provider, batch, backward=True):
    fn = providers.load(stem, provider)
    run = calls.forward_backward if backward else calls.forward
    return run(fn, calls.prepare(stem, provider, batch))


@pytest.mark.parametrize("batch", shapes.VARIANTS, indirect=True)
@pytest.mark.parametrize("provider", ["eager", "grpo_fast", providers.INPLACE])
def test_gate_passes_correct_losses(batch, provider):
    gate.check("grpo", batch, *result("grpo", provider, batch))


def test_gate_passes_the_other_stems(batch):
    for provider in ("eager", "grpo_fast"):
        gate.check("policy_loss", batch, *result("policy_loss", provider, batch))
        gate.check("logprob", batch, *result("logprob", provider, batch, backward=False))
        advantages = result("group_advantage", provider, batch, backward=False)
        gate.check("group_advantage", batch, *advantages)


@pytest.mark.parametrize("value_factor, grad_factor", [(1.001, 1), (1, 1.001), (float("nan"), 1)])
def test_gate_refuses_a_result_that_is_slightly_off(batch, value_factor, grad_factor):
    loss, (grad,) = result("grpo", "eager", batch)
    with pytest.raises(AssertionError, match=r"grpo: (value|gradient)"):
        gate.check("grpo", batch, loss * value_factor, (grad * grad_factor,))


def of_group_advantage(provider, benchmark=None):
    case = measure.Case("group_advantage", "micro-batch", "full", provider)
    measure.measure(benchmark or Benchmark("bench_forward[x]"), case, backward=False)


def test_a_wrong_provider_is_not_timed(monkeypatch):
    class Untouchable(Benchmark):
        def pedantic(self, *args, **kwargs):
            raise RuntimeError("timed")

    monkeypatch.setitem(
        providers.PROVIDERS["group_advantage"], "wrong", lambda: lambda rewards, _: rewards
    )
    monkeypatch.setattr(measure, "ABSENT", {})
    with pytest.raises(AssertionError, match="group_advantage: value"):
        of_group_advantage("wrong", Untouchable("bench_forward[x]"))
    assert measure.ABSENT["group_advantage wrong"].startswith("wrong result")


def test_whatever_a_provider_raises_is_a_reason(monkeypatch):
    def raising(*args):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setitem(providers.PROVIDERS["group_advantage"], "raising", lambda: raising)
    monkeypatch.setattr(measure, "ABSENT", {})
    with pytest.raises(RuntimeError, match="no kernel image"):
        of_group_advantage("raising")
    want = {"group_advantage raising micro-batch full": "RuntimeError: no kernel image"}
    assert want == measure.ABSENT


def test_a_failure_keeps_no_memory(monkeypatch):
    """Its traceback holds the tensors, and pytest's own frames in it hold the traceback."""
    held = []

    def failing(*args):
        kept = Tracked()
        held.append(weakref.ref(kept))
        raise RuntimeError

    def cyclic():
        try:
            of_group_advantage("failing")
        except RuntimeError as error:
            caught = error  # this frame is in the traceback: a cycle
            return len(str(caught))

    class Tracked:
        pass

    monkeypatch.setitem(providers.PROVIDERS["group_advantage"], "failing", lambda: failing)
    monkeypatch.setattr(measure, "ABSENT", {})
    gc.disable()
    try:
        cyclic()
        assert held[0]() is not None
        monkeypatch.setattr(providers, "load", unavailable)
        with pytest.raises(pytest.skip.Exception):
            of_group_advantage("eager")
        assert held[0]() is None
    finally:
        gc.enable()


def unavailable(stem, provider):
    raise providers.UnavailableError("not now")


def test_a_stem_without_providers_is_an_error():
    with pytest.raises(ValueError, match=r"'mine' has no providers: enter it in benchmarks/prov"):
        measure.cases("mine", [("micro-batch", "full")])


def test_a_missing_library_is_a_reason(monkeypatch):
    def load():
        import no_such_library_at_all  # noqa: F401

    monkeypatch.setitem(providers.PROVIDERS["grpo"], "missing", load)
    with pytest.raises(providers.UnavailableError, match="no_such_library_at_all"):
        providers.load("grpo", "missing")


def test_inputs_are_confident_and_ragged():
    batch = make_batch(shapes.Shape(B=32, T=64, V=1000, G=4), "padded", CPU, torch.float32)
    logps = eager.logprob(batch.logits, batch.ids)
    assert -0.6 < logps.mean().item() < -0.4
    assert 0.6 < batch.live / batch.shape.N < 0.8
    level = make_batch(batch.shape, "zero-variance", CPU, torch.float32).arguments["advantages"]
    assert (level == 0).float().mean().item() == 0.5


@pytest.mark.parametrize("shape, variant", [*shapes.hidden_cases(), *shapes.cases()])
def test_every_case_has_tokens_with_a_gradient(shape, variant):
    small = dataclasses.replace(shapes.get(shape), V=0, D=0)
    assert make_batch(small, variant, CPU, torch.float32).moving > small.N / 8


@pytest.mark.parametrize(
    "commit, clean",
    [("19274bf", True), ("v0.1.0-3-g19274bf", True), ("19274bf-dirty", False), ("unknown", False)],
)
def test_commit_names(commit, clean):
    assert machine.is_clean(commit) == clean


def test_run_all_lists_what_it_would_do(capsys):
    assert runner.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "test test_grpo"
    assert "benchmarks" in lines
    assert runner.main(["--list", "--no-tests"]) == 0
    assert "test" not in capsys.readouterr().out
    assert runner.main(["--list", "--only", "7B", "--only", "TRL"]) == 0
    assert capsys.readouterr().out.splitlines() == ["7B step", "TRL step"]


def test_run_all_takes_the_interpreter_of_make(tmp_path):
    """Unless `PYTHON` names another."""
    script = tmp_path / "benchmarks" / "run_all"
    script.parent.mkdir()
    shutil.copy(ROOT / "benchmarks" / "run_all", script)
    for name in (".venv/bin/python", "other"):
        python = tmp_path / name
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(f'#!/bin/sh\necho "{name} $*"\n')
        python.chmod(0o755)

    def run(**more):
        environment = {"PATH": os.environ["PATH"]} | more
        command = [script, "--list"]
        return subprocess.run(
            command, env=environment, text=True, capture_output=True, check=True
        ).stdout

    assert run() == ".venv/bin/python -m benchmarks.run --list\n"
    assert run(PYTHON=str(tmp_path / "other")) == "other -m benchmarks.run --list\n"


@pytest.mark.parametrize("arguments, want", [(("--version",), "passed"), (("/no/file",), "failed")])
def test_run_all_reports_a_piece(arguments, want):
    assert runner.run_piece(runner.Piece("x", arguments), 120, {}).text == want


def test_run_all_stops_what_overruns(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 0.5)
    path = tmp_path / "test_slow.py"
    path.write_text("import time\ndef test_slow():\n    time.sleep(600)\n")
    piece = runner.Piece("slow", (str(path),))
    assert runner.run_piece(piece, 1.5, {}).late
    outcome = runner.run([piece], 0.1, "19274bf", tmp_path)
    assert outcome == {"slow": runner.Outcome("out of time", late=True)}


def test_a_short_call_has_the_time_on_the_device_too(monkeypatch):
    """What is launched between two events runs behind other work, with arguments of its own each time."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 0.05

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("busy"))

    def setup():
        log.append("setup")
        return "batch"

    for median, want in ((1e-4, {"event_seconds": 0.05e-3}), (3e-2, {})):
        stats = types.SimpleNamespace(stats=types.SimpleNamespace(median=median))
        benchmark = types.SimpleNamespace(extra_info={}, stats=stats)
        measure._add_event_time(benchmark, log.append, setup)
        assert benchmark.extra_info == pytest.approx(want)
    one = ["setup", "wait", "busy", "event", "batch", "event", "wait"]
    assert log == one * measure.DEVICE_ROUNDS
    info = {"median": 1e-4, "event_seconds": 0.05e-3}
    assert tables.on_device(info) == " (50.0 µs on the device)"
    assert tables.on_device({"median": 1e-4}) == ""


def test_peak_memory_sees_what_is_freed_again():
    extra = memory.peak_extra_bytes(lambda: torch.ones(1 << 24, device=shapes.device()).sum())
    if extra is None:
        pytest.skip("this system does not tell the peak of its memory")
    assert extra == pytest.approx(1 << 26, rel=0.1)


def test_results_name_the_switch_that_another_kernel_ran_by(monkeypatch):
    monkeypatch.setenv(machine.COMMAND_VARIABLE, "benchmarks/run_all")
    for value, command in (
        ("0", "benchmarks/run_all"),
        ("1", "GRPO_FAST_ON_CHIP=1 benchmarks/run_all"),
    ):
        monkeypatch.setenv("GRPO_FAST_ON_CHIP", value)
        assert machine.describe(roofs=False)["command"] == command
