"""Who is measured. A provider of a stem is one function of its contract, or a reason why it is missing.

    logprob          (logits, ids) -> log-probs
    policy_loss, sequence_loss
                     (logps, *, mask, advantages, old_logps, ref_logps, objective) -> loss
    grpo             (logits, ids, *, mask, advantages, old_logps, ref_logps, objective) -> loss
    linear_logprob   (hidden, weight, ids) -> log-probs
    linear_grpo      (hidden, weight, ids, *, as grpo) -> loss
    group_advantage  (rewards, group_size) -> advantages

To add a library, write a loader that imports it and returns such a function, and enter it below. A loader
that raises `UnavailableError` or `ImportError` becomes a skip that names the reason.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import eager
from grpo_fast.loss import grpo_loss, linear_grpo_loss, policy_loss
from grpo_fast.ops import group_advantage, linear_logprob, logprob

Function = Callable[..., Tensor]

INPLACE = "grpo_fast-inplace"  # may overwrite the logits: gets a copy of its own each time


class UnavailableError(Exception):
    """This provider cannot run here; the message says why."""


def compiled(fn: Function) -> Callable[[], Function]:
    def load() -> Function:
        if not torch.cuda.is_available():
            from torch._inductor import cpp_builder, exc

            try:
                cpp_builder.get_cpp_compiler()
            except exc.InvalidCxxCompiler as error:
                raise UnavailableError("torch.compile finds no C++ compiler") from error
        torch._dynamo.reset()  # or it gives up after a few shapes
        return torch.compile(fn, dynamic=False)

    return load


def trl_logprob() -> Function:
    """TRL's Triton kernel; it computes the entropy as well, always."""
    if not torch.cuda.is_available():
        raise UnavailableError("TRL's kernel needs a GPU")
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    return lambda logits, ids: selective_log_softmax_and_entropy(logits, ids)[0]


def loss_of(fn: Callable[..., Any], **options: Any) -> Callable[[], Function]:
    def call(*tensors: Tensor, **arguments: Any) -> Tensor:
        return fn(*tensors, **arguments, **options).loss

    return lambda: call


def own_group_advantage(rewards: Tensor, group_size: int) -> Tensor:
    return group_advantage(rewards, group_size=group_size)


PROVIDERS: dict[str, dict[str, Callable[[], Function]]] = {
    "logprob": {
        "eager": lambda: eager.logprob,
        "compile": compiled(eager.logprob),
        "trl": trl_logprob,
        "grpo_fast": lambda: logprob,
    },
    "policy_loss": {
        "eager": lambda: eager.policy_loss,
        "compile": compiled(eager.policy_loss),
        "grpo_fast": loss_of(policy_loss),
    },
    "sequence_loss": {
        "eager": lambda: eager.policy_loss,
        "compile": compiled(eager.policy_loss),
        "grpo_fast": loss_of(policy_loss),
    },
    "grpo": {
        "eager": lambda: eager.grpo,
        "compile": compiled(eager.grpo),
        "grpo_fast": loss_of(grpo_loss),
        INPLACE: loss_of(grpo_loss, inplace=True),
    },
    "linear_logprob": {
        "eager": lambda: eager.linear_logprob,
        "compile": compiled(eager.linear_logprob),
        "grpo_fast": lambda: linear_logprob,
    },
    "linear_grpo": {
        "eager": lambda: eager.linear_grpo,
        "compile": compiled(eager.linear_grpo),
        "grpo_fast": loss_of(linear_grpo_loss),
        "grpo_fast-uncompacted": loss_of(linear_grpo_loss, compact=False),
    },
    "group_advantage": {
        "eager": lambda: eager.group_advantage,
        "compile": compiled(eager.group_advantage),
        "grpo_fast": lambda: own_group_advantage,
    },
}


def load(stem: str, name: str) -> Function:
    """The function of a provider.

    Raises:
        UnavailableError: it cannot run here.
    """
    try:
        return PROVIDERS[stem][name]()
    except ImportError as error:
        raise UnavailableError(f"not installed: {error.name or error}") from error
