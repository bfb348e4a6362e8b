"""Batches of hidden states for the loss, and the loss against the reference."""

import torch

from grpo_fast import reference
from grpo_fast.loss import linear_grpo_loss
from grpo_fast.ops import linear_grpo
from grpo_fast.testing import assert_as_accurate
from tests.support.cases import in_double
from tests.support.heads import HEADS, call, graded, make


def batch(B, T, V, device, head=HEADS["plain"], D=8, drift=0.3, dtype=torch.float32):
    """(head tensors, head options, ids, loss arguments): row 1 is empty, row 0 without advantage."""
    tensors, options = make(B * T, D, V, device, head, dtype)
    tensors["hidden"] = tensors["hidden"].view(B, T, D)
    lengths = torch.randint(1, T + 1, (B,)).to(device)
    if B > 1:
        lengths[1] = 0
    mask = torch.arange(T, device=device) < lengths[:, None]
    ids = torch.randint(options.get("vocab_size", V), (B, T)).to(device)
    floats = {k: x.float() for k, x in tensors.items()}
    logp = call(reference.linear_logprob, floats, options, ids)
    old, ref = (logp + drift * torch.randn(B, T).to(device) for _ in range(2))
    advantages = torch.randn(B).to(device)
    if B > 1:
        advantages[0] = 0
    tensors["hidden"] = torch.where(mask[..., None], tensors["hidden"], torch.nan)
    arguments = {
        "mask": mask,
        "advantages": advantages,
        "old_logps": torch.where(mask, old, torch.nan),
        "ref_logps": torch.where(mask, ref, torch.nan),
    }
    return tensors, options, ids.where(mask, -100), arguments


def loss_and_grads(fn, tensors, options, ids, arguments, upstream=1.0, frozen=(), **kwargs):
    """{name: the loss, and `upstream` times its gradients}."""
    leaves = graded(tensors, frozen=frozen)
    out = call(fn, leaves, options, ids, **arguments, **kwargs)
    loss = getattr(out, "loss", out)
    leaves = {k: x for k, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(upstream * loss, list(leaves.values()))
    return {"loss": loss} | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


def check(tensors, options, ids, arguments, upstream=1.0, frozen=(), **kwargs):
    actual = loss_and_grads(
        linear_grpo_loss, tensors, options, ids, arguments, upstream, frozen, **kwargs
    )
    oracle = (reference.linear_grpo, options, ids)
    baseline = loss_and_grads(oracle[0], tensors, *oracle[1:], arguments, upstream, frozen)
    doubled = {k: x.double() for k, x in tensors.items()}
    truth = loss_and_grads(oracle[0], doubled, *oracle[1:], in_double(arguments), upstream, frozen)
    assert actual.keys() == truth.keys()
    for name in truth:
        scale = 0.1 if name == "loss" else 0.0  # its terms are of the size of 1, and cancel
        assert_as_accurate(actual[name], baseline[name], truth[name], name=name, scale=scale)
    return actual


def packed(tensors, ids, arguments):
    """Remove the padding of a batch: tokens end to end, with their boundaries."""
    mask = arguments["mask"]
    lengths = mask.sum(1)
    flat = {k: x[mask] for k, x in arguments.items() if k in ("old_logps", "ref_logps")}
    flat["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    flat["advantages"] = arguments["advantages"]
    return {**tensors, "hidden": tensors["hidden"][mask]}, ids[mask], flat


def ways_taken(monkeypatch):
    """A list that gets the way of each head's gradients that is planned from here on."""
    taken = []
    plan = linear_grpo.plan

    def recorded(*args):
        taken.append(plan(*args))
        return taken[-1]

    monkeypatch.setattr(linear_grpo, "plan", recorded)
    return taken
