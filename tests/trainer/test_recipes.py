"""The recipes: each builds a tiny model of its architecture and takes two steps."""

import os
from pathlib import Path

import pytest
import yaml

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from grpo_fast.trainer.cli import main

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_there_are_four():
    assert [path.stem for path in RECIPES] == [
        "arithmetic-cpu", "qwen2.5-0.5b-1gpu", "qwen2.5-7b-full-8gpu", "qwen2.5-7b-lora-24gb",
    ]  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_takes_two_steps(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(path), "--dry_run", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert "dry run: two steps" in shown.out
    assert "in 2 GRPO steps" in shown.out
    assert "GRPO 2/2" in shown.err
    if "dataset" in yaml.safe_load(path.read_text()):
        assert "the built-in task takes the place of the dataset" in shown.out
    assert os.listdir(tmp_path) == []  # nothing is left
