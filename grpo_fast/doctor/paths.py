"""Which path each operator takes on a machine: found by calling it, not by a second set of rules."""

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
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
        error: what was raised, "" where the call succeeded; then `ran` is "".
    """

    operator: str
    given: str
    ran: str
    compiled: str
    fallbacks: list[str]
    error: str = ""


def paths(device: torch.device) -> list[Path]:
    """Call each operator with a few rows of a large vocabulary, and return what ran."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with lenient():
        return [
            *(_tried(name, partial(call, _Given(device, dtype))) for name, call in CALLS.items()),
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


class _Given(NamedTuple):
    """The tensors of a call. Each is made when it is asked for: memory may be short."""

    device: torch.device
    dtype: torch.dtype

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(*shape, dtype=dtype or self.dtype, device=self.device)

    @property
    def logits(self) -> Tensor:
        return self.new(2, 2, V).requires_grad_()

    @property
    def head(self) -> tuple[Tensor, Tensor]:
        return self.new(2, 2, 64).requires_grad_(), self.new(V, 64)

    @property
    def ids(self) -> Tensor:
        return self.new(2, 2, dtype=torch.int64)

    @property
    def logps(self) -> Tensor:
        return self.new(2, 2, dtype=torch.float32)

    @property
    def ones(self) -> Tensor:
        return self.new(2, dtype=torch.float32) + 1


@notices.logged("scaling")
def _scaled(x: Tensor, factor: Tensor) -> None:
    scale_rows_(x, factor)


SEQUENCE = Objective(ratio="sequence")
# A call of each operator.
CALLS: dict[str, Callable[[_Given], Any]] = {
    "logprob": lambda x: logprob(x.logits.detach(), x.ids),
    "grpo": lambda x: grpo_loss(x.logits, x.ids, advantages=x.ones),
    "policy_loss": lambda x: policy_loss(x.logps, advantages=x.ones),
    "sequence_loss": lambda x: policy_loss(
        x.logps, old_logps=x.logps, advantages=x.ones, objective=SEQUENCE
    ),
    "group_advantage": lambda x: group_advantage(x.ones, group_size=2),
    "linear_logprob": lambda x: linear_logprob(*x.head, x.ids),
    "linear_grpo": lambda x: linear_grpo_loss(*x.head, x.ids, advantages=x.ones),
    "scaling": lambda x: _scaled(x.new(2, 2, V), x.new(4, dtype=torch.float32)),
}


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
    """Make a call, and return what ran, or the error."""
    with warnings.catch_warnings(record=True) as said, notices.recorded() as calls:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:  # of whatever does not work here; the doctor goes on
            found = " ".join(f"{type(error).__name__}: {error}".split())
            return Path(name, "", "", "", [], found)
    fallbacks = [str(x.message) for x in said if str(x.message).startswith("grpo_fast")]
    outer = calls[-1]
    return Path(name, outer.given, outer.ran, _compiled(outer.ran), fallbacks)


def _compiled(ran: str) -> str:
    """Say what compiles a path."""
    if "Triton kernels" in ran:
        return "by Triton, at the first launch"
    if "compiled, blocks" in ran:
        return "by inductor, at the first call"
    if "Triton's interpreter" in ran:
        return "no, interpreted"
    return "no, eager" if "PyTorch path" in ran else ""
