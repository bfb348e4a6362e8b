"""Each function on one batch: its values and gradients by token, and those that sum over tokens.

`PATHS` are the ways to compute them. `computed` runs a function; `Batch` changes what must not matter.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_fast import (
    Objective,
    group_advantage,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    logprob,
    policy_loss,
)

# The environment variables of each way to compute.
PATHS = {
    "torch": {"GRPO_FAST_BACKEND": "torch", "GRPO_FAST_COMPILE": "0"},
    "triton": {"GRPO_FAST_BACKEND": "triton"},
    "compiled": {"GRPO_FAST_BACKEND": "torch", "GRPO_FAST_COMPILE": "1"},
}

B, T, D, V, G = 4, 3, 8, 24, 2
LENGTHS = (3, 2, 3, 1)
TOKEN = Objective(beta=0.1, entropy_coef=0.02, reduction="token_mean")
SEQUENCE = Objective(ratio="sequence", beta=0.1, reduction="token_mean")
TEMPERATURE = 0.8
# Of a sequence alone the reduction must be that of the batch.
ITEMS = float(sum(LENGTHS))


@dataclasses.dataclass(frozen=True)
class Batch:
    """The tensors of a batch, padded (B, T, ...) or packed (N, ...)."""

    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def of(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with other sequences: `change` of each tensor but the head's."""
        changed = {k: x if k == "weight" else change(x) for k, x in self.tensors.items()}
        return Batch(changed)

    def sequences(self, which: Any) -> "Batch":
        """These sequences alone, or all in another order."""
        return self.of(lambda x: x[which])

    def packed(self) -> "Batch":
        """The live tokens end to end."""
        mask = self["mask"]
        changed = {
            k: x[mask] if k != "weight" and x.shape[:2] == mask.shape else x
            for k, x in self.tensors.items()
        }
        changed["cu_seqlens"] = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        return Batch(changed)


def batch(vocabulary: int = V, device: str = "cpu") -> Batch:
    """The batch of all tests, drawn on the CPU."""
    new = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=new)

    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    found = {
        "logits": 3 * randn(B, T, vocabulary),
        "hidden": randn(B, T, D),
        "weight": randn(vocabulary, D),
        "ids": torch.randint(vocabulary, (B, T), generator=new),
        "logps": -randn(B, T).exp(),
        "old_logps": -randn(B, T).exp(),
        "ref_logps": -randn(B, T).exp(),
        "entropy": randn(B, T).exp(),
        "upstream": randn(B, T),
        "advantages": randn(B),
        "rewards": randn(B),
        "mask": mask,
    }
    return Batch({k: x.to(device) for k, x in found.items()})


@dataclasses.dataclass(frozen=True)
class Found:
    """Of a function: tensors with a row for each token or sequence, and sums over all of them.

    A masked token has no value: it holds 0.
    """

    rows: dict[str, Tensor]
    sums: dict[str, Tensor]

    def sequences(self, which: Any) -> "Found":
        """The rows of these sequences."""
        return Found({name: x[which] for name, x in self.rows.items()}, self.sums)


def _loss_arguments(t: Batch, objective: Objective) -> dict[str, Any]:
    names = ("mask", "old_logps", "ref_logps", "advantages", "cu_seqlens")
    given: dict[str, Any] = {name: t[name] for name in names if name in t.tensors}
    return given | {"objective": objective, "num_items": ITEMS}


def _of_weight(gradients: list[Tensor]) -> dict[str, Tensor]:
    return {"weight's gradient": gradients[0]} if gradients else {}


def _of_log_probs(function: Any, names: tuple[str, ...]) -> Callable[..., Found]:
    def run(t: Batch, **options: Any) -> Found:
        leaves = [t[name].clone().requires_grad_() for name in names]
        given = {"mask": t["mask"], "temperature": TEMPERATURE, "return_entropy": True}
        logp, entropy = function(*leaves, t["ids"], **given, **options)
        total = ((logp + 0.3 * entropy) * t["upstream"])[t["mask"]].sum()
        first, *rest = torch.autograd.grad(total, leaves)
        rows = {"logp": logp.detach(), "entropy": entropy.detach(), "gradient": first}
        return Found(rows, _of_weight(rest))

    return run


def _of_loss(function: Any, names: tuple[str, ...], objective: Objective) -> Callable[..., Found]:
    def run(t: Batch, **options: Any) -> Found:
        leaves = [t[name].clone().requires_grad_() for name in names]
        given = _loss_arguments(t, objective)
        if function is policy_loss:
            given["entropy"] = t["entropy"] if objective.needs_entropy else None
            out = function(*leaves, **given)
        else:
            given["temperature"] = TEMPERATURE
            out = function(*leaves, t["ids"], **given, **options)
        first, *rest = torch.autograd.grad(out.loss, leaves)
        rows = {"logp": out.logps.detach(), "gradient": first}
        return Found(rows, {"loss": out.loss.detach(), **_of_weight(rest)})

    return run


def _advantages(t: Batch, **options: Any) -> Found:
    return Found({"advantage": group_advantage(t["rewards"], group_size=G)}, {})


LOGITS, HIDDEN, LOGPS = ("logits",), ("hidden", "weight"), ("logps",)
FUNCTIONS: dict[str, Callable[..., Found]] = {
    "logprob": _of_log_probs(logprob, LOGITS),
    "linear_logprob": _of_log_probs(linear_logprob, HIDDEN),
    "grpo_loss": _of_loss(grpo_loss, LOGITS, TOKEN),
    "grpo_loss, by sequence": _of_loss(grpo_loss, LOGITS, SEQUENCE),
    "linear_grpo_loss": _of_loss(linear_grpo_loss, HIDDEN, TOKEN),
    "linear_grpo_loss, by sequence": _of_loss(linear_grpo_loss, HIDDEN, SEQUENCE),
    "policy_loss": _of_loss(policy_loss, LOGPS, TOKEN),
    "sequence_loss": _of_loss(policy_loss, LOGPS, SEQUENCE),  # the kernel of that name
    "group_advantage": _advantages,
}


def computed(name: str, t: Batch, **options: Any) -> Found:
    """Run a function of `FUNCTIONS`; `options` are those of the head."""
    found = FUNCTIONS[name](t, **options)
    for x in found.rows.values():
        if x.shape[: t["mask"].ndim] == t["mask"].shape:
            x[~t["mask"]] = 0
    return found
