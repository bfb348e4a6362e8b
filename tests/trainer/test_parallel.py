"""Several processes: the losses, weights and checkpoints of one process with the same batch."""

import contextlib
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from safetensors.torch import load_file, save_file
from torch import nn

from grpo_fast.trainer import checkpoints, parallel
from grpo_fast.trainer.cli import main
from tests.support import ranks
from tests.support.openai_server import OpenAIServer
from tests.support.tiny_runs import EVEN, arguments, given_model, untimed

GIVEN = {**EVEN, "learning_rate": 1e-2, "beta": 0.1, "threads": 1}
LORA = {**GIVEN, "use_peft": True, "lora_r": 4}
CASES = {
    "new": {**EVEN, "num_iterations": 2, "prompts_per_step": 4, "warmup_steps": 20},
    "full": {**GIVEN, "micro_batch_tokens": 40},
    "adapter": LORA,
    "full, shared weights": {**GIVEN, "fsdp": True, "micro_batch_tokens": 40, "num_iterations": 2},
    "adapter, shared weights": {**LORA, "fsdp": True, "micro_batch_tokens": 40},
    # Often one of the two processes has no completion with a gradient.
    "silent": {**GIVEN, "beta": 0.0, "prompts_per_step": 2, "group_size": 2, "steps": 8},
    "batch": {**GIVEN, "scale_rewards": "batch", "objective": "dapo_zv", "beta": 0.0},
}
GOES_ON = "full, shared weights"


def make(folder: Path, case: str, *more: str) -> int:
    options = {"steps": 4, "save_steps": 2, "name": "run", **CASES[case]}
    if "learning_rate" in options:
        options["model"] = folder.parent / "given"
    return main(["train", *arguments(folder / case, **options), *more])


@contextlib.contextmanager
def kept(folder: Path):
    """Save what each process has at the end: all of them must have the same weights."""
    from grpo_fast.trainer.loop import Run

    real, rank = Run.save, os.environ["RANK"]

    def save(self):
        path = real(self)
        if self.step == self.config.steps and not self.learner.sharded:
            from peft import get_peft_model_state_dict

            model = self.policy.model
            found = get_peft_model_state_dict(model) if self.policy.adapted else model.state_dict()
            copies = {key: x.clone() for key, x in found.items()}
            save_file(copies, folder / f"weights-{rank}.safetensors")
        return path

    Run.save = save
    try:
        yield
    finally:
        Run.save = real


def in_each(folder: str) -> None:
    """All cases in one of two processes; then `GOES_ON` starts again from its last checkpoint but one."""
    for name in CASES:
        log = (Path(folder) / f"log-{os.environ['RANK']}").open("a")
        with (
            log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
            kept(Path(folder) / name),
        ):
            assert make(Path(folder), name) == 0, name
    run = Path(folder) / GOES_ON / "run"
    newest = checkpoints.latest(run)
    torch.distributed.barrier()
    if os.environ["RANK"] == "0":
        newest.rename(run / "taken")
    torch.distributed.barrier()
    assert main(["train", "--resume", str(run)]) == 0


@ranks.needs_gloo
def test_two_processes_train_as_one(tmp_path, capsys):
    """All cases in one test: a pair of processes takes ten seconds to start."""
    (tmp_path / "two").mkdir()
    given_model(tmp_path)
    for case in CASES:
        assert make(tmp_path / "one", case) == 0
    ranks.run("tests.trainer.test_parallel:in_each", 2, str(tmp_path / "two"), seconds=240)
    for case in CASES:
        compare(tmp_path, case)
    logs = [(tmp_path / "two" / f"log-{rank}").read_text() for rank in range(2)]
    assert logs[0].count("after GRPO") == len(CASES)
    assert "GRPO" not in logs[1]
    capsys.readouterr()
    run = tmp_path / "two" / GOES_ON / "run"
    names = sorted(p.name for p in (run / "taken").glob("*.safetensors"))
    assert names == ["model.safetensors", *(f"training_state-{r:05d}.safetensors" for r in (0, 1))]
    for name in names:
        now, before = load_file(checkpoints.latest(run) / name), load_file(run / "taken" / name)
        torch.testing.assert_close(now, before, rtol=0, atol=0)
    assert main(["train", "--resume", str(run)]) == 2  # in one process
    assert (
        "was written by 2 processes that share them, and this run has 1" in capsys.readouterr().err
    )


def compare(folder: Path, case: str) -> None:
    """The run of two processes is that of one; what they have at the end is what they saved."""
    one, two = (untimed(folder / number / case / "run") for number in ("one", "two"))
    assert [row["step"] for row in one] == list(range(CASES[case].get("steps", 4))), case
    if case == "silent":
        assert any(row["groups_without_signal"] == 0.5 for row in one)
    assert any(row["loss"] for row in one), case
    for row, other in zip(one, two, strict=True):
        assert row.keys() == other.keys(), case
        for key, value in row.items():
            near = value if value is None else pytest.approx(value, rel=1e-5, abs=1e-5)
            assert other[key] == near, (case, key)
    first, second = (checkpoints.latest(folder / n / case / "run") for n in ("one", "two"))
    name = "adapter_model.safetensors" if "adapter" in case else "model.safetensors"
    torch.testing.assert_close(
        load_file(first / name), load_file(second / name), rtol=1e-4, atol=1e-5
    )
    kept_by = (folder / "two" / case).glob("weights-*.safetensors")
    states = [load_file(path) for path in (second / name, *kept_by)]
    assert len(states) == (1 if "shared" in case else 3), case
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=0, atol=0)


def fails_in_one(folder: str) -> None:
    team = parallel.Team(torch.device("cpu"))

    def work() -> int:
        if team.rank == 1:
            raise FloatingPointError("in one")
        return team.rank

    with pytest.raises(FloatingPointError, match="in one"):
        team.together(work)
    with pytest.raises(ValueError, match="main alone"):
        team.on_main(lambda: (_ for _ in ()).throw(ValueError("main alone")))
    assert team.on_main(lambda: team.rank + 7) == 7
    weights = [nn.Parameter(torch.full((3,), float(team.rank))) for _ in range(2)]
    team.alike(weights)
    assert weights[0].tolist() == [0, 0, 0]
    weights[0].grad = torch.full((3,), team.rank + 1.0)
    team.sum_gradients(weights)  # the second one has none
    assert weights[0].grad.tolist() == [3, 3, 3]
    Path(folder, f"ok-{team.rank}").write_text(json.dumps(team.objects(team.rank)))


def with_server(folder: str, url: str, adapter: bool) -> None:
    options = {**EVEN, "model": Path(folder) / "given", "learning_rate": 0.05, "use_peft": adapter}
    options |= {"server": url, "name": "run", "steps": 3, "beta": 0.0, "samples": 0}
    assert main(["train", *arguments(Path(folder) / f"server-{adapter}", **options)]) == 0


@ranks.needs_gloo
def test_all_processes_sample_from_the_weights_that_one_has_sent(tmp_path):
    given = given_model(tmp_path)
    with OpenAIServer(given, processed=True, dev=True, lora=True) as server:
        # The adapter first: the server keeps the weights of the last run.
        cases = [[str(tmp_path), server.url, adapter] for adapter in (True, False)]
        ranks.run_each("tests.trainer.test_parallel:with_server", 2, cases)
        asked = [
            (b["model"], b["cache_salt"])
            for p, b, _ in server.requests
            if "completions" in p and "cache_salt" in b
        ]
    for adapter in (False, True):
        for row in untimed(tmp_path / f"server-{adapter}" / "run"):
            assert row["mismatch_ratio_max"] == pytest.approx(1, abs=1e-4)
    counts = Counter(asked)
    assert sorted(n for n in counts.values() if n >= 16) == [16] * 6  # 16 samples after each update


def fails_alone(folder: str) -> None:
    """One process cannot load its reward; another time the loss is not finite, in both."""
    run = Path(folder) / "run"
    before = sorted(run.rglob("*"))
    reward = "tests.support.tiny_runs:even_digits" if os.environ["RANK"] == "0" else "no.such:f"
    given = arguments(Path(folder), name="run", warmup_steps=0, reward=reward)
    assert main(["train", *given, "--overwrite"]) == 2
    assert sorted(run.rglob("*")) == before
    given = arguments(
        Path(folder),
        name="nan",
        warmup_steps=0,
        learning_rate=1e30,
        lr_warmup_steps=0,
        reward=EVEN["reward"],
    )
    assert main(["train", *given]) == 1
    assert checkpoints.checkpoints(Path(folder) / "nan")


def fails(folder: str) -> None:
    fails_in_one(folder)
    fails_alone(folder)


@ranks.needs_gloo
def test_an_error_in_one_process_is_an_error_in_all(tmp_path):
    """Also of a run that one process cannot make: nothing is deleted for it."""
    assert main(["train", *arguments(tmp_path, name="run", steps=1)]) == 0
    ranks.run("tests.trainer.test_parallel:fails", 2, str(tmp_path))
    assert [(tmp_path / f"ok-{r}").read_text() for r in range(2)] == ["[0, 1]"] * 2


def test_settings_of_accelerate_that_are_not_used_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["train", *arguments(tmp_path)]) == 2
    assert "ACCELERATE_USE_FSDP: accelerate's settings for it are not used here; give --fsdp" in (
        capsys.readouterr().err
    )


def test_prompts_must_be_dealt_out_evenly():
    from grpo_fast.trainer.config import TrainConfig
    from grpo_fast.trainer.train import check_team

    team = parallel.Team(torch.device("cpu"))
    team.size = 3
    with pytest.raises(ValueError, match="prompts_per_step=32: want a multiple of the 3 processes"):
        check_team(TrainConfig(), team)
