"""Helpers of the other libraries' providers."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from grpo_fast import Objective

Function = Callable[..., Tensor]
IGNORED = -100  # the id that cross-entropies leave out


class UnavailableError(Exception):
    """This provider cannot run here; the message says why."""


def need_gpu(name: str, interpreted: bool = False) -> None:
    """Refuse to load without a GPU; `interpreted`: Triton's interpreter will do, for tests.

    Raises:
        UnavailableError: neither is there.
    """
    can = torch.cuda.is_available()
    if not can and not (interpreted and os.environ.get("TRITON_INTERPRET") == "1"):
        raise UnavailableError(f"{name} needs a GPU")


def loss_type(objective: Objective) -> str:
    """Translate a reduction into TRL's and Liger's name for it."""
    known = {"sequence_mean": "grpo", "token_mean": "bnpo"}
    if objective.surrogate != "clip" or objective.reduction not in known:
        raise UnavailableError(f"no loss type for {objective}")
    return known[objective.reduction]
