"""Adapters, quantised weights and precisions: what is trained, and what is saved."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer needs grpo-fast[train]")
pytest.importorskip("peft", reason="adapters need peft")

import peft
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_fast.trainer import checkpoints
from grpo_fast.trainer import model as models
from grpo_fast.trainer.cli import main
from grpo_fast.trainer.train import train
from grpo_fast.trainer.update import Learner
from tests.support.tiny_runs import EVEN, arguments, given_model, metrics, tiny

# Installed beside the environment, by the Makefile: other packages behave otherwise if they find them.
QUANTISERS = Path(sys.prefix) / "quantisers"


def test_only_the_adapter_is_trained_and_saved(tmp_path, capsys):
    given = given_model(tmp_path)
    before = load_file(given / "model.safetensors")
    options = {
        **EVEN,
        "model": str(given),
        "use_peft": True,
        "lora_r": 4,
        "beta": 0.1,
        "learning_rate": 0.02,
    }
    end = train(tiny(tmp_path, name="run", steps=3, **options))
    rows = metrics(end.run_dir)
    assert rows[0]["kl"] == 0  # a new adapter changes nothing
    assert rows[2]["kl"] > 0
    assert not (end.run_dir / "reference").exists()
    assert not (end.checkpoint / "model.safetensors").exists()
    settings = json.loads((end.checkpoint / "adapter_config.json").read_text())
    assert settings["r"] == 4
    assert "lm_head" not in settings["target_modules"]

    base = AutoModelForCausalLM.from_pretrained(given)
    adapted = peft.PeftModel.from_pretrained(base, end.checkpoint)
    ids = AutoTokenizer.from_pretrained(end.checkpoint)("1+2=", return_tensors="pt")["input_ids"]
    found = adapted(ids).logits
    for name, value in AutoModelForCausalLM.from_pretrained(given).state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, found, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(given).save_pretrained(tmp_path / "merged")
    assert models.build(tiny(tmp_path, model=str(tmp_path / "merged")), "").model is not None

    assert main(["eval", str(end.run_dir), "--device", "cpu"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_layers_of_the_adapter(tmp_path, capsys):
    given = str(given_model(tmp_path))
    config = tiny(tmp_path, model=given, use_peft=True, lora_target_modules=["q_proj", "v_proj"])
    policy = models.build(config, "")
    names = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    assert len(names) == 4
    assert all("q_proj" in n or "v_proj" in n for n in names)
    options = arguments(tmp_path, model=given, lora_target_modules="nothing")
    assert main(["train", *options, "--use_peft"]) == 2
    assert "use_peft: Target modules" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, weights, masters",
    [
        ({}, torch.float32, False),
        ({"dtype": "bfloat16"}, torch.bfloat16, True),
        ({"weights": "bfloat16"}, torch.bfloat16, True),
        ({"dtype": "bfloat16", "weights": "float32"}, torch.float32, False),
        ({"dtype": "bfloat16", "fsdp": True}, torch.float32, False),
    ],
)
def test_precisions(tmp_path, options, weights, masters):
    config = tiny(tmp_path, model=str(given_model(tmp_path)), **options)
    policy = models.build(config, "")
    assert {p.dtype for p in policy.model.parameters()} == {weights}
    assert policy.masters == masters
    assert policy.model.model.rotary_emb.inv_freq.dtype == torch.float32
    learner = Learner(policy, config)
    assert {p.dtype for p in learner.parameters} == {torch.float32}


def test_an_adapter_of_half_precision_weights_is_float32(tmp_path):
    given = str(given_model(tmp_path))
    config = tiny(tmp_path, model=given, use_peft=True, dtype="bfloat16")
    policy = models.build(config, "")
    trained = {p.dtype for p in policy.model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in policy.model.parameters() if not p.requires_grad}
    assert (trained, frozen) == ({torch.float32}, {torch.bfloat16})


def test_bf16_weights_are_saved_as_such(tmp_path):
    options = {
        **EVEN,
        "model": str(given_model(tmp_path)),
        "dtype": "bfloat16",
        "learning_rate": 0.01,
    }
    end = train(tiny(tmp_path, name="run", steps=2, **options))
    saved = load_file(end.checkpoint / "model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.bfloat16}
    state = load_file(end.checkpoint / "training_state-00000.safetensors")
    assert {x.dtype for n, x in state.items() if n.endswith(".weight")} == {torch.float32}


def test_a_quantiser_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "torchao" else real(name, *rest),
    )
    options = arguments(tmp_path, model=given_model(tmp_path), quantize="torchao-int8")
    assert main(["train", *options, "--use_peft"]) == 2
    assert "torchao is not installed; pip install torchao" in capsys.readouterr().err


RUN = """
import sys
sys.path.append(sys.argv[1])
from grpo_fast.trainer.cli import main
from tests.support.tiny_runs import EVEN, arguments
from pathlib import Path
folder = Path(sys.argv[2])
for name in sys.argv[3:]:
    quantised = "-" in name
    options = {"quantize": name, "lora_r": 4} if quantised else {"optim": name, "weights": "bfloat16_only"}
    if name.startswith("paged"):
        options["weights"] = "float32"
    options |= EVEN | {"model": folder / "given", "learning_rate": 0.01, "steps": 2, "name": name}
    run = ["train", *arguments(folder, **options), *(["--use_peft"] if quantised else [])]
    assert main(run) == 0, name
    assert main(["train", "--resume", str(folder / name), "--steps", "3"]) == 0, name
"""


@pytest.mark.skipif(
    not QUANTISERS.is_dir(), reason="torchao and bitsandbytes are not in quantisers/"
)
def test_torchao_and_bitsandbytes(tmp_path):
    """Quantised bases, and optimizers with states in 8 bits, which are saved and go on."""
    import subprocess

    given_model(tmp_path, hidden_size=64)  # bitsandbytes needs multiples of 32 on a CPU
    names = ["torchao-int8", "bnb-4bit", "bnb-8bit", "adamw_torch_8bit", "paged_adamw_8bit"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, str(QUANTISERS), str(tmp_path), *names],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        rows = metrics(tmp_path / name)
        assert [row["step"] for row in rows] == [0, 1, 2]
        assert rows[2]["entropy"] != rows[0]["entropy"]
        kept = checkpoints.latest(tmp_path / name)
        assert (kept / "adapter_model.safetensors").exists() == ("-" in name)
