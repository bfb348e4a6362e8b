"""Training in any dtype with our trainer, and with TRL's after `patch()`: the results are TRL's."""

import copy

import pytest
import torch

pytest.importorskip("trl", "1.15", reason="they are TRL's trainers")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of TRL and its libraries
    pytest.mark.usefixtures("torch_backend"),
]

import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import MambaConfig, MambaForCausalLM  # noqa: E402
from trl.trainer import utils  # noqa: E402

from grpo_fast.integrations import trl as adapter  # noqa: E402
from grpo_fast.integrations.trl import head  # noqa: E402
from tests.support.trl_training import COMMON, PROMPTS, reward  # noqa: E402

DATA = {
    "GRPO": {"prompt": PROMPTS},
    "RLOO": {"prompt": PROMPTS},
    "DPO": {"prompt": PROMPTS, "chosen": PROMPTS[::-1], "rejected": ["cdd"] * 8},
    "KTO": {"prompt": PROMPTS, "completion": PROMPTS[::-1], "label": [True, False] * 4},
    "SFT": {"text": PROMPTS},
}
# What a half-precision checkpoint is trained to, within some units of its rounding at 1.
NEAR = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-6}


@pytest.fixture(scope="module")
def mamba_path(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("mamba")
    config = MambaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        state_size=8,
        time_step_rank=4,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    MambaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def train(kind, cls, path, dtype, tokenizer, tmp_path, peft_config=None, **options):
    """(parameters, losses) after two steps from the same start and seed."""
    torch.manual_seed(0)
    sampled = {}
    if kind in ("GRPO", "RLOO"):
        options |= {"num_generations": 4, "max_completion_length": 6}
        sampled = {"reward_funcs": reward}
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8 if sampled else 4,
        max_steps=2,
        model_init_kwargs={"dtype": dtype},
        **COMMON | options,
    )
    trainer = cls(
        model=path,
        args=arguments,
        train_dataset=Dataset.from_dict(DATA[kind]),
        processing_class=copy.deepcopy(tokenizer),
        peft_config=copy.deepcopy(peft_config),
        **sampled,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return dict(trainer.model.named_parameters()), losses


def both(kind, monkeypatch, *arguments, **options):
    """Trained by TRL, and by ours: its own trainer, or TRL's after `patch()`."""
    stock = getattr(trl, f"{kind}Trainer")
    theirs = train(kind, stock, *arguments, **options)
    calls = []
    fused = head.log_probs
    monkeypatch.setattr(head, "log_probs", lambda *a, **k: calls.append(1) or fused(*a, **k))
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", utils._ChunkedLogProbFunction)
    adapter.patch()
    cls = adapter.GRPOTrainer if kind == "GRPO" else stock
    ours = train(kind, cls, *arguments, **options)
    assert calls or kind == "GRPO", "the fused head did not run"
    return theirs, ours


def assert_alike(theirs, ours, tolerance):
    (want, losses), (got, mine) = theirs, ours
    assert mine == pytest.approx(losses, rel=tolerance, abs=tolerance)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_a_float16_checkpoint_under_bfloat16_autocast(
    kind,
    lora,
    monkeypatch,
    model_path,
    tokenizer,
    tmp_path,
):
    """`bf16=True` is TRL's default, whatever the checkpoint is."""
    peft_config = None
    if lora:
        peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
        peft_config = peft.LoraConfig(r=4, init_lora_weights=False)
    given = (monkeypatch, model_path, torch.float16, tokenizer, tmp_path)
    assert_alike(*both(kind, *given, peft_config=peft_config, bf16=True), NEAR[torch.float16])


@pytest.mark.parametrize("kind", DATA)
def test_a_backbone_in_float32_with_a_head_in_bfloat16(
    kind,
    monkeypatch,
    mamba_path,
    tokenizer,
    tmp_path,
):
    given = (monkeypatch, mamba_path, torch.bfloat16, tokenizer, tmp_path)
    assert_alike(*both(kind, *given), NEAR[torch.bfloat16])


@pytest.mark.parametrize("kind", DATA)
def test_a_model_in_float64(kind, monkeypatch, model_path, tokenizer, tmp_path):
    """TRL rounds the logits to float32 on the way, ours does not."""
    given = (monkeypatch, model_path, torch.float64, tokenizer, tmp_path)
    assert_alike(*both(kind, *given), NEAR[torch.float64])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_float32_products_with_the_head(
    dtype,
    bf16,
    monkeypatch,
    model_path,
    tokenizer,
    tmp_path,
):
    """`cast_lm_head_to_fp32`, of a checkpoint in any dtype."""
    given = (monkeypatch, model_path, dtype, tokenizer, tmp_path)
    options = {"cast_lm_head_to_fp32": True, "bf16": bf16}
    assert_alike(*both("GRPO", *given, **options), 3e-2 if bf16 else NEAR[dtype])
