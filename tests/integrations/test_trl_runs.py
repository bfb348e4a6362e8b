"""`GRPOTrainer` in longer runs: sharded by FSDP2, and resumed from a checkpoint, beside TRL's own."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from grpo_fast.ops import scaling

pytest.importorskip("trl", "1.15", reason="it is a subclass of TRL's trainer")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of TRL and its libraries
    pytest.mark.usefixtures("torch_backend"),
]

from datasets import Dataset  # noqa: E402
from trl import GRPOTrainer as Stock  # noqa: E402

from grpo_fast.integrations.trl import GRPOTrainer, trainer  # noqa: E402
from tests.support import ranks  # noqa: E402
from tests.support.trl_training import (  # noqa: E402
    PROMPTS,
    as_fsdp2,
    assert_same_logs,
    config,
    reward,
    train,
)


def sharded_on_a_rank(path, output, lora):
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"beta": 0.04, "num_iterations": 2, "prepare": as_fsdp2}
    options |= {"per_device_train_batch_size": 4, "max_steps": 2}
    if lora:
        import peft

        options["peft_config"] = peft.LoraConfig(r=4, lora_alpha=64)
    tokens = AutoTokenizer.from_pretrained(path)
    want, their_logs = train(Stock, path, tokens, Path(output), **options)
    fused, calls = trainer.linear_grpo_loss, []
    trainer.linear_grpo_loss = lambda *a, **k: calls.append(1) or fused(*a, **k)
    got, logs = train(GRPOTrainer, path, tokens, Path(output), **options)
    assert calls, "TRL's own code has run"
    assert any(isinstance(x, DTensor) for x in got.values()), "nothing is sharded"
    start = AutoModelForCausalLM.from_pretrained(path).state_dict()
    for name, x in got.items():
        # every process has to take part in the gathering, so first of all
        both = [y.full_tensor() if isinstance(y, DTensor) else y for y in (x, want[name])]
        torch.testing.assert_close(*both, rtol=0, atol=1e-6)
        if not lora and "layernorm" not in name:
            assert (both[0] - start[name]).abs().max() > 1e-3, f"{name} has not moved"
    assert_same_logs(logs, their_logs)


@ranks.needs_gloo
def test_fsdp2_on_two_processes(model_path, tmp_path):
    """All parameters, and where PEFT is there those of an adapter."""
    kinds = (False, True) if importlib.util.find_spec("peft") else (False,)
    cases = [[model_path, str(tmp_path), lora] for lora in kinds]
    ranks.run_each("tests.integrations.test_trl_runs:sharded_on_a_rank", 2, cases)


def test_resume(model_path, tokenizer, tmp_path):
    """Two steps, a checkpoint, two more: the parameters and metrics of four steps in one go."""

    def run(steps, **options):
        torch.manual_seed(0)
        arguments = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
        arguments |= {"num_iterations": 2, "beta": 0.04, "learning_rate": 1e-2}
        trainer = GRPOTrainer(
            model=model_path,
            reward_funcs=reward,
            args=config(tmp_path / str(steps), max_steps=4, **arguments),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=copy.deepcopy(tokenizer),
        )
        trainer.train(**options)
        return dict(trainer.model.named_parameters()), trainer.state.log_history

    want, whole = run(4)
    got, resumed = run(2, resume_from_checkpoint=str(tmp_path / "4" / "checkpoint-2"))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)
    assert_same_logs(resumed[:-1], whole[:-1])  # the last has the mean loss of the steps it ran


def test_no_factor_is_left_on_the_loss(model_path, tokenizer, tmp_path, monkeypatch):
    """No factor of accumulation or of processes costs a pass over the gradients of hidden states and head."""
    from grpo_fast.ops import linear_grpo

    factors, scale_ = [], scaling.scale_
    monkeypatch.setattr(
        linear_grpo, "scale_", lambda x, factor: (factors.append(factor.item()), scale_(x, factor))
    )
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 1}
    train(GRPOTrainer, model_path, tokenizer, tmp_path, **options)
    assert len(factors) >= 2
    assert set(factors) == {1.0}
