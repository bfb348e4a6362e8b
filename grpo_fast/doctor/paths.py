"""Which path each operator takes on a machine: found by calling it, not by a second set of rules."""

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast import Objective, notices
from grpo_fast.loss import grpo_loss, linear_grpo_loss, policy_loss
from grpo_fast.ops import group_advantage, linear_logprob, logprob
from grpo_fast.ops.head.arguments import HeadArguments, check_head
from grpo_fast.ops.head.chunk_length import length_of
from grpo_fast.ops.scaling import scale_rows_

V = 151_936  # the vocabulary of Qwen models
N, D = 8192, 3584  # tokens and features of the head whose chunks are shown: those of a 7B model


class Path(NamedTuple):
    """One operator and the path that it takes on a machine.

    Attributes:
        operator: its name.
        given: the tensors of the call.
        ran: path and reason, kernels, schedules, chunks.
        compiled: by what.
        fallbacks: the messages of what fell back.
    """

    operator: str
    given: str
    ran: str
    compiled: str
    fallbacks: list[str]


def paths(device: torch.device) -> list[Path]:
    """Call each operator with a few rows of a large vocabulary, and return what ran."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with lenient():
        return [
            *(_tried(name, call) for name, call in _calls(device, dtype).items()),
            _tried("chunks of a head", lambda: _chunks(device, torch.bfloat16)),
            _tried("shared prompts", lambda: _shared(device)),
        ]


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Let fallbacks happen, whatever GRPO_FAST_STRICT says, and forget which were told."""
    before = os.environ.get("GRPO_FAST_STRICT")
    os.environ["GRPO_FAST_STRICT"] = "0"
    notices.forget()
    try:
        yield
    finally:
        notices.forget()
        del os.environ["GRPO_FAST_STRICT"]
        if before is not None:
            os.environ["GRPO_FAST_STRICT"] = before


def _calls(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Return a call of each operator."""

    def new(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.zeros(*shape, dtype=kind, device=device)

    ids, ones = new(2, 2, kind=torch.int64), new(2, kind=torch.float32) + 1
    logps = new(2, 2, kind=torch.float32)
    sequence = Objective(ratio="sequence")
    given: dict[str, Any] = {"advantages": ones}
    hidden, head = new(2, 2, 64), new(V, 64)

    def graded(x: Tensor) -> Tensor:
        return x.requires_grad_()

    return {
        "logprob": lambda: logprob(new(2, 2, V), ids),
        "grpo": lambda: grpo_loss(graded(new(2, 2, V)), ids, **given),
        "policy_loss": lambda: policy_loss(logps, **given),
        "sequence_loss": lambda: policy_loss(logps, old_logps=logps, objective=sequence, **given),
        "group_advantage": lambda: group_advantage(ones, group_size=2),
        "linear_logprob": lambda: linear_logprob(graded(hidden), head, ids),
        "linear_grpo": lambda: linear_grpo_loss(graded(hidden), head, ids, **given),
        "scaling": lambda: _scaled(new(2, 2, V), new(4, kind=torch.float32)),
    }


@notices.logged("scaling")
def _scaled(x: Tensor, factor: Tensor) -> None:
    scale_rows_(x, factor)


@notices.logged("chunks")
def _chunks(device: torch.device, dtype: torch.dtype) -> None:
    """Note the chunks of a head of a 7B model, without memory for it."""
    hidden = torch.empty(N, D, device=device, dtype=dtype)
    weight = torch.empty(1, D, device=device, dtype=dtype).expand(V, D)
    ids = torch.empty(N, device=device, dtype=torch.int64)
    head = HeadArguments(
        weight,
        bias=None,
        softcap=None,
        logit_scale=1.0,
        logits_dtype="fp32",
        vocab_size=None,
        chunk_size=None,
        lora=None,
        tp_group=None,
    )
    options = check_head("doctor", hidden, ids, "ids", head)[2]
    C = length_of(hidden, N, options)
    size = f"{N} tokens, hidden size {D}, {V:,} entries, bfloat16"
    notices.note(f"chunks of {C} tokens: {-(-N // C)} ({size})")


@notices.logged("shared prompts")
def _shared(device: torch.device) -> None:
    """Note the route of a small model whose completions share prompts."""
    if importlib.util.find_spec("transformers") is None:
        notices.note("not available: transformers is not installed")
        return
    from grpo_fast import shared_prompt

    model = tiny_model(device)
    prompts = torch.full((2, 60), 5, device=device)
    plan = shared_prompt.plan(prompts, torch.full((8, 12), 6, device=device), group_size=4)
    notices.note(shared_prompt.choose(model, plan).line)


def tiny_model(device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """Return a Llama of two layers with random weights. It needs transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 61,
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    return model.to(device, dtype).eval()


def _tried(name: str, call: Callable[[], Any]) -> Path:
    """Make a call, and return what ran; an error takes its place."""
    with warnings.catch_warnings(record=True) as said, notices.recorded() as calls:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:  # of whatever does not work here; the doctor goes on
            return Path(name, "", f"{type(error).__name__}: {error}", "", [])
    fallbacks = [str(x.message) for x in said if str(x.message).startswith("grpo_fast")]
    outer = calls[-1]
    return Path(name, outer.given, outer.ran, _compiled(outer.ran), fallbacks)


def _compiled(ran: str) -> str:
    """Say what compiles a path."""
    if "Triton kernels" in ran:
        return "by Triton, at the first launch"
    if "Triton's interpreter" in ran:
        return "no, interpreted"
    return "no, eager" if "PyTorch path" in ran else ""
