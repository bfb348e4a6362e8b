"""Single losses of TRL's trainer and of ours: the trainers, their inputs, and the values of a loss."""

import copy
from collections import defaultdict

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig
from trl import GRPOTrainer as Stock

from grpo_fast.integrations.trl import GRPOTrainer
from grpo_fast.trainer.model import character_tokenizer
from tests.support.hosts import assert_adapter_only_scales

B, P, T, V = 5, 3, 6, 11
GAS, SPG = 4, 2
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]

SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def make(cls, model, path, **options):
    tokenizer = character_tokenizer("abcdefgh")
    tokenizer.padding_side = "left"
    arguments = GRPOConfig(
        output_dir=str(path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=T,
        gradient_accumulation_steps=GAS,
        steps_per_generation=SPG,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **options,
    )
    trainer = cls(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = GAS
    trainer.model.train()
    return trainer


DEFAULTS = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "beta": 0.0,
    "use_bias_correction_kl": True,
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "entropy_target": 1.5,
    "entropy_coef_delta": 0.02,
    "use_vllm": False,
    "vllm_importance_sampling_correction": True,
    "sapo_temperature_pos": 1.0,
    "vespo_k_pos": 2.0,
}


def configure(trainer, options):
    """Set options as TRL's constructor does."""
    options = DEFAULTS | options
    for name, value in options.items():
        setattr(trainer.args, name, value)
        setattr(trainer, name, value)
    trainer.epsilon_low = options["epsilon"]
    high = options["epsilon_high"]
    trainer.epsilon_high = options["epsilon"] if high is None else high
    trainer._entropy_bonus_enabled = options["entropy_coef"] != 0 or options["use_adaptive_entropy"]
    trainer._last_world_entropy, trainer._entropy_window_stats = 1.4, None
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}


def inputs_of(trainer, change=()):
    """A micro-batch: ragged, one completion empty, old and reference policies near this one."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    ids = torch.randint(2, V, (B, P + T), generator=generator)
    prompt_mask = (torch.arange(P) >= torch.tensor([0, 2, 1, 0, 0])[:, None]).long()
    mask = (torch.arange(T) < torch.tensor([6, 3, 0, 5, 2])[:, None]).long()
    with torch.no_grad():
        logits = trainer.model(
            input_ids=ids, attention_mask=torch.cat([prompt_mask, mask], 1)
        ).logits
        logps = logits.log_softmax(-1)[:, P - 1 : -1].gather(-1, ids[:, P:, None]).squeeze(-1)
    inputs = {
        "prompt_ids": ids[:, :P],
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, P:],
        "completion_mask": mask,
        "advantages": normal(B),
        "num_items_in_batch": torch.tensor(37),
        "old_per_token_logps": (logps + 0.3 * normal(B, T)) * mask,
        "ref_per_token_logps": (logps + 0.3 * normal(B, T)) * mask,
    }
    extra = {
        "advantages": normal(B, T),
        "tool_mask": torch.randint(0, 2, (B, T), generator=generator),
        "importance_sampling_ratio": torch.where(
            mask.bool(), 2 * torch.rand(B, T, generator=generator), 1
        ),
        "sampling_per_token_logps": torch.where(
            torch.rand(B, T, generator=generator) < 0.1,
            torch.nan,
            inputs["old_per_token_logps"] + 0.3 * normal(B, T),
        ),
    }
    for name in change:
        if name == "on_policy":
            del inputs["old_per_token_logps"]
        elif name == "sequence_ratio":
            ratio = 2 * torch.rand(B, 1, generator=generator)
            inputs["importance_sampling_ratio"] = ratio.masked_fill(ratio < 0.5, 0)
        elif name == "masked_ratio":
            ratio = extra["importance_sampling_ratio"]
            inputs["importance_sampling_ratio"] = ratio.masked_fill(ratio < 0.5, 0)
        elif name == "no_difference":  # groups without a difference in reward, in part
            inputs["advantages"][::2] = 0
        elif name == "nothing_live":
            inputs["completion_mask"] = torch.zeros_like(mask)
        elif name == "one_token":
            for key in list(inputs):
                if inputs[key].ndim == 2 and inputs[key].shape[1] == T:
                    inputs[key] = inputs[key][:, :1]
        else:
            inputs[name] = extra[name]
    return inputs


def compute(trainer, options, inputs, mode="train", prepare=None):
    """(loss, gradients, metrics)."""
    configure(trainer, options)
    if prepare is not None:
        prepare(trainer)
    trainer.model.train(mode == "train")
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, dict(inputs))
    if type(trainer) is GRPOTrainer and trainer._why_not_fused(inputs) is None:
        assert_adapter_only_scales(loss)
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    return loss, gradients, {name: values[0] for name, values in trainer._metrics[mode].items()}


def pair(path):
    """(TRL's trainer, ours), with equal weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    return make(Stock, copy.deepcopy(model), path), make(GRPOTrainer, copy.deepcopy(model), path)
