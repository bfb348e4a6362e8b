"""One measurement: load, check, then memory and time."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gate, inputs, machine, memory, providers, shapes
from benchmarks.inputs import Batch

TIME_BUDGET = {"cuda": 0.6, "cpu": 2.0}  # seconds of timed rounds of one case
ROUNDS = (5, 200)
# Below this a call is mostly launches: the time of the device alone is recorded next to it.
LAUNCH_BOUND = 200e-6

Gradient = Tensor | tuple[Tensor, ...] | None
Call = Callable[..., tuple[Tensor, Gradient]]
Setup = Callable[[Batch], tuple[Any, ...]]

ABSENT: dict[str, str] = {}  # "stem provider" -> why there is no number


def measure(
    benchmark: Any,
    *,
    stem: str,
    provider: str,
    shape_name: str,
    variant: str,
    setup: Setup,
    call: Callable[[providers.Function], Call],
    nbytes: Callable[[Batch], int],
    roof: str = "copy",
) -> None:
    """Gate, then time `call(function)(*setup(batch))`; `setup` is not timed.

    Args:
        call: from a provider's function to one that returns its value and gradient.
        nbytes: that have to move at least, by the formula in the kernel's docstring.
        roof: which measured bandwidth they are held against: "copy" or "read".
    """
    fn = _load(stem, provider)
    shape, device, dtype = shapes.get(shape_name), shapes.device(), shapes.dtype()
    batches = inputs.rotation(shape, variant, device, dtype)
    run = call(fn)
    try:
        _check(stem, provider, batches[0], run(*setup(batches[0])))
        extra = memory.peak_extra_bytes(functools.partial(run, *setup(batches[0])))
        rounds = _rounds(run, setup, batches[0])
        turns = itertools.cycle(batches)
        benchmark.group = f"{stem} {benchmark.name.split('[')[0]} {shape_name} {variant}"
        benchmark.extra_info |= {
            "stem": stem,
            "case": benchmark.name.split("[")[0].removeprefix("bench_"),
            "provider": provider,
            "shape": shape_name,
            "variant": variant,
            "sizes": {"B": shape.B, "T": shape.T, "V": shape.V, "G": shape.G, "D": shape.D},
            "dtype": str(dtype).removeprefix("torch.") if shape.V else "float32",
            "live_tokens": batches[0].live,
            "bytes": nbytes(batches[0]),
            "roof": roof,
            "peak_extra_bytes": extra,
        }
        benchmark.pedantic(
            _discard(run), setup=lambda: (setup(next(turns)), {}), rounds=rounds, warmup_rounds=2
        )
        _add_device_time(benchmark, run, setup, batches[0])
    except torch.OutOfMemoryError:
        _absent(stem, provider, f"out of memory at {shape_name}")


def value_and_grad(fn: providers.Function, leaf: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The loss and its gradient in `leaf`."""
    loss = fn(*args, **kwargs)
    return loss, torch.autograd.grad(loss, leaf)[0]


def head_setup(batch: Batch) -> tuple[Tensor, Tensor, Batch]:
    """(hidden states, weight), leaves that want a gradient, and the batch."""
    assert batch.head is not None
    hidden, weight = batch.head
    return hidden.requires_grad_(), weight.requires_grad_(), batch


def head_bytes(batch: Batch, gradients: bool) -> int:
    """Bytes of hidden states and weight, and of their gradients: nothing of the size of the logits."""
    assert batch.head is not None
    return sum(x.numel() * x.element_size() for x in batch.head) * (2 if gradients else 1)


def logits_setup(batch: Batch, copy: bool) -> tuple[Tensor, Tensor]:
    """(leaf, logits that depend on it): a copy where they may be overwritten."""
    assert batch.logits is not None
    leaf = batch.logits.requires_grad_()
    return leaf, leaf.clone() if copy else leaf


def logits_bytes(batch: Batch, live_passes: int, all_passes: int) -> int:
    """Bytes of passes over the live rows of the logits and over all of them."""
    assert batch.logits is not None
    row = batch.logits.element_size() * batch.shape.V
    return row * (live_passes * batch.live + all_passes * batch.shape.N)


def _load(stem: str, provider: str) -> providers.Function:
    try:
        return providers.load(stem, provider)
    except providers.UnavailableError as reason:
        _absent(stem, provider, str(reason))
        raise AssertionError("unreachable") from reason


def _absent(stem: str, provider: str, reason: str) -> None:
    ABSENT[f"{stem} {provider}"] = reason
    pytest.skip(f"{provider}: {reason}")


def _check(stem: str, provider: str, batch: Batch, result: tuple[Tensor, Gradient]) -> None:
    try:
        gate.check(stem, batch, *result)
    except AssertionError as error:
        ABSENT[f"{stem} {provider}"] = f"wrong result: {str(error).splitlines()[0]}"
        raise


def _discard(run: Call) -> Callable[..., None]:
    """`run` without its results: they would stay alive during the next round."""

    def timed(*args: Any) -> None:
        run(*args)

    return timed


def _rounds(run: Call, setup: Setup, batch: Batch) -> int:
    arguments = setup(batch)
    start = machine.synced_time()
    run(*arguments)
    seconds = machine.synced_time() - start
    fewest, most = ROUNDS
    return min(max(int(TIME_BUDGET[shapes.device().type] / seconds), fewest), most)


def _add_device_time(benchmark: Any, run: Call, setup: Setup, batch: Batch) -> None:
    if not torch.cuda.is_available() or benchmark.stats is None:
        return
    if benchmark.stats.stats.median < LAUNCH_BOUND:
        from triton.testing import do_bench

        median = do_bench(functools.partial(run, *setup(batch)), return_mode="median")
        benchmark.extra_info["device_seconds"] = median / 1e3


def parameters(cases: list[tuple[str, str]], stem: str) -> list[Any]:
    """pytest parameters (shape, variant, provider); the provider varies fastest."""
    return [
        pytest.param(shape, variant, provider, id=f"{shape}-{variant}-{provider}")
        for shape, variant in cases
        for provider in providers.PROVIDERS[stem]
    ]
