"""Make hidden states and a head whose next-token distributions look like a language model's.

Where speed depends on the data (a head that skips what is nearly 0), random numbers flatter: after
a head of random numbers no entry of the softmax is large. What is imposed here, per token:

- Its entropy, drawn from `ENTROPY`. The two middle points are what was published of a reasoning
  model's chains of thought (arXiv 2506.01939): about half of the tokens below 0.01 nats, a fifth
  above 0.672. The ends are assumptions; between the points log H is linear in the share.
- Its `CANDIDATES` likeliest entries fall like a power law p_k = k^-a / Z, with a chosen to give the
  entropy.
- Which entries these are: ids are ordered by frequency, as byte-pair vocabularies nearly are, and
  drawn with density 1/id (Zipf). A part of them is drawn evenly (`EVEN_SHARE`), so that rare ids
  are used as well.

The hidden state is the least one that gives the candidates their logits; all other entries get what
falls out of the random head, a bell of logits whose logsumexp is accounted for. `describe` tells
what came out.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

ENTROPY = ((0.0, 1e-6), (0.5064, 1e-2), (0.8, 0.672), (1.0, 4.0))  # (share of tokens below, nats)
CANDIDATES = 16
EVEN_SHARE = 0.5
LEAST_TAIL = 1e-9  # probability of all other entries together, at least
FIXED_POINT_STEPS = 8
EXPONENTS = torch.linspace(1.2, 24.0, 2000, dtype=torch.float64)
BLOCK = 128  # of tokens and of entries: what a head may skip at once
SMALL = 2.0**-12  # cut-cross-entropy's threshold for bfloat16


class Hidden(NamedTuple):
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    ids: Tensor  # (N,), drawn from the distributions


def entropies(N: int, generator: torch.Generator) -> Tensor:
    """Draw N entropies in float64: each quantile of `ENTROPY` equally often, in random order."""
    share = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    log_h = torch.empty_like(share)
    for (low, h_low), (high, h_high) in itertools.pairwise(ENTROPY):
        here = (share >= low) & (share <= high)
        part = (share[here] - low) / (high - low)
        log_h[here] = math.log(h_low) + part * (math.log(h_high) - math.log(h_low))
    return log_h.exp()[torch.randperm(N, generator=generator)]


def power_laws(V: int, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p of the candidates (N, K) and of all others together (N,), for given entropies."""
    # Far out p hardly changes from one entry to the next: the first exactly, the rest as an
    # integral.
    k = torch.arange(1, 1025, dtype=torch.float64)
    log_k, a = k.log(), EXPONENTS[:, None]
    heads = torch.exp(-a * log_k)
    b = EXPONENTS - 1
    first = k[-1].item() + 0.5
    rest = (first**-b - (V + 0.5) ** -b) / b if len(k) < V else torch.zeros_like(b)
    rest_log = rest * (math.log(first) + 1 / b)
    z = heads.sum(1) + rest
    h = z.log() + EXPONENTS * ((heads * log_k).sum(1) + rest_log) / z
    order = h.argsort()
    place = torch.searchsorted(h[order], entropy).clamp(0, len(h) - 1)
    chosen = order[place]
    log_p = -EXPONENTS[chosen, None] * log_k[:CANDIDATES] - z[chosen, None].log()
    tail = (-torch.expm1(torch.logsumexp(log_p, 1).clamp(max=0))).clamp(min=LEAST_TAIL)
    return log_p, tail.log()


def candidates(N: int, V: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw (N, K) ids, no two of a token alike."""
    uniform = torch.rand(N, CANDIDATES, device=device, generator=generator, dtype=torch.float64)
    even = torch.rand(N, CANDIDATES, device=device, generator=generator) < EVEN_SHARE
    ids = (
        torch.where(even, uniform * V, torch.exp(uniform * math.log(V)) - 1).long().clamp(max=V - 1)
    )
    # Equal ones move to the next free id: K is small against V.
    ids = ids.sort(1).values
    step = torch.arange(CANDIDATES, device=device)
    ids = (ids - step).cummax(1).values + step
    over = (ids[:, -1:] - (V - 1)).clamp(min=0)
    ids = ids - over
    shuffle = torch.rand(N, CANDIDATES, device=device, generator=generator).argsort(1)
    return ids.gather(1, shuffle)


def make(N: int, D: int, V: int, device: torch.device, dtype: torch.dtype, seed: int) -> Hidden:
    generator = torch.Generator(device).manual_seed(seed)
    host = torch.Generator().manual_seed(seed)
    weight = torch.empty(V, D, device=device, dtype=dtype)
    weight.normal_(0, D**-0.5, generator=generator)
    log_p, log_tail = (x.to(device) for x in power_laws(V, entropies(N, host)))
    chosen = candidates(N, V, generator, device)
    hidden = torch.empty(N, D, device=device, dtype=dtype)
    for start in range(0, N, 1024):
        rows = slice(start, start + 1024)
        w = weight[chosen[rows]].float()  # (n, K, D)
        gram = w @ w.mT + 1e-6 * torch.eye(CANDIDATES, device=device)
        # Logits of the candidates above the logsumexp of the bell, which grows with the hidden
        # state itself.
        above = (log_p[rows] - log_tail[rows, None]).float()
        bell = torch.full((len(above), 1), math.log(V), device=device)
        for _ in range(FIXED_POINT_STEPS):
            z = (bell + above).clamp(min=0.0)
            mix = torch.linalg.solve(gram, z[..., None])
            norm = (mix * z[..., None]).sum((1, 2))  # of the hidden state, squared
            bell = (math.log(V) + norm[:, None] / (2 * D)).clamp(max=60.0)
        hidden[rows] = (w.mT @ mix).squeeze(2).to(dtype)
    return Hidden(hidden, weight, draw(hidden, weight, generator))


def draw(hidden: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one id for each token from its softmax."""
    parts = []
    for rows in hidden.split(max(1, (1 << 26) // len(weight))):
        z = (rows @ weight.mT).float()
        uniform = torch.empty_like(z).uniform_(generator=generator).clamp_(1e-20, 1 - 1e-7)
        parts.append((z - torch.log(-torch.log(uniform))).argmax(1))  # Gumbel
    return torch.cat(parts)


def describe(hidden: Tensor, weight: Tensor, tokens: int = 1024) -> dict[str, float]:
    """Measure some entropies, and how much a head that skips small blocks must do."""
    D = hidden.shape[-1]
    rows = hidden.detach().reshape(-1, D)[:tokens]
    rows = rows[: len(rows) // BLOCK * BLOCK] if len(rows) >= BLOCK else rows
    low = high = kept = blocks = 0
    for part in rows.split(BLOCK):
        logp = torch.log_softmax((part @ weight.detach().mT).float(), -1)
        p = logp.exp()
        h = -(p * logp).sum(1)
        low += int((h < ENTROPY[1][1]).sum())
        high += int((h > ENTROPY[2][1]).sum())
        large = (p > SMALL).any(0)
        columns = torch.nn.functional.pad(large, (0, -len(large) % BLOCK)).view(-1, BLOCK)
        kept += int(columns.any(1).sum())
        blocks += len(columns)
    n = len(rows)
    return {
        "entropy_below_0.01": low / n,
        "entropy_above_0.672": high / n,
        "blocks_kept": kept / blocks,
    }
