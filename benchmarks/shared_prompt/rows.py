"""Measure updates with shared prompts beside the unshared one: time and peak memory.

    python -m benchmarks.shared_prompt --model smollm2-135m --out results/shared_prompt.json
    python -m benchmarks.shared_prompt --prompt 512 1024 2048 --group 8 --completion 256    # a GPU's

A case is one group: a prompt of P tokens and G completions of R tokens. The providers of a case run in turns.
The memory is the peak beyond the weights and their gradients, in an update of its own before the timed ones.
Where the padded batch has more than `--tokens` tokens, the unshared update takes its completions in several
forwards, as a trainer would: its memory is that of one of them. Freed memory is kept for the next update. A
provider whose loss or gradient norm is not that of the unshared update gets no number; the
exit code is 1 if it is one of this project's.
"""

import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import command_line, providers
from benchmarks.inputs import shapes
from benchmarks.measuring import gate, machine, memory, recorder
from benchmarks.shared_prompt import models, step
from benchmarks.shared_prompt.step import PROVIDERS, ROUTES, Size
from grpo_fast import shared_prompt
from grpo_fast.integrations.transformers import causal_lm
from grpo_fast.shared_prompt.choice import obstacle

GRID = {"prompt": (96, 512, 2048), "group": (4, 8, 16), "completion": (32, 256)}
OWN = tuple(x for x in PROVIDERS if x != "prefix-grouper")
# Loss and norm of the gradient beside those of the unshared update.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 0.05}
ROUNDS = 3
LONG = 60.0  # seconds of a round; such a case has one


class Sheet(recorder.Sheet):
    """The rows of a run, and why others are absent."""

    def __init__(self, out: Path | None) -> None:
        super().__init__(out, "shared_prompt")
        self.absent: dict[str, str] = self.document["machine_info"]["absent"]

    def skip(self, who: str, why: str) -> None:
        self.absent[who] = why
        print(f"{who}: {why}", flush=True)
        self.write()


def measure(
    model: Any, size: Size, chosen: Sequence[str], most: int, sheet: Sheet, name: str
) -> None:
    """Measure the providers of a case, in turns, and write a row for each."""
    lm = causal_lm(model)
    given = step.inputs(size, lm.get_input_embeddings().num_embeddings)
    rows = max(1, most // (size.P + size.R))
    taken: dict[str, list[float]] = {}
    peaks: dict[str, int | None] = {}
    results: dict[str, tuple[float, float]] = {}
    left, rounds = list(chosen), 1
    while rounds <= ROUNDS and left:
        for provider in list(left):
            who = f"{name} {'x'.join(map(str, size))}, {provider}"
            try:
                if rounds == 1:
                    peaks[provider] = _peak(model, given, provider, rows)
                seconds, result = _once(model, given, provider, rows)
                _check(result, results.setdefault("unshared", result), lm.dtype)
            except Exception as error:  # of a library or a lack of memory: it costs its own row
                known = isinstance(error, (providers.UnavailableError, gate.WrongError))
                sheet.skip(who, str(error) if known else f"failed: {recorder.reason_of(error)}")
                left.remove(provider)
                taken.pop(provider, None)
                continue
            taken.setdefault(provider, []).append(seconds)
        slowest = max((times[-1] for times in taken.values()), default=0.0)
        rounds = ROUNDS + 1 if slowest > LONG else rounds + 1
    for provider, times in taken.items():
        choice = shared_prompt.choose(model, given.plan).route if provider == "auto" else None
        sheet.append(
            {
                "model": name,
                "provider": provider,
                **size._asdict(),
                "dtype": str(lm.dtype).removeprefix("torch."),
                "route": choice,
                "rows": rows if provider == "unshared" else None,
                "flops": step.flops(model, size, provider != "unshared"),
                "median": statistics.median(times),
                "spread": max(times) - min(times),
                "rounds": len(times),
                "peak_extra_bytes": peaks[provider],
            }
        )


def _peak(model: Any, given: step.Inputs, provider: str, rows: int) -> int | None:
    """Return the peak memory of an update; of the unshared one, that of its first forward and backward."""
    if provider in ROUTES and provider != "auto":
        why_not = obstacle(model, given.plan, provider)
        if why_not:
            raise providers.UnavailableError(why_not)
    if provider == "unshared":
        given = step.first(given, rows)
    memory.release()
    _clear(model)
    return memory.peak_extra_bytes(lambda: step.update(model, given, provider, rows))


def _once(
    model: Any, given: step.Inputs, provider: str, rows: int
) -> tuple[float, tuple[float, float]]:
    """Return the time of one update, and its loss and gradient norm."""
    gc.collect()
    _clear(model)
    start = machine.synced_time()
    loss = step.update(model, given, provider, rows)
    seconds = machine.synced_time() - start
    return seconds, (loss, step.gradient_norm(model))


def _clear(model: Any) -> None:
    """Set the gradients to zero: they exist already in training, and the peak is beyond them."""
    for x in model.parameters():
        if x.requires_grad:
            x.grad = torch.zeros_like(x)


def _check(got: tuple[float, float], want: tuple[float, float], dtype: torch.dtype) -> None:
    """Hold loss and gradient norm against those of the unshared update."""
    for what, x, y in zip(("loss", "gradient norm"), got, want, strict=True):
        scale = max(abs(want[1]), 1e-3) if what == "loss" else abs(y)
        if not abs(x - y) <= AGREEMENT[dtype] * scale:
            raise gate.WrongError(f"wrong result: {what} {x:.6g}, unshared {y:.6g}")


def own_failures(document: dict[str, Any]) -> list[str]:
    """List the rows of this project that were wrong, or raised."""
    return [
        who
        for who, why in document["machine_info"]["absent"].items()
        if why.startswith(("wrong result", "failed")) and who.rsplit(", ")[-1] in OWN
    ]


def _command(given: Sequence[str]) -> str:
    """Write the command of a run, without the file that it writes."""
    kept = [x for x in given if not x.startswith("--out=")]
    while "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return " ".join(["python -m benchmarks.shared_prompt", *kept])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--model", choices=models.NAMES, help="default: qwen3-4b-lora on a GPU, tiny on a CPU")
    for name, values in GRID.items():
        add(f"--{name}", type=int, nargs="+", default=values)
    add("--providers", nargs="+", choices=PROVIDERS, default=("unshared", "auto", "backward"))
    add("--attention", default="sdpa", help="attn_implementation of the model")
    add("--tokens", type=int, help="most tokens of an unshared forward: 9,216; on a GPU 65,536")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--seconds", type=float, default=3600.0, help="for everything")
    add("--until", type=float, help="instead: when to end, of Python's time.time()")
    add("--out", type=Path, help="JSON file, written anew after each row")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    os.environ.setdefault(machine.COMMAND_VARIABLE, _command(given))
    end = options.until if options.until is not None else time.time() + options.seconds
    if shapes.device().type == "cpu":
        torch.set_num_threads(options.threads)
    sheet = Sheet(options.out)
    most = options.tokens or (9216 if shapes.device().type == "cpu" else 65_536)
    name = options.model or ("tiny" if shapes.device().type == "cpu" else "qwen3-4b-lora")
    try:
        model = models.build(name, options.attention)
    except providers.UnavailableError as reason:
        sheet.skip(name, str(reason))
        return 0
    step.update(model, step.inputs(Size(8, 2, 2), 512), "unshared", 2)  # the first call is slow
    sizes = itertools.product(options.prompt, options.group, options.completion)
    cases = sorted((Size(*x) for x in sizes), key=lambda x: x.tokens[0])
    with memory.kept():
        for size in cases:
            if time.time() > end:
                sheet.skip(f"{name} {'x'.join(map(str, size))}", "out of time")
                continue
            measure(model, size, options.providers, most, sheet, name)
    return 1 if own_failures(sheet.document) else 0
