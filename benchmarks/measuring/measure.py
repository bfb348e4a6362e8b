"""One measurement: load, check, then memory and time."""

import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import providers
from benchmarks.inputs import batches as inputs
from benchmarks.inputs import shapes
from benchmarks.inputs.batches import Batch
from benchmarks.measuring import gate, gate_hidden, machine, memory
from benchmarks.measuring.recorder import Recorder

TIME_BUDGET = {"cuda": 0.6, "cpu": 2.0}  # seconds of timed rounds of one case
ROUNDS = (5, 200)
WARMUP_ROUNDS = 2
# Seconds of a call that gets fewer rounds and no more warming up: it has run three times by then.
SLOW, SLOW_ROUNDS = 10.0, 3
# Of calls that are shorter, the time on the device alone is recorded as well: launches are a part of them.
LAUNCHES_COUNT = 20e-3
DEVICE_ROUNDS = 10
AHEAD = 1 << 23  # cycles, about 5 ms, that the device spends while a call is being launched

Call = Callable[..., tuple[Tensor, Any]]
Setup = Callable[[Batch], tuple[Any, ...]]


class WrongError(AssertionError):
    """A result that is further from the truth than it may be."""


ABSENT: dict[str, str] = {}  # "stem provider" -> why there is no number
RECORDER: list[Recorder] = []  # the one that `--results` asked for


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
    flops: Callable[[Batch], int] | None = None,
) -> None:
    """Gate, then time `call(function)(*setup(batch))`; `setup` is not timed.

    Args:
        call: from a provider's function to one that returns its value and gradient.
        nbytes: that have to move at least, by the formula in the kernel's docstring.
        roof: what was measured on this machine that they are held against: "copy" or "read" bandwidth, or
            the rate of matrix multiplications, "gemm", for `flops`.
        flops: of the matrix multiplications that have to be done at least.
    """
    memory.release()
    fn = _load(stem, provider)
    shape, device, dtype = shapes.get(shape_name), shapes.device(), shapes.dtype()
    hidden = stem in providers.HIDDEN_PROVIDERS
    try:
        batches = inputs.rotation(shape, variant, device, dtype, hidden)
        run = call(fn)
        errors = _check(stem, provider, batches[0], run(*setup(batches[0])))
        extra = memory.peak_extra_bytes(functools.partial(run, *setup(batches[0])))
        rounds, warmup_rounds = _rounds(run, setup, batches[0])
        turns = itertools.cycle(batches)
        benchmark.group = f"{stem} {benchmark.name.split('[')[0]} {shape_name} {variant}"
        benchmark.extra_info |= {
            "stem": stem,
            "case": benchmark.name.split("[")[0].removeprefix("bench_"),
            "provider": provider,
            "shape": shape_name,
            "variant": variant,
            "sizes": {"B": shape.B, "T": shape.T, "V": shape.V, "G": shape.G}
            | ({"D": shape.D} if hidden else {}),
            "dtype": str(dtype).removeprefix("torch.") if shape.V else "float32",
            "live_tokens": batches[0].live,
            "moving_tokens": batches[0].moving,
            "bytes": nbytes(batches[0]),
            "flops": flops(batches[0]) if flops else 0,
            "roof": roof,
            "peak_extra_bytes": extra,
            "errors": errors,
        }
        if hidden:
            benchmark.extra_info |= _about_the_head(batches[0])
        benchmark.pedantic(
            _discard(run),
            setup=lambda: (setup(next(turns)), {}),
            rounds=rounds,
            warmup_rounds=warmup_rounds,
        )
        _add_event_time(benchmark, run, lambda: setup(next(turns)))
        record(benchmark)
    except torch.OutOfMemoryError:
        absent(stem, f"{provider} {shape_name}", "out of memory")
    except providers.UnavailableError as reason:
        absent(stem, provider, str(reason))
    except WrongError as error:
        note(stem, provider, f"wrong result: {_first_line(error)}")
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {_first_line(error)}"
        note(stem, f"{provider} {shape_name} {variant}", what)
        raise


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def record(benchmark: Any) -> None:
    """Write down what was timed, and what `extra_info` says of it, where `--results` asks for it."""
    if RECORDER and benchmark.stats is not None:
        RECORDER[0].add(benchmark.name, benchmark.extra_info, benchmark.stats.stats)


def value_and_grad(fn: providers.Function, leaf: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The loss and its gradient in `leaf`."""
    loss = fn(*args, **kwargs)
    return loss, torch.autograd.grad(loss, leaf)[0]


def logits_setup(batch: Batch, provider: str) -> tuple[Tensor, Tensor]:
    """(leaf, logits that depend on it): a copy where they may be overwritten."""
    assert batch.logits is not None
    leaf = batch.logits.detach()
    if provider in providers.EXTRA_ROW:
        leaf = torch.nn.functional.pad(leaf, (0, 0, 0, 1))
    leaf.requires_grad_()
    # Padding has made a copy of its own already.
    copy = provider in providers.OVERWRITES and provider not in providers.EXTRA_ROW
    return leaf, leaf.clone() if copy else leaf


def without_extra_row(grad: Tensor, batch: Batch) -> Tensor:
    return grad[:, : batch.shape.T]


def hidden_measure(
    benchmark: Any, *, stem: str, provider: str, shape_name: str, variant: str, backward: bool
) -> None:
    """Measure a provider of a stem that starts from hidden states."""

    def setup(batch: Batch) -> tuple[Any, ...]:
        return *gate_hidden.leaves(batch), batch

    def call(fn: providers.Function) -> Call:
        def both(hidden: Tensor, weight: Tensor, batch: Batch) -> tuple[Tensor, Any]:
            return gate_hidden.run(fn, hidden, weight, batch, stem)

        def forward(hidden: Tensor, weight: Tensor, batch: Batch) -> tuple[Tensor, None]:
            with torch.no_grad():
                return fn(hidden, weight, batch.ids), None

        return both if backward else forward

    def flops(batch: Batch) -> int:
        rows = batch.moving if stem == "linear_grpo" else batch.shape.N
        return (6 if backward else 2) * rows * batch.shape.D * batch.shape.V

    def nbytes(batch: Batch) -> int:
        assert batch.hidden is not None
        assert batch.weight is not None
        return (2 if backward else 1) * (batch.hidden.nbytes + batch.weight.nbytes)

    measure(
        benchmark,
        stem=stem,
        provider=provider,
        shape_name=shape_name,
        variant=variant,
        setup=setup,
        call=call,
        nbytes=nbytes,
        roof="gemm",
        flops=flops,
    )


@functools.lru_cache(maxsize=4)
def _bare_gemms(N: int, D: int, V: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of the three matrix multiplications of a head with gradients, in chunks, nothing else."""
    hidden = torch.randn(min(N, 4096), D, device=device).to(dtype)
    weight = torch.randn(V, D, device=device).to(dtype)
    logits = torch.empty(len(hidden), V, device=device, dtype=dtype)

    def chunk() -> None:
        torch.mm(hidden, weight.mT, out=logits)
        logits @ weight
        logits.mT @ hidden

    return machine.fastest(chunk, rounds=3) * N / len(hidden)


def _about_the_head(batch: Batch) -> dict[str, Any]:
    from benchmarks.inputs import hidden

    assert batch.hidden is not None
    assert batch.weight is not None
    shape, h = batch.shape, batch.hidden
    if "about" not in batch.expected:
        batch.expected["about"] = hidden.describe(h, batch.weight)
    return {
        "bare_gemms_seconds": _bare_gemms(shape.N, shape.D, shape.V, h.device, h.dtype),
        "inputs": batch.expected["about"],
    }


def row_of(batch: Batch) -> tuple[int, int]:
    """(entries of a row of logits, bytes of each)."""
    assert batch.logits is not None
    return batch.shape.V, batch.logits.element_size()


def _load(stem: str, provider: str) -> providers.Function:
    try:
        return providers.load(stem, provider)
    except providers.UnavailableError as reason:
        absent(stem, provider, str(reason))
        raise AssertionError("unreachable") from reason


def note(stem: str, provider: str, reason: str) -> None:
    """Write down why a provider has no number."""
    ABSENT[f"{stem} {provider}"] = reason
    if RECORDER:
        RECORDER[0].skip(f"{stem} {provider}", reason)


def absent(stem: str, provider: str, reason: str) -> None:
    """Skip the benchmark, and say why."""
    note(stem, provider, reason)
    pytest.skip(f"{provider}: {reason}")


def _check(stem: str, provider: str, batch: Batch, result: tuple[Tensor, Any]) -> dict[str, float]:
    check = gate_hidden.check if stem in providers.HIDDEN_PROVIDERS else gate.check
    try:
        return check(stem, batch, *result, factor=gate.factor_of(provider))
    except AssertionError as error:
        raise WrongError(*error.args) from None


def _discard(run: Call) -> Callable[..., None]:
    """`run` without its results: they would stay alive during the next round."""

    def timed(*args: Any) -> None:
        run(*args)

    return timed


def _rounds(run: Call, setup: Setup, batch: Batch) -> tuple[int, int]:
    """(rounds that are timed, rounds before them)."""
    arguments = setup(batch)
    start = machine.synced_time()
    run(*arguments)
    seconds = machine.synced_time() - start
    if seconds > SLOW:
        return SLOW_ROUNDS, 0
    fewest, most = ROUNDS
    rounds = min(max(int(TIME_BUDGET[shapes.device().type] / seconds), fewest), most)
    return rounds, WARMUP_ROUNDS


def _add_event_time(benchmark: Any, run: Call, setup: Callable[[], tuple[Any, ...]]) -> None:
    """Record the time of a short call on the device alone, as `event_seconds`.

    The device is busy while the call is launched, so that it waits for no launch, unless the call itself
    waits for the device. `setup` takes the inputs in turns: none is found in the cache.
    """
    if not torch.cuda.is_available() or benchmark.stats is None:
        return
    if benchmark.stats.stats.median >= LAUNCHES_COUNT:
        return
    seconds = []
    for _ in range(DEVICE_ROUNDS):
        call = functools.partial(run, *setup())
        torch.cuda.synchronize()
        torch.cuda._sleep(AHEAD)
        start, end = machine.between_events(call)
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    benchmark.extra_info["event_seconds"] = statistics.median(seconds)


def parameters(cases: list[tuple[str, str]], stem: str) -> list[Any]:
    """pytest parameters (shape, variant, provider); the provider varies fastest.

    torch.compile takes part at the first shape only: elsewhere compiling it would take most of the time.
    """
    return [
        pytest.param(shape, variant, provider, id=f"{shape}-{variant}-{provider}")
        for i, (shape, variant) in enumerate(cases)
        for provider in providers.PROVIDERS[stem]
        if provider != "compile" or i == 0
    ]
