"""The providers: who is measured. Each is a function of its stem's contract, or a reason why not.

    logprob                     (logits, ids) -> log-probs
    policy_loss, sequence_loss  (logps, **given) -> loss
    grpo                        (logits, ids, **given) -> loss
    group_advantage             (rewards, group_size) -> advantages
    linear_logprob              (hidden, weight, ids) -> log-probs
    linear_grpo                 (hidden, weight, ids, **given) -> loss
    linear_cross_entropy        (hidden, weight, ids) -> mean of -log-prob

`given` is mask, advantages, old_logps, ref_logps and objective. To add a provider, write a loader
that imports its library and returns such a function, and enter it below. A loader that raises
`UnavailableError` or `ImportError` becomes a skip that names the reason.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.providers import eager, heads, liger, trl
from benchmarks.providers.common import Function, UnavailableError
from grpo_fast import Objective
from grpo_fast.loss import grpo_loss, linear_grpo_loss, policy_loss
from grpo_fast.ops import group_advantage, linear_logprob, logprob

INPLACE = "grpo_fast-inplace"
OVERWRITES = {INPLACE, "liger"}  # the logits: these get a copy of their own each time
EXTRA_ROW = {"liger"}  # the logits of one position more per sequence, as the model returns them
Loader = Callable[[], Function]


def _compiled(fn: Function) -> Loader:
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


def _pytorch(fn: Function) -> dict[str, Loader]:
    return {"eager": lambda: fn, "compile": _compiled(fn)}


def _own(fn: Callable[..., Any], **options: Any) -> Loader:
    """Wrap a function of this project: return its result, or the loss in it."""

    def call(*tensors: Tensor, **arguments: Any) -> Tensor:
        out = fn(*tensors, **arguments, **options)
        return getattr(out, "loss", out)

    return lambda: call


def _own_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> Any:
    """Compute the mean of -log-prob: it is the REINFORCE loss with an advantage of 1."""
    return linear_grpo_loss(
        hidden,
        weight,
        ids,
        advantages=torch.ones(ids.shape[0], device=ids.device),
        objective=Objective(surrogate="reinforce", reduction="token_mean"),
        compact=False,
    )


PROVIDERS: dict[str, dict[str, Loader]] = {
    "logprob": {**_pytorch(eager.logprob), "trl": trl.logprob, "grpo_fast": _own(logprob)},
    "policy_loss": {
        **_pytorch(eager.policy_loss),
        "trl": trl.policy_loss,
        "grpo_fast": _own(policy_loss),
    },
    "grpo": {
        **_pytorch(eager.grpo),
        "trl": trl.grpo,
        "liger": liger.grpo,
        "grpo_fast": _own(grpo_loss),
        INPLACE: _own(grpo_loss, inplace=True),
    },
    "group_advantage": {
        **_pytorch(eager.group_advantage),
        "grpo_fast": _own(lambda rewards, G: group_advantage(rewards, group_size=G)),
    },
}
# Log-probs from hidden states.
TORCH = partial(heads.torch_head, "none")
CCE, CCE_EXACT = (partial(heads.cce, exact, "none") for exact in (False, True))
HIDDEN_PROVIDERS: dict[str, dict[str, Loader]] = {
    "linear_logprob": {
        **_pytorch(eager.linear_logprob),
        "torch-lce": TORCH,
        "trl": trl.linear_logprob,
        "liger-scaled-ce": liger.linear_logprob,
        "cce": CCE,
        "cce-exact": CCE_EXACT,
        "verl": heads.verl_logprob,
        "grpo_fast": _own(linear_logprob),
        "grpo_fast-bf16": _own(linear_logprob, logits_dtype="bf16"),
    },
    "linear_grpo": {
        **_pytorch(eager.linear_grpo),
        "torch-lce": heads.with_eager_loss(TORCH),
        "trl": trl.linear_grpo,
        "liger-chunked": liger.linear_grpo,
        "liger-scaled-ce": heads.with_eager_loss(liger.linear_logprob),
        "cce": heads.with_eager_loss(CCE),
        "cce-exact": heads.with_eager_loss(CCE_EXACT),
        "verl": heads.with_eager_loss(heads.verl_logprob, ignores=False),
        "grpo_fast": _own(linear_grpo_loss),
        "grpo_fast-bf16": _own(linear_grpo_loss, logits_dtype="bf16"),
        "grpo_fast-all-rows": _own(linear_grpo_loss, compact=False),
    },
    "linear_cross_entropy": {
        **_pytorch(eager.linear_cross_entropy),
        "torch-lce": partial(heads.torch_head, "mean"),
        "liger-flce": liger.cross_entropy,
        "cce": partial(heads.cce, False, "mean"),
        "cce-exact": partial(heads.cce, True, "mean"),
        "quack": heads.quack_cross_entropy,
        "grpo_fast": _own(_own_cross_entropy),
    },
}
PROVIDERS |= {"sequence_loss": dict(PROVIDERS["policy_loss"]), **HIDDEN_PROVIDERS}
OWN = ("eager", "compile", "torch", "grpo_fast")


def library(name: str) -> str:
    """Name the library whose code a provider runs: "cce-exact" is "cce"."""
    return name.split("-")[0]


def load(stem: str, name: str) -> Function:
    """Load the function of a provider.

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
    """Find the ImportError behind an error; TRL hides it in a RuntimeError where it loads lazily."""
    while isinstance(error, RuntimeError) and str(error).startswith("Failed to import trl."):
        error = error.__cause__
    return error if isinstance(error, ImportError) else None
