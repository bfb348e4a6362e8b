"""Triton's interpreter, quicker by `tests/support/quick.py`: the same results, and nothing left behind."""

import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

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
    assert interpreter._patch_lang is not quick.ORIGINAL["_patch_lang"]
    with mock.patch.multiple(interpreter, **quick.ORIGINAL):
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
