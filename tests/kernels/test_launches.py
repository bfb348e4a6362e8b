"""What a loss and its backward launch besides the loss's own kernel, counted.

A dispatch launches work on a GPU: an operator of PyTorch's that computes, copies or fills, or a kernel of
Triton's. Views and new empty tensors launch nothing. It is counted on CPU tensors, where the kernels are
interpreted, so three things that a GPU never sees are left out:

- numbers of the call (temperature, options of the objective): float64 tensors on the CPU, on every device;
- checks of the arguments' values, which are made on the CPU alone (`check_values`);
- what Triton's interpreter and the guard bands of the tests do inside a launch.
"""

import contextlib
import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_fast import Objective, checks, grpo_loss, policy_loss
from grpo_fast.loss import arguments as loss_arguments
from tests.support.cases import batch, packed

pytest.importorskip("triton", reason="the kernels need Triton")
if torch.cuda.is_available():
    pytest.skip("counts what the interpreter is given", allow_module_level=True)

from torch._library.custom_ops import OPDEFS
from triton.runtime.interpreter import GridExecutor

from grpo_fast.kernels import policy_loss as kernels

# Operators that launch nothing.
FREE = {
    *(
        "alias",
        "as_strided",
        "detach",
        "expand",
        "permute",
        "select",
        "slice",
        "split",
        "squeeze",
        "t",
    ),
    *("transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "empty", "empty_like"),
    *("empty_strided", "new_empty", "new_empty_strided", "is_same_size"),
}
NUMBERS = torch.float64  # of no tensor of tokens in this file


class Dispatches(TorchDispatchMode):
    """Counts what is dispatched, inside the library's own operators as well."""

    def __init__(self):
        super().__init__()
        self.found = Counter()
        self.paused = False

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        own = OPDEFS.get(operator._schema.name)
        if own is not None and not self.paused:
            with self:
                return own._init_fn(*args, **kwargs)
        out = operator(*args, **kwargs)
        tensors = [x for x in (*args, *kwargs.values(), out) if isinstance(x, torch.Tensor)]
        numbers = bool(tensors) and all(x.dtype == NUMBERS for x in tensors)
        empty = isinstance(out, torch.Tensor) and not out.numel()  # nothing to launch
        name = operator.overloadpacket.__name__
        if not (self.paused or numbers or empty or name in FREE):
            self.found[name] += 1
        return out


@pytest.fixture
def dispatches(monkeypatch):
    """`with dispatches() as found`: how often each operator and each kernel was dispatched."""
    monkeypatch.setenv("GRPO_FAST_BACKEND", "triton")
    monkeypatch.setattr(kernels, "BLOCK", 2)  # several programs add up the statistics
    for module in (checks, loss_arguments, sys.modules["grpo_fast.ops.group_advantage"]):
        monkeypatch.setattr(module, "check_values", lambda x: False)
    run, modes = GridExecutor.__call__, []

    def counted(self, *args, **kwargs):
        for mode in modes:
            mode.found[self.fn.__name__] += 1
            mode.paused = True
        try:
            return run(self, *args, **kwargs)
        finally:
            for mode in modes:
                mode.paused = False

    monkeypatch.setattr(GridExecutor, "__call__", counted)

    @contextlib.contextmanager
    def counting():
        mode = Dispatches()
        modes.append(mode)
        try:
            with mode:
                yield mode.found
        finally:
            modes.pop()

    return counting


REDUCTIONS = {"sequence_mean": None, "token_mean": None, "sequence_sum": None, "fixed_length": 7}
MASKS = {"none": None, "bool": torch.bool, "integer": torch.int64, "floating": torch.float32}


def arguments(V, reduction="sequence_mean", mask="bool", **options):
    """(logits, ids, arguments) of 3 sequences, with everything that one step in most trainers has."""
    logits, ids, given = batch(3, 4, V, "cpu", garbage=False)
    length = REDUCTIONS[reduction]
    options = {"reduction": reduction, "max_length": length, "beta": 0.04, **options}
    given |= {"objective": Objective(**options), "loss_scale": torch.tensor(2.0)}
    if mask == "packed":
        names = ("old_logps", "ref_logps")
        given["cu_seqlens"], given["mask"], logits, ids, *rest = packed(
            given["mask"], logits, ids, *(given[name] for name in names)
        )
        given |= dict(zip(names, rest, strict=True))
        assert len(ids) > kernels.BLOCK
    else:
        given["mask"] = None if mask == "none" else given["mask"].to(MASKS[mask])
    return logits.requires_grad_(), ids, given


@pytest.mark.parametrize(
    ("V", "reduction"), [*((60, name) for name in REDUCTIONS), (32_800, "token_mean")]
)
@pytest.mark.parametrize("mask", [*MASKS, "packed"])
def test_grpo_loss_by_token(V, mask, reduction, dispatches):
    """At most 8: a mask as bools, weights, advantages per token, counters, statistics, the backward's two."""
    logits, ids, given = arguments(V, reduction, mask)
    if reduction == "token_mean" and mask != "bool":
        given["num_items"] = torch.tensor(9)
    with dispatches() as found:
        grpo_loss(logits, ids, **given).loss.backward()
    ceiling = 6 + (mask in ("integer", "floating")) + (V > 32_768)
    assert ceiling <= 8
    assert found["_grpo_kernel"] == 1
    assert found.total() - 1 <= ceiling, found


# (options, ceilings of all dispatches, kernels among them: with a gradient, in place, without a gradient).
OF_LOGITS = {
    "by token": ({}, (7, 7, 6)),
    "entropy": ({"entropy_coef": 0.1}, (7, 7, 12)),
    "gspo": ({"ratio": "sequence"}, (9, 10, 6)),
    "gspo on policy": ({"ratio": "sequence", "old_logps": None}, (11, 11, 6)),
    "top entropy": ({"top_entropy_quantile": 0.5}, (36, 37, 33)),
}
OF_LOG_PROBS = {
    "by token": (7, 5),
    "entropy": (13, 11),
    "gspo": (7, 5),
    "gspo on policy": (7, 5),
    "top entropy": (34, 32),
}


def of_case(case):
    options = dict(OF_LOGITS[case][0])
    on_policy = "old_logps" in options
    options.pop("old_logps", None)
    logits, ids, given = arguments(60, **options)
    old = given["old_logps"]
    return logits, ids, given | ({"old_logps": None} if on_policy else {}), old


@pytest.mark.parametrize("case", OF_LOGITS)
@pytest.mark.parametrize("way", [0, 1, 2], ids=["gradient", "in place", "no gradient"])
def test_grpo_loss_of_other_objectives(way, case, dispatches):
    logits, ids, given, _ = of_case(case)
    x = logits.clone() if way == 1 else logits
    with dispatches() as found, torch.set_grad_enabled(way != 2):
        out = grpo_loss(x, ids, **given, inplace=way == 1)
        if way != 2:
            torch.autograd.grad(out.loss, logits)
    assert found.total() <= OF_LOGITS[case][1][way], found


@pytest.mark.parametrize("case", OF_LOG_PROBS)
@pytest.mark.parametrize("way", [0, 1], ids=["gradient", "no gradient"])
def test_policy_loss(way, case, dispatches):
    *_, given, old = of_case(case)
    logps = (old + 0.1).requires_grad_()
    if given["objective"].needs_entropy:
        given["entropy"] = -logps.detach()
    with dispatches() as found, torch.set_grad_enabled(way == 0):
        out = policy_loss(logps, **given)
        if way == 0:
            out.loss.backward()
    assert found.total() <= OF_LOG_PROBS[case][way], found


def test_a_launch_more_is_counted(dispatches):
    """Of an operator inside one of the library's own, of a kernel, of PyTorch's operators in a backward."""
    logits, ids, _ = arguments(60)
    A, x = torch.ones(3), torch.ones(3, requires_grad=True)
    with dispatches() as found:
        grpo_loss(logits, ids, advantages=A)
        assert found["_grpo_kernel"] == found["zeros"] == 1
        before = found.total()
        x.exp().sum().backward()
    assert found.total() - before == 4  # exp, sum; ones_like, mul
