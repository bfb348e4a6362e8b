"""Offsets beyond 2**31 elements and more than 65,535 rows: the first and the last rows of tensors that large.

In the interpreter only some programs run, on memory that the system hands out page by page as it is written:
neither time nor memory grows with the tensor. `tests/benchmarks/test_codegen.py` reads the width of the
offsets from the compiled kernels.
"""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from grpo_fast import reference
from grpo_fast.kernels import grpo, logprob, scaling, schedules
from grpo_fast.objective import Objective
from grpo_fast.records import Rewards, Targets, Tokens
from tests.support.guards import unguarded

LARGE = (53_800, 40_000)  # rows, V: 2.15e9 elements, each row shared by programs
MANY = (70_000, 24)

by_shape = pytest.mark.parametrize("shape", [LARGE, MANY], ids=["large", "many"])


class SomePrograms:
    """A kernel of which only the programs of the first and last rows run; notes the grid."""

    def __init__(self, kernel, shape, monkeypatch, parts):
        self.kernel, self.monkeypatch = kernel, monkeypatch
        self.N, self.parts = shape[0], parts

    def __getitem__(self, grid):
        assert grid == (self.N * self.parts,)  # 1-D: the other dimensions stop at 65,535
        if not isinstance(self.kernel, InterpretedFunction):
            return self.kernel[grid]
        some = [row * self.parts + part for row in chosen(self.N) for part in range(self.parts)]
        program_id = InterpreterBuilder.create_get_program_id

        def create_get_program_id(builder, axis):
            handle = program_id(builder, axis)
            handle.data = handle.data * 0 + some[handle.data.item()]
            return handle

        def launch(**arguments):
            with self.monkeypatch.context() as patch:
                patch.setattr(InterpreterBuilder, "create_get_program_id", create_get_program_id)
                # The interpreter copies what the kernel saw back to the arguments: here onto itself.
                patch.setattr(torch.UntypedStorage, "copy_", lambda self, source: self)
                self.kernel[(len(some),)](**arguments)

        return launch


def chosen(N):
    return [0, 1, 65_535 % N, N - 2, N - 1]


@pytest.fixture
def lazily():
    """Let `torch.empty` hand out memory that nobody has touched, and kernels work in it, not in copies."""
    torch.use_deterministic_algorithms(False)
    with unguarded():
        yield


@pytest.fixture
def some_programs(monkeypatch, shape):
    read, write = schedules.reading(shape[1], 2).parts, schedules.schedule(shape[1]).parts
    for module, name, parts in (
        (logprob, "_logprob_fwd_kernel", read),
        (logprob, "_logprob_bwd_kernel", write),
        (grpo, "_grpo_kernel", read),
        (scaling, "_scale_rows_kernel", 1),  # of many rows, one program each
    ):
        kernel = SomePrograms(getattr(module, name), shape, monkeypatch, parts)
        monkeypatch.setattr(module, name, kernel)


def large_logits(shape, device):
    """(logits (1, N, V), ids (N,), the chosen rows of both)."""
    N, V = shape
    logits = torch.empty(1, N, V, dtype=torch.float16, device=device)
    ids = torch.randint(V, (N,), device=device)
    x = torch.randn(len(chosen(N)), V, device=device).half()
    logits[0, chosen(N)] = x
    return logits, ids, x, ids[chosen(N)]


@by_shape
def test_large_tensors_pass_int32(shape):
    assert shape[0] * shape[1] > 2**31 or shape[0] > 65_535


@by_shape
def test_logprob(shape, lazily, some_programs, device):
    logits, ids, x, y = large_logits(shape, device)
    some = chosen(shape[0])
    statistics = logprob.logprob_fwd(logits, Targets(ids), True)
    logp, entropy = statistics.logp, statistics.entropy
    x = x.double().requires_grad_()
    expected = reference.logprob(x, y)
    torch.testing.assert_close(logp[some].double(), expected, rtol=1e-5, atol=1e-5)
    expected_entropy = reference.entropy(x)
    torch.testing.assert_close(entropy[some].double(), expected_entropy, rtol=1e-5, atol=1e-5)
    dlogp = torch.ones_like(logp)
    dlogits = torch.empty_like(logits)
    statistics = statistics._replace(entropy=None)
    logprob.logprob_bwd(dlogp, None, logits, Targets(ids), statistics, dlogits)
    (dx,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(dlogits[0, some].double(), dx, rtol=2e-3, atol=1e-6)


@by_shape
def test_grpo_and_scale_rows(shape, lazily, some_programs, device):
    logits, ids, x, y = large_logits(shape, device)
    N, some = shape[0], chosen(shape[0])
    ones = torch.ones(N, device=device)
    given = (logits, Targets(ids), Tokens(ones, ones), Rewards(), False, Objective(), logits)
    out = grpo.grpo_fwd_bwd(*given)
    x = x.double().requires_grad_()
    expected = reference.logprob(x, y)
    torch.testing.assert_close(out.logp[some].double(), expected, rtol=1e-5, atol=1e-5)
    (dx,) = torch.autograd.grad(-expected.sum(), x)
    torch.testing.assert_close(logits[0, some].double(), dx, rtol=2e-3, atol=1e-6)
    scaling.scale_rows(torch.full((), 2.0, device=device).expand(N), logits)
    torch.testing.assert_close(logits[0, some].double(), 2 * dx, rtol=2e-3, atol=1e-6)
