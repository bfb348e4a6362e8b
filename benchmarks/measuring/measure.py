"""Take one measurement: load a provider, check its result, then take its memory and time."""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import providers
from benchmarks.inputs import batches, hidden, shapes
from benchmarks.inputs.batches import Batch
from benchmarks.measuring import calls, gate, machine, memory, recorder

TIME_BUDGET = {"cuda": 0.6, "cpu": 1.0}  # seconds of timed rounds of one case
ROUNDS = (5, 200)
WARMUP_ROUNDS = 2
# A call of this many seconds gets fewer rounds and no more warming up: it has run three times by
# then.
SLOW, SLOW_ROUNDS = 1.0, 3
# Shorter calls have the time on the device alone as well: launches are a part of the other one.
LAUNCHES_COUNT = 20e-3
DEVICE_ROUNDS = 10
AHEAD = 1 << 23  # cycles, about 5 ms, that the device spends while a call is being launched


ABSENT: dict[str, str] = {}  # "stem provider" -> why there is no number
RECORDER: list[recorder.Recorder] = []  # the one that `--results` asked for


@dataclasses.dataclass(frozen=True)
class Case:
    """One provider of one stem, on one batch."""

    stem: str
    shape: str
    variant: str
    provider: str

    def __str__(self) -> str:
        return f"{self.shape}-{self.variant}-{self.provider}"


def cases(stem: str, inputs: list[tuple[str, str]], backward: bool = True) -> Callable[..., None]:
    """Make a benchmark of all providers of a stem on (shape, variant); the provider varies fastest.

    torch.compile takes part in the first case only: elsewhere compiling it would take most of the
    time.
    """
    if stem not in providers.PROVIDERS:
        raise ValueError(f"{stem!r} has no providers: enter it in benchmarks/providers/__init__.py")
    made = [
        Case(stem, *where, provider)
        for where in inputs
        for provider in providers.PROVIDERS[stem]
        if provider != "compile" or where == inputs[0]
    ]

    @pytest.mark.parametrize("case", made, ids=str)
    def bench(benchmark: Any, case: Case) -> None:
        measure(benchmark, case, backward)

    return bench


def measure(benchmark: Any, case: Case, backward: bool = True) -> None:
    """Check a provider, then time its calls, with the gradients unless `backward` is False."""
    memory.release()
    shape, device, dtype = shapes.get(case.shape), shapes.device(), shapes.dtype()
    from_hidden = case.stem in providers.HIDDEN_PROVIDERS
    try:
        fn = providers.load(case.stem, case.provider)
        turns = batches.rotation(shape, case.variant, device, dtype, from_hidden)
        prepare = functools.partial(calls.prepare, case.stem, case.provider)
        run = functools.partial(calls.forward_backward if backward else calls.forward, fn)
        factor = gate.factor_of(case.provider)
        errors = gate.check(case.stem, turns[0], *run(prepare(turns[0])), factor)
        extra = memory.peak_extra_bytes(functools.partial(run, prepare(turns[0])))
        rounds, warmup_rounds = _rounds(functools.partial(run, prepare(turns[0])))
        benchmark.extra_info |= {
            **dataclasses.asdict(case),
            "sizes": dataclasses.asdict(dataclasses.replace(shape, D=shape.D * from_hidden)),
            "dtype": str(dtype).removeprefix("torch.") if shape.V else "float32",
            "live_tokens": turns[0].live,
            "moving_tokens": turns[0].moving,
            **calls.work(case.stem, turns[0], backward),
            "errors": errors,
            **(_about_the_head(turns[0]) if from_hidden else {}),
        }
        inputs = map(prepare, itertools.cycle(turns))
        take(benchmark, run, lambda: next(inputs), extra, (rounds, warmup_rounds))
        _add_event_time(benchmark, run, lambda: next(inputs))
        record(benchmark)
    except torch.OutOfMemoryError:
        absent(case.stem, f"{case.provider} {case.shape}", "out of memory")
    except providers.UnavailableError as reason:
        absent(case.stem, case.provider, str(reason))
    except gate.WrongError as error:
        note(case.stem, case.provider, f"wrong result: {str(error).splitlines()[0]}")
        raise
    except Exception as error:
        who = f"{case.provider} {case.shape} {case.variant}"
        note(case.stem, who, recorder.reason_of(error))
        raise


def take(
    benchmark: Any,
    run: Callable[[Any], object],
    setup: Callable[[], Any],
    extra: int | None,
    rounds: tuple[int, int],
) -> None:
    """Time `run(setup())`, without `setup`; its results are gone before the next round."""

    def timed(given: Any) -> None:
        run(given)

    name, info = benchmark.name.split("[")[0], benchmark.extra_info
    info |= {"case": name.removeprefix("bench_"), "peak_extra_bytes": extra}
    benchmark.group = f"{info['stem']} {name} {info['shape']} {info['variant']}"
    benchmark.pedantic(
        timed, setup=lambda: ((setup(),), {}), rounds=rounds[0], warmup_rounds=rounds[1]
    )


def record(benchmark: Any) -> None:
    """Write down what was timed, and its `extra_info`, where `--results` asks for it."""
    if RECORDER and benchmark.stats is not None:
        RECORDER[0].add(benchmark.name, benchmark.extra_info, benchmark.stats.stats)


def note(stem: str, provider: str, reason: str) -> None:
    """Write down why a provider has no number."""
    ABSENT[f"{stem} {provider}"] = reason
    if RECORDER:
        RECORDER[0].skip(f"{stem} {provider}", reason)


def absent(stem: str, provider: str, reason: str) -> None:
    """Skip the benchmark, and say why."""
    note(stem, provider, reason)
    pytest.skip(f"{provider}: {reason}")


@functools.lru_cache(maxsize=4)
def _bare_gemms(N: int, D: int, V: int, device: torch.device, dtype: torch.dtype) -> float:
    """Time the three matrix multiplications of a head with gradients, in chunks, nothing else."""
    states = torch.randn(min(N, 4096), D, device=device).to(dtype)
    weight = torch.randn(V, D, device=device).to(dtype)
    logits = torch.empty(len(states), V, device=device, dtype=dtype)

    def chunk() -> None:
        torch.mm(states, weight.mT, out=logits)
        logits @ weight
        logits.mT @ states

    return machine.fastest(chunk, rounds=3) * N / len(states)


def _about_the_head(batch: Batch) -> dict[str, Any]:
    shape, h = batch.shape, batch.hidden
    if "about" not in batch.expected:
        batch.expected["about"] = hidden.describe(h, batch.weight)
    bare = _bare_gemms(shape.N, shape.D, shape.V, h.device, h.dtype)
    return {"bare_gemms_seconds": bare, "inputs": batch.expected["about"]}


def _rounds(run: Callable[[], object]) -> tuple[int, int]:
    """Choose how many rounds are timed, and how many run before them."""
    start = machine.synced_time()
    run()
    seconds = machine.synced_time() - start
    if seconds > SLOW:
        return SLOW_ROUNDS, 0
    fewest, most = ROUNDS
    rounds = min(max(int(TIME_BUDGET[shapes.device().type] / seconds), fewest), most)
    return rounds, WARMUP_ROUNDS


def _add_event_time(benchmark: Any, run: Callable[[Any], object], setup: Callable[[], Any]) -> None:
    """Record the time of a short call on the device alone, as `event_seconds`.

    The device is busy while the call is launched, so that it waits for no launch, unless the call
    itself waits for the device. `setup` takes the inputs in turns: none is found in the cache.
    """
    stats = benchmark.stats if torch.cuda.is_available() else None
    if stats is None or stats.stats.median >= LAUNCHES_COUNT:
        return
    seconds = []
    for _ in range(DEVICE_ROUNDS):
        call = functools.partial(run, setup())
        torch.cuda.synchronize()
        torch.cuda._sleep(AHEAD)
        start, end = machine.between_events(call)
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    benchmark.extra_info["event_seconds"] = statistics.median(seconds)
