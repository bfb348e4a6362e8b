"""Nothing is timed before it is right: results are held against float64 on the benchmark's own inputs.

Log-probs and losses are compared on all tokens, gradients in the logits on some rows (float64 gradients
of all of them would not fit). The yardstick is `grpo_fast.reference` in float32, rounded to the dtype of the
logits where the result is.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks import providers
from benchmarks.inputs.batches import Batch
from grpo_fast import reference
from grpo_fast.testing import assert_as_accurate

CHUNK_ELEMENTS = 1 << 24  # of float64 at a time
MAX_ROWS = 64  # whose gradient is looked at
# Errors may be this many times plain PyTorch's. Other libraries round a logsumexp near 30, or sum in another
# order, and are not wrong for that: what they lose is in the table, next to their time.
FACTOR, FACTOR_OF_PEERS = 2.0, 10.0


@dataclasses.dataclass
class Result:
    """What a provider has to reproduce; `grad` of the rows in `rows`, or of all tokens without logits."""

    value: Tensor
    grad: Tensor | None
    rows: Tensor | None = None


def expected(stem: str, batch: Batch, dtype: torch.dtype) -> Result:
    """The result of `grpo_fast.reference` in `dtype`."""
    if stem == "group_advantage":
        rewards = batch.rewards.to("cpu", dtype)  # a loop over groups: no place for a GPU
        return Result(reference.group_advantage(rewards, group_size=batch.shape.G), None)
    if stem in ("policy_loss", "sequence_loss"):
        return Result(*loss_and_grad(batch, batch.logps, dtype))
    logps = _logps(batch, dtype)
    if stem == "logprob":
        value, dlogp = logps, batch.upstream.to(dtype)
    else:
        value, dlogp = loss_and_grad(batch, logps, dtype)
    rows = some_rows(batch)
    return Result(value, _dlogits(batch, dlogp, rows, dtype), rows)


def factor_of(provider: str) -> float:
    return FACTOR if providers.library(provider) in providers.OWN else FACTOR_OF_PEERS


def check(
    stem: str, batch: Batch, value: Tensor, grad: Tensor | None, factor: float = FACTOR
) -> dict[str, float]:
    """Compare a provider's result, and its gradient in logits or log-probs if it has one.

    Returns:
        The errors against float64 in units of the largest true entry: "value", and "gradient".
    Raises:
        AssertionError: it is wrong; it must not be timed.
    """
    if stem not in batch.expected:
        batch.expected[stem] = tuple(
            expected(stem, batch, t) for t in (torch.float64, torch.float32)
        )
    truth, baseline = batch.expected[stem]
    value, exact = with_scale(value, batch), with_scale(truth.value, batch)
    plain = with_scale(baseline.value, batch)
    assert_as_accurate(value, plain, exact, factor, name=f"{stem}: value")
    errors = {"value": relative_error(value, exact)}
    if grad is None:
        return errors
    assert truth.grad is not None
    assert baseline.grad is not None
    if truth.rows is not None:
        grad = grad.flatten(0, 1)[truth.rows]
    plain = baseline.grad.to(grad.dtype)
    assert_as_accurate(grad, plain, truth.grad, factor, name=f"{stem}: gradient")
    return errors | {"gradient": relative_error(grad, truth.grad)}


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """The largest error in units of the largest true entry."""
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    return ((actual - truth).abs().max() / truth.abs().max().clamp(min=1e-300)).item()


def with_scale(value: Tensor, batch: Batch) -> Tensor:
    """A loss next to the size of its terms: they cancel, so its own size is no measure of its error."""
    if value.ndim:
        return value
    scale = batch.arguments["advantages"].abs().mean()
    return torch.stack([value.detach(), scale.to(value)])


def loss_and_grad(batch: Batch, logps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logps = logps.detach().to(dtype).requires_grad_()
    arguments = {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in batch.arguments.items()
    }
    loss = reference.policy_loss(logps, objective=batch.objective, **arguments)
    (grad,) = torch.autograd.grad(loss, logps)
    return loss.detach(), grad


def _flat(batch: Batch) -> tuple[Tensor, Tensor]:
    assert batch.logits is not None
    return batch.logits.detach().flatten(0, 1), batch.ids.flatten()


def _chunks(N: int, V: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // V)
    for start in range(0, N, step):
        yield slice(start, start + step)


def _logps(batch: Batch, dtype: torch.dtype) -> Tensor:
    logits, ids = _flat(batch)
    parts = [reference.logprob(logits[c].to(dtype), ids[c]) for c in _chunks(*logits.shape)]
    return torch.cat(parts).view_as(batch.ids)


def some_rows(batch: Batch) -> Tensor:
    """First, last, and evenly between: sequence ends, padding and every group are among them."""
    N = batch.shape.N
    return torch.linspace(0, N - 1, min(N, MAX_ROWS), device=batch.ids.device).long()


def _dlogits(batch: Batch, dlogp: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    logits, ids = _flat(batch)
    z = logits[rows].to(dtype).requires_grad_()
    logp = reference.logprob(z, ids[rows])
    (grad,) = torch.autograd.grad(logp, z, dlogp.flatten()[rows].to(dtype))
    return grad
