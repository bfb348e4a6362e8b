"""Models: a small new one or a given one, its device and precision, and checkpoints."""

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from grpo_fast.trainer.config import TrainConfig


@dataclass
class Policy:
    """A causal LM with its tokenizer, ready to sample from and to train.

    Attributes:
        model: weights in float32.
        generation_config: the one the model came with; saved with it. While training, the model's own is
            neutral, so that what is sampled follows exactly the distribution that is scored.
        eos_ids: tokens that end a completion.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    generation_config: GenerationConfig
    eos_ids: list[int]

    def autocast(self) -> contextlib.AbstractContextManager:
        """Activations in `dtype`."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)


def build(config: TrainConfig, alphabet: str) -> Policy:
    """The policy a configuration asks for, on its device.

    Raises:
        ValueError: no such device, or a model or tokenizer that cannot be used, saying why.
    """
    device, dtype = placement(config)
    tokenizer: Any
    if config.model is None:
        tokenizer = character_tokenizer(alphabet)
        model = new_model(config, tokenizer)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.model)
            model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ValueError(f"model={config.model!r}: {error}") from error
    return prepare(model, tokenizer, device, dtype)


def prepare(model: Any, tokenizer: Any, device: torch.device, dtype: torch.dtype) -> Policy:
    """Wrap a model: padding on the left, neutral generation settings, no dropout."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    original = model.generation_config
    eos = original.eos_token_id if original.eos_token_id is not None else tokenizer.eos_token_id
    if eos is None or tokenizer.pad_token_id is None:
        raise ValueError("model: neither it nor its tokenizer has an end-of-sequence token")
    eos_ids = eos if isinstance(eos, list) else [eos]
    model.generation_config = GenerationConfig(
        eos_token_id=eos_ids, pad_token_id=tokenizer.pad_token_id
    )
    return Policy(model.to(device).eval(), tokenizer, device, dtype, original, eos_ids)


def placement(config: TrainConfig) -> tuple[torch.device, torch.dtype]:
    """Device and dtype, "auto" resolved.

    Raises:
        ValueError: the device is not there.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={config.device!r}: {str(error).splitlines()[0]}") from error
    if config.dtype == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return device, torch.bfloat16 if bf16 else torch.float32
    return device, getattr(torch, config.dtype)


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """One token per character of `alphabet`, beside padding, end and unknown."""
    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *dict.fromkeys(alphabet)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def new_model(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A small Llama with random weights."""
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def save(policy: Policy, run_dir: Path, step: int, keep: int) -> Path:
    """Write `checkpoints/step-<step>`, whole or not at all, and delete all but the newest `keep`.

    Loadable by `AutoModelForCausalLM` and `AutoTokenizer`.
    """
    folder = run_dir / "checkpoints"
    final, partial = folder / f"step-{step:06d}", folder / f".step-{step:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    neutral = policy.model.generation_config
    policy.model.generation_config = policy.generation_config
    try:
        policy.model.save_pretrained(partial)
    finally:
        policy.model.generation_config = neutral
    policy.tokenizer.save_pretrained(partial)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    for old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(run_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted(p for p in found if re.fullmatch(r"step-\d{6,}", p.name) and p.is_dir())


def latest(run_dir: Path) -> Path:
    """The newest checkpoint of a run.

    Raises:
        ValueError: there is none.
    """
    found = checkpoints(run_dir)
    if not found:
        raise ValueError(f"{run_dir}: not a run with a checkpoint")
    return found[-1]
