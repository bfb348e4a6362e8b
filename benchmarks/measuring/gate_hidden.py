"""The gate (`gate`) of what starts from hidden states: value, some rows of dhidden, some of dweight.

Truth is `grpo_fast.reference` in float64 on the same inputs, taken in chunks of tokens; the yardstick the
same in the dtype of the inputs, whose matmuls round the logits to it.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs.batches import Batch
from benchmarks.measuring import gate
from grpo_fast import reference
from grpo_fast.testing import assert_as_accurate

MAX_ENTRIES = 256  # of the vocabulary, whose row of dweight is looked at


@dataclasses.dataclass
class Result:
    value: Tensor
    dhidden: Tensor  # of `rows`
    dweight: Tensor  # of `entries`


@dataclasses.dataclass
class Sample:
    rows: Tensor  # tokens
    entries: Tensor  # of the vocabulary: some that were scored, some of all


def check(
    stem: str,
    batch: Batch,
    value: Tensor,
    grads: tuple[Tensor, Tensor] | None,
    factor: float = gate.FACTOR,
) -> dict[str, float]:
    """Compare a provider's value and its gradients in hidden states and weight, if it has any.

    Returns:
        The errors against float64 in units of the largest true entry.
    Raises:
        AssertionError: it is wrong; it must not be timed.
    """
    if stem not in batch.expected:
        sample = _sample(batch)
        assert batch.hidden is not None
        plain = _result(stem, batch, sample, batch.hidden.dtype)
        batch.expected[stem] = (sample, _result(stem, batch, sample, torch.float64), plain)
    sample, truth, baseline = batch.expected[stem]
    results = {"value": (value, baseline.value, truth.value)}
    if grads is not None:
        dhidden, dweight = _select(grads, sample)
        results["dhidden"] = (dhidden, baseline.dhidden, truth.dhidden)
        results["dweight"] = (dweight, baseline.dweight, truth.dweight)
    errors = {}
    for name, (actual, plain, exact) in results.items():
        a, p, t = (gate.with_scale(x, batch) for x in (actual, plain, exact))
        assert_as_accurate(a, p, t, factor, name=f"{stem}: {name}")
        errors[name] = gate.relative_error(a, t)
    return errors


def _sample(batch: Batch) -> Sample:
    V, device = batch.shape.V, batch.ids.device
    rows = gate.some_rows(batch)
    spread = torch.linspace(0, V - 1, MAX_ENTRIES // 2, device=device).long()
    scored = batch.ids.flatten()[:: max(1, batch.shape.N // (MAX_ENTRIES // 2))]
    return Sample(rows, torch.cat([spread, scored]).unique())


def _select(grads: tuple[Tensor, Tensor], sample: Sample) -> tuple[Tensor, Tensor]:
    dhidden, dweight = grads
    return dhidden.flatten(0, 1)[sample.rows], dweight[sample.entries]


def _result(stem: str, batch: Batch, sample: Sample, dtype: torch.dtype) -> Result:
    """In float64, or as plain PyTorch does it in `dtype`: matmuls round to it, the rest is float32."""
    assert batch.hidden is not None
    assert batch.weight is not None
    hidden = batch.hidden.detach().flatten(0, 1)
    weight, ids = batch.weight.detach().to(dtype), batch.ids.flatten()
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    step = max(1, gate.CHUNK_ELEMENTS * 4 // len(weight))
    chunks = [slice(i, i + step) for i in range(0, len(ids), step)]
    logps = torch.cat(
        [reference.logprob((hidden[c].to(dtype) @ weight.mT).to(inner), ids[c]) for c in chunks]
    )
    value, dlogp = _loss(stem, batch, logps.view_as(batch.ids))
    dlogp = dlogp.flatten()

    def dlogits(rows: Any) -> tuple[Tensor, Tensor]:
        h = hidden[rows].to(dtype)
        return h, _dlogits((h @ weight.mT).to(inner), ids[rows], dlogp[rows]).to(dtype)

    dhidden = dlogits(sample.rows)[1] @ weight
    dweight = torch.zeros(len(sample.entries), hidden.shape[1], dtype=inner, device=ids.device)
    for c in chunks:
        h, dz = dlogits(c)
        dweight += dz[:, sample.entries].to(inner).mT @ h.to(inner)
    return Result(value, dhidden, dweight.to(dtype))


def _dlogits(z: Tensor, ids: Tensor, dlogp: Tensor) -> Tensor:
    dz = -torch.softmax(z, -1)
    dz.scatter_add_(1, ids[:, None], torch.ones_like(dz[:, :1]))
    return torch.where((dlogp == 0)[:, None], 0.0, dz * dlogp[:, None])


def _loss(stem: str, batch: Batch, logps: Tensor) -> tuple[Tensor, Tensor]:
    """(value, its gradient in the log-probs, or the upstream gradient)."""
    if stem == "linear_logprob":
        return logps, batch.upstream.to(logps.dtype)
    if stem == "linear_cross_entropy":
        return -logps.mean(), torch.full_like(logps, -1 / logps.numel())
    return gate.loss_and_grad(batch, logps, logps.dtype)


def leaves(batch: Batch) -> tuple[Tensor, Tensor]:
    assert batch.hidden is not None
    assert batch.weight is not None
    return batch.hidden.requires_grad_(), batch.weight.requires_grad_()


def run(
    fn: Any, hidden: Tensor, weight: Tensor, batch: Batch, stem: str
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A provider's value and gradients."""
    arguments = {"objective": batch.objective, **batch.arguments} if stem == "linear_grpo" else {}
    value = fn(hidden, weight, batch.ids, **arguments)
    upstream = batch.upstream.to(value.dtype) if stem == "linear_logprob" else None
    dhidden, dweight = torch.autograd.grad(value, (hidden, weight), upstream)
    return value.detach(), (dhidden, dweight)
