"""The options, rewards and tasks of the included trainer: which values are accepted, and the errors."""

import dataclasses
import importlib.metadata
import math
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from grpo_fast.integrations.shared.sharing import SharePrompts
from grpo_fast.shared_prompt.routes import ROUTES
from grpo_fast.trainer import cli, parsing, rewards, runs, tasks
from grpo_fast.trainer import config as configs
from grpo_fast.trainer.cli import main
from grpo_fast.trainer.config import TrainConfig


def test_rewards():
    completions = ["[12]", "12", "[13]", "[12", " [12] ", "[1 2]"]
    answer = ["12"] * 6
    columns = {"answer": answer}
    assert rewards.correct(completions, completions, answer) == [1, 1, 0, 1, 1, 0]
    assert rewards.bracketed_number(completions, completions) == [1, 0, 1, 0, 0, 0]
    scores = rewards.score(
        [rewards.correct, rewards.bracketed_number], [0.9, 0.1], completions, completions, columns
    )
    torch.testing.assert_close(scores.total, torch.tensor([1.0, 0.9, 0.1, 0.9, 0.9, 0.0]))
    assert scores.means == pytest.approx({"correct": 4 / 6, "bracketed_number": 2 / 6})
    chat = [[{"role": "assistant", "content": "[12]"}]]
    assert rewards.correct(chat, chat, [12]) == [1]


@pytest.mark.parametrize(
    "specification, message",
    [
        ("nothing", "want module:function"),
        ("no_such_module:f", "no_such_module"),
        ("math:no_such", "no_such"),
        ("math:pi", "not a function"),
    ],
)
def test_bad_reward_specification(specification, message):
    with pytest.raises(ValueError, match=message):
        rewards.load(specification)


def test_heldout_problems_are_not_trained_on():
    task = tasks.build(TrainConfig(heldout=100))
    train_prompts, heldout = ({r["prompt"] for r in rows} for rows in (task.train, task.heldout))
    assert len(heldout) == 100
    assert not train_prompts & heldout
    other = tasks.build(TrainConfig(heldout=100, seed=1))
    assert {r["prompt"] for r in other.heldout} != heldout


@pytest.mark.parametrize(
    "options, message",
    [
        ({"group_size": 1}, "group_size: want a finite number >= 2, got 1"),
        ({"learning_rate": -1e-3}, "learning_rate: want a positive number, got -0.001"),
        ({"learning_rate": math.nan}, "learning_rate: want a positive number, got nan"),
        ({"temperature": 0}, "temperature: want a positive number, got 0"),
        ({"micro_batch_size": 0}, "micro_batch_size: .* got 0"),
        ({"epsilon_low": -0.1}, "epsilon_low: .* got -0.1"),
        ({"objective": "nonsense"}, "nonsense"),
        ({"kl": "k9"}, "k9"),
        ({"lr_scheduler": "bumpy"}, "lr_scheduler='bumpy' is unknown"),
        ({"warmup_error_rate": 1.5}, r"warmup_error_rate: want a number in \[0, 1\], got 1.5"),
        ({"hidden_size": 30}, "hidden_size=30: .* num_heads=4"),
        ({"name": "../elsewhere"}, "name: .*elsewhere"),
        ({"reward_weights": [1.0]}, "reward_weights: want one for each of the 0 functions"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_bad_command_lines(tmp_path, capsys):
    def refused(*given) -> str:
        assert main(["train", *map(str, given)]) == 2
        return capsys.readouterr().err

    settings = tmp_path / "settings.yaml"
    settings.write_text("gruop_size: 8\n")
    assert "unknown key 'gruop_size'; did you mean 'group_size'?" in refused(settings)
    settings.write_text("- 1\n")
    assert "want `option: value` lines, got list" in refused(settings)
    settings.write_text("steps: null\n")
    assert "steps: want a value, got null" in refused(settings)
    settings.write_text("steps: [\n")
    assert "not YAML" in refused(settings)
    assert "no such file" in refused(tmp_path / "missing.yaml")
    assert "unknown argument '--gruop_size'; did you mean 'group_size'?" in refused(
        "--gruop_size", 8
    )
    assert "group_size: want a finite number >= 2, got 1" in refused("--group_size", 1)
    assert "device='cuda:99'" in refused("--device", "cuda:99", "--output_dir", tmp_path)
    assert "model='/no/such'" in refused("--model", "/no/such", "--output_dir", tmp_path)
    assert "heldout=5000" in refused("--heldout", 5000, "--output_dir", tmp_path)

    settings.write_text("steps: many\n")
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(settings)])
    assert stopped.value.code == 2
    assert "--steps: invalid int value: 'many'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [settings]  # nothing was started


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: not JSON"),
        ('{"prompt": "a"}', "line 2: no column answer"),
        ("[1]", "line 2: want an object"),
        ('{"prompt": "a", "answer": "b", "c": 1}', "line 2: other columns"),
    ],
)
def test_bad_datasets_name_the_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "answer": "a"}\n' + line)
    with pytest.raises(ValueError, match=message):
        tasks.build(TrainConfig(dataset=str(path)))


def test_runs_are_never_overwritten_silently(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path))
    assert runs.create(config) == tmp_path / "arithmetic"
    assert runs.create(config) == tmp_path / "arithmetic-2"
    named = TrainConfig(output_dir=str(tmp_path), name="mine")
    (runs.create(named) / "notes.txt").write_text("keep")
    with pytest.raises(FileExistsError, match=r"name='mine'.*--overwrite"):
        runs.create(named)
    replacing = TrainConfig(output_dir=str(tmp_path), name="mine", overwrite=True)
    with pytest.raises(FileExistsError, match="not a run"):
        runs.create(replacing)
    assert (tmp_path / "mine" / "notes.txt").exists()
    parsing.save(named, tmp_path / "mine" / "config.yaml")
    with pytest.raises(FileExistsError, match=r"what no run has made: notes\.txt"):
        runs.create(replacing)
    (tmp_path / "mine" / "notes.txt").unlink()
    assert [path.name for path in runs.create(replacing).iterdir()] == [".lock"]


def test_a_home_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = TrainConfig(output_dir="~/runs", reward_dir="~/rewards")
    assert (config.output_dir, config.reward_dir) == (f"{tmp_path}/runs", f"{tmp_path}/rewards")


def test_a_link_that_leads_nowhere_is_a_name_that_is_taken(tmp_path):
    (tmp_path / "arithmetic").symlink_to(tmp_path / "nowhere")
    assert runs.create(TrainConfig(output_dir=str(tmp_path))).name == "arithmetic-2"


def test_a_path_that_is_not_utf8_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"name=.*not UTF-8"):
        runs.check(TrainConfig(output_dir=str(tmp_path), name="x\udcff"))


def test_a_list_is_given_once():
    with pytest.raises(ValueError, match="--reward is given twice; give all after one"):
        parsing.parse(["--reward", "a:f", "--reward=b:g"])
    with pytest.raises(ValueError, match="--reward_weights is given twice"):
        parsing.parse(["--reward-weights", "1", "--reward_weights=2"])


def test_prompts_are_shared_by_each_route_there_is():
    routes = set(ROUTES) - {"unshared"}  # that is "off"
    assert set(get_args(SharePrompts)) == {"auto", "off"} | routes
    TrainConfig(share_prompts="bounded")
    with pytest.raises(
        ValueError, match=r"share_prompts='unshared' is unknown; choose from auto, off"
    ):
        TrainConfig(share_prompts="unshared")


def test_small_negative_weights_are_read_back(tmp_path):
    config = TrainConfig(reward=["a:f", "b:g"], reward_weights=[-1e-7, 2.0])
    parsing.save(config, tmp_path / "config.yaml")
    assert parsing.parse([str(tmp_path / "config.yaml")]).reward_weights == [-1e-7, 2.0]


def test_a_transformers_that_is_too_old_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "4.57.1")
    assert main(["train"]) == 1
    assert (
        "transformers 4.57.1 is installed: pip install 'transformers>=5.17'"
        in capsys.readouterr().err
    )


def test_a_package_that_is_missing_is_named_with_what_installs_it(monkeypatch):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from grpo_fast.trainer.cli import main\n"
        "sys.exit(main(['train']))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "No module named 'matplotlib" in done.stderr
    assert done.stderr.endswith(f": {cli.how_to_install()}\n")
    assert cli.how_to_install().startswith(f"pip install '{root}[train]'")
    monkeypatch.setattr(cli.grpo_fast, "__file__", "/x/site-packages/grpo_fast/__init__.py")
    assert cli.how_to_install() == "pip install '.[train]' in a checkout of grpo_fast"


def test_the_help_names_each_command(capsys):
    for command in ("", *cli.COMMANDS):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"] if command else ["--help"])
        text = capsys.readouterr().out
        assert "%" not in text.replace("95 % intervals", "")  # argparse leaves %% in a description
        assert all(f"\n  {name} " in text for name in cli.COMMANDS) or command


def test_importing_the_library_leaves_transformers_alone():
    code = "import sys, grpo_fast, grpo_fast.trainer.cli; sys.exit('transformers' in sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_documentation_lists_every_option_with_its_default():
    text = (Path(__file__).parents[2] / "docs" / "trainer_options.md").read_text()
    for field in dataclasses.fields(TrainConfig):
        shown = configs.default_text(field.name) or field.default
        if shown is dataclasses.MISSING or shown is None:
            shown = ""
        assert f"| `{field.name}` | {shown} | {field.metadata['help']} |" in text
