"""CPU tensors that take the path of a GPU: halves are multiplied with a float32 result."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from grpo_fast.ops.head import chunked, products


@contextlib.contextmanager
def mixed_products(seen=None):
    """The head takes the path of a GPU.

    seen: a list that gets (dtype of the operands, dtype of the result, elements summed up) of each product.
    """
    real_mm, real_addmm = torch.mm, torch.addmm

    def note(a, out):
        if seen is not None:
            seen.append((a.dtype, out.dtype, a.shape[1]))

    def mm(a, b, *, out_dtype=None, out=None):
        note(a, out)
        if out_dtype is None:
            with _disable_current_modes():
                return real_mm(a, b, out=out)
        assert out_dtype == out.dtype == torch.float32 != a.dtype == b.dtype
        with _disable_current_modes():  # one operator on a GPU
            return real_mm(a.float(), b.float(), out=out)

    def addmm(start, a, b, *, out_dtype=None, out, **factors):
        note(a, out)
        if out_dtype is None:
            with _disable_current_modes():
                return real_addmm(start, a, b, out=out, **factors)
        assert out_dtype == out.dtype == torch.float32 != a.dtype == b.dtype
        with _disable_current_modes():
            return real_addmm(start, a.float(), b.float(), out=out, **factors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", mm)
        patch.setattr(torch, "addmm", addmm)
        for module in (chunked, products):
            patch.setattr(module, "on_gpu", lambda x: True)
        patch.setattr(products, "MIXED_MM", True)
        patch.setattr(products, "MIXED_ADDMM", True)
        yield
