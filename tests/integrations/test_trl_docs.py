"""docs/trl.md says what the code does: its blocks run, its lines are printed, its metrics are logged."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", "1.15", reason="the page is about TRL")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of TRL and its libraries
    pytest.mark.usefixtures("torch_backend"),
]

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from trl import GRPOConfig  # noqa: E402
from trl.trainer import utils  # noqa: E402

from grpo_fast import Objective  # noqa: E402
from grpo_fast.integrations import trl as adapter  # noqa: E402
from grpo_fast.integrations.trl import trainer  # noqa: E402
from grpo_fast.trainer.model import character_tokenizer  # noqa: E402
from tests.support.trl_losses import LOSS_TYPES, SIZES, compute, inputs_of  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "trl.md"
TEXT = PAGE.read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_example_with_lora(tmp_path, monkeypatch, capsys):
    """The example runs unchanged, except the model, the number of steps and the option for CPUs.

    The README has the same.
    """
    pytest.importorskip("peft", reason="the adapters are PEFT's")
    (example,) = (block for block in BLOCKS if "LoraConfig" in block)
    assert f"```python\n{example}```" in (PAGE.parents[1] / "README.md").read_text()
    tokenizer = character_tokenizer("0123456789+= ")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": len(tokenizer)}))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    changes = {"Qwen/Qwen2.5-0.5B": "model", "max_steps=100": "max_steps=2, bf16=False"}
    for name, value in changes.items():
        assert example.count(name) == 1
        example = example.replace(name, value)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(example, scope)
    assert scope["trainer"].state.global_step == 2
    assert scope["reward"](["= 12", "3"], ["12", "4"]) == [1.0, 0.0]
    line = re.search(r"^grpo_fast: head and loss fused \(.*, dapo, ", TEXT, re.MULTILINE)[0]
    assert line.replace("Qwen2", "Llama") in capsys.readouterr().out


def test_the_other_blocks(monkeypatch):
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", utils._ChunkedLogProbFunction)
    scope = {"args": GRPOConfig("out", loss_type="cispo", bf16=False)}
    others = [block for block in BLOCKS if "LoraConfig" not in block]
    assert len(others) == 3
    for block in others:
        exec(block, scope)
    assert isinstance(scope["chosen"], Objective)
    assert utils._ChunkedLogProbFunction is adapter.head.FusedLogProb


def test_versions_and_command():
    at_least, below = adapter.SUPPORTED
    assert f"TRL {at_least} and 1.{int(below.split('.')[1]) - 1} are supported" in TEXT
    assert f"`pip install 'trl>={at_least},<{below}'`" in TEXT


def test_reasons():
    for step in trainer.STEPS:
        assert f"`{step}`" in TEXT or f"own {step}`" in TEXT


def test_metrics(trainers):
    """The metrics of the loss are those in the table, and no others."""
    logged = set()
    for loss_type in LOSS_TYPES:
        options = {"beta": 0.1, "use_adaptive_entropy": True, "entropy_coef": 0.1}
        options |= {"loss_type": loss_type, "epsilon_high": 1.2}
        logged |= compute(trainers[1], options, inputs_of(trainers[1]))[2].keys()
        few = compute(trainers[1], {"loss_type": loss_type}, inputs_of(trainers[1]))[2].keys()
        assert not few & {"kl", "policy_loss", "entropy_coef"}
        assert "entropy" in few
        assert ("clip_ratio/low_mean" in few) == (loss_type not in ("cispo", "sapo", "vespo"))
    section = TEXT.split("## Metrics")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\S+)` \|", section, re.MULTILINE)) == logged
