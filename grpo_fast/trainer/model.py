"""The policy of a run: a small new model or a given one, its adapter, its device and its precision."""

import contextlib
import copy
from collections.abc import Iterator
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

from grpo_fast.trainer import known_models, loading
from grpo_fast.trainer.config import TrainConfig

CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"  # of a dry run


@dataclass
class Policy:
    """A causal LM with its tokenizer, ready to sample from and to train.

    Attributes:
        model: bare, with a peft adapter, or with weights that are shared between processes.
        dtype: the precision of the activations.
        generation_config: the configuration that the model came with; it is saved with the model. During
            training the model has a neutral one, so that samples follow the distribution that is scored.
        eos_ids: the tokens that end a completion.
        masters: bf16 weights have float32 copies, which the optimizer updates.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    generation_config: GenerationConfig
    eos_ids: list[int]
    masters: bool = False

    def autocast(self) -> contextlib.AbstractContextManager:
        """Compute activations in `dtype`."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    @property
    def adapted(self) -> bool:
        """Tell whether an adapter is trained."""
        return hasattr(self.model, "disable_adapter")

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[Any]:
        """Give the model as it was before its adapter."""
        with self.model.disable_adapter():
            yield self.model


def build(config: TrainConfig, alphabet: str, checkpoint: Path | None = None) -> Policy:
    """Build the policy of a configuration, on its device.

    Args:
        checkpoint: the folder of a checkpoint that has its weights, or its adapter.

    Raises:
        ValueError: there is no such device, or the model or tokenizer cannot be used; the message says why.
    """
    device, dtype = placement(config)
    weights = weights_dtype(config, dtype)
    source = config.model if checkpoint is None or config.use_peft else str(checkpoint)
    options: dict[str, Any] = {}
    if config.attention is not None:
        options["attn_implementation"] = config.attention
    if config.quantize and not config.dry_run:
        options["quantization_config"] = loading.quantization(config.quantize)
    if source is None or (config.dry_run and (checkpoint is None or config.use_peft)):
        tokenizer: Any = character_tokenizer(alphabet)
        if config.model is None:
            model = new_model(config, tokenizer, weights)
        else:
            model = tiny_model(config.model, tokenizer, weights, options)
            tokenizer.chat_template = CHAT
    else:
        model, tokenizer = loading.load(source, weights, **options)
    if config.use_peft:
        model = adapted(model, config, checkpoint)
    if config.gradient_checkpointing:
        loading.check_layers(model)
    policy = prepare(model, tokenizer, device, dtype)
    policy.masters = weights == torch.bfloat16 and config.weights != "bfloat16_only"
    return policy


def weights_dtype(config: TrainConfig, dtype: torch.dtype) -> torch.dtype:
    """Return the precision of the weights; FSDP keeps float32 weights itself, where they are trained."""
    if config.fsdp and not config.use_peft:
        return torch.float32
    if config.weights == "auto":
        return dtype
    return torch.float32 if config.weights == "float32" else torch.bfloat16


def adapted(model: Any, config: TrainConfig, checkpoint: Path | None) -> Any:
    """Put a LoRA adapter on a model: a new one, which changes nothing yet, or that of a checkpoint.

    Raises:
        ValueError: peft is not installed, or the model has no such layers.
    """
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise ValueError("use_peft: peft is not installed; pip install peft") from error
    if checkpoint is not None:
        # Without this file peft reads a pickle, or asks the hub.
        if not (checkpoint / "adapter_model.safetensors").is_file():
            raise ValueError(f"resume: {checkpoint} has no adapter_model.safetensors")
        return PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True)
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # an int is usual, no must
        target_modules=config.lora_target_modules or "all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise ValueError(f"use_peft: {' '.join(str(error).split())}") from error


def threads(config: TrainConfig) -> int:
    """Return how many threads a run computes with, on a CPU; the bits of a sum depend on their number."""
    return config.threads or (torch.get_num_threads() if config.model else 1)


def reference(policy: Policy) -> Any:
    """Return a frozen copy of the model, for the KL; None with an adapter, whose base is the reference."""
    if policy.adapted:
        return None
    return copy.deepcopy(policy.model).eval().requires_grad_(False)


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
    return Policy(placed(model, device).eval(), tokenizer, device, dtype, original, eos_ids)


def placed(model: Any, device: torch.device) -> Any:
    """Move a model to a device; one of bitsandbytes is there since it was loaded."""
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        return model
    return model.to(device)


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


def tiny_model(
    name: str, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype, options: dict[str, Any]
) -> Any:
    """Return a model of the same architecture as `name`, with few layers and random weights.

    Raises:
        ValueError: there is no such model, and its name is unknown here, too.
    """
    shape = known_models.tiny(known_models.describe(name))
    text = shape.get_text_config()
    text.vocab_size = max(len(tokenizer), 64)
    text.eos_token_id = shape.eos_token_id = tokenizer.eos_token_id
    text.pad_token_id = shape.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(shape, dtype=dtype, **options)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    return model


def new_model(
    config: TrainConfig, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype = torch.float32
) -> Any:
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
        ),
        dtype=dtype,
    )
