"""Tiny models and a ragged batch for the tests of shared prompts, and what the model itself computes."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the models are Hugging Face's")
import transformers

from grpo_fast.shared_prompt import Plan, backward, plan, with_head

VOCABULARY = 61
# The weights are large, so that what a token must not see would change its log-probs.
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
WINDOW = {"sliding_window": 5}  # shorter than the longest prompt
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
MAMBA = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
}
ATTENTION: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": WINDOW,
    "gemma2": MIXED,
    "gemma3_text": MIXED,
    "gpt2": {},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "gpt_oss": EXPERTS | MIXED,
}
HYBRID: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": EXPERTS | LINEAR,
    "qwen3_5_text": LINEAR,
    "falcon_h1": MAMBA,
}
MODELS = ATTENTION | HYBRID
EAGER = ("gemma2", "gpt_oss")  # models without attention of kind sdpa
WINDOWED = ("mistral", "gemma2", "gemma3_text", "gpt_oss")
ROUTES = ("packed", "mask", "fork", "bounded", "backward")
MICRO_BATCH = 2


def routes_of(name: str) -> tuple[str, ...]:
    """The routes that share the prompts of a model, and `backward`."""
    if name in HYBRID:
        return ("fork", "bounded", "backward")
    return tuple(x for x in ROUTES if x != "packed" or name not in EAGER)


def config_of(name: str, **options: Any) -> Any:
    """The configuration of a tiny model."""
    given = GPT2 if name == "gpt2" else COMMON | MODELS[name]
    return transformers.AutoConfig.for_model(name, **(given | options))


def build(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A tiny random model in evaluation mode.

    Args:
        options: of its configuration; and `attn_implementation`. Default: sdpa where the model has it.
    """
    torch.manual_seed(1)
    attention = options.pop("attn_implementation", None)
    config = config_of(name, **options)
    # The other code for experts has no float64.
    experts = "eager" if dtype == torch.float64 and set(EXPERTS) <= set(MODELS[name]) else None
    made = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation=experts
    )
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:  # norms and biases, which start at 0 or 1
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made.to(dtype).eval()


def batch() -> dict[str, Tensor]:
    """Eight ragged completions of four ragged prompts, not in the order of the prompts.

    The groups have 4, 2, 1 and 1 completions. Two completions are empty, one of them alone in its group; one
    has one token and one has two.
    """
    draw = torch.Generator().manual_seed(5)
    prompts = torch.randint(3, VOCABULARY, (4, 9), generator=draw)
    completions = torch.randint(3, VOCABULARY, (8, 7), generator=draw)
    which = torch.tensor([0, 1, 0, 2, 1, 0, 3, 0])
    lengths = torch.tensor([9, 6, 1, 3])[which, None]
    sizes = torch.tensor([7, 3, 0, 4, 5, 2, 0, 1])[:, None]
    return {
        "prompt_ids": prompts[which],
        "completion_ids": completions,
        "prompt_mask": torch.arange(9) >= 9 - lengths,
        "completion_mask": torch.arange(7) < sizes,
    }


def sequences(given: dict[str, Tensor]) -> list[tuple[Tensor, int]]:
    """The tokens of each sequence of a batch without padding, (S,), and how long its completion is."""
    found = []
    for ids, mask, more, live in zip(*(given[name] for name in BATCH), strict=True):
        completion = more[live.bool()]
        found.append((torch.cat([ids[mask.bool()], completion]), len(completion)))
    return found


BATCH = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


def alone(model: Any, given: dict[str, Tensor], offset: int = 0) -> Tensor:
    """The log-probs of the completions from the model's logits of one sequence at a time, (N,).

    Args:
        offset: the position of the first token, for the model's `position_ids`.
    """
    found = []
    for ids, length in sequences(given):
        if length:
            positions = {"position_ids": torch.arange(len(ids))[None] + offset} if offset else {}
            logits = model(input_ids=ids[None], use_cache=False, **positions).logits[0]
            scored = logits[-length - 1 : -1].log_softmax(-1)
            found.append(scored.gather(1, ids[-length:, None])[:, 0])
    return torch.cat(found)


def padded(model: Any, given: dict[str, Tensor]) -> Tensor:
    """The log-probs of the completions from the model's logits of the padded batch, (N,)."""
    ids = torch.cat([given["prompt_ids"], given["completion_ids"]], 1)
    live = given["completion_mask"].bool()
    mask = torch.cat([given["prompt_mask"].bool(), live], 1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    T = live.shape[1]
    logits = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
    ).logits
    scored = logits[:, -T - 1 : -1].log_softmax(-1)
    return scored.gather(2, given["completion_ids"][..., None])[..., 0][live]


def score(hidden: Tensor, head: Any, targets: Tensor) -> Tensor:
    """The log-probs of some targets."""
    return head.logits(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def log_probs(model: Any, shared: Plan, route: str = "auto", **options: Any) -> Tensor:
    """The log-probs of a plan's targets through `with_head`, (N,)."""
    return with_head(
        model,
        shared,
        lambda hidden, head: score(hidden, head, shared.targets),
        route=route,
        micro_batch=MICRO_BATCH,
        **options,
    )


class Graded(NamedTuple):
    """Log-probs, and the gradient of their sum with random weights, by the names of the parameters."""

    log_probs: Tensor
    gradient: dict[str, Tensor]


def upstream(shared: Plan, dtype: torch.dtype) -> Tensor:
    """Random weights of the targets, (N,)."""
    draw = torch.Generator().manual_seed(3)
    return torch.randn(len(shared.targets), generator=draw).to(dtype)


def gradient_of(model: Any) -> dict[str, Tensor]:
    """The gradients of a model's parameters, which are cleared."""
    found = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return found


def graded(model: Any, shared: Plan, found: Tensor) -> Graded:
    """The log-probs of a plan's targets and the gradient of their weighted sum."""
    model.zero_grad()
    (found * upstream(shared, found.dtype)).sum().backward()
    return Graded(found.detach(), gradient_of(model))


def streamed(model: Any, shared: Plan, **options: Any) -> Graded:
    """The same from `backward`, which takes a few completions at a time."""
    model.zero_grad()
    weights = shared.padded(upstream(shared, model.dtype))
    out = weights.new_zeros(shared.given)

    def loss(hidden: Tensor, head: Any, part: Any) -> Any:
        found = score(hidden, head, part.plan.targets)
        return (found * part.plan.packed(weights)).sum(), found, part.completions

    count = 0
    for _, found, which in backward(model, shared, loss, micro_batch=MICRO_BATCH, **options):
        own = shared.completions(which)
        out += own.padded(found)
        count += len(which)
    assert count == len(shared.prompt_of)
    return Graded(shared.packed(out), gradient_of(model))


def through(model: Any, shared: Plan, route: str, **options: Any) -> Graded:
    """Log-probs and gradient through one route, or through `backward`."""
    if route == "backward":
        return streamed(model, shared, **options)
    return graded(model, shared, log_probs(model, shared, route, **options))


def assert_same(got: Graded, want: Graded, tolerance: float) -> None:
    """Check log-probs, and the gradients of all parameters relative to the norm of the whole gradient."""
    error = (got.log_probs - want.log_probs).abs().max().item()
    assert error <= tolerance, f"log-probs differ by {error:.1e}"
    assert got.gradient.keys() == want.gradient.keys()
    norm = sum(x.square().sum().item() for x in want.gradient.values()) ** 0.5
    assert norm > 1e-2
    for name, x in want.gradient.items():
        error = (got.gradient[name] - x).norm().item() / norm
        assert error <= tolerance, f"the gradient of {name} differs by {error:.1e} of the norm"


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Let code that asks for float32 have float64: norms, routers and rotary positions of transformers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(Tensor, "float", Tensor.double)
        yield


@functools.cache
def truth(name: str, dtype: torch.dtype) -> tuple[Any, Plan, Graded]:
    """A model, the plan of the batch, and what the model itself computes; no test changes them."""
    model, given = build(name, dtype), batch()
    shared = plan(**given)
    return model, shared, graded(model, shared, alone(model, given))
