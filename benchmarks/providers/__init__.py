"""Who is measured. A provider of a stem is one function of its contract, or a reason why it is missing.

    logprob          (logits, ids) -> log-probs
    policy_loss, sequence_loss
                     (logps, *, mask, advantages, old_logps, ref_logps, objective) -> loss
    grpo             (logits, ids, *, mask, advantages, old_logps, ref_logps, objective) -> loss
    group_advantage  (rewards, group_size) -> advantages
    linear_logprob   (hidden, weight, ids) -> log-probs
    linear_grpo      (hidden, weight, ids, *, mask, advantages, old_logps, ref_logps, objective) -> loss
    linear_cross_entropy
                     (hidden, weight, ids) -> mean of -log-prob

Other libraries live in `peers_*.py`. To add one, write a loader that imports it and returns such a function,
and enter it below. A loader that raises `UnavailableError` or `ImportError` becomes a skip that names the
reason.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.providers import eager
from benchmarks.providers import heads as peers_heads
from benchmarks.providers import liger as peers_liger
from benchmarks.providers import trl as peers_trl
from benchmarks.providers.common import Function, UnavailableError
from grpo_fast import Objective
from grpo_fast.loss import grpo_loss, linear_grpo_loss, policy_loss
from grpo_fast.ops import group_advantage, linear_logprob, logprob

__all__ = [
    "EXTRA_ROW",
    "OVERWRITES",
    "PROVIDERS",
    "Function",
    "UnavailableError",
    "library",
    "load",
]

INPLACE = "grpo_fast-inplace"
# May overwrite the logits: these get a copy of their own each time.
OVERWRITES = {INPLACE, "liger"}
# Want the logits of one position more per sequence, as the model returns them.
EXTRA_ROW = {"liger"}


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


def loss_of(fn: Callable[..., Any], **options: Any) -> Callable[[], Function]:
    def call(*tensors: Tensor, **arguments: Any) -> Tensor:
        return fn(*tensors, **arguments, **options).loss

    return lambda: call


def own_group_advantage(rewards: Tensor, group_size: int) -> Tensor:
    return group_advantage(rewards, group_size=group_size)


def own_linear_logprob(**options: Any) -> Callable[[], Function]:
    return lambda: functools.partial(linear_logprob, **options)


def own_cross_entropy() -> Function:
    """The mean of -log-prob is the REINFORCE loss with an advantage of 1."""
    objective = Objective(surrogate="reinforce", reduction="token_mean")

    def call(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        ones = torch.ones(ids.shape[0], device=ids.device)
        return linear_grpo_loss(
            hidden, weight, ids, advantages=ones, objective=objective, compact=False
        ).loss

    return call


PROVIDERS: dict[str, dict[str, Callable[[], Function]]] = {
    "logprob": {
        "eager": lambda: eager.logprob,
        "compile": compiled(eager.logprob),
        "trl": peers_trl.logprob,
        "grpo_fast": lambda: logprob,
    },
    "policy_loss": {
        "eager": lambda: eager.policy_loss,
        "compile": compiled(eager.policy_loss),
        "trl": peers_trl.policy_loss,
        "grpo_fast": loss_of(policy_loss),
    },
    "sequence_loss": {
        "eager": lambda: eager.policy_loss,
        "compile": compiled(eager.policy_loss),
        "trl": peers_trl.policy_loss,
        "grpo_fast": loss_of(policy_loss),
    },
    "grpo": {
        "eager": lambda: eager.grpo,
        "compile": compiled(eager.grpo),
        "trl": peers_trl.grpo,
        "liger": peers_liger.grpo,
        "grpo_fast": loss_of(grpo_loss),
        INPLACE: loss_of(grpo_loss, inplace=True),
    },
    "group_advantage": {
        "eager": lambda: eager.group_advantage,
        "compile": compiled(eager.group_advantage),
        "grpo_fast": lambda: own_group_advantage,
    },
}
HIDDEN_PROVIDERS: dict[str, dict[str, Callable[[], Function]]] = {
    "linear_logprob": {
        "eager": lambda: eager.linear_logprob,
        "compile": compiled(eager.linear_logprob),
        "torch-lce": peers_heads.torch_logprob,
        "trl": peers_trl.linear_logprob,
        "liger-scaled-ce": peers_liger.linear_logprob,
        "cce": peers_heads.cce_logprob(exact=False),
        "cce-exact": peers_heads.cce_logprob(exact=True),
        "verl": peers_heads.verl_logprob,
        "grpo_fast": own_linear_logprob(),
        "grpo_fast-bf16": own_linear_logprob(logits_dtype="bf16"),
    },
    "linear_grpo": {
        "eager": lambda: eager.linear_grpo,
        "compile": compiled(eager.linear_grpo),
        "torch-lce": peers_heads.with_eager_loss(peers_heads.torch_logprob, ignores=True),
        "trl": peers_trl.linear_grpo,
        "liger-chunked": peers_liger.linear_grpo,
        "liger-scaled-ce": peers_heads.with_eager_loss(peers_liger.linear_logprob, ignores=True),
        "cce": peers_heads.with_eager_loss(peers_heads.cce_logprob(exact=False), ignores=True),
        "cce-exact": peers_heads.with_eager_loss(peers_heads.cce_logprob(exact=True), ignores=True),
        "verl": peers_heads.with_eager_loss(peers_heads.verl_logprob, ignores=False),
        "grpo_fast": loss_of(linear_grpo_loss),
        "grpo_fast-bf16": loss_of(linear_grpo_loss, logits_dtype="bf16"),
        "grpo_fast-all-rows": loss_of(linear_grpo_loss, compact=False),
    },
    "linear_cross_entropy": {
        "eager": lambda: eager.linear_cross_entropy,
        "compile": compiled(eager.linear_cross_entropy),
        "torch-lce": peers_heads.torch_cross_entropy,
        "liger-flce": peers_liger.cross_entropy,
        "cce": peers_heads.cce_cross_entropy(exact=False),
        "cce-exact": peers_heads.cce_cross_entropy(exact=True),
        "quack": peers_heads.quack_cross_entropy,
        "grpo_fast": own_cross_entropy,
    },
}
PROVIDERS |= HIDDEN_PROVIDERS
OWN = ("eager", "compile", "torch", "grpo_fast")


def library(name: str) -> str:
    """Whose code a provider runs: "cce-exact" is "cce"."""
    return name.split("-")[0]


def load(stem: str, name: str) -> Function:
    """The function of a provider.

    Raises:
        UnavailableError: it cannot run here.
    """
    try:
        return PROVIDERS[stem][name]()
    except (ImportError, RuntimeError) as error:
        if (missing := _failed_import(error)) is None:
            raise
        raise UnavailableError(f"not installed: {missing.name or missing}") from error


def _failed_import(error: BaseException | None) -> ImportError | None:
    """The ImportError behind an error; TRL makes a RuntimeError of one in a module that it loads lazily."""
    while isinstance(error, RuntimeError) and str(error).startswith("Failed to import trl."):
        error = error.__cause__
    return error if isinstance(error, ImportError) else None
