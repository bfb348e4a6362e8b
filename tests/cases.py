"""Batches for the tests: ragged, one row empty, NaN in the padding, old and reference policies."""

import pytest
import torch

from grpo_fast import reference

# Triton's interpreter truncates to bfloat16 where the hardware rounds: its accuracy is tested on a GPU.
HALVES = [torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
DTYPES = [torch.float32, *HALVES]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def batch(B, T, V, device, dtype=torch.float32, spread=3.0, drift=0.3, garbage=True):
    """(logits (B, T, V), ids (B, T), arguments): row 1 is empty, others end at random."""
    logits = spread * torch.randn(B, T, V, device=device, dtype=dtype)
    ids = torch.randint(V, (B, T), device=device)
    lengths = torch.randint(1, T + 1, (B,), device=device)
    if B > 1:
        lengths[1] = 0
    mask = torch.arange(T, device=device) < lengths[:, None]
    logp = reference.logprob(logits.float(), ids)
    old = logp + drift * torch.randn(B, T, device=device)
    ref = logp + drift * torch.randn(B, T, device=device)
    if garbage:  # nothing of a masked token may be used
        logits = torch.where(mask[..., None], logits, torch.nan)
        ids = torch.where(mask, ids, -100)
        old, ref = (torch.where(mask, x, torch.nan) for x in (old, ref))
    arguments = {
        "advantages": torch.randn(B, device=device),
        "mask": mask,
        "old_logps": old,
        "ref_logps": ref,
    }
    return logits, ids, arguments


def in_double(arguments):
    """The same arguments with floating tensors in float64."""
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
