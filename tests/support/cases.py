"""Batches of logits: ragged, one row empty, NaN in the padding, with old and reference policies.

Drawn on the CPU: the same batch on every device, and what a test needs of its numbers holds on all of them.
"""

import pytest
import torch

from grpo_fast import reference
from grpo_fast.loss import grpo_loss
from grpo_fast.testing import assert_as_accurate

# Triton's interpreter truncates to bfloat16 where the hardware rounds: its accuracy is tested on a GPU.
HALVES = [torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
DTYPES = [torch.float32, *HALVES]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def batch(B, T, V, device, dtype=torch.float32, spread=3.0, drift=0.3, garbage=True):
    """(logits (B, T, V), ids (B, T), arguments): row 1 is empty, others end at random."""
    logits = spread * torch.randn(B, T, V, dtype=dtype)
    ids = torch.randint(V, (B, T))
    lengths = torch.randint(1, T + 1, (B,))
    if B > 1:
        lengths[1] = 0
    mask = torch.arange(T) < lengths[:, None]
    logp = reference.logprob(logits.float(), ids)
    old = logp + drift * torch.randn(B, T)
    ref = logp + drift * torch.randn(B, T)
    if garbage:  # nothing of a masked token may be used
        logits = torch.where(mask[..., None], logits, torch.nan)
        ids = torch.where(mask, ids, -100)
        old, ref = (torch.where(mask, x, torch.nan) for x in (old, ref))
    arguments = {
        "advantages": torch.randn(B),
        "mask": mask,
        "old_logps": old,
        "ref_logps": ref,
    }
    arguments = {name: x.to(device) for name, x in arguments.items()}
    return logits.to(device), ids.to(device), arguments


def in_double(arguments):
    """Return the arguments with floating tensors in float64."""
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


def loss_and_grad(fn, x, *args, upstream=1.0, **kwargs):
    """The loss of `fn`, and `upstream` times its gradient in the first argument."""
    x = x.detach().clone().requires_grad_()
    out = fn(x, *args, **kwargs)
    loss = getattr(out, "loss", out)
    (grad,) = torch.autograd.grad(upstream * loss, x)
    return loss, grad


def in_other_company(backend, device):
    """Tolerances for a row among other rows: none.

    But PyTorch's own sums on a GPU share a row between threads by how many rows there are.
    """
    ours = backend == "triton" or device == "cpu"
    return {"rtol": 0, "atol": 0} if ours else {"rtol": 1e-6, "atol": 1e-6}


def tokens(device, B=6, T=9, drift=0.4, garbage=True):
    """(old_logps, sampling_logps, mask), rows 1 and 4 empty, NaN in the padding."""
    old = -torch.rand(B, T).exp()
    sampling = old + drift * torch.randn(B, T)
    lengths = torch.randint(1, T + 1, (B,))
    lengths[0], lengths[1], lengths[4] = T, 0, 0
    mask = torch.arange(T) < lengths[:, None]
    if garbage:
        old, sampling = (torch.where(mask, x, torch.nan) for x in (old, sampling))
    return old.to(device), sampling.to(device), mask.to(device)


def packed(mask, *tensors):
    """The live tokens and one dead one of each row, end to end, with their boundaries and mask."""
    keep = mask | (mask.cumsum(1) == mask.sum(1, keepdim=True)) & (
        torch.arange(mask.shape[1], device=mask.device) == mask.sum(1, keepdim=True)
    )
    boundaries = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0))
    return boundaries, mask[keep], *(x[keep] for x in tensors)


def check(logits, ids, arguments, upstream=1.0):
    actual = loss_and_grad(grpo_loss, logits, ids, upstream=upstream, **arguments)
    baseline = loss_and_grad(reference.grpo_loss, logits, ids, upstream=upstream, **arguments)
    truth = loss_and_grad(
        reference.grpo_loss, logits.double(), ids, upstream=upstream, **in_double(arguments)
    )
    for name, a, b, t in zip(("loss", "dlogits"), actual, baseline, truth, strict=True):
        assert_as_accurate(a, b, t, name=name)


def held(x, before, gap):
    """x, (B, T, V), with `gap` entries between its rows, and `before` before the first; all these NaN."""
    B, T, V = x.shape
    stride_t = V + gap
    stride_b = T * stride_t + gap
    storage = x.new_full((before + B * stride_b + 3,), torch.nan)
    return storage.as_strided(x.shape, (stride_b, stride_t, 1), before).copy_(x)
