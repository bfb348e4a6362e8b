"""Every tensor argument of every public function, in any memory layout: the values do not change."""

import inspect

import pytest
import torch

import grpo_fast.diagnostics
import grpo_fast.loss
import grpo_fast.ops
import grpo_fast.weights
from tests.support.calls import (
    CALLS,
    DIFFERENTIABLE,
    outputs,
    tensors,
)


# How a layout holds given values.
def strided(x):
    return torch.stack([x, x.flip(-1)], -1)[..., 0]


def sliced(x):
    larger = torch.stack([x, x])
    for dimension in range(1, larger.ndim):
        larger = torch.cat([larger.flip(dimension), larger], dimension)
    inner = tuple(slice(n, None) for n in x.shape)
    return larger[1][inner]


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def swapped(x):
    """The first two dimensions in the other order in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


# And how one holds a value in the place of many: these change the values.
def expanded(x):
    return x[:1].expand(x.shape)


def of_one(x):
    return x[(slice(0, 1),) * x.ndim].expand(x.shape)


LAYOUTS = [strided, sliced, transposed, swapped, expanded, of_one]
EXACT = {"rtol": 1e-6, "atol": 1e-7}
ROWS = ("logits", "flat_logits")  # their last dimension must be contiguous


def layouts_of(name, x):
    """The layouts that an argument may have."""
    if name == "cu_seqlens":
        return [strided, sliced]
    if name in ROWS:
        return [sliced, expanded, *([swapped] if x.ndim == 3 else [])]
    return LAYOUTS if x.ndim > 1 else [strided, sliced, expanded]


WITH_KERNELS = ("grpo_loss", "linear_grpo_loss", "policy_loss", "logprob", "linear_logprob")
WITH_KERNELS += ("group_advantage",)


class Used(dict):
    """A dictionary that remembers what was asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.names = []

    def __getitem__(self, name):
        self.names.append(name)
        return super().__getitem__(name)


def arguments_of(call):
    used = Used(tensors("cpu"))
    call(used)
    return list(dict.fromkeys(used.names))


@pytest.mark.parametrize("name", CALLS)
def test_layouts(name, backend, device):
    if backend == "triton" and name.split(",")[0] not in WITH_KERNELS:
        pytest.skip("has no kernel")
    call = CALLS[name]
    names = arguments_of(call)
    for argument in names:
        x = tensors(device)[argument]
        for layout in layouts_of(argument, x):
            if backend == "triton" and layout not in (strided, of_one):
                continue  # the others come to the kernels as one of these, and take minutes
            other = layout(x)
            assert layout is sliced or not other.is_contiguous()
            results = []
            for held in (other.clone(memory_format=torch.contiguous_format), other):
                given = {**tensors(device), argument: held}
                for wanted in set(DIFFERENTIABLE) & set(names):
                    given[wanted] = given[wanted].detach().requires_grad_()
                results.append(outputs(call, given))
            (want, dwant), (got, dgot) = results
            assert [len(got), len(dgot)] == [len(want), len(dwant)]
            for a, b in zip((*got, *dgot), (*want, *dwant), strict=True):
                torch.testing.assert_close(
                    *(a, b),
                    # A matrix library adds up in another order for another layout.
                    **({"rtol": 1e-4, "atol": 1e-5} if name.startswith("linear") else EXACT),
                    equal_nan=True,
                    msg=lambda text, at=(argument, layout.__name__): f"{at}: {text}",
                )


def test_every_public_function_is_here():
    for module in (grpo_fast.loss, grpo_fast.ops, grpo_fast.weights, grpo_fast.diagnostics):
        public = getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"]
        for function in (x for x in public if inspect.isfunction(getattr(module, x))):
            assert any(name.split(",")[0] == function for name in CALLS), function
