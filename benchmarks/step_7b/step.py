"""One GRPO update of a 7B model: time, peak memory, and the longest completion that fits.

    python -m benchmarks.step_7b --seconds 540 --out results/step_7b.json     # a tiny model on a CPU

An update is all of: log-probs of the old policy (the model itself) and of the reference without gradients,
hidden states with gradients, each layer checkpointed, the loss of the head, the backward pass into every
trainable parameter. bfloat16 on a GPU. Not part of it: sampling, the optimiser and its state. Two ways:

    lora   the model frozen, adapters of rank 16 on every projection; the reference is the model without them
    full   every parameter trained, its bfloat16 gradient kept; the reference is a second copy of the weights

Providers differ in the head alone (`linear_logprob`, `linear_grpo` of `providers`). One whose loss or
gradient norm is not eager's gets no number, nor does one that fails; the exit code is 1 if it is one of this
project's. On a GPU two questions come first (`HEADLINES`): does one update fit into that memory with this
project's head, and with eager's. The longest completion is searched with one sequence, under caps on the
memory that PyTorch may use; the search knows that the peak grows linearly with the length. What was planned
and not done, because time was up or the process was killed, is listed as "not_reached".
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import providers
from benchmarks.measuring import machine, memory
from benchmarks.measuring import recorder as results
from benchmarks.step_7b import decoder
from benchmarks.step_7b.longest import capped, longest
from grpo_fast import Objective

PROVIDERS = ("eager", "trl", "grpo_fast", "grpo_fast-bf16")
MODES = ("lora", "full")
RANK = 16
OBJECTIVE = Objective.preset("grpo", beta=0.04)
CAPS = (24e9, 48e9, 80e9)  # bytes
ROUNDS = 3
AGREEMENT = {torch.bfloat16: 0.05, torch.float32: 1e-4}  # of loss and gradient norm with eager's
STEP_OF_LENGTH = 256
HEADLINE_PROVIDERS = ("grpo_fast", "eager")


class Size(NamedTuple):
    B: int
    P: int  # of the prompt
    T: int  # of the completion


BATCH = {"cuda": Size(4, 256, 1024), "cpu": Size(2, 4, 12)}
SEARCHED = {"cuda": Size(1, 256, 512), "cpu": Size(1, 4, 8)}


# (mode, cap, sequences): by `memory_model` each fits with this project's head and not with eager's.
HEADLINES = (("lora", 24e9, Size(1, 256, 8192)), ("full", 80e9, Size(1, 256, 32_768)))


class Trained(NamedTuple):
    model: decoder.Decoder
    reference: decoder.Decoder | None  # None: the model without its adapters


def build(config: decoder.Config, mode: str, device: torch.device, dtype: torch.dtype) -> Trained:
    model = decoder.make(config, device, dtype)
    if mode == "full":
        return Trained(model, copy.deepcopy(model).requires_grad_(False))
    decoder.add_lora(model, RANK)
    return Trained(model, None)


def batch(size: Size, V: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(V, (size.B, size.P + size.T), device=device, generator=generator)
    sign = torch.ones(size.B, device=device)
    sign[1::2] = -1
    return {"ids": ids, "completion": ids[:, size.P :].contiguous(), "advantages": sign}


def update(trained: Trained, inputs: dict[str, Tensor], log_probs: Any, loss_of: Any) -> Tensor:
    """The loss; gradients are left in the parameters."""
    model, reference = trained
    ids, completion = inputs["ids"], inputs["completion"]
    T = completion.shape[1]
    weight = model.lm_head.weight

    def hidden(of: decoder.Decoder) -> Tensor:
        return of(ids)[:, -T - 1 : -1].contiguous()

    with torch.no_grad():
        old = log_probs(hidden(model), weight, completion)
        if reference is None:
            decoder.switch_adapters(model, on=False)
            try:
                ref = log_probs(hidden(model), weight, completion)
            finally:  # it may run out of memory here
                decoder.switch_adapters(model, on=True)
        else:
            ref = log_probs(hidden(reference), reference.lm_head.weight, completion)
    loss = loss_of(
        hidden(model),
        weight,
        completion,
        mask=None,
        advantages=inputs["advantages"],
        old_logps=old,
        ref_logps=ref,
        objective=OBJECTIVE,
    )
    loss.backward()
    return loss.detach()


def clear(model: decoder.Decoder) -> None:
    for x in model.parameters():
        x.grad = None


def gradient_norm(model: decoder.Decoder) -> float:
    squares = [x.grad.float().square().sum() for x in model.parameters() if x.grad is not None]
    return math.sqrt(torch.stack(squares).sum().item())


def measure(trained: Trained, size: Size, provider: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time, peak and outcome of an update. The peak counts the weights."""
    memory.release()  # what another provider may have left when it ran out of memory
    model = trained.model
    device = model.lm_head.weight.device
    inputs = batch(size, model.c.V, device)
    heads = providers.load("linear_logprob", provider), providers.load("linear_grpo", provider)

    def run() -> Tensor:
        clear(model)
        return update(trained, inputs, *heads)

    run()  # warm: compiles, and allocates what stays
    loss = run()
    norm = gradient_norm(model)
    clear(model)
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    extra = memory.peak_extra_bytes(run)
    times = []
    for _ in range(rounds):
        start = machine.synced_time()
        run()
        times.append(machine.synced_time() - start)
    clear(model)
    seconds = statistics.median(times)
    return {
        "loss": loss.item(),
        "gradient_norm": norm,
        "peak_bytes": None if extra is None else held + extra,
        "seconds": seconds,
        "spread": (max(times) - min(times)) / seconds,
        "tokens_per_second": size.B * (size.P + size.T) / seconds,
    }


def disagreement(row: dict[str, Any], eager: dict[str, Any], dtype: torch.dtype) -> str | None:
    """Why a provider's update is not eager's; None if it is."""
    scale = {"loss": 1.0, "gradient_norm": abs(eager["gradient_norm"])}  # advantages are of size 1
    for name, unit in scale.items():
        error = abs(row[name] - eager[name]) / unit
        if not error <= AGREEMENT[dtype]:
            return f"wrong result: {name} {row[name]:.6g}, eager has {eager[name]:.6g}"
    return None


def peak_at(trained: Trained, size: Size, provider: str) -> int | None:
    """Bytes in use at once in one update, weights included; None if it ran out of memory."""
    memory.release()
    torch.cuda.reset_peak_memory_stats()
    heads = providers.load("linear_logprob", provider), providers.load("linear_grpo", provider)
    try:
        inputs = batch(size, trained.model.c.V, trained.model.lm_head.weight.device)
        update(trained, inputs, *heads)
    except torch.OutOfMemoryError:
        return None
    finally:
        clear(trained.model)
    # Not what was reserved: near a cap that is the cap, whatever the length.
    return torch.cuda.max_memory_allocated()


class Sheet:
    """The rows, written after each."""

    def __init__(
        self,
        out: Path | None,
        config: decoder.Config,
        dtype: torch.dtype,
        planned: Sequence[str] = (),
    ) -> None:
        self.out = out
        info = machine.describe() | {"absent": {}}
        name = "qwen2.5-7b" if config == decoder.QWEN_7B else "tiny"
        self.document: dict[str, Any] = {"machine_info": info, "benchmarks": [], "step": []}
        self.document["not_reached"] = list(planned)
        self.common = {"model": name, "dtype": str(dtype).removeprefix("torch.")}

    def add(self, who: str, **row: Any) -> None:
        self.drop(who)
        self.document["step"].append(self.common | row)
        print(row, flush=True)
        self.write()

    def drop(self, who: str) -> None:
        """It is no longer to be done."""
        waiting = self.document["not_reached"]
        waiting[:] = [name for name in waiting if name != who]

    def skip(self, who: str, why: str) -> None:
        self.drop(who)
        self.document["machine_info"]["absent"][who] = why
        print(f"{who}: {why}", flush=True)
        self.write()

    def write(self) -> None:
        if self.out:
            results.write(self.out, self.document)


def run(
    config: decoder.Config,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    out: Path | None = None,
    chosen: Sequence[str] = PROVIDERS,
    modes: Sequence[str] = MODES,
    caps: Sequence[float] = CAPS,
) -> dict[str, Any]:
    """Everything, the most telling first, as far as the time goes."""
    end = time.monotonic() + seconds
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        caps = [cap for cap in caps if cap <= 1.02 * total]
    else:
        caps = []
    headlines = [x for x in HEADLINES if x[0] in modes and x[1] in caps]
    sheet = Sheet(out, config, dtype, planned(headlines, modes, chosen, caps))
    sheet.write()
    for mode, cap, size in headlines:
        if time.monotonic() > end:
            break
        trained = build(config, mode, device, dtype)
        _headline(sheet, trained, mode, cap, size, chosen, end)
        del trained
        memory.release()
    able: dict[str, list[str]] = {}
    for mode in modes:
        if time.monotonic() > end:
            break
        trained = build(config, mode, device, dtype)
        able[mode] = _same_batch(sheet, trained, mode, chosen, dtype, end)
        del trained
        memory.release()
    for mode in able if caps else ():
        # The other way to train gets its share of the time, if it comes.
        share = 0.7 if mode == modes[0] and len(able) > 1 else 1.0
        deadline = time.monotonic() + (end - time.monotonic()) * share
        if time.monotonic() > deadline:
            break
        trained = build(config, mode, device, dtype)
        _longest(sheet, trained, mode, able[mode], caps, deadline)
        del trained
        memory.release()
    sheet.write()
    return sheet.document


def named(mode: str, provider: str, cap: float = 0.0, length: int = 0) -> str:
    """What a row is called where it has no number."""
    limit = f"{cap / 1e9:.0f} GB, " if cap else ""
    return f"7B step, {mode}, {limit}{f'{length} tokens, ' if length else ''}{provider}"


def planned(
    headlines: Sequence[tuple[str, float, Size]],
    modes: Sequence[str],
    chosen: Sequence[str],
    caps: Sequence[float],
) -> list[str]:
    """Every row that a run is to have."""
    first = [
        named(mode, who, cap, size.T)
        for mode, cap, size in headlines
        for who in HEADLINE_PROVIDERS
        if who in chosen
    ]
    batches = [named(mode, who) for mode in modes for who in chosen]
    searches = [named(mode, who, cap) for mode in modes for cap in caps for who in reversed(chosen)]
    return first + batches + searches


def _headline(
    sheet: Sheet,
    trained: Trained,
    mode: str,
    cap: float,
    size: Size,
    chosen: Sequence[str],
    end: float,
) -> None:
    """Does one update fit into a memory? The peak, or none."""
    for provider in HEADLINE_PROVIDERS:
        if provider not in chosen or time.monotonic() > end:
            continue
        who = named(mode, provider, cap, size.T)
        with capped(cap):
            try:
                peak = peak_at(trained, size, provider)
            except Exception as error:
                sheet.skip(who, failure(error))
                continue
        about = {"mode": mode, "provider": provider, "cap_bytes": cap}
        sheet.add(who, kind="headline", **about, **size._asdict(), peak_bytes=peak)


def failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _same_batch(
    sheet: Sheet,
    trained: Trained,
    mode: str,
    chosen: Sequence[str],
    dtype: torch.dtype,
    end: float,
) -> list[str]:
    """Measure the providers on one batch; those that can."""
    size = BATCH[trained.model.lm_head.weight.device.type]
    eager, able = None, []
    for provider in chosen:
        if time.monotonic() > end:
            break
        who = named(mode, provider)
        try:
            row = measure(trained, size, provider)
        except providers.UnavailableError as reason:
            sheet.skip(who, str(reason))
            continue
        except torch.OutOfMemoryError:
            clear(trained.model)
            sheet.skip(who, f"out of memory at {size}")
            able.append(provider)  # a shorter completion may fit
            continue
        except Exception as error:  # of a library: it costs its own row
            clear(trained.model)
            sheet.skip(who, failure(error))
            continue
        eager = row if provider == "eager" else eager
        wrong = disagreement(row, eager, dtype) if eager else None
        if wrong:
            sheet.skip(who, wrong)
            continue
        sheet.add(who, kind="batch", mode=mode, provider=provider, **size._asdict(), **row)
        able.append(provider)
    return able


def _longest(
    sheet: Sheet,
    trained: Trained,
    mode: str,
    able: list[str],
    caps: Sequence[float],
    deadline: float,
) -> None:
    """Search per cap and provider, the smallest cap first; each gets an equal part of what is left."""
    todo = [(cap, provider) for cap in caps for provider in reversed(able)]
    for who in sheet.document["not_reached"].copy():
        # The others have said already why they have no number.
        if who in {named(mode, x, cap) for cap in caps for x in PROVIDERS if x not in able}:
            sheet.drop(who)
    size = SEARCHED["cuda"]
    for i, (cap, provider) in enumerate(todo):
        left = deadline - time.monotonic()
        if left <= 0:
            return
        who = named(mode, provider, cap)

        def peak(length: int, provider: str = provider) -> int | None:
            return peak_at(trained, size._replace(T=length), provider)

        with capped(cap):
            until = time.monotonic() + left / (len(todo) - i)
            try:
                fits, fails = longest(peak, cap, size.T, until, STEP_OF_LENGTH)
            except Exception as error:
                sheet.skip(who, failure(error))
                continue
        if (fits, fails) == (0, None):
            continue  # no length was tried
        sheet.add(
            who,
            kind="longest",
            mode=mode,
            provider=provider,
            cap_bytes=cap,
            B=size.B,
            P=size.P,
            fits=fits,
            fails=fails,
        )


def own_failures(document: dict[str, Any]) -> list[str]:
    """Who of this project's providers is wrong, or raised."""
    return [
        who
        for who, why in document["machine_info"]["absent"].items()
        if why.startswith(("wrong result", "failed"))
        and providers.library(who.rsplit(", ")[-1]) in providers.OWN
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=540.0, help="for everything")
    parser.add_argument("--until", type=float, help="instead: when to end, of Python's time.time()")
    parser.add_argument("--out", type=Path, help="JSON file, written anew after each row")
    parser.add_argument("--provider", action="append", choices=PROVIDERS, help="repeatable")
    parser.add_argument("--mode", action="append", choices=MODES, help="repeatable")
    parser.add_argument("--cap", action="append", type=float, help="GB; repeatable")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    document = run(
        decoder.QWEN_7B if cuda else decoder.TINY,
        torch.device("cuda" if cuda else "cpu"),
        torch.bfloat16 if cuda else torch.float32,
        options.seconds if options.until is None else options.until - time.time(),
        options.out,
        options.provider or PROVIDERS,
        options.mode or MODES,
        [cap * 1e9 for cap in options.cap] if options.cap else CAPS,
    )
    return 1 if own_failures(document) else 0
