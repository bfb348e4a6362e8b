"""Train with GRPO in TRL, with the loss of grpo_fast.

Run it with `python examples/trl_train.py`, or with `accelerate launch`. It downloads nothing: a tiny random
model learns to write the letter a. Only the import of `GRPOTrainer` differs from a script for TRL.

To train a real model:
    - pass its name or folder instead of the model, for example `model="Qwen/Qwen2.5-0.5B"`, and leave out
      `processing_class`: TRL loads the tokenizer of the model;
    - lower `learning_rate` to about 1e-6 (1e-5 with LoRA);
    - remove `bf16=False` if there is a GPU;
    - use your own prompts and your own reward.
docs/trl.md has a complete script of this kind, with LoRA.
"""

import tempfile

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

from grpo_fast.integrations.trl import GRPOTrainer


def letters() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per letter."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def reward(completions: list[str], **_: object) -> list[float]:
    """Return the share of the letter a in each completion."""
    return [text.count("a") / max(len(text), 1) for text in completions]


def main(output_dir: str | None = None, **options: object) -> list[float]:
    """Run the training with further options of `GRPOConfig`, and return the reward of each step."""
    tokenizer = letters()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    arguments = {
        "per_device_train_batch_size": 32,
        "num_generations": 8,
        "max_completion_length": 8,
        "num_iterations": 2,
        "loss_type": "dapo",
        "epsilon_high": 0.28,
        "learning_rate": 1e-2,
        "max_steps": 20,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
    }
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(output_dir or tempfile.mkdtemp(), **(arguments | options)),
        train_dataset=Dataset.from_dict({"prompt": list("bcdefgh") * 8}),
        processing_class=tokenizer,
    )
    trainer.train()
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


if __name__ == "__main__":
    main()
