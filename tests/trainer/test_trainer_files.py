"""The files of the included trainer: complete at every moment, and written by one process."""

import contextlib
import errno
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from transformers import AutoModelForCausalLM

from grpo_fast.trainer import checkpoints, console, files, parsing, runs
from grpo_fast.trainer.cli import main
from grpo_fast.trainer.train import train
from tests.support.tiny_runs import arguments, metrics, setup, start, tiny, untimed

# How files and folders change on disk, but for what safetensors does in Rust.
CALLS = [
    (os, "replace"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"),
    (shutil, "rmtree"),
]  # fmt: skip


class Killed(BaseException):
    pass


def dying(monkeypatch, alive: int) -> list[str]:
    """Let so many calls pass; that one and all after it raise, as if the process were gone."""
    made = []
    for module, name in CALLS:
        real = getattr(module, name)

        def call(*args, real=real, name=name, **kwargs):
            made.append(name)
            if len(made) > alive:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)
    return made


def fill(policy, value: float) -> None:
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.fill_(value)


def value_of(checkpoint: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    (value,) = {p.unique().item() for p in model.parameters()}
    return value


@pytest.mark.parametrize("step, keep", [(2, 2), (3, 1)], ids=["again", "prune"])
def test_wherever_a_save_dies_the_newest_checkpoint_is_whole(tmp_path, monkeypatch, step, keep):
    _, policy = setup(tiny(tmp_path))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and changes nothing here
    alive, done = 0, False
    while not done:
        run = tmp_path / f"run-{alive}"
        fill(policy, 1.0)
        if step != 2:  # else there is no other one to fall back on
            checkpoints.save(policy, run, 1, 2)
        checkpoints.save(policy, run, 2, 2)
        fill(policy, 3.0)
        with monkeypatch.context() as patch:
            made = dying(patch, alive)
            with contextlib.suppress(Killed):
                checkpoints.save(policy, run, step, keep)
        done = len(made) <= alive
        assert value_of(checkpoints.latest(run)) in ({3.0} if done else {1.0, 3.0}), made
        for path in checkpoints.checkpoints(run):
            assert value_of(path) in (1.0, 3.0), made
        checkpoints.save(
            policy, run, 4, 2
        )  # and the next one finds its way, and leaves nothing hidden
        assert value_of(checkpoints.latest(run)) == 3.0
        assert len(checkpoints.checkpoints(run)) == 2
        assert [p.name for p in (run / "checkpoints").iterdir() if p.name[0] == "."] == []
        alive += 1
    assert alive > 10


def test_only_whole_checkpoints_are_listed_in_the_order_of_steps(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("step-999999", "step-1000000", ".step-000007.old", ".step-1000000.old"):
        (folder / name).mkdir(parents=True)
    for name in (".step-000008.partial", ".step-000009.deleted", "step-12", "notes"):
        (folder / name).mkdir()
    found = [path.name for path in checkpoints.checkpoints(tmp_path)]
    assert found == [".step-000007.old", "step-999999", "step-1000000"]


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("old")
    alive = 0
    while True:
        with monkeypatch.context() as patch:
            made = dying(patch, alive)
            with contextlib.suppress(Killed):
                files.write(path, b"new")
        if len(made) <= alive:
            break
        assert path.read_text() in ("old", "new")
        alive += 1
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_a_row_of_metrics_is_written_whole_or_not_at_all(tmp_path):
    resource = pytest.importorskip("resource")
    log = runs.Lines(tmp_path / "metrics.jsonl")
    log.write({"step": 0})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limit[1]))
    try:
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            log.write({"step": 1, "text": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert metrics(tmp_path) == [{"step": 0}]
    assert log.rows == [{"step": 0}]  # a checkpoint asks whether its step has a row


def failing(code: int, when=lambda path: True, times: int = 10**9):
    """`save_pretrained` that fails after it has written something."""
    from transformers import PreTrainedModel

    real, left = PreTrainedModel.save_pretrained, [times]

    def save(self, folder, *args, **kwargs):
        real(self, folder, *args, **kwargs)
        if when(Path(folder)) and left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code), str(folder))

    return save


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_save_that_fails_names_the_folder_and_keeps_the_older_ones(
    tmp_path, monkeypatch, capsys, code
):
    save = failing(code, when=lambda path: "step-000003" in path.name)
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", save)
    assert main(["train", *arguments(tmp_path, save_steps=1, keep_checkpoints=2, name="run")]) == 1
    shown = capsys.readouterr().err
    assert "step-000003" in shown
    assert os.strerror(code) in shown
    assert "Traceback" not in shown
    newest = checkpoints.latest(tmp_path / "run")
    assert str(newest) in shown  # where the weights are that were saved
    assert newest.name == "step-000002"
    AutoModelForCausalLM.from_pretrained(newest)
    hidden = [p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name[0] == "."]
    assert hidden == []


def test_a_full_disk_costs_the_oldest_checkpoint_not_the_weights(tmp_path, monkeypatch):
    _, policy = setup(tiny(tmp_path))
    for step in (1, 2, 3):
        checkpoints.save(policy, tmp_path, step, 3)
    full = lambda path: (tmp_path / "checkpoints" / "step-000001").exists()  # noqa: E731
    monkeypatch.setattr(
        "transformers.PreTrainedModel.save_pretrained", failing(errno.ENOSPC, when=full)
    )
    checkpoints.save(policy, tmp_path, 4, 3)
    steps = [path.name for path in checkpoints.checkpoints(tmp_path)]
    assert steps == ["step-000002", "step-000003", "step-000004"]


@pytest.mark.parametrize("where", ["model", "tokenizer"])
def test_a_full_disk_as_safetensors_and_tokenizers_tell_it(tmp_path, monkeypatch, where):
    def full(*args, **kwargs):
        raise Exception("I/O error: No space left (os error 28)")

    _, policy = setup(tiny(tmp_path))
    monkeypatch.setattr(getattr(policy, where), "save_pretrained", full)
    with pytest.raises(OSError, match="step-000001") as raised:
        checkpoints.save(policy, tmp_path, 1, 1)
    assert raised.value.errno == errno.ENOSPC
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("what", ["metrics.jsonl", "curve.png"])
def test_a_failing_log_or_curve_costs_no_weights(tmp_path, monkeypatch, capsys, what):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), what)

    name = "Lines.write" if what == "metrics.jsonl" else "plot"
    monkeypatch.setattr(f"grpo_fast.trainer.runs.{name}", full)
    assert main(["train", *arguments(tmp_path, name="run")]) == 1
    shown = capsys.readouterr().err
    assert f"{what}: No space left" in shown
    step = 1 if what == "metrics.jsonl" else 3
    assert checkpoints.latest(tmp_path / "run").name == f"step-{step:06d}"
    assert str(checkpoints.latest(tmp_path / "run")) in shown


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert main(["train", *arguments(tmp_path / "runs")]) == 1
    assert "runs: Permission denied" in capsys.readouterr().err


def test_an_output_folder_that_is_a_file_or_cannot_be_made(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").write_text("")
    assert main(["train", *arguments(tmp_path / "runs")]) == 2
    assert f"output_dir='{tmp_path / 'runs'}': not a folder" in capsys.readouterr().err

    def denied(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    assert main(["train", *arguments(tmp_path / "new")]) == 1
    assert f"error: {tmp_path / 'new'}: Read-only file system" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_a_live_run_cannot_be_overwritten_and_a_closed_terminal_saves_it(tmp_path, capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, a child would ignore it
    try:
        process = start(tmp_path, name="run", steps=100_000, save_steps=1)
    finally:
        signal.signal(signal.SIGHUP, before)
    run = tmp_path / "run"
    try:
        for more in ([], ["--overwrite"]):
            assert main(["train", *arguments(tmp_path, name="run"), *more]) == 2
            assert f"{run}: process {process.pid} is writing" in capsys.readouterr().err
        process.stdout.close()  # nobody reads on
        process.stderr.close()
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 128 + signal.SIGHUP
    finally:
        process.kill()
        process.wait()
    assert checkpoints.latest(run).name == f"step-{len(metrics(run)):06d}"
    assert (run / "curve.png").exists()


def test_a_name_that_is_taken_says_how_to_go_on_and_a_dead_run_can_be_overwritten(tmp_path, capsys):
    run = train(tiny(tmp_path, name="run", steps=2)).run_dir
    (run / ".pid").write_text("1")  # as kill -9 leaves it
    again = ["train", *arguments(tmp_path, name="run", steps=1)]
    assert main(again) == 2
    shown = capsys.readouterr().err
    assert f"of step 2, is {checkpoints.latest(run)}" in shown
    assert f"--resume {run}" in shown
    assert f"--model {checkpoints.latest(run)} --name run-2" in shown
    assert shown.index("--resume") < shown.index("--model") < shown.index("--overwrite")
    assert main([*again, "--overwrite"]) == 0
    assert len(metrics(run)) == 1
    assert [path.name for path in checkpoints.checkpoints(run)] == ["step-000001"]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--model", "./none"],
        ["--reward", "no_such_module:f"],
        ["--dataset", "none.jsonl"],
        ["--device", "cuda:99"],
    ],
    ids=lambda wrong: wrong[0],
)
def test_overwrite_deletes_nothing_before_all_else_is_checked(tmp_path, capsys, wrong):
    end = train(tiny(tmp_path, name="run", steps=1))
    before = sorted(end.run_dir.rglob("*"))
    assert main(["train", *arguments(tmp_path, name="run"), "--overwrite", *wrong]) == 2
    assert sorted(end.run_dir.rglob("*")) == before


def test_overwrite_does_not_delete_what_the_new_run_starts_from(tmp_path, capsys):
    checkpoint = train(tiny(tmp_path, name="run", steps=1)).checkpoint
    options = arguments(tmp_path, name="run", model=checkpoint)
    assert main(["train", *options, "--overwrite"]) == 2
    assert f"model={str(checkpoint)!r} is in {tmp_path / 'run'}" in capsys.readouterr().err
    AutoModelForCausalLM.from_pretrained(checkpoint)


def test_an_error_on_the_way_keeps_its_traceback_and_the_weights(tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise ValueError("not yours")

    monkeypatch.setattr("grpo_fast.trainer.update.Learner.update", broken)
    with pytest.raises(RuntimeError, match="step 0: not yours") as raised:
        main(["train", *arguments(tmp_path, name="run")])
    assert isinstance(raised.value.__cause__, ValueError)
    assert str(checkpoints.latest(tmp_path / "run")) in capsys.readouterr().err


def test_a_run_that_died_at_once_can_be_overwritten(tmp_path):
    config = tiny(tmp_path, name="run", overwrite=True)
    runs.create(config)
    with runs.hold(runs.create(config)):
        pass
    assert runs.create(config) == tmp_path / "run"


def test_config_yaml_repeats_the_run_under_a_free_name(tmp_path, capsys):
    options = arguments(tmp_path, name="run", steps=1)
    assert main(["train", *options, "--overwrite"]) == 0
    written = tmp_path / "run" / "config.yaml"
    assert parsing.parse([str(written)]).overwrite is False
    assert main(["train", str(written)]) == 0
    assert untimed(tmp_path / "run") == untimed(tmp_path / "run-2")
    assert main(["train", str(written), "--name", "run"]) == 2  # asked for by name
    assert json.loads(json.dumps(metrics(tmp_path / "run")))  # and still there


def test_a_closed_terminal_costs_no_file(monkeypatch):
    """Whether the stream has a descriptor that the null device can replace, or none."""
    opened = []
    monkeypatch.setattr(os, "open", lambda *_: opened.append(os.dup(0)) or opened[-1])
    with open(os.devnull) as place:
        for fileno in (place.fileno, lambda: (_ for _ in ()).throw(ValueError("no descriptor"))):
            stream = SimpleNamespace(write=Mock(side_effect=BrokenPipeError), fileno=fileno)
            assert console._Stream(stream).write("text") == 4
    for descriptor in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_a_terminal_without_a_character_shows_its_number(tmp_path):
    with (tmp_path / "out").open("w", encoding="ascii") as file:
        console._Stream(file).write("caf\u00e9\n")
    assert (tmp_path / "out").read_text() == "caf\\xe9\n"
