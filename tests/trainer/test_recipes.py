"""The recipes: each builds a tiny model of its architecture and takes two steps."""

import os
import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from grpo_fast.trainer import parsing
from grpo_fast.trainer.cli import main
from tests.support.tiny_runs import arguments

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_there_are_five():
    assert [path.stem for path in RECIPES] == [
        "arithmetic-cpu", "qwen2.5-0.5b-1gpu", "qwen2.5-7b-full-8gpu", "qwen2.5-7b-lora-24gb", "smollm2-geo",
    ]  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_takes_two_steps(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(path), "--dry_run", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert "dry run: two steps" in shown.out
    assert "in 2 GRPO steps" in shown.out
    assert shown.out.endswith("dry run: the options can be used; nothing was kept\n")
    assert "checkpoint:" not in shown.out  # no path of what is gone
    alone = "fsdp: there is one process, so no weights are shared"
    assert (alone in shown.out) == ("full-8gpu" in path.stem)
    assert "GRPO 2/2" in shown.err
    if "dataset" in yaml.safe_load(path.read_text()):
        assert "the built-in task takes the place of the dataset" in shown.out
    assert os.listdir(tmp_path) == []  # nothing is left


def test_the_recipe_for_24_gb_fits(capsys):
    recipe = str(RECIPES[3])
    assert main(["plan", recipe, "--gpu", "24GB"]) == 0
    shown = capsys.readouterr().out
    assert "weights (7,615,616,512, bnb-4bit)" in shown
    assert "Fits: the predicted peak is" in shown
    assert main(["plan", "--gpu", "24GB"]) == 2
    assert "plan: want --model" in capsys.readouterr().err
    assert main(["plan", recipe, "--gpu", "much"]) == 2
    assert "want a size like 24GB" in capsys.readouterr().err


def test_the_commands_of_the_readme_are_those_of_the_recipe():
    text = (RECIPES[0].parents[1] / "README.md").read_text()
    commands = re.findall(r"^grpo-fast (\S+) (.*?)(?:  +#.*)?$", text, re.MULTILINE)
    named = [rest.split() for _, rest in commands if "recipes/" in rest]
    assert len(named) == 3
    recipe = RECIPES[0].parents[1] / named[0][0]
    assert all(RECIPES[0].parents[1] / words[0] == recipe for words in named)
    run = f"runs/{yaml.safe_load(recipe.read_text())['name']}"
    assert {command for command, rest in commands if run in rest} == {"report", "train", "eval"}
    for words in named[1:]:
        parsing.parse([str(recipe), *words[1:]])


def test_a_report_of_a_run(tmp_path, capsys):
    options = arguments(tmp_path, name="run", steps=2, warmup_steps=0, completions_steps=1)
    assert main(["train", *options]) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run")]) == 0
    page = tmp_path / "run" / "report.html"
    assert capsys.readouterr().out == f"{page}\n"
    assert "reward" in page.read_text()
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "not a run" in capsys.readouterr().err
    assert main(["train", *options, "--overwrite"]) == 0  # the page is a run's own
    assert not page.exists()
