"""Hold results against float64 on the benchmark's own inputs, before every timing.

Values are compared on all tokens, gradients on some rows, as float64 gradients of all rows would
not fit. The yardstick is `grpo_fast.reference` in plain PyTorch. On logits it runs in float32, and
its gradient is rounded to the dtype of the result. From hidden states it runs in the dtype of the
inputs, whose products round the logits to it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import providers
from benchmarks.inputs.batches import Batch
from grpo_fast import reference
from grpo_fast.testing import assert_as_accurate

CHUNK_ELEMENTS = 1 << 24  # of float64 at a time
MAX_ROWS = 64  # tokens whose gradient is looked at
MAX_ENTRIES = 256  # entries of the vocabulary whose row of dweight is looked at
# Errors may be this many times plain PyTorch's. Other libraries round a logsumexp near 30, or sum
# in another order. That is not wrong, and the table shows their errors next to their times.
FACTOR, FACTOR_OF_PEERS = 2.0, 10.0
Results = dict[str, Tensor]  # "value", then "gradient", or "dhidden" and "dweight"


class WrongError(AssertionError):
    """A result that is further from the truth than it may be."""


def factor_of(provider: str) -> float:
    return FACTOR if providers.library(provider) in providers.OWN else FACTOR_OF_PEERS


def check(
    stem: str, batch: Batch, value: Tensor, grads: Sequence[Tensor] = (), factor: float = FACTOR
) -> dict[str, float]:
    """Compare a provider's value, and its gradients if it has any, with float64.

    Returns:
        The errors in units of the largest true entry, by name.
    Raises:
        WrongError: the result must not be timed.
    """
    if stem not in batch.expected:
        plain = torch.float32 if batch.hidden is None else batch.hidden.dtype
        batch.expected[stem] = [expected(stem, batch, t) for t in (torch.float64, plain)]
    truth, baseline = batch.expected[stem]
    errors, size = {}, batch.arguments["advantages"].abs().mean()
    for name, actual in {"value": value, **_selected(batch, grads)}.items():
        plain = baseline[name] if name == "value" else baseline[name].to(actual.dtype)
        a, p, t = (with_scale(x, size) for x in (actual, plain, truth[name]))
        try:
            assert_as_accurate(a, p, t, factor, name=f"{stem}: {name}")
        except AssertionError as error:
            raise WrongError(*error.args) from None
        errors[name] = relative_error(a, t)
    return errors


def expected(stem: str, batch: Batch, dtype: torch.dtype) -> Results:
    """Compute the result of `grpo_fast.reference` in `dtype`."""
    if stem == "group_advantage":
        rewards = batch.rewards.to("cpu", dtype)  # a loop over groups: no place for a GPU
        return {"value": reference.group_advantage(rewards, group_size=batch.shape.G)}
    if stem in ("policy_loss", "sequence_loss"):
        value, grad = loss_and_grad(batch, batch.logps, dtype)
        return {"value": value, "gradient": grad}
    if batch.hidden is not None:
        return _from_hidden(stem, batch, dtype)
    logits, ids, rows = batch.logits.detach().flatten(0, 1), batch.ids.flatten(), some_rows(batch)
    parts = [reference.logprob(logits[c].to(dtype), ids[c]) for c in _chunks(*logits.shape)]
    value, dlogp = _loss(stem, batch, torch.cat(parts).view_as(batch.ids))
    z = logits[rows].to(dtype).requires_grad_()
    logp = reference.logprob(z, ids[rows])
    (grad,) = torch.autograd.grad(logp, z, dlogp.flatten()[rows].to(dtype))
    return {"value": value, "gradient": grad}


def _from_hidden(stem: str, batch: Batch, dtype: torch.dtype) -> Results:
    """Compute in float64, or as plain PyTorch: products round to `dtype`, the rest is float32."""
    hidden, ids = batch.hidden.detach().flatten(0, 1), batch.ids.flatten()
    weight, entries = batch.weight.detach().to(dtype), some_entries(batch)
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    chunks = _chunks(len(ids), len(weight) // 4)

    def logits(rows: Any) -> Tensor:
        return (hidden[rows].to(dtype) @ weight.mT).to(inner)

    logps = torch.cat([reference.logprob(logits(c), ids[c]) for c in chunks])
    value, dlogp = _loss(stem, batch, logps.view_as(batch.ids))
    dlogp = dlogp.flatten()

    def dlogits(rows: Any) -> Tensor:
        dz = -torch.softmax(logits(rows), -1)
        dz.scatter_add_(1, ids[rows, None], torch.ones_like(dz[:, :1]))
        upstream = dlogp[rows][:, None]
        return torch.where(upstream == 0, 0.0, dz * upstream).to(dtype)

    dweight = torch.zeros(len(entries), hidden.shape[1], dtype=inner, device=ids.device)
    for c in chunks:
        dweight += dlogits(c)[:, entries].to(inner).mT @ hidden[c].to(dtype).to(inner)
    dhidden = dlogits(some_rows(batch)) @ weight
    return {"value": value, "dhidden": dhidden, "dweight": dweight.to(dtype)}


def _loss(stem: str, batch: Batch, logps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value, and its gradient in the log-probs or the upstream gradient."""
    if stem in ("logprob", "linear_logprob"):
        return logps, batch.upstream.to(logps.dtype)
    if stem == "linear_cross_entropy":
        return -logps.mean(), torch.full_like(logps, -1 / logps.numel())
    return loss_and_grad(batch, logps, logps.dtype)


def loss_and_grad(batch: Batch, logps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logps = logps.detach().to(dtype).requires_grad_()
    arguments = in_dtype(batch.arguments, dtype)
    loss = reference.policy_loss(logps, objective=batch.objective, **arguments)
    (grad,) = torch.autograd.grad(loss, logps)
    return loss.detach(), grad


def in_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Convert the floating-point tensors among the arguments."""
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


def _selected(batch: Batch, grads: Sequence[Tensor]) -> Results:
    """Choose the rows of gradients that are compared; positions behind the tokens are left out."""
    if len(grads) == 2:
        dhidden, dweight = grads
        rows, entries = some_rows(batch), some_entries(batch)
        return {"dhidden": dhidden.flatten(0, 1)[rows], "dweight": dweight[entries]}
    if grads and grads[0].ndim == 3:
        return {"gradient": grads[0][:, : batch.shape.T].flatten(0, 1)[some_rows(batch)]}
    return {"gradient": x for x in grads}  # noqa: B035 (of log-probs: one, or none)


def some_rows(batch: Batch) -> Tensor:
    """Choose tokens: first, last, and evenly between, so that every group is among them."""
    N = batch.shape.N
    return torch.linspace(0, N - 1, min(N, MAX_ROWS), device=batch.ids.device).long()


def some_entries(batch: Batch) -> Tensor:
    """Choose entries of the vocabulary: some of all, and some that were scored."""
    spread = torch.linspace(0, batch.shape.V - 1, MAX_ENTRIES // 2, device=batch.ids.device).long()
    scored = batch.ids.flatten()[:: max(1, batch.shape.N // (MAX_ENTRIES // 2))]
    return torch.cat([spread, scored]).unique()


def _chunks(N: int, V: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // V)
    return [slice(start, start + step) for start in range(0, N, step)]


def with_scale(value: Tensor, size: Tensor) -> Tensor:
    """Put a loss next to the size of its terms, which cancel: its own size is no measure."""
    return value if value.ndim else torch.stack([value.detach(), size.to(value)])


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Return the largest error in units of the largest true entry."""
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    return ((actual - truth).abs().max() / truth.abs().max().clamp(min=1e-300)).item()
