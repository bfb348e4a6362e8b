"""`GRPOTrainer` against TRL's own, both trained on the CPU: the same parameters and the same metrics."""

import copy
import functools
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", "1.15", reason="it is a subclass of TRL's trainer")
# TRL and its libraries warn as they are imported and as they train; this adapter's own warnings are
# expected one by one.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("torch_backend"),
]

from datasets import Dataset  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402
from trl import GRPOTrainer as Stock  # noqa: E402

from grpo_fast.integrations import trl as adapter  # noqa: E402
from grpo_fast.integrations.trl import GRPOTrainer, head  # noqa: E402
from grpo_fast.trainer.model import character_tokenizer  # noqa: E402
from tests.support import ranks  # noqa: E402
from tests.support.trl_training import COMMON, PROMPTS, TIMES, assert_same_logs, train  # noqa: E402


def assert_same_training(model_path, tokenizer, tmp_path, **options):
    want, their_logs = train(Stock, model_path, tokenizer, tmp_path / "stock", **options)
    got, our_logs = train(GRPOTrainer, model_path, tokenizer, tmp_path / "ours", **options)
    start = dict(LlamaForCausalLM.from_pretrained(model_path).named_parameters())
    moved = max(
        (p - start[name.removeprefix("base_model.model.")]).abs().max().item()
        if name in start
        else 1.0
        for name, p in want.items()
    )
    assert moved > 1e-3  # or it would prove nothing
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-6)
    assert_same_logs(our_logs, their_logs)
    return their_logs


LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_off_policy_with_a_reference(loss_type, model_path, tokenizer, tmp_path):
    """Two updates a batch, gradient accumulation, KL to a reference model."""
    logs = assert_same_training(
        model_path,
        tokenizer,
        tmp_path,
        loss_type=loss_type,
        beta=0.04,
        num_iterations=2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        max_steps=4,
        epsilon=0.02,
        epsilon_high=1.01 if loss_type == "cispo" else 0.03,
    )
    if loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        assert max(entry.get("clip_ratio/region_mean", 0) for entry in logs) > 0
    assert max(entry.get("kl", 0) for entry in logs) > 0


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_steps": 2}, id="on-policy"),
        pytest.param({"importance_sampling_level": "sequence", "beta": 0.04}, id="sequence"),
        pytest.param({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, id="reused"),
        pytest.param(
            {"mask_truncated_completions": True, "max_completion_length": 4}, id="truncated"
        ),
        pytest.param({"temperature": 0.7, "scale_rewards": "batch"}, id="temperature"),
        # Equal entropies at the quantile, of completions of one prompt, would make the mask a matter of
        # rounding.
        pytest.param({"entropy_coef": 0.1, "top_entropy_quantile": 0.3}, id="entropy"),
        pytest.param(
            {
                "use_adaptive_entropy": True,
                "entropy_coef": 0.05,
                "entropy_coef_delta": 0.02,
                "entropy_target": 2.0,
                "gradient_accumulation_steps": 2,
            },
            id="adaptive-entropy",
        ),
        pytest.param({"cast_lm_head_to_fp32": True}, id="fp32-head"),
        pytest.param({"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}, id="evaluation"),
        pytest.param({"gradient_checkpointing": True, "max_steps": 2}, id="checkpointing"),
    ],
)
def test_options(options, model_path, tokenizer, tmp_path):
    """Options that matter around the loss: generation, normalisation, masks, precision, evaluation."""
    assert_same_training(model_path, tokenizer, tmp_path, **({"num_iterations": 2} | options))


def test_resuming_as_trls_trainer_does(model_path, tokenizer, tmp_path):
    """A run that is resumed from a checkpoint has the state of the entropy controller."""
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "use_adaptive_entropy": True,
        "entropy_coef": 0.05,
        "entropy_target": 2.0,
    }

    def resume(trainer):
        trainer.train = functools.partial(trainer.train, resume_from_checkpoint=True)

    assert_same_training(model_path, tokenizer, tmp_path, max_steps=2, **options)
    logs = assert_same_training(
        model_path, tokenizer, tmp_path, max_steps=4, prepare=resume, **options
    )
    assert [entry["step"] for entry in logs if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.parametrize("options", [{"beta": 0.04}, {}], ids=["kl", "no-kl"])
def test_lora(options, model_path, tokenizer, tmp_path):
    """The reference is the model with its adapter off; the head is frozen."""
    peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
    options |= {"num_iterations": 2, "peft_config": peft.LoraConfig(r=4, lora_alpha=64)}
    logs = assert_same_training(model_path, tokenizer, tmp_path, **options)
    if "beta" in options:
        assert max(entry.get("kl", 0) for entry in logs) > 0


@pytest.mark.parametrize(
    "kind, options",
    [
        ("LoraConfig", {"r": 4, "lora_alpha": 64, "modules_to_save": ["lm_head"]}),
        ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    ],
    ids=["copy-of-the-head", "prompt"],
)
def test_the_reference_of_other_adapters(kind, options, model_path, tokenizer, tmp_path):
    """The reference is the model without its adapter, head and prompt included."""
    peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
    adapter = getattr(peft, kind)(task_type="CAUSAL_LM", **options)
    logs = assert_same_training(
        model_path, tokenizer, tmp_path, beta=0.1, num_iterations=2, peft_config=adapter
    )
    assert max(entry.get("kl", 0) for entry in logs) > 0


def test_autocast(model_path, tokenizer, tmp_path):
    """bfloat16 activations on float32 weights: as near to training in float32 as TRL's."""
    exact, _ = train(Stock, model_path, tokenizer, tmp_path, max_steps=1)
    stock, ours = (
        train(cls, model_path, tokenizer, tmp_path, bf16=True, max_steps=1)[0]
        for cls in (Stock, GRPOTrainer)
    )

    def error(got):
        return max((got[name] - exact[name]).abs().max().item() for name in exact)

    assert 1e-5 < error(stock) < 1e-2
    assert error(ours) <= 2 * error(stock)


def train_on_a_rank(model_path, output):
    tokenizer = character_tokenizer("abcdefgh")
    tokenizer.padding_side = "left"
    for options in (
        {"loss_type": "dapo", "beta": 0.04, "gradient_accumulation_steps": 2},
        {"loss_type": "grpo", "use_adaptive_entropy": True, "entropy_target": 2.0},
        {"loss_type": "dapo", "entropy_coef": 0.1, "top_entropy_quantile": 0.3},
    ):
        options |= {"per_device_train_batch_size": 4, "num_iterations": 2, "max_steps": 2}
        logs = assert_same_training(model_path, tokenizer, Path(output), **options)
        assert any("entropy" in entry for entry in logs)


def test_two_ranks(model_path, tmp_path):
    """Normalisers and metrics are those of all devices (DDP on the CPU)."""
    ranks.run("tests.integrations.test_trl_trainer:train_on_a_rank", 2, model_path, str(tmp_path))


@pytest.mark.parametrize("kind, passes", [("DPO", 2), ("SFT", 1), ("KTO", 4)])
def test_trls_other_trainers(kind, passes, model_path, tokenizer, tmp_path, monkeypatch):
    """Under `patch()`: the training is TRL's, and DPO's policy and reference start equal, bit for bit."""
    import trl
    from trl.trainer import utils

    data = {"prompt": PROMPTS, "chosen": PROMPTS[::-1], "rejected": [*PROMPTS[3:], *PROMPTS[:3]]}
    if kind == "SFT":
        data = {"text": PROMPTS}
    elif kind == "KTO":
        data = {"prompt": PROMPTS, "completion": PROMPTS[::-1], "label": [True, False] * 4}

    def run():
        torch.manual_seed(0)
        arguments = getattr(trl, f"{kind}Config")(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=2, **COMMON
        )
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model_path,
            args=arguments,
            train_dataset=Dataset.from_dict(data),
            processing_class=copy.deepcopy(tokenizer),
        )
        trainer.train()
        return dict(trainer.model.named_parameters()), trainer.state.log_history

    want, their_logs = run()
    calls = []
    fused = head.log_probs
    monkeypatch.setattr(head, "log_probs", lambda *a, **k: calls.append(1) or fused(*a, **k))
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", utils._ChunkedLogProbFunction)
    adapter.patch()
    got, logs = run()
    # Two steps; policy and reference, and for KTO's KL those of other pairs, too.
    assert len(calls) == 2 * passes
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-6)
    for ours, theirs in zip(logs, their_logs, strict=True):
        for name, value in theirs.items():
            if not any(word in name for word in TIMES):
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    if kind == "DPO":
        assert logs[0]["rewards/margins"] == 0
        assert logs[1]["rewards/margins"] != 0
