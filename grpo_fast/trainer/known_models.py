"""The dimensions of well-known models, so that plans and dry runs need no download; and small ones.

They are those of the published config.json files. The number of weights is checked against the published
one in tests/trainer/test_sizing.py.
"""

import copy
import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from grpo_fast.trainer.loading import refusal

_QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
    "bos_token_id": 151_643,
    "eos_token_id": 151_643,
}
_QWEN3 = _QWEN2 | {
    "model_type": "qwen3",
    "max_position_embeddings": 40_960,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "eos_token_id": 151_645,
}
_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}
_SMOL = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _rope_of_llama3(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _sizes(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, kv_heads: int
) -> dict[str, int]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


# By the last part of the hub id, without -Instruct and -Base: `model_type` and the arguments of its
# configuration.
KNOWN: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": _QWEN2 | _sizes(896, 4864, 24, 14, 2),
    "Qwen2.5-1.5B": _QWEN2 | _sizes(1536, 8960, 28, 12, 2),
    "Qwen2.5-3B": _QWEN2 | _sizes(2048, 11_008, 36, 16, 2),
    "Qwen2.5-7B": _QWEN2
    | _sizes(3584, 18_944, 28, 28, 4)
    | {"vocab_size": 152_064, "tie_word_embeddings": False, "max_position_embeddings": 131_072},
    "Qwen3-0.6B": _QWEN3 | _sizes(1024, 3072, 28, 16, 8),
    "Qwen3-1.7B": _QWEN3 | _sizes(2048, 6144, 28, 16, 8),
    "Qwen3-4B": _QWEN3 | _sizes(2560, 9728, 36, 32, 8),
    "Qwen3-8B": _QWEN3 | _sizes(4096, 12_288, 36, 32, 8) | {"tie_word_embeddings": False},
    "Llama-3.2-1B": _LLAMA3
    | _sizes(2048, 8192, 16, 32, 8)
    | {"head_dim": 64, "tie_word_embeddings": True, "rope_parameters": _rope_of_llama3(32.0)},
    "Llama-3.1-8B": _LLAMA3
    | _sizes(4096, 14_336, 32, 32, 8)
    | {"tie_word_embeddings": False, "rope_parameters": _rope_of_llama3(8.0)},
    "SmolLM2-135M": _SMOL | _sizes(576, 1536, 30, 9, 3),
    "SmolLM2-360M": _SMOL | _sizes(960, 2560, 32, 15, 5),
    "SmolLM2-1.7B": _SMOL
    | _sizes(2048, 8192, 24, 32, 32)
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 130_000.0}},
}


def known_config(name: str) -> Any:
    """Return the configuration of a well-known model, by its hub id or the last part of it; else None."""
    short = re.sub(r"-(instruct|base)$", "", name.split("/")[-1], flags=re.IGNORECASE).lower()
    for known, sizes in KNOWN.items():
        if known.lower() == short:
            given = copy.deepcopy(sizes)
            if given["model_type"] == "qwen2" and name.lower().endswith("-instruct"):
                given["max_position_embeddings"] = 32_768  # also where the base model has more
            return AutoConfig.for_model(given.pop("model_type"), **given)
    return None


def describe(model: str) -> Any:
    """Return the configuration of a model: a folder, its config.json, a well-known name, or a hub id.

    Raises:
        ValueError: there is none, or the hub cannot be reached; the message lists the known names.
    """
    path = Path(model).expanduser()
    if not path.exists() and (known := known_config(model)) is not None:
        return known
    try:
        where = str(path) if path.exists() else model
        return AutoConfig.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # of whatever the hub's client raises
        why = "cannot be read" if path.exists() else "no such folder, and not found on the hub"
        lines = str(error).strip().splitlines()
        detail = refusal(error) or (lines or [type(error).__name__])[0]
        names = ", ".join(KNOWN)
        raise ValueError(f"model={model!r}: {why} ({detail}); known without it: {names}") from error


def tiny(config: Any) -> Any:
    """Return the same architecture with two layers, a hidden size of 64 and 512 tokens, for dry runs."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    heads, kv = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    apart = (getattr(text, "head_dim", None) or text.hidden_size // heads) * heads
    sizes = {
        "head_dim": 16 if apart == text.hidden_size else 32,
        "num_key_value_heads": 4 if kv == heads else 2,
        "intermediate_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 2,
        "max_window_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "vocab_size": 512,
        "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    for name, value in sizes.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    for owner in (small, text):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(owner, name, None) is not None:
                setattr(owner, name, 1)
    return small
