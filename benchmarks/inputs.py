"""Batches as training makes them: confident tokens, ragged lengths, rewards of 0 and 1."""

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import Shape
from grpo_fast import Objective, reference

SPREAD = 2.0  # standard deviation of the logits but the scored one
MEAN_LOGP = -0.5  # of sampled tokens; most are near 0, some far below
# Together the inputs that take turns must not fit into a GPU's L2 cache, or reading them costs nothing.
ROTATION_BYTES = 256 << 20
MAX_ROTATION = 64


@dataclasses.dataclass
class Batch:
    """The inputs of all benchmarks. Per-token tensors are (B, T)."""

    shape: Shape
    logits: Tensor | None  # (B, T, V), where the benchmark starts from logits
    logps: Tensor
    ids: Tensor
    rewards: Tensor  # (B,)
    upstream: Tensor  # a gradient to send back through log-probs
    objective: Objective
    arguments: dict[str, Any]  # of a loss: mask, advantages, old_logps, ref_logps
    head: tuple[Tensor, Tensor] | None = None  # (B, T, D) hidden states and (V, D) weight
    # What the reference makes of it, by stem, once somebody asked (`gate`).
    expected: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def live(self) -> int:
        """How many tokens count."""
        mask = self.arguments["mask"]
        return self.shape.N if mask is None else int(mask.sum())


def make_batch(
    shape: Shape, variant: str, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Batch:
    B, T, V, G = shape.B, shape.T, shape.V, shape.G
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    # -log p of a sampled token: exponential, many near 0 and a tail, as in a trained model.
    logps = torch.empty(B, T, device=device).exponential_(1 / -MEAN_LOGP, generator=generator)
    logps = -logps.clamp(1e-5, 12.0)
    ids = torch.randint(max(V, 1), (B, T), device=device, generator=generator)
    logits = None
    head = None
    if shape.D:
        head = _make_head(shape, ids, _scored(V, logps), dtype, generator)
        logps = head_logps(*head, ids)
    elif V:
        logits = torch.empty(B, T, V, device=device, dtype=dtype)
        logits.normal_(0, SPREAD, generator=generator)
        logits.scatter_(2, ids[..., None], _scored(V, logps)[..., None].to(dtype))
    mask = None
    if variant == "padded":
        lengths = torch.randint(T * 2 // 5, T + 1, (B, 1), device=device, generator=generator)
        mask = torch.arange(T, device=device) < lengths
    if variant == "dead":
        mask = (torch.arange(T, device=device) < T * 2 // 5).expand(B, T).contiguous()
    rewards = (torch.arange(B, device=device) % G < G // 2).float()
    if variant == "zero-variance":
        rewards[torch.arange(B, device=device) // G % 2 == 0] = 1.0
    groups = rewards.view(-1, G)
    score = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    # Without a KL term a token without advantage has no gradient: the case worth telling apart.
    preset = {"zero-variance": "dapo", "gspo": "gspo"}.get(variant, "grpo")
    options = {"beta": 0.04} if variant == "gspo" else {}
    return Batch(
        shape,
        logits,
        logps,
        ids,
        rewards,
        normal(B, T),
        Objective.preset(preset, **options),
        {
            "mask": mask,
            "advantages": score.flatten(),
            "old_logps": logps + 0.05 * normal(B, T),
            "ref_logps": logps + 0.1 * normal(B, T),
        },
        head,
    )


def _scored(V: int, logps: Tensor) -> Tensor:
    """Where the scored logit has to be: the logsumexp of the others is log V + SPREAD^2 / 2."""
    return math.log(V) + SPREAD**2 / 2 + logps - torch.log(-torch.expm1(logps))


def _make_head(
    shape: Shape, ids: Tensor, scored: Tensor, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Hidden states whose logits are spread by SPREAD, and that reach the scored logit."""
    hidden = torch.empty(shape.B, shape.T, shape.D, device=ids.device)
    hidden.normal_(generator=generator)
    weight = torch.empty(shape.V, shape.D, device=ids.device)
    weight.normal_(0, SPREAD / shape.D**0.5, generator=generator)
    row = weight[ids]
    gap = scored - (hidden * row).sum(-1)
    hidden += (gap / row.square().sum(-1))[..., None] * row
    return hidden.to(dtype), weight.to(dtype)


def head_logps(hidden: Tensor, weight: Tensor, ids: Tensor, rows: int = 256) -> Tensor:
    """Log-probs in the dtype of the arguments, at least float32, some rows at a time."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    W = weight.to(dtype).T
    h = hidden.detach().flatten(0, 1).to(dtype)
    parts = [
        reference.logprob(h[i : i + rows] @ W, y)
        for i, y in zip(range(0, len(h), rows), ids.flatten().split(rows), strict=True)
    ]
    return torch.cat(parts).view_as(ids)


@functools.lru_cache(maxsize=1)  # one at a time: a batch may fill a third of the device
def rotation(
    shape: Shape, variant: str, device: torch.device, dtype: torch.dtype
) -> tuple[Batch, ...]:
    """Batches to take turns with, so that none is found in the cache; on the CPU one."""
    if device.type == "cpu":
        count = 1
    else:
        nbytes = shape.N * (shape.V * dtype.itemsize or 20)
        if shape.D:
            nbytes = ROTATION_BYTES
        count = min(max(ROTATION_BYTES // nbytes, 1), MAX_ROTATION)
    return tuple(make_batch(shape, variant, device, dtype, seed) for seed in range(count))
