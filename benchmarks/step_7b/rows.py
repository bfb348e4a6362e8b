"""Measure GRPO updates of a 7B model, and the longest completion that fits, as time allows.

    python -m benchmarks.step_7b --seconds 540 --out results/step_7b.json    # on a CPU a tiny model

The rows come in the order of what they tell. "headline": does one update fit into a memory with
this project's head, and with eager's? "batch": the same batch with every provider's head.
"longest": the longest completion of one sequence, under caps on the memory that PyTorch may use. A
provider whose loss or gradient norm is not eager's gets no number, nor does one that fails; the
exit code is 1 if it is one of this project's. What was not done, because time was up or the process
was killed, is "not_reached".
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import command_line, providers
from benchmarks.inputs import shapes
from benchmarks.measuring import gate, memory, recorder
from benchmarks.step_7b import decoder, step
from benchmarks.step_7b.longest import capped, longest

# (mode, cap, sequences): by `memory_model` each fits with this project's head and not with eager's.
HEADLINES = (("lora", 24e9, step.Size(1, 256, 8192)), ("full", 80e9, step.Size(1, 256, 32_768)))
HEADLINE_PROVIDERS = ("grpo_fast", "eager")


class Row(NamedTuple):
    """One measurement of a plan; a cap of 0 is none."""

    kind: str
    mode: str
    provider: str
    cap: float
    size: step.Size

    def __str__(self) -> str:
        limit = f"{self.cap / 1e9:.0f} GB, " if self.cap else ""
        length = f"{self.size.T} tokens, " if self.kind == "headline" else ""
        return f"7B step, {self.mode}, {limit}{length}{self.provider}"


def planned(
    modes: Sequence[str], chosen: Sequence[str], caps: Sequence[float], device: str = "cuda"
) -> list[Row]:
    """List every row that a run is to have, in order; the smallest cap first."""
    headlines = [
        Row("headline", mode, who, cap, size)
        for mode, cap, size in HEADLINES
        for who in HEADLINE_PROVIDERS
        if mode in modes and who in chosen and cap in caps
    ]
    batches = itertools.product(modes, chosen)
    searches = itertools.product(modes, caps, reversed(chosen))
    return [
        *headlines,
        *(Row("batch", mode, who, 0.0, step.BATCH[device]) for mode, who in batches),
        *(Row("longest", mode, who, cap, step.SEARCHED[device]) for mode, cap, who in searches),
    ]


class Sheet(recorder.Sheet):
    """The rows of a plan; those that are still to be measured are `not_reached`."""

    def __init__(self, out: Path | None, about: dict[str, Any], rows: Sequence[Row]) -> None:
        super().__init__(out, "step", not_reached=[str(row) for row in rows])
        self.about = about
        self.absent: dict[str, str] = self.document["machine_info"]["absent"]
        self.write()

    def add(self, row: Row, **found: Any) -> None:
        about = {"kind": row.kind, "mode": row.mode, "provider": row.provider}
        cap = {"cap_bytes": row.cap} if row.cap else {}
        self.append(self.about | about | row.size._asdict() | cap | found)
        self.drop(row)

    def skip(self, row: Row, why: str) -> None:
        self.absent[str(row)] = why
        print(f"{row}: {why}", flush=True)
        self.drop(row)

    def drop(self, row: Row) -> None:
        """Take a row off the list of what is still to be done."""
        self.document["not_reached"].remove(str(row))
        self.write()


class Run:
    """Rows measured one after the other, as far as the time goes."""

    def __init__(
        self, config: decoder.Config, device: torch.device, dtype: torch.dtype, sheet: Sheet
    ) -> None:
        self.config, self.device, self.dtype, self.sheet = config, device, dtype, sheet
        self.eager: dict[str, dict[str, Any]] = {}  # eager's batch by mode

    def all(self, rows: Sequence[Row], end: float) -> None:
        """Measure rows until `end`, of `time.monotonic()`; searches share what is left equally."""
        built = ""
        trained: Any = None
        left = list(rows)
        while left and time.monotonic() < end:
            row = left.pop(0)
            if built != row.mode:
                trained = None
                memory.release()
                trained = step.build(self.config, row.mode, self.device, self.dtype)
                built = row.mode
            until = time.monotonic() + (end - time.monotonic()) / (1 + len(left))
            if not self.one(row, trained, until):
                for other in [x for x in left if (x.mode, x.provider) == (row.mode, row.provider)]:
                    left.remove(other)  # it has said why already
                    self.sheet.drop(other)

    def one(self, row: Row, trained: step.Trained, until: float) -> bool:
        """Measure a row; False if its provider can do no other with this way to train."""
        try:
            (self._batch if row.kind == "batch" else self._under_cap)(row, trained, until)
        except torch.OutOfMemoryError:
            self.sheet.skip(row, f"out of memory at {row.size}")  # a shorter completion may fit
        except Exception as error:  # of a library: it costs its own row
            known = isinstance(error, (providers.UnavailableError, gate.WrongError))
            why = str(error) if known else f"failed: {recorder.reason_of(error)}"
            self.sheet.skip(row, why)
            return row.kind != "batch"
        finally:
            if trained is not None:
                step.clear(trained.model)
        return True

    def _batch(self, row: Row, trained: step.Trained, until: float) -> None:
        found = step.measure(trained, row.size, row.provider)
        if row.provider == "eager":
            self.eager[row.mode] = found
        eager = self.eager.get(row.mode)
        if eager and (wrong := step.disagreement(found, eager, self.dtype)):
            raise gate.WrongError(wrong)
        self.sheet.add(row, **found)

    def _under_cap(self, row: Row, trained: step.Trained, until: float) -> None:
        def peak(length: int) -> int | None:
            return step.peak_at(trained, row.size._replace(T=length), row.provider)

        with capped(row.cap):
            if row.kind == "headline":
                self.sheet.add(row, peak_bytes=peak(row.size.T))
                return
            fits, fails = longest(peak, row.cap, row.size.T, until, step.STEP_OF_LENGTH)
        if (fits, fails) != (0, None):  # else no length was tried
            self.sheet.add(row, fits=fits, fails=fails)


def own_failures(document: dict[str, Any]) -> list[str]:
    """List the rows whose provider is this project's and was wrong, or raised."""
    return [
        who
        for who, why in document["machine_info"]["absent"].items()
        if why.startswith(("wrong result", "failed"))
        and providers.library(who.rsplit(", ")[-1]) in providers.OWN
    ]


def run(rows: Sequence[Row], seconds: float, out: Path | None = None) -> dict[str, Any]:
    """Measure rows, with a 7B model on a GPU and a tiny one on a CPU."""
    end = time.monotonic() + seconds
    name, config, dtype = "tiny", decoder.TINY, torch.float32
    if torch.cuda.is_available():
        name, config, dtype = "qwen2.5-7b", decoder.QWEN_7B, torch.bfloat16
    sheet = Sheet(out, {"model": name, "dtype": str(dtype).split(".")[1]}, rows)
    Run(config, shapes.device(), dtype, sheet).all(rows, end)
    return sheet.document


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--seconds", type=float, default=540.0, help="for everything (default: 540)")
    add("--until", type=float, help="instead: when to end, of Python's time.time()")
    add("--out", type=Path, help="JSON file, written anew after each row")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    total = torch.cuda.get_device_properties(0).total_memory if cuda else 0
    caps = [cap for cap in step.CAPS if cap <= 1.02 * total]
    rows = planned(step.MODES, step.PROVIDERS, caps, "cuda" if cuda else "cpu")
    seconds = options.seconds if options.until is None else options.until - time.time()
    return 1 if own_failures(run(rows, seconds, options.out)) else 0
