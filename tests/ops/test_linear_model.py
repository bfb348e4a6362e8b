"""The fused head inside a model: activation checkpointing, and FSDP on two processes."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from grpo_fast import reference
from grpo_fast.loss import linear_grpo_loss
from grpo_fast.ops import linear_logprob
from grpo_fast.testing import assert_as_accurate
from tests.support.ranks import needs_gloo, run

V, D = 40, 8


class Model(nn.Module):
    """One layer and a head; the loss is taken in the forward, where FSDP has gathered the weights."""

    def __init__(self, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.layer = nn.Linear(D, D)
        self.head = nn.Linear(D, V)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids, **arguments):
        hidden = self.layer(self.embedding(ids)).tanh()
        head = {"bias": self.head.bias, "chunk_size": 4}
        return linear_grpo_loss(hidden, self.head.weight, ids, **head, **arguments).loss


def batch(B=4, T=3, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "ids": torch.randint(V, (B, T), generator=generator),
        "advantages": torch.randn(B, generator=generator),
        "old_logps": torch.full((B, T), -3.7),
        "mask": torch.rand(B, T, generator=generator) < 0.8,
    }
    return {name: x.to(device) for name, x in tensors.items()}


def gradients(model):
    return {name: x.grad for name, x in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_activation_checkpointing(tied, backend, device):
    """Recomputed in the backward: the same gradients, in the head's weight and below it."""
    model, given = Model(tied).to(device), batch(device=device)
    (2 * model(**given)).backward()
    want = gradients(model)
    model.zero_grad()
    (2 * checkpoint(model, use_reentrant=False, **given)).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, want[name], rtol=0, atol=0)


def test_checkpointing_keeps_no_gradient_buffer():
    """The first forward's gradients are dropped; the backward computes them again."""
    weight = torch.randn(V, D, requires_grad=True)
    hidden = torch.randn(6, D, requires_grad=True)
    saved = []

    def run(hidden):
        ids = torch.zeros(6, dtype=torch.int64)
        return linear_grpo_loss(hidden, weight, ids, advantages=torch.ones(1)).loss

    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.shape) or x, lambda x: x
    ):
        run(hidden)
    assert weight.shape in saved  # through autograd's own list, which checkpointing empties


def test_checkpointing_around_linear_logprob(backend, device):
    weight = torch.randn(V, D, device=device, requires_grad=True)
    hidden = torch.randn(6, D, device=device, requires_grad=True)
    ids = torch.arange(6, device=device)
    want = torch.autograd.grad(linear_logprob(hidden, weight, ids).sum(), (hidden, weight))
    out = checkpoint(linear_logprob, hidden, weight, ids, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(out.sum(), (hidden, weight)), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def shard_of(batch, rank, ranks):
    share = len(batch["ids"]) // ranks
    return {name: x[rank * share : (rank + 1) * share] for name, x in batch.items()}


def train_sharded():
    """Run the test below in one of its processes."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    mesh = dist.device_mesh.init_device_mesh(device.type, (ranks,))
    for tied in (False, True):
        torch.manual_seed(0)
        whole = Model(tied)
        torch.manual_seed(0)
        model = fully_shard(Model(tied), mesh=mesh)
        # FSDP averages over ranks, and so does a loss that is the mean over sequences.
        for _ in range(2):
            whole(**batch()).backward()
            model(**shard_of(batch(), rank, ranks)).backward()
        for (name, a), (_, b) in zip(
            whole.named_parameters(), model.named_parameters(), strict=True
        ):
            assert isinstance(b.grad, DTensor)
            torch.testing.assert_close(b.grad.full_tensor(), a.grad, rtol=1e-5, atol=1e-6, msg=name)
        outside = torch.zeros(2, D)
        with pytest.raises(TypeError, match="inside the forward"):
            linear_logprob(outside, model.head.weight, torch.zeros(2, dtype=torch.int64))


@needs_gloo
def test_fsdp_on_two_processes():
    """`fully_shard`: gathered in the forward, reduced in the backward, as one process computes it."""
    run("tests.ops.test_linear_model:train_sharded", 2)


@pytest.mark.parametrize("loss", [True, False], ids=["loss", "log-probs"])
def test_a_float32_head_under_half_precision_states(loss, backend, device):
    """Products are of halves, as under autocast, but the gradient of the weight is not rounded."""
    hidden = torch.randn(2, 5, 16, device=device).half()
    weight = torch.randn(33, 16, device=device)
    ids = torch.randint(33, (2, 5), device=device)
    advantages = torch.randn(2, device=device)

    def gradients(weight):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if loss:
            value = linear_grpo_loss(*leaves, ids, advantages=advantages).loss
        else:
            value = (linear_logprob(*leaves, ids) * advantages[:, None]).sum()
        return torch.autograd.grad(value, leaves)

    got, rounded = gradients(weight), gradients(weight.half())
    assert [x.dtype for x in got] == [torch.float16, torch.float32]
    hidden, advantages = hidden.double(), advantages.double()
    leaves = hidden.requires_grad_(), weight.double().requires_grad_()
    logps = reference.logprob(leaves[0] @ leaves[1].T, ids)
    if loss:
        value = reference.policy_loss(logps, advantages=advantages)
    else:
        value = (logps * advantages[:, None]).sum()
    truth = torch.autograd.grad(value, leaves)
    for a, b, t in zip(got, rounded, truth, strict=True):
        assert_as_accurate(a, b, t)
    assert (got[1] != got[1].half()).any()
