"""Runs that go on: the same metrics and weights, bit for bit, as if they had not stopped."""

import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from safetensors.torch import load_file

from grpo_fast.trainer import checkpoints, parsing, runs, warmup
from grpo_fast.trainer.cli import main
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.train import train
from grpo_fast.trainer.update import Learner
from tests.support import kills
from tests.support.tiny_runs import EVEN, arguments, given_model, setup, tiny, untimed

ROOT = Path(__file__).parents[2]
GIVEN = {**EVEN, "model": "given", "learning_rate": 1e-2}
LORA = {**GIVEN, "use_peft": True, "lora_r": 4}


def same_weights(one: Path, other: Path) -> None:
    files = sorted(p.name for p in one.glob("*.safetensors"))
    assert files == sorted(p.name for p in other.glob("*.safetensors"))
    for name in files:
        torch.testing.assert_close(load_file(one / name), load_file(other / name), rtol=0, atol=0)


def killed(folder: Path, options: dict, at: int = 2) -> tuple[Path, Path]:
    """A whole run of 5 steps, and a copy that died in step 4, after the checkpoint of step `at`."""
    whole = train(tiny(folder / "whole", name="run", steps=5, save_steps=2, **options)).run_dir
    copy = folder / "died" / "run"
    shutil.copytree(whole, copy)
    for path in checkpoints.checkpoints(copy):
        if int(path.name.removeprefix("step-")) > at:
            shutil.rmtree(path)
    settings = copy / "config.yaml"
    settings.write_text(settings.read_text().replace(str(folder / "whole"), str(folder / "died")))
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # as kill -9 may leave it
    return whole, copy


@pytest.mark.parametrize(
    "options",
    [
        {"num_iterations": 2, "completions_steps": 2, "keep_checkpoints": 9},
        {"weights": "bfloat16", "dtype": "bfloat16", "keep_checkpoints": 9},
        {**GIVEN, "gradient_checkpointing": True, "resample": 2, "objective": "dapo_zv"},
        {**LORA, "beta": 0.1, "optim": "adafactor"},
    ],
    ids=["new", "bfloat16", "given", "adapter"],
)
def test_a_run_that_died_goes_on_bit_for_bit(tmp_path, options):
    if "model" in options:
        options = {**options, "model": str(given_model(tmp_path))}
    whole, copy = killed(tmp_path, {**options, "keep_checkpoints": 9})
    assert main(["train", "--resume", str(copy)]) == 0
    assert untimed(copy) == untimed(whole)
    if (whole / "completions.jsonl").exists():
        assert (copy / "completions.jsonl").read_text() == (whole / "completions.jsonl").read_text()
    same_weights(*(checkpoints.latest(run) for run in (whole, copy)))
    assert checkpoints.latest(copy).name == "step-000005"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_kill_9_at_random_moments(tmp_path):
    """`python -m tests.support.kills --kills 50` does more of them."""
    assert kills.check(tmp_path, kills=6, seed=0) == 6


def test_a_finished_run_can_be_made_longer_and_only_what_may_change_changes(tmp_path, capsys):
    run = train(tiny(tmp_path, name="run", steps=2)).run_dir
    given = ["train", *arguments(tmp_path, name="run"), "--resume", str(run)]
    assert main([*given, "--steps", "4", "--save_steps=3"]) == 0
    assert [row["step"] for row in untimed(run)] == [0, 1, 2, 3]
    assert f"resumed after step 2 from {run}" in capsys.readouterr().out
    assert main([*given, "--group_size", "8"]) == 2
    assert "resume: group_size=8 was 4; this would be another run" in capsys.readouterr().err
    assert len(untimed(run)) == 4
    assert main(["train", "--resume", str(run)]) == 0  # it remembers the new number of steps
    assert len(untimed(run)) == 4


def test_an_option_that_is_given_counts_though_it_is_the_default(tmp_path):
    run = train(tiny(tmp_path, name="run", steps=1, save_steps=1, samples=1)).run_dir
    assert main(["train", "--resume", str(run), "--save_steps", "100", "--samples=4"]) == 0
    saved = parsing.parse([str(run / "config.yaml")])
    assert (saved.save_steps, saved.samples, saved.steps) == (100, 4, 1)


def test_more_steps_have_the_schedule_of_more_steps(tmp_path):
    run = train(tiny(tmp_path, name="run", steps=2, lr_warmup_steps=0)).run_dir
    assert main(["train", "--resume", str(run), "--steps", "4"]) == 0
    rates = [row["learning_rate"] for row in untimed(run)]
    assert rates == pytest.approx([1e-3, 0.5e-3, 0.5e-3, 0.25e-3])


def test_a_reference_that_is_gone_is_named(tmp_path, capsys):
    run = train(tiny(tmp_path, name="run", steps=1)).run_dir
    shutil.rmtree(run / "reference")
    assert main(["train", "--resume", str(run), "--steps", "2"]) == 2
    assert "reference is gone: it had the model before GRPO" in capsys.readouterr().err
    assert [p.name for p in checkpoints.resumable(run)] == ["step-000001"]


def test_a_row_that_was_lost_costs_no_checkpoint(tmp_path):
    run = train(tiny(tmp_path, name="run", steps=3)).run_dir
    log = run / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[::2]))
    assert main(["train", "--resume", str(run), "--steps", "4"]) == 0
    assert checkpoints.resumable(run)[-1].name == "step-000004"


def test_a_folder_that_was_made_before_a_run_died_is_taken(tmp_path):
    config = tiny(tmp_path, name="run", steps=1)
    with runs.hold(runs.create(config)):
        pass
    given = ["train", *arguments(tmp_path, name="run", steps=1), "--resume", "latest"]
    assert main(given) == 0
    assert len(untimed(tmp_path / "run")) == 1


def test_latest_is_the_first_run_where_there_is_none(tmp_path, capsys):
    given = ["train", *arguments(tmp_path, steps=2), "--resume", "latest"]
    assert main(given) == 0
    assert "there is no run" in capsys.readouterr().out
    assert main([*given[:-2], "--name=other"]) == 0
    assert main(given) == 0  # the command of a job that starts again and again
    assert f"resumed after step 2 from {tmp_path / 'other'}" in capsys.readouterr().out
    assert main(["train", "--resume", str(tmp_path / "none")]) == 2
    assert "not a run, it has no config.yaml" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_starts_again(tmp_path):
    whole = train(tiny(tmp_path, name="run", steps=2)).run_dir
    before = untimed(whole)
    shutil.rmtree(whole / "checkpoints")
    assert main(["train", "--resume", str(whole)]) == 0
    assert untimed(whole) == before


def test_a_live_run_cannot_be_resumed(tmp_path, capsys):
    run = train(tiny(tmp_path, name="run", steps=1)).run_dir
    with runs.hold(run):
        assert main(["train", "--resume", str(run)]) == 2
    assert "is writing to this run" in capsys.readouterr().err


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    config = tiny(tmp_path, name="run", steps=1)
    end = train(config)
    _, policy = setup(config)
    other = Learner(policy, tiny(tmp_path, optim="adafactor"))
    with pytest.raises(ValueError, match="resume: the checkpoint has"):
        checkpoints.restore(other, end.checkpoint)


def test_a_disk_that_is_full_while_the_state_is_written_keeps_the_last_checkpoint(
    tmp_path, monkeypatch, capsys
):
    real, calls = checkpoints.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) > 1:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    assert main(["train", *arguments(tmp_path, name="run", save_steps=1)]) == 1
    assert "step-000002: No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    run = tmp_path / "run"
    assert [p.name for p in checkpoints.resumable(run)] == ["step-000001"]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000001"]
    assert main(["train", "--resume", str(run)]) == 0
    assert [row["step"] for row in untimed(run)] == [0, 1, 2]


def test_signals_in_an_update_lose_no_row(tmp_path, monkeypatch):
    """The second signal comes while weights change: their step has its row, and the run goes on from it."""
    whole = train(tiny(tmp_path / "whole", name="run", steps=4)).run_dir
    real, calls = Learner.update, []

    def interrupted(self, *given):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        return real(self, *given)

    monkeypatch.setattr(Learner, "update", interrupted)
    options = arguments(tmp_path / "cut", name="run", steps=4)
    assert main(["train", *options]) == 128 + signal.SIGTERM
    run = tmp_path / "cut" / "run"
    assert [row["step"] for row in untimed(run)] == [0, 1]
    assert checkpoints.resumable(run)[-1].name == "step-000002"
    assert main(["train", *options, "--resume", "latest"]) == 0
    assert untimed(run) == untimed(whole)


def test_a_warm_up_that_was_interrupted_starts_again(tmp_path, monkeypatch):
    whole = train(tiny(tmp_path / "whole", name="run", steps=2)).run_dir
    real = warmup.imitate

    def interrupted(*given):
        signal.raise_signal(signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(warmup, "imitate", interrupted)
    options = arguments(tmp_path / "cut", name="run", steps=2)
    assert main(["train", *options]) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert main(["train", *options, "--resume", "latest"]) == 0
    assert untimed(tmp_path / "cut" / "run") == untimed(whole)


def test_a_row_that_could_not_be_written_is_made_again(tmp_path, monkeypatch):
    """The newest checkpoint has no row: it stays, and so does the last one that has, though one is kept."""
    whole = train(tiny(tmp_path / "whole", name="run", steps=4)).run_dir
    real = runs.Lines.write

    def full(self, *rows):
        if rows[0]["step"] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
        real(self, *rows)

    monkeypatch.setattr(runs.Lines, "write", full)
    options = arguments(tmp_path / "cut", name="run", steps=4, save_steps=1, keep_checkpoints=1)
    assert main(["train", *options]) == 1
    run = tmp_path / "cut" / "run"
    assert [p.name for p in checkpoints.checkpoints(run)] == ["step-000002", "step-000003"]
    assert [p.name for p in checkpoints.resumable(run)] == ["step-000002"]
    monkeypatch.undo()
    assert main(["train", "--resume", str(run)]) == 0
    assert untimed(run) == untimed(whole)
    assert [p.name for p in checkpoints.checkpoints(run)] == ["step-000004"]


def test_there_is_no_pickle(tmp_path):
    run = train(tiny(tmp_path, steps=1)).run_dir
    for path in run.rglob("*"):
        assert path.is_dir() or path.suffix in (
            ".json", ".safetensors", ".yaml", ".jsonl", ".png", ".jinja", ".txt", "",
        ), path  # fmt: skip
    for path in (ROOT / "grpo_fast" / "trainer").glob("*.py"):
        assert not re.search(r"torch\.(load|save)\(|import pickle", path.read_text()), path


def test_the_position_in_the_data_goes_on(tmp_path):
    run = train(tiny(tmp_path, name="run", steps=3)).run_dir
    state = json.loads((checkpoints.latest(run) / "training_state.json").read_text())
    assert state["position"] == 3 * 4
    assert TrainConfig(resume="~/x").resume == str(Path.home() / "x")
