"""The code blocks of docs/scaling.md give the loss and the gradient of the whole batch."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from grpo_fast import Objective, fold_statistics, grpo_loss
from tests.support import ranks

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text()
COMMON, TOKENS, SEQUENCES, SCALER, DDP, ACCELERATE, DEEPSPEED = re.findall(
    r"```python\n(.*?)```", PAGE, re.DOTALL
)
D, V, T = 4, 13, 6


class Model(torch.nn.Linear):
    """Logits of inputs (B, T, D), and what the losses of a step add up to."""

    def __init__(self):
        torch.manual_seed(5)
        super().__init__(D, V, bias=False)


def whole_batch(ranks=1):
    """Eight sequences for each rank, of different lengths; numbers 4 and 5 have no live token."""
    rng = torch.Generator().manual_seed(0)
    lengths = torch.tensor([6, 1, 3, 2, 0, 0, 5, 4, 1, 1, 0, 0, 2, 6, 6, 3])[: 8 * ranks]
    B = len(lengths)
    return {
        "inputs": torch.randn(B, T, D, generator=rng),
        "completion_ids": torch.randint(V, (B, T), generator=rng),
        "advantages": torch.randn(B, generator=rng),
        "mask": torch.arange(T) < lengths[:, None],
        "old_logps": -3 - 0.1 * torch.rand(B, T, generator=rng),
    }


def cut(batch, sizes):
    """Micro-batches of these numbers of sequences."""
    parts = {name: x.split(sizes) for name, x in batch.items()}
    return [{name: x[i] for name, x in parts.items()} for i in range(len(sizes))]


def in_one_go(objective, batch):
    model = Model()
    out = grpo_loss(
        model(batch["inputs"]), **{k: x for k, x in batch.items() if k != "inputs"}, objective=objective
    )  # fmt: skip
    out.loss.backward()
    return out.loss.detach(), model.weight.grad


def step(block, sizes, batch, scope=None, model=None):
    """Run a block: (the sum of the losses that were differentiated, the gradient)."""
    losses = []
    original = torch.Tensor.backward

    def backward(loss):
        losses.append(loss.detach())
        original(loss)

    model = model or Model()
    scope = {"torch": torch, "model": model, "micro_batches": cut(batch, sizes)} | (scope or {})
    torch.Tensor.backward = backward
    try:
        exec(COMMON + block, scope)
    finally:
        torch.Tensor.backward = original
    (weight,) = model.parameters()
    return torch.stack(losses).sum(), weight.grad


def same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


RAGGED = [1, 3, 2, 2]  # the third has no live token
BY_SEQUENCES = ["sequence_mean", "sequence_sum", "fixed_length"]


def with_reduction(block, reduction):
    length = ", max_length=10" if reduction == "fixed_length" else ""
    return block.replace('"sequence_mean"', f'"{reduction}"{length}')


def objective_of(reduction):
    return Objective(reduction=reduction, max_length=10 if reduction == "fixed_length" else None)


def test_token_mean():
    same(step(TOKENS, RAGGED, whole_batch()), in_one_go(objective_of("token_mean"), whole_batch()))


@pytest.mark.parametrize("reduction", BY_SEQUENCES)
def test_means_of_sequences(reduction):
    found = step(with_reduction(SEQUENCES, reduction), RAGGED, whole_batch())
    same(found, in_one_go(objective_of(reduction), whole_batch()))


def test_grad_scaler():
    """The optimizer's step has taken the scale out of the gradients again."""
    model, scaler = Model(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scope = {"scaler": scaler, "optimizer": optimizer, "device": "cpu"}
    loss, grad = step(SCALER, RAGGED, whole_batch(), scope, model)
    same((loss / 1024, grad), in_one_go(objective_of("token_mean"), whole_batch()))


def test_the_mean_of_means_is_another():
    """The page warns of this mistake."""
    wrong = TOKENS.replace(", num_items=num_items", "")
    found = step(wrong, RAGGED, whole_batch())[0] / len(RAGGED)
    assert (found - in_one_go(objective_of("token_mean"), whole_batch())[0]).abs() > 0.01


def averaging(world, steps):
    """A stand-in for Accelerate and DeepSpeed: what it divides, and the mean over ranks, simulated."""

    def backward(loss):
        (loss / steps).backward()

    return SimpleNamespace(
        backward=backward,
        gradient_accumulation_steps=steps,
        num_processes=world,
        reduce=lambda x, how: x,
    )


def over_ranks(block, name, world=2):
    """Each rank's part of a batch in turn, and the mean of their gradients."""
    batch = whole_batch(world)
    of_ranks = cut(batch, [8] * world)
    scope = averaging(world, len(RAGGED))
    scope.reduce = lambda x, how: batch["mask"].sum()
    if name == "engine":
        scope.gradient_accumulation_steps = lambda: len(RAGGED)
        scope.step = lambda: None
    found = [step(block, RAGGED, part, {name: scope, "world_size": world}) for part in of_ranks]
    return [torch.stack(x).mean(0) for x in zip(*found, strict=True)], batch


def test_accelerate():
    found, batch = over_ranks(ACCELERATE, "accelerator")
    same(found, in_one_go(objective_of("token_mean"), batch))


@pytest.mark.parametrize("reduction", BY_SEQUENCES)
def test_deepspeed(reduction):
    found, batch = over_ranks(with_reduction(DEEPSPEED, reduction), "engine")
    same(found, in_one_go(objective_of(reduction), batch))


def ddp_on_a_rank():
    dist.init_process_group("gloo")
    batch = whole_batch(2)
    mine = cut(batch, [8, 8])[dist.get_rank()]
    model = torch.nn.parallel.DistributedDataParallel(Model())
    loss, grad = step(DDP, RAGGED, mine, model=model)
    dist.all_reduce(loss)
    same((loss / 2, grad), in_one_go(objective_of("token_mean"), batch))


@ranks.needs_gloo
def test_ddp():
    ranks.run("tests.loss.test_scaling:ddp_on_a_rank", 2)


def test_metrics_of_micro_batches():
    """docs/metrics.md, "Over micro-batches and ranks"."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    model, batch = Model(), whole_batch()

    def output(part):
        given = {k: x for k, x in part.items() if k != "inputs"}
        return grpo_loss(model(part["inputs"]), **given, return_entropy=True)

    scope = {"outputs": [output(part) for part in cut(batch, RAGGED)]}
    exec(block, scope)
    want = output(batch)
    for name, x in want.metrics.items():
        torch.testing.assert_close(scope["metrics"][name], x)
    assert want.statistics.shape == fold_statistics(scope["gathered"]).shape
