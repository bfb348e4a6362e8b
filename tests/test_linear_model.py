"""The fused head inside a model: activation checkpointing, and FSDP on two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from grpo_fast.loss import linear_grpo_loss
from grpo_fast.ops import linear_logprob

ROOT = Path(__file__).resolve().parents[1]
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


def batch(B=4, T=3):
    generator = torch.Generator().manual_seed(0)
    return {
        "ids": torch.randint(V, (B, T), generator=generator),
        "advantages": torch.randn(B, generator=generator),
        "old_logps": torch.full((B, T), -3.7),
        "mask": torch.rand(B, T, generator=generator) < 0.8,
    }


def gradients(model):
    return {name: x.grad for name, x in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_activation_checkpointing(tied, backend):
    """Recomputed in the backward: the same gradients, in the head's weight and below it."""
    model = Model(tied)
    (2 * model(**batch())).backward()
    want = gradients(model)
    model.zero_grad()
    (2 * checkpoint(model, use_reentrant=False, **batch())).backward()
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


def test_checkpointing_around_linear_logprob(backend):
    weight = torch.randn(V, D, requires_grad=True)
    hidden = torch.randn(6, D, requires_grad=True)
    ids = torch.arange(6)
    want = torch.autograd.grad(linear_logprob(hidden, weight, ids).sum(), (hidden, weight))
    out = checkpoint(linear_logprob, hidden, weight, ids, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(out.sum(), (hidden, weight)), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def shard_of(batch, rank, ranks):
    share = len(batch["ids"]) // ranks
    return {name: x[rank * share : (rank + 1) * share] for name, x in batch.items()}


def train_sharded():
    """What each process of the test below runs."""
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
    dist.destroy_process_group()
    print(f"rank {rank} done")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_fsdp_on_two_processes():
    """`fully_shard`: gathered in the forward, reduced in the backward, as one process computes it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    code = "from tests.test_linear_model import train_sharded; train_sharded()"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment | {"RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, output
        assert f"rank {rank} done" in output
