"""The names that other trainers give our options, for the message about an unknown one."""

import dataclasses

from grpo_fast.spelling import closest, did_you_mean
from grpo_fast.trainer.config import TrainConfig

# The names of our options in other trainers.
ELSEWHERE = {
    "group_size": "num_generations n rollout_n num_samples",
    "max_new_tokens": "max_completion_length max_response_length max_length",
    "steps": "num_train_epochs max_steps epochs num_epochs total_epochs",
    "micro_batch_size": "per_device_train_batch_size train_batch_size",
    "prompts_per_step": "batch_size generation_batch_size gradient_accumulation_steps",
    "objective": "loss_type algorithm",
    "learning_rate": "lr",
    "lr_scheduler": "lr_scheduler_type",
    "lr_warmup_steps": "warmup_ratio num_warmup_steps",
    "model": "model_name_or_path model_path",
    "dataset": "dataset_name train_file train_dataset data",
    "heldout": "eval_dataset test_size",
    "reward": "reward_funcs reward_functions reward_func",
    "epsilon_low": "epsilon clip_range cliprange",
    "beta": "kl_coef kl_beta init_kl_coef",
    "entropy_coef": "entropy_coeff",
    "name": "run_name experiment_name",
    "resume": "resume_from_checkpoint",
    "use_peft": "lora use_lora",
    "lora_r": "lora_rank",
    "server": "vllm_server_base_url use_vllm",
    "micro_batch_tokens": "ppo_max_token_len_per_gpu max_tokens_per_gpu max_tokens_per_mb",
    "optim": "optimizer",
    "attention": "attn_implementation",
    "resample": "filter_groups dynamic_sampling",
    "completions_steps": "log_completions",
    "dtype": "bf16 fp16 torch_dtype precision",
    "keep_checkpoints": "save_total_limit",
    "threads": "num_threads",
    "samples": "num_completions_to_print",
    "max_grad_norm": "clip_grad grad_clip",
}
# Names without a counterpart here.
NONE_HERE = {
    "logging_steps": "every step is a line of metrics.jsonl",
    "save_strategy": "save_steps sets when checkpoints are written",
    "max_prompt_length": "prompts are never cut",
    "top_p": "what is sampled must be what is scored, so nothing is cut off",
    "top_k": "what is sampled must be what is scored, so nothing is cut off",
}
# What a user of such a name has to know besides.
NOTES = {
    "num_train_epochs": ", in GRPO steps (an epoch is rows / prompts_per_step of them)",
    "per_device_train_batch_size": ", the completions of a forward pass; prompts_per_step and "
    "group_size set those of a GRPO step",
    "gradient_accumulation_steps": "; micro_batch_tokens sets how it is cut into forward passes",
    "batch_size": ", with micro_batch_size completions in a forward pass",
    "warmup_ratio": ", in steps; warmup_steps is the supervised warm-up of a new model",
    "bf16": ", e.g. --dtype bfloat16",
    "epsilon": " and 'epsilon_high'",
}


def suggestion(option: str) -> str:
    """Suggest what to write instead of an unknown option."""
    name = option.split("=")[0].replace("-", "_")
    for ours, theirs in ELSEWHERE.items():
        if name in theirs.split():
            return f"; here it is {ours!r}{NOTES.get(name, '')}"
    if name in NONE_HERE:
        return f"; there is none: {NONE_HERE[name]}"
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    return did_you_mean(closest(name, names)[:1])
