"""The shapes that are measured, by name. A benchmark takes no other."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Shape:
    """B sequences of T completion tokens over V entries, G of them for each prompt; D hidden features."""

    B: int
    T: int
    V: int
    G: int
    D: int = 0  # where the benchmark starts from logits

    @property
    def N(self) -> int:  # noqa: N802 (a dimension, like the fields)
        return self.B * self.T


# The vocabularies of model families. Gemma's is so wide that it gets half the tokens; GPT-2's is odd,
# so that its rows are not aligned to 16 bytes.
CUDA = {
    "qwen2.5-7b": Shape(B=16, T=1024, V=152_064, G=4),
    "llama3-8b": Shape(B=16, T=1024, V=128_256, G=4),
    "gemma": Shape(B=8, T=1024, V=262_144, G=4),
    "gpt2": Shape(B=16, T=1024, V=50_257, G=4),
}
CPU = {
    "cpu-small": Shape(B=16, T=256, V=32_000, G=4),
    "cpu-odd": Shape(B=8, T=64, V=50_257, G=4),
    "cpu-tiny": Shape(B=8, T=32, V=4096, G=4),
}
# Per-token and per-sequence work, where the vocabulary plays no part: the same on every machine.
TOKENS = {
    "micro-batch": Shape(B=16, T=1024, V=0, G=4),
    "step": Shape(B=512, T=2048, V=0, G=8),
}

# From hidden states.
CUDA_HEADS = {
    "qwen2.5-7b-head": Shape(B=16, T=1024, V=152_064, G=4, D=3584),
    "qwen2.5-0.5b-head": Shape(B=16, T=1024, V=151_936, G=4, D=896),
    "llama3-8b-head": Shape(B=16, T=1024, V=128_256, G=4, D=4096),
}
CPU_HEADS = {
    "cpu-head": Shape(B=16, T=256, V=64_000, G=4, D=512),
    "cpu-tiny-head": Shape(B=8, T=32, V=4096, G=4, D=128),
}

# What is in a batch: every token counts; about 30 % padding; half of the groups with equal rewards.
VARIANTS = ("full", "padded", "zero-variance")
DEAD_VARIANT = "dead"  # 60 % padding
SEQUENCE_VARIANT = "gspo"  # every token counts, the ratio is the sequence's


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> torch.dtype:
    """Of the logits: what a trainer has on that device."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def logits_shapes() -> dict[str, Shape]:
    return CUDA if torch.cuda.is_available() else CPU


def get(name: str) -> Shape:
    return {**CUDA, **CPU, **TOKENS, **CUDA_HEADS, **CPU_HEADS}[name]


def head_shapes() -> dict[str, Shape]:
    return CUDA_HEADS if torch.cuda.is_available() else CPU_HEADS


def head_cases() -> list[tuple[str, str]]:
    """(shape, variant) of the losses on hidden states."""
    first, *others = head_shapes()
    variants = ("full", DEAD_VARIANT, "zero-variance")
    return [(first, variant) for variant in variants] + [(name, "full") for name in others]


def cases() -> list[tuple[str, str]]:
    """(shape, variant) of the losses on logits: all variants at the first shape, one at the others."""
    first, *others = logits_shapes()
    return [(first, variant) for variant in VARIANTS] + [(name, "full") for name in others]
