"""The policy of a run: a small new model or a given one, its device and precision, and checkpoints."""

import contextlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from grpo_fast.trainer import files, loading
from grpo_fast.trainer.config import TrainConfig


@dataclass
class Policy:
    """A causal LM with its tokenizer, ready to sample from and to train.

    Attributes:
        model: its weights are float32.
        generation_config: the configuration that the model came with; it is saved with the model. During
            training the model has a neutral one, so that samples follow the distribution that is scored.
        eos_ids: the tokens that end a completion.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    generation_config: GenerationConfig
    eos_ids: list[int]

    def autocast(self) -> contextlib.AbstractContextManager:
        """Compute activations in `dtype`."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)


def build(config: TrainConfig, alphabet: str) -> Policy:
    """Build the policy of a configuration, on its device.

    Raises:
        ValueError: there is no such device, or the model or tokenizer cannot be used; the message says why.
    """
    device, dtype = placement(config)
    if config.model is None:
        tokenizer: Any = character_tokenizer(alphabet)
        model = new_model(config, tokenizer)
    else:
        model, tokenizer = loading.load(config.model)
    if config.gradient_checkpointing:
        loading.check_layers(model)
    return prepare(model, tokenizer, device, dtype)


def prepare(model: Any, tokenizer: Any, device: torch.device, dtype: torch.dtype) -> Policy:
    """Wrap a model: padding on the left, neutral generation settings, no dropout.

    Raises:
        ValueError: there is no end-of-sequence token, or padding has no embedding.
    """
    tokenizer.padding_side = "left"
    original = model.generation_config or GenerationConfig()
    size = model.get_input_embeddings().num_embeddings
    candidates = (original.eos_token_id, tokenizer.eos_token_id)
    # A token without an embedding is never sampled, so it ends nothing.
    named = [
        [i for i in (c if isinstance(c, list) else [c]) if i in range(size)] for c in candidates
    ]
    eos_ids = named[0] or named[1]
    if not eos_ids:
        raise ValueError(
            f"model: no end-of-sequence token among its {size} tokens: its generation_config.json has "
            f"eos_token_id {candidates[0]}, its tokenizer {candidates[1]}"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens((named[1] or eos_ids)[0])
    if tokenizer.pad_token_id not in range(size):
        raise ValueError(
            f"model: the tokenizer's pad_token_id {tokenizer.pad_token_id} is not among its {size} tokens"
        )
    model.generation_config = GenerationConfig(
        eos_token_id=eos_ids, pad_token_id=tokenizer.pad_token_id
    )
    return Policy(model.to(device).eval(), tokenizer, device, dtype, original, eos_ids)


def placement(config: TrainConfig) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype, with "auto" resolved.

    Raises:
        ValueError: there is no such device.
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
    """Return a tokenizer with one token per character of `alphabet`, and padding, end and unknown."""
    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *dict.fromkeys(alphabet)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def new_model(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return a small Llama with random weights."""
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
    """Write `checkpoints/step-<step>` completely or not at all, and delete all but the newest `keep`.

    `AutoModelForCausalLM` and `AutoTokenizer` can load it. If the disk is full, the checkpoints that would be
    deleted afterwards are deleted first, and the write is repeated once. The newest one always stays.

    Raises:
        OSError: nothing was saved; the message names the folder.
    """
    folder = run_dir / "checkpoints"
    try:
        final = _write(policy, folder, step)
    except OSError as error:
        if error.errno not in files.FULL:
            raise
        for spare in checkpoints(run_dir)[: -max(keep - 1, 1)]:
            files.remove(spare)
        final = _write(policy, folder, step)
    try:
        for old in checkpoints(run_dir)[:-keep]:
            if old != final:
                files.remove(old)
    except OSError as error:
        print(f"{folder}: could not delete an older checkpoint: {error}", file=sys.stderr)
    return final


def _write(policy: Policy, folder: Path, step: int) -> Path:
    """Write one checkpoint; nothing of it stays if that fails."""
    final = folder / f"step-{step:06d}"
    partial = files.hidden(final, "partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.tidy(folder)
        partial.mkdir()
        policy.model.save_pretrained(partial)
        policy.tokenizer.save_pretrained(partial)
        # Not through save_pretrained, which refuses settings that models on the hub have.
        policy.generation_config.to_json_file(partial / "generation_config.json")
        files.publish(partial, final)
    except Exception as error:  # OSError, or the errors of safetensors and tokenizers
        with contextlib.suppress(OSError):
            files.tidy(folder)
        raise files.named(error, final) from error
    return final


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the oldest first.

    If a process died while it replaced one, the old one counts, which still has its hidden name.
    """
    found = {}
    for path in (run_dir / "checkpoints").glob("*"):
        name = re.fullmatch(r"step-(\d{6,})|\.step-(\d{6,})\.old", path.name)
        if name and path.is_dir() and not (name[2] and int(name[2]) in found):
            found[int(name[1] or name[2])] = path
    return [found[step] for step in sorted(found)]


def latest(run_dir: Path) -> Path:
    """Return the newest checkpoint of a run.

    Raises:
        ValueError: there is none.
    """
    found = checkpoints(run_dir)
    if not found:
        raise ValueError(f"{run_dir}: not a run with a checkpoint")
    return found[-1]
