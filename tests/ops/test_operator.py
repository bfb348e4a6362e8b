"""Operators that nothing traces are called directly: what autograd and other watchers see all the same."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_fast import checks, grpo_loss
from grpo_fast.ops import scaling
from grpo_fast.ops.operator import watched
from grpo_fast.ops.reduction_weights import reduction_weights_op
from grpo_fast.ops.scaling import scale_, scale_rows_, scaled_to
from grpo_fast.records import Targets, Tokens, Weighing, flat


class Seen(TorchDispatchMode):
    """The operators of this project that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("grpo_fast."):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Special(torch.Tensor):
    """A subclass of tensors."""


def loss_of(logits, **given):
    ids = torch.zeros(logits.shape[:2], dtype=torch.long)
    return grpo_loss(logits, ids, advantages=torch.ones(len(logits)), **given).loss


@pytest.mark.parametrize("scale", [scale_rows_, scale_], ids=["rows", "all"])
@pytest.mark.parametrize("traced", [False, True], ids=["directly", "as an operator"])
def test_autograd_learns_that_a_tensor_was_changed(scale, traced, monkeypatch):
    """A graph that has kept the old values says so. PyTorch's own operators would count; kernels do not."""
    monkeypatch.setattr(scaling, "run", lambda *args, **given: None)
    x = torch.ones(1, 2, 3)
    kept = (x * torch.ones(1, requires_grad=True)).sum()
    version = x._version
    (scale.traced if traced else scale)(x, torch.tensor(2.0))
    assert x._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_a_tensor_of_inference_is_changed_as_well():
    """It counts no versions."""
    with torch.inference_mode():
        x = torch.ones(1, 2, 3)
        scale_rows_(x, torch.tensor([2.0, 3.0]))
    assert x[0, :, 0].tolist() == [2, 3]


@pytest.mark.parametrize("inplace", [False, True])
def test_modes_see_operators(inplace):
    leaf = torch.randn(2, 3, 5, requires_grad=True)
    with Seen() as seen:
        loss = loss_of(leaf * 1, inplace=inplace)
        torch.autograd.grad(loss, leaf)
    want = ["reduction_weights", "grpo_" if inplace else "grpo", "token_statistics", "scale_rows_"]
    assert seen.names == want


@pytest.mark.parametrize("inplace", [False, True])
def test_directly_and_as_operators_the_same(inplace):
    leaf = torch.randn(2, 3, 5, requires_grad=True)

    def both():
        loss = loss_of(leaf * 1, inplace=inplace, old_logps=-torch.ones(2, 3))
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    found = both()
    with Seen():
        again = both()
    torch.testing.assert_close(found, again, rtol=0, atol=0)


def test_what_is_watched():
    """Tensors within records count, at any depth; a parameter is an ordinary tensor."""
    x = torch.ones(2)
    special, meta = x.as_subclass(Special), torch.ones(2, device="meta")
    assert not watched(x, torch.nn.Parameter(x), None, True, 1, 1.5, "", Targets(x))
    assert not watched((Tokens(x), (x, (x,))))
    for odd in (special, meta):
        for args in ((odd,), (x, None, odd), (x, Tokens(x, odd)), ("", (1, (Targets(odd),)))):
            assert watched(*args)
    with Seen():
        assert watched(x)


def test_a_result_without_elements_stands_for_none():
    """An operator returns tensors, its direct call what the function returns."""
    like = torch.ones(2, 3)
    given = (like, Weighing(), "token_mean", 0, False)
    weight, *missing = reduction_weights_op(*given)
    assert missing == [None] * 3
    same, *empty = reduction_weights_op.traced(*flat(*given))
    torch.testing.assert_close(same, weight)
    assert [tuple(x.shape) for x in empty] == [(0,)] * 3


def test_a_dtype_is_an_argument():
    x = torch.ones(3)
    for call in (scaled_to, scaled_to.traced):
        got = call(x, torch.tensor(2.0), torch.float16)
        assert got.dtype == torch.float16
        assert got.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "mode", [FakeTensorMode, torch.inference_mode], ids=["without values", "inference"]
)
def test_a_temperature_is_kept_for_no_other_mode(mode):
    """A temperature is made once. What a mode made of it is not what a later call computes with."""
    temperature = {FakeTensorMode: 1.37, torch.inference_mode: 1.41}[mode]
    like = torch.zeros(2, dtype=torch.long)
    with mode():
        checks.check_temperature("op", temperature, like, None)
    _, first = checks.check_temperature("op", temperature, like, None)
    assert type(first) is torch.Tensor
    assert not first.is_inference()
    assert first.item() == 1 / temperature
    leaf = torch.randn(2, 3, 5, requires_grad=True)
    torch.autograd.grad(loss_of(leaf * 1, temperature=temperature), leaf)


def test_a_temperature_is_kept_for_no_transform():
    with_vmap = torch.func.vmap(
        lambda x: x * checks.check_temperature("op", 1.53, torch.zeros(2), None)[1]
    )
    with_vmap(torch.ones(3))
    found = checks.check_temperature("op", 1.53, torch.zeros(2), None)[1]
    assert type(found) is torch.Tensor
    assert found.item() == 1 / 1.53
