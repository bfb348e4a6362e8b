"""The memory of the losses on a CPU, against eager PyTorch, at N = 2048, V = 32000, float32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDED = 2 << 30  # eager: 1 GB with its input

# In a process of its own: nothing else allocates meanwhile, and no freed memory is waiting to be reused.
MEASURE = """
import json, sys, torch
from benchmarks.providers import eager
from benchmarks.inputs import batches as inputs, shapes
from benchmarks.measuring import calls, memory
from grpo_fast.loss import grpo_loss

def run(fn, provider, **options):
    given = calls.prepare("grpo", provider, batch)
    call = lambda: calls.forward_backward(lambda *a, **k: fn(*a, **k, **options), given)
    return memory.peak_extra_bytes(call)

loss = lambda *args, **kwargs: grpo_loss(*args, **kwargs).loss
cpu = torch.device("cpu")
batch = inputs.make_batch(shapes.Shape(B=2, T=8, V=1000, G=2), sys.argv[1], cpu, torch.float32)
for warm_up in (eager.grpo, loss):
    run(warm_up, "eager")
batch = inputs.make_batch(shapes.Shape(B=8, T=256, V=32_000, G=4), sys.argv[1], cpu, torch.float32)
found = [run(eager.grpo, "eager"), run(loss, "grpo_fast"), run(loss, "grpo_fast-inplace", inplace=True)]
print(json.dumps(found))
"""


LINEAR = """
import json, torch
from benchmarks.providers import eager
from benchmarks.measuring import memory
from grpo_fast import Objective
from grpo_fast.loss import linear_grpo_loss

B, T, D, V = 4, 256, 64, 32_000

def run(fn, B, T, V, **options):
    hidden, weight = torch.randn(B, T, D).requires_grad_(), torch.randn(V, D).requires_grad_()
    ids, x = torch.randint(V, (B, T)), torch.randn(B, T)
    given = {"mask": None, "advantages": torch.randn(B), "old_logps": x, "ref_logps": x}
    def call():
        loss = fn(hidden, weight, ids, objective=Objective(), **given, **options)
        return torch.autograd.grad(getattr(loss, "loss", loss), (hidden, weight))
    return memory.peak_extra_bytes(call)

found = []
for fn, T, options in (
    (eager.linear_grpo, 256, {}),
    (linear_grpo_loss, 256, {"chunk_size": 128}),
    (linear_grpo_loss, 1024, {"chunk_size": 128}),
):
    run(fn, 2, 8, 1000)
    found.append(run(fn, B, T, V, **options))
print(json.dumps(found))
"""


def measured(code, *arguments):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "GRPO_FAST_BACKEND": "torch",
    }
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
def test_from_hidden_states_memory_does_not_grow_with_tokens():
    """The gradients, one chunk of logits, and nothing of N V: at most a sixth of eager, whatever N is."""
    eager, ours, longer = measured(LINEAR)
    if eager is None:
        pytest.skip("this system does not let a process reset its peak")
    assert eager >= 2 * 4 * 1024 * 32_000  # or the measurement sees nothing
    assert ours <= eager / 6
    assert longer <= ours + (16 << 20)  # the gradient of four times as many hidden states


def available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
@pytest.mark.parametrize("variant", ["full", "padded"])
def test_peak_extra_memory_on_cpu(variant):
    if available_memory() < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of free memory")
    eager, ours, inplace = measured(MEASURE, variant)
    if eager is None:
        pytest.skip("this system does not let a process reset its peak")
    logits = 4 * 2048 * 32_000
    assert eager >= 2 * logits  # or the measurement sees nothing
    assert ours <= 0.4 * eager
    assert inplace <= 0.1 * eager
