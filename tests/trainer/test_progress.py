"""The display of a run: progress on a terminal and in a file, tables, and trackers."""

import io
import json

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from grpo_fast.trainer import progress
from grpo_fast.trainer.cli import main
from tests.support.tiny_runs import arguments, metrics


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ROW = {
    "reward": 0.5,
    "kl": 0.25,
    "clip_fraction": 0.125,
    "tokens_per_second": 99.6,
    "memory_gib": 1.25,
}


def test_a_terminal_has_a_bar_with_the_time_that_is_left(monkeypatch):
    shown = Terminal()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("sys.stderr", shown)
    with progress.Bar("GRPO", 3) as bar:
        for _ in range(3):
            bar.advance(progress.line_of(ROW))
    text = shown.getvalue()
    assert "3/3" in text
    assert "0:00:00" in text
    assert "reward 0.500, kl 0.250, clip 0.125, 100 tokens/s, 1.2 GiB" in text


def test_a_file_has_a_line_now_and_then(monkeypatch, capsys):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.Bar("GRPO", 10, 4) as bar:  # 4 of 10 were done by another process
        for _ in range(6):
            bar.advance("text")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "GRPO 5/10, 0:20 left, text",
        "GRPO 8/10, 0:08 left, text",
        "GRPO 10/10, 0:00 left, text",
    ]
    silent = progress.Bar("GRPO", 1, shown=False)
    silent.advance("text")
    assert capsys.readouterr().err == ""


def test_without_a_reference_there_is_no_kl():
    assert "kl" not in progress.line_of(ROW | {"kl": float("nan")})


def test_a_table_shows_completions_as_they_are(capsys):
    one = {
        "prompt": [{"role": "user", "content": "1+1?"}],
        "completion": "[red]2[/red] :smile:",
        "tokens": 3,
    }
    progress.table(
        7, [one | {"reward": None, "advantage": 0.5}, one | {"reward": 1.0, "advantage": None}]
    )
    shown = capsys.readouterr().out
    assert "completions of step 7" in shown
    assert "[red]2[/red] :smile:" in shown  # text, no markup
    assert "1+1?" in shown
    assert "role" not in shown
    assert "0.50" in shown


def test_no_text_commands_the_terminal(capsys):
    one = {"prompt": "p", "completion": "a\x1b]0;owned\x07\x1b[2Jb\nc", "tokens": 3}
    progress.table(7, [one | {"reward": None, "advantage": None}])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "\\x1b" in shown


def test_completions_are_written_with_their_rewards(tmp_path):
    options = arguments(tmp_path, name="run", steps=3, warmup_steps=0, completions_steps=2)
    assert main(["train", *options]) == 0
    rows = [
        json.loads(x) for x in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [0] * 16 + [2] * 16
    for row in rows:
        assert row["rewards"].keys() == {"correct", "bracketed_number"}
        assert row["reward"] == pytest.approx(
            0.9 * row["rewards"]["correct"] + 0.1 * row["rewards"]["bracketed_number"]
        )
        assert row["answer"] == str(eval(row["prompt"].rstrip("=")))
    means = [r["reward"] for r in metrics(tmp_path / "run")]
    first = torch.tensor([row["reward"] for row in rows[:16]])
    assert first.mean().item() == pytest.approx(means[0])


def test_trackers_get_the_metrics(tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    options = arguments(tmp_path, name="run", steps=2, warmup_steps=0, report_to="tensorboard")
    assert main(["train", *options]) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {p.parent for p in (tmp_path / "run" / "grpo_fast").glob("events*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    found = [event.value for event in events.Scalars("reward")]
    assert found == pytest.approx([row["reward"] for row in metrics(tmp_path / "run")])

    assert main(["train", *arguments(tmp_path, name="no", report_to="nothing")]) == 2
    assert "report_to='nothing' is unknown or not installed" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert main(["train", *arguments(tmp_path, name="no", optim="nothing")]) == 2
    assert "optim='nothing' is unknown" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
