"""Language-model heads of each kind, and log-probs of hidden states against the reference."""

import pytest
import torch

from grpo_fast import reference
from grpo_fast.ops import linear_logprob
from grpo_fast.testing import assert_as_accurate

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "logit_scale": {"logit_scale": 0.4},
    "padded vocabulary": {"vocab_size": 90},
    "lora": {"lora": 0.7},
    "everything": {
        "bias": True,
        "softcap": 4.0,
        "logit_scale": 1.7,
        "vocab_size": 90,
        "lora": 2.0,
    },
}

by_head = pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)


def make(N, D, V, device, options=HEADS["plain"], dtype=torch.float32, rank=3, scale=1.0):
    """(tensors by name: hidden, weight, and those the options ask for; the other options)."""
    options = dict(options)

    def normal(*shape):  # on the CPU: see tests/support/cases.py
        return torch.randn(*shape).to(device, dtype)

    tensors = {"hidden": normal(N, D), "weight": scale * normal(V, D) / D**0.5}
    if options.pop("bias", None):
        tensors["bias"] = normal(V)
    if "lora" in options:
        tensors["A"], tensors["B"] = normal(rank, D) / D**0.5, normal(V, rank)
    return tensors, options


def call(fn, tensors, options, *args, **kwargs):
    """`fn` on the head that the tensors and options describe."""
    options = dict(options)
    if "lora" in options:
        options["lora"] = (tensors["A"], tensors["B"], options["lora"])
    if "bias" in tensors:
        options["bias"] = tensors["bias"]
    return fn(tensors["hidden"], tensors["weight"], *args, **options, **kwargs)


def graded(tensors, dtype=None, frozen=()):
    return {
        k: x.detach().to(dtype or x.dtype).requires_grad_(k not in frozen)
        for k, x in tensors.items()
    }


def values_and_grads(fn, tensors, options, upstream, *args, frozen=(), **kwargs):
    """{name: value or gradient} for upstream gradients of (log-probs, entropy)."""
    tensors = graded(tensors, frozen=frozen)
    outputs = call(fn, tensors, options, *args, return_entropy=True, **kwargs)
    found = dict(zip(("logp", "entropy"), outputs, strict=True))
    # Where a token is masked, values are unspecified.
    masked = upstream[0] == 0
    found = {k: x.masked_fill(masked, 0) for k, x in found.items()}
    total = sum((x * u.to(x)).sum() for x, u in zip(found.values(), upstream, strict=True))
    leaves = {k: x for k, x in tensors.items() if x.requires_grad}
    grads = torch.autograd.grad(total, list(leaves.values()))
    return found | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


def check_log_probs(
    tensors, options, ids, upstream, frozen=(), mask=None, temperature=1.0, **kwargs
):
    same = {"frozen": frozen, "mask": mask, "temperature": temperature}
    fn, oracle = linear_logprob, reference.linear_logprob
    actual = values_and_grads(fn, tensors, options, upstream, ids, **same, **kwargs)
    baseline = values_and_grads(oracle, tensors, options, upstream, ids, **same)
    doubled = {k: x.double() for k, x in tensors.items()}
    if isinstance(temperature, torch.Tensor):
        same["temperature"] = temperature.double()
    truth = values_and_grads(oracle, doubled, options, upstream, ids, **same)
    assert actual.keys() == truth.keys()
    for name in truth:
        assert_as_accurate(actual[name], baseline[name], truth[name], name=name)


def targets(N, V, device):
    """(ids, mask, upstream gradients, 0 where masked)."""
    ids = torch.randint(V, (N,))
    mask = torch.rand(N) < 0.7
    upstream = torch.randn(2, N) * mask
    return ids.where(mask, -100).to(device), mask.to(device), upstream.to(device)
