"""Make batches as training does: confident tokens, ragged lengths, rewards of 0 and 1."""

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import hidden as hidden_states
from benchmarks.inputs.shapes import DEAD, REALISTIC, Shape
from benchmarks.providers import eager
from grpo_fast import Objective

SPREAD = 2.0  # standard deviation of the logits but the scored one
MEAN_LOGP = -0.5  # of sampled tokens; most are near 0, some far below
# Together the inputs that take turns must not fit into a GPU's L2 cache, or reading them costs
# nothing.
ROTATION_BYTES = 256 << 20
MAX_ROTATION = 64
# A realistic batch: lengths log-normal, cut off at T (a few per cent are), their mean about T / 2.
MEDIAN_LENGTH, LENGTH_SPREAD = 0.45, 0.5
EQUAL_GROUPS = {"zero-variance": 0.5, REALISTIC: 0.4}  # share of groups whose rewards do not differ
PRESETS = {"zero-variance": "dapo", REALISTIC: "dapo", "gspo": "gspo"}


@dataclasses.dataclass
class Batch:
    """The inputs of all benchmarks. Per-token tensors are (B, T)."""

    shape: Shape
    logits: Any  # (B, T, V); None where the benchmark starts from hidden states
    logps: Tensor
    ids: Tensor
    rewards: Tensor  # (B,)
    upstream: Tensor  # a gradient to send back through log-probs
    objective: Objective
    arguments: dict[str, Any]  # of a loss: mask, advantages, old_logps, ref_logps
    hidden: Any = None  # (B, T, D); None where the benchmark starts from logits
    weight: Any = None  # (V, D); likewise
    # What the reference makes of it, by stem, once somebody asked (`gate`).
    expected: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def live(self) -> int:
        """The number of tokens that count."""
        mask = self.arguments["mask"]
        return self.shape.N if mask is None else int(mask.sum())

    @property
    def moving(self) -> int:
        """The number of tokens with a gradient: they count, and have an advantage or a KL term."""
        if self.objective.beta:
            return self.live
        moves = (self.arguments["advantages"] != 0)[:, None].expand(self.ids.shape)
        mask = self.arguments["mask"]
        return int((moves if mask is None else moves & mask).sum())


def make_batch(
    shape: Shape,
    variant: str,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    hidden: bool = False,
) -> Batch:
    """Make a batch of one of `shapes.VARIANTS`, from hidden states or from logits."""
    B, T, V = shape.B, shape.T, shape.V
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    logits = states = weight = None
    if hidden:
        made = hidden_states.make(shape.N, shape.D, V, device, dtype, seed)
        states, weight, ids = made.hidden.view(B, T, -1), made.weight, made.ids.view(B, T)
        logps = _log_probs(made).view(B, T)
    else:
        # -log p of a sampled token: exponential, many near 0 and a tail, as in a trained model.
        logps = torch.empty(B, T, device=device).exponential_(1 / -MEAN_LOGP, generator=generator)
        logps = -logps.clamp(1e-5, 12.0)
        ids = torch.randint(max(V, 1), (B, T), device=device, generator=generator)
    if V and not hidden:
        logits = torch.empty(B, T, V, device=device, dtype=dtype)
        logits.normal_(0, SPREAD, generator=generator)
        # The logsumexp of the others is log V + SPREAD^2 / 2: place the scored one to reach its
        # log-prob.
        scored = math.log(V) + SPREAD**2 / 2 + logps - torch.log(-torch.expm1(logps))
        logits.scatter_(2, ids[..., None], scored[..., None].to(dtype))
    # Without a KL term a token without advantage has no gradient: the case worth telling apart.
    options = {"beta": 0.04} if variant == "gspo" else {}
    rewards = _rewards(shape, variant, device)
    return Batch(
        shape=shape,
        logits=logits,
        logps=logps,
        ids=ids,
        rewards=rewards,
        upstream=normal(B, T),
        objective=Objective.preset(PRESETS.get(variant, "grpo"), **options),
        arguments={
            "mask": _mask(shape, variant, device, generator),
            "advantages": eager.group_advantage(rewards, shape.G),
            "old_logps": logps + 0.05 * normal(B, T),
            "ref_logps": logps + 0.1 * normal(B, T),
        },
        hidden=states,
        weight=weight,
    )


def _log_probs(made: hidden_states.Hidden) -> Tensor:
    parts = []
    for start in range(0, len(made.ids), 512):
        z = (made.hidden[start : start + 512] @ made.weight.mT).float()
        ids = made.ids[start : start + 512, None]
        parts.append((z.gather(1, ids) - torch.logsumexp(z, 1, keepdim=True)).squeeze(1))
    return torch.cat(parts).clamp(max=-1e-5)


def _mask(
    shape: Shape, variant: str, device: torch.device, generator: torch.Generator
) -> Tensor | None:
    B, T = shape.B, shape.T
    if variant == "padded":
        lengths = torch.randint(T * 2 // 5, T + 1, (B, 1), device=device, generator=generator)
    elif variant == REALISTIC:
        spread = torch.randn(B, 1, device=device, generator=generator) * LENGTH_SPREAD
        lengths = (MEDIAN_LENGTH * T * spread.exp()).ceil().clamp(max=T)
    elif variant == DEAD:
        lengths = torch.full((B, 1), T * 2 // 5, device=device)
    else:
        return None
    return torch.arange(T, device=device) < lengths


def _rewards(shape: Shape, variant: str, device: torch.device) -> Tensor:
    """Give half of each group a reward of 1, or all of it."""
    B, G = shape.B, shape.G
    sequence = torch.arange(B, device=device)
    rewards = (sequence % G < G // 2).float()
    share = EQUAL_GROUPS.get(variant, 0.0)
    # Spread evenly over the batch: group g is equal where the count of equal ones goes up.
    group = sequence // G
    equal = torch.ceil((group + 1) * share - 1e-9) > torch.ceil(group * share - 1e-9)
    return torch.where(equal, 1.0, rewards)


@functools.lru_cache(maxsize=1)  # one at a time: a batch may fill a third of the device
def rotation(
    shape: Shape, variant: str, device: torch.device, dtype: torch.dtype, hidden: bool = False
) -> tuple[Batch, ...]:
    """Make batches that take turns, so that none is found in the cache; on the CPU one."""
    if device.type == "cpu":
        count = 1
    else:
        nbytes = shape.N * (shape.V * dtype.itemsize or 20)
        if hidden:
            nbytes = (shape.N + shape.V) * shape.D * dtype.itemsize
        count = min(max(ROTATION_BYTES // nbytes, 1), MAX_ROTATION)
    return tuple(make_batch(shape, variant, device, dtype, seed, hidden) for seed in range(count))
