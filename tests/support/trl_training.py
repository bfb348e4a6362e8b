"""Short runs of TRL's trainers, and the comparison of their logs."""

import copy

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig

PROMPTS = ["ab", "cde", "a", "bdca", "ee", "dab", "c", "bb"]


def reward(completions, **_):
    return [text.count("a") - 0.3 * text.count("b") + 0.05 * len(text) for text in completions]


# Options of any TRL trainer.
COMMON = {
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def config(tmp_path, **options):
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 7,
        "max_steps": 3,
    }
    return GRPOConfig(**(COMMON | defaults | options))


def train(
    cls, model_path, tokenizer, tmp_path, prepare=None, peft_config=None, given=None, **options
):
    """(parameters, log history) after training from the same start and seed.

    `given` are other arguments of the trainer; its "prompts" replace `PROMPTS`.
    """
    torch.manual_seed(0)
    given = dict(given or {})
    prompts = given.pop("prompts", PROMPTS)
    trainer = cls(
        model=model_path,
        reward_funcs=reward,
        args=config(tmp_path, **options),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        eval_dataset=Dataset.from_dict({"prompt": prompts[:2]}),
        processing_class=copy.deepcopy(tokenizer),
        peft_config=peft_config,
        **given,
    )
    if prepare is not None:
        prepare(trainer)
    trainer.train()
    parameters = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return parameters, trainer.state.log_history


def as_fsdp2(trainer):
    """Accelerate takes FSDP from a configuration on GPUs alone: here it is told on CPUs."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    state = AcceleratorState()._shared_state
    state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    trainer.is_fsdp_enabled = True


TIMES = ("step_time", "_runtime", "per_second", "total_flos", "epoch")


def assert_same_logs(got, want):
    """All metrics but times agree, NaN included."""
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if any(word in name for word in TIMES):
                continue
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=2e-6, nan_ok=True), name
