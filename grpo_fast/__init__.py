"""The fused loss stage of GRPO-style post-training.

`grpo_fast.loss` holds the losses. `grpo_fast.ops` holds the differentiable operations that they
consist of. `grpo_fast.reference` has the definitions in plain PyTorch. The functions that most
programs need can be imported from `grpo_fast` itself.
"""

import importlib
from typing import TYPE_CHECKING, Any

from grpo_fast.objective import Objective

if TYPE_CHECKING:
    from grpo_fast import diagnostics, loss, ops, presets, reference, weights
    from grpo_fast.diagnostics import token_diagnostics
    from grpo_fast.invariance import check_invariance
    from grpo_fast.loss import (
        LossOutput,
        fold_statistics,
        grpo_loss,
        linear_grpo_loss,
        metrics_from,
        policy_loss,
    )
    from grpo_fast.ops.group_advantage import group_advantage
    from grpo_fast.ops.linear_logprob import linear_logprob
    from grpo_fast.ops.logprob import logprob

__all__ = [
    "LossOutput",
    "Objective",
    "check_invariance",
    "diagnostics",
    "fold_statistics",
    "group_advantage",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logprob",
    "logprob",
    "loss",
    "metrics_from",
    "ops",
    "policy_loss",
    "presets",
    "reference",
    "token_diagnostics",
    "weights",
]
__version__ = "0.1.0"

# These are loaded at first use (PEP 562), so that a program that only needs `Objective` does not
# load the operators.
_MODULES = ("diagnostics", "loss", "ops", "presets", "reference", "weights")
_HOME = {
    "LossOutput": "loss",
    "check_invariance": "invariance",
    "fold_statistics": "loss",
    "group_advantage": "ops.group_advantage",
    "grpo_loss": "loss",
    "linear_grpo_loss": "loss",
    "linear_logprob": "ops.linear_logprob",
    "logprob": "ops.logprob",
    "metrics_from": "loss",
    "policy_loss": "loss",
    "token_diagnostics": "diagnostics",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES and name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = importlib.import_module(f"{__name__}.{_HOME.get(name, name)}")
    if name in _HOME:
        found = getattr(found, name)
    globals()[name] = found  # the next access does not call this function
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
