"""Nothing is timed before it is right: results are held against float64 on the benchmark's own inputs.

Log-probs and losses are compared on all tokens, gradients in the logits on some rows (float64 gradients
of all of them would not fit). The yardstick is `grpo_fast.reference` in float32, rounded to the dtype of the
logits where the result is.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.inputs import Batch, head_logps
from grpo_fast import reference
from grpo_fast.testing import assert_as_accurate

CHUNK_ELEMENTS = 1 << 24  # of float64 at a time
MAX_ROWS = 64  # whose gradient is looked at


@dataclasses.dataclass
class Result:
    """What a provider has to reproduce; `grad` of the rows in `rows`, or of all tokens without logits."""

    value: Tensor
    grad: Tensor | tuple[Tensor, ...] | None
    rows: Tensor | None = None


def expected(stem: str, batch: Batch, dtype: torch.dtype) -> Result:
    """The result of `grpo_fast.reference` in `dtype`."""
    if stem == "group_advantage":
        rewards = batch.rewards.to("cpu", dtype)  # a loop over groups: no place for a GPU
        return Result(reference.group_advantage(rewards, group_size=batch.shape.G), None)
    if stem in ("policy_loss", "sequence_loss"):
        return Result(*_loss_and_grad(batch, batch.logps, dtype))
    if batch.head is not None:
        return _expected_of_head(stem, batch, dtype)
    logps = _logps(batch, dtype)
    if stem == "logprob":
        value, dlogp = logps, batch.upstream.to(dtype)
    else:
        value, dlogp = _loss_and_grad(batch, logps, dtype)
    rows = _some_rows(batch)
    return Result(value, _dlogits(batch, dlogp, rows, dtype), rows)


def check(stem: str, batch: Batch, value: Tensor, grad: Tensor | tuple[Tensor, ...] | None) -> None:
    """Compare a provider's result, and its gradient in logits or log-probs if it has one.

    Raises:
        AssertionError: it is wrong; it must not be timed.
    """
    if stem not in batch.expected:
        batch.expected[stem] = tuple(
            expected(stem, batch, t) for t in (torch.float64, torch.float32)
        )
    truth, baseline = batch.expected[stem]
    assert_as_accurate(
        _with_scale(value, batch),
        _with_scale(baseline.value, batch),
        _with_scale(truth.value, batch),
        name=f"{stem}: value",
    )
    if grad is None:
        return
    if isinstance(grad, tuple):  # of hidden states and weight
        for name, *three in zip(("hidden", "weight"), grad, baseline.grad, truth.grad, strict=True):
            ours, plain, exact = three
            ours = ours.flatten(0, -2)
            assert_as_accurate(ours, plain.to(ours.dtype), exact, name=f"{stem}: gradient, {name}")
        return
    assert isinstance(truth.grad, Tensor)
    assert isinstance(baseline.grad, Tensor)
    if truth.rows is not None:
        grad = grad.flatten(0, 1)[truth.rows]
    assert_as_accurate(grad, baseline.grad.to(grad.dtype), truth.grad, name=f"{stem}: gradient")


def _with_scale(value: Tensor, batch: Batch) -> Tensor:
    """A loss next to the size of its terms: they cancel, so its own size is no measure of its error."""
    if value.ndim:
        return value
    scale = batch.arguments["advantages"].abs().mean()
    return torch.stack([value.detach(), scale.to(value)])


def _loss_and_grad(batch: Batch, logps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logps = logps.to(dtype).requires_grad_()
    arguments = {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in batch.arguments.items()
    }
    loss = reference.policy_loss(logps, objective=batch.objective, **arguments)
    (grad,) = torch.autograd.grad(loss, logps)
    return loss.detach(), grad


def _expected_of_head(stem: str, batch: Batch, dtype: torch.dtype) -> Result:
    """The gradients in all hidden states and in the weight, some rows of logits at a time."""
    assert batch.head is not None
    hidden, weight = (x.detach().to(dtype) for x in batch.head)
    logps = head_logps(hidden, weight, batch.ids)
    if stem == "linear_logprob":
        value, dlogp = logps, batch.upstream.to(dtype)
    else:
        value, dlogp = _loss_and_grad(batch, logps, dtype)
    dhidden, dweight = torch.empty_like(hidden).flatten(0, 1), torch.zeros_like(weight)
    for c in _chunks(batch.shape.N, batch.shape.V):
        h = hidden.flatten(0, 1)[c]
        p = (h @ weight.T).softmax(-1)
        p.scatter_add_(1, batch.ids.flatten()[c, None], p.new_full((len(p), 1), -1.0))
        dz = p.mul_(-dlogp.flatten()[c, None])
        dhidden[c] = dz @ weight
        dweight.addmm_(dz.T, h)
    return Result(value, (dhidden, dweight))


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


def _some_rows(batch: Batch) -> Tensor:
    """First, last, and evenly between: sequence ends, padding and every group are among them."""
    N = batch.shape.N
    return torch.linspace(0, N - 1, min(N, MAX_ROWS), device=batch.ids.device).long()


def _dlogits(batch: Batch, dlogp: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    logits, ids = _flat(batch)
    z = logits[rows].to(dtype).requires_grad_()
    logp = reference.logprob(z, ids[rows])
    (grad,) = torch.autograd.grad(logp, z, dlogp.flatten()[rows].to(dtype))
    return grad
