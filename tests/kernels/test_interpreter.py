"""Triton's interpreter, quicker by `tests/support/quick.py`: the same results, and nothing left behind."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from grpo_fast import Objective
from grpo_fast.loss import grpo_loss, linear_grpo_loss
from tests.support import quick
from tests.support.cases import batch, loss_and_grad

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="is about the interpreter"
    ),
    pytest.mark.skipif(
        not hasattr(interpreter, "_LangPatchScope"), reason="this version is left as it is"
    ),
]


def results():
    """Of kernels of both losses, in two dtypes, token by token and by sequence."""
    torch.manual_seed(0)
    found = []
    for dtype in (torch.float32, torch.float16):
        logits, ids, arguments = batch(3, 4, 40, "cpu", dtype, garbage=False)
        weight = torch.randn(40, 8, dtype=dtype)
        hidden = torch.randn(3, 4, 8, dtype=dtype)
        for ratio in ("token", "sequence"):
            given = arguments | {"objective": Objective(ratio=ratio, entropy_coef=0.1)}
            found += loss_and_grad(grpo_loss, logits, ids, **given)
            found += loss_and_grad(linear_grpo_loss, hidden, weight, ids, **given)
    return found


def test_it_computes_the_same_bits(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_BACKEND", "triton")
    got = results()
    for (thing, name), original in quick.ORIGINAL.items():
        assert getattr(thing, name) is not original, name
    with quick.slow():
        want = results()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_language_is_as_before_behind_a_kernel(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_BACKEND", "triton")
    things = (tl, tl.core, tl.math, tl.tensor, tl.dtype)
    results()
    before = [dict(vars(x)) for x in things]
    results()
    for x, names in zip(things, before, strict=True):
        assert dict(vars(x)) == names
    assert isinstance(tl.range, type), "a function within a kernel"


DTYPES = (
    tl.int1,
    tl.int8,
    tl.int32,
    tl.int64,
    tl.uint8,
    tl.uint32,
    tl.float16,
    tl.float32,
    tl.float64,
)
NUMBERS = (0, 1, -1, 3, 300, 2**31, 2**40, 0.0, -0.0, 1.5, 1e-40, float("inf"), True)


def operands():
    """Scalars and tiles of every dtype, and numbers."""
    for dtype in DTYPES:
        kind = quick.DTYPES[dtype]
        for shape in ((), (1,), (4,), (2, 4)):
            values = np.resize(np.array([0, 1, 3, 100]), shape or (1,)).astype(kind)
            handle = interpreter.TensorHandle(values, dtype)
            yield tl.tensor(handle, tl.block_type(dtype, list(shape)) if shape else dtype)
    yield from NUMBERS


def outcome(operation, a, b):
    """The type and the bits of what an operation gives, or the error that it raises."""
    semantic = interpreter.interpreter_semantic
    overflow = (True,) if operation in ("add", "sub", "mul") else ()
    try:
        found = getattr(semantic, operation)(a, b, *overflow)
    except Exception as error:
        return type(error).__name__, str(error)
    data = found.handle.data
    shape = [x.value for x in found.shape]
    return str(found.type), str(found.dtype), shape, data.dtype, data.shape, data.tobytes()


@pytest.mark.parametrize(
    "operation", ["add", "sub", "mul", "truediv", "floordiv", "mod", "less_than"]
)
def test_operands_of_all_kinds(operation):
    """Promoted, cast, broadcast and refused as ever."""
    pairs = [(a, b) for a in operands() for b in operands() if hasattr(a, "type")]
    pairs += [(b, a) for a, b in pairs if not hasattr(b, "type")]
    with np.errstate(all="ignore"):
        got = [outcome(operation, a, b) for a, b in pairs]
        with quick.slow():
            want = [outcome(operation, a, b) for a, b in pairs]
    assert got == want


def test_casts_of_all_kinds():
    pairs = [(x, dtype) for x in operands() if hasattr(x, "type") for dtype in DTYPES]
    got = [outcome("cast", *pair) for pair in pairs]
    with quick.slow():
        assert got == [outcome("cast", *pair) for pair in pairs]
