"""The shapes that are measured, by name: a model's head, and how many tokens."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Shape:
    """B sequences of T completion tokens over V entries, G for each prompt, from D wide hidden states."""

    B: int
    T: int
    V: int
    G: int
    D: int = 0

    @property
    def N(self) -> int:  # noqa: N802 (a dimension, like the fields)
        return self.B * self.T


# (D, V) of the models' heads, padded rows included. Gemma's vocabularies are so wide that they get
# half the tokens; GPT-2's is odd, so that its rows are not aligned to 16 bytes.
HEADS = {
    "qwen2.5-7b": (3584, 152_064),
    "qwen2.5-0.5b": (896, 151_936),
    "llama2-7b": (4096, 32_000),
    "llama3-8b": (4096, 128_256),
    "gemma2-2b": (2304, 256_000),
    "gemma3-1b": (1152, 262_144),
    "gpt2": (768, 50_257),
    # No model's: small enough for many tokens on a CPU, and still V >> D.
    "small-head": (512, 64_000),
}


def of(model: str, B: int, T: int, G: int = 4) -> Shape:
    D, V = HEADS[model]
    return Shape(B=B, T=T, V=V, G=G, D=D)


CUDA = {
    "qwen2.5-7b-16k": of("qwen2.5-7b", 16, 1024),
    "llama3-8b-16k": of("llama3-8b", 16, 1024),
    "gemma3-1b-8k": of("gemma3-1b", 8, 1024),
    "gemma2-2b-8k": of("gemma2-2b", 8, 1024),
    "gpt2-16k": of("gpt2", 16, 1024),
}
CPU = {
    "llama2-7b-1k": of("llama2-7b", 16, 64),
    "llama2-7b-4k": of("llama2-7b", 16, 256),
    "qwen2.5-0.5b-256": of("qwen2.5-0.5b", 4, 64),
    "gemma3-1b-128": of("gemma3-1b", 4, 32),
    "gpt2-512": of("gpt2", 8, 64),
}
# From hidden states.
CUDA_HIDDEN = {
    "qwen2.5-7b-16k": of("qwen2.5-7b", 16, 1024),
    "qwen2.5-7b-4k": of("qwen2.5-7b", 4, 1024),
    "qwen2.5-7b-32k": of("qwen2.5-7b", 32, 1024),
    "qwen2.5-0.5b-16k": of("qwen2.5-0.5b", 16, 1024),
    "llama3-8b-16k": of("llama3-8b", 16, 1024),
    "gemma2-2b-8k": of("gemma2-2b", 8, 1024),
}
CPU_7B = "qwen2.5-7b-1k"
CPU_HIDDEN = {
    "small-head-256": of("small-head", 8, 32),
    "small-head-4k": of("small-head", 16, 256),
    "small-head-1k": of("small-head", 16, 64),
    "small-head-2k": of("small-head", 16, 128),
    "qwen2.5-0.5b-512": of("qwen2.5-0.5b", 8, 64),
    CPU_7B: of("qwen2.5-7b", 16, 64),  # 3.3 TFLOP a step; four groups: not all have equal rewards
}
# Per-token and per-sequence work, where the vocabulary plays no part: the same on every machine.
TOKENS = {"micro-batch": Shape(B=16, T=1024, V=0, G=4), "step": Shape(B=512, T=2048, V=0, G=8)}

# What is in a batch: every token counts; about 30 % padding; half of the groups with equal rewards.
VARIANTS = ("full", "padded", "zero-variance")
REALISTIC = "realistic"  # half of it padding, 40 % of the groups with equal rewards, no KL term
DEAD = "dead"  # 60 % padding, evenly; every other token has a gradient


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> torch.dtype:
    """Return the dtype of logits and hidden states that a trainer has on this device."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def logits_shapes() -> dict[str, Shape]:
    return CUDA if torch.cuda.is_available() else CPU


def hidden_shapes() -> dict[str, Shape]:
    return CUDA_HIDDEN if torch.cuda.is_available() else CPU_HIDDEN


def get(name: str) -> Shape:
    return {**CUDA, **CPU, **CUDA_HIDDEN, **CPU_HIDDEN, **TOKENS}[name]


def cases() -> list[tuple[str, str]]:
    """List (shape, variant) for losses on logits: all variants at the first shape."""
    first, *others = logits_shapes()
    return [(first, variant) for variant in VARIANTS] + [(name, "full") for name in others]


def hidden_cases() -> list[tuple[str, str]]:
    """List (shape, variant) for losses from hidden states; a 7B model's with a realistic mask, too."""
    first, *others = hidden_shapes()
    chosen = [(first, variant) for variant in ("full", REALISTIC, DEAD)]
    chosen += [(name, "full") for name in others]
    return chosen + [(CPU_7B, REALISTIC)] * (CPU_7B in others)
