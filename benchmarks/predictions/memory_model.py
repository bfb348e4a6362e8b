"""Predict the peak memory of the 7B step on a GPU, without one.

The update of `step_7b` runs on tensors of device "meta", which have sizes and no contents: the same
modules, the same autograd, the same providers. `grpo_fast.trainer.allocations` says what is
counted. Predictions are put next to the measurements of a GPU in RESULTS.md.
"""

import bisect
import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import command_line
from benchmarks.step_7b import decoder
from benchmarks.step_7b import step as step_7b
from grpo_fast.trainer.allocations import BLOCK, META, PROCESSORS, Allocations, on_paper

__all__ = [
    "BLOCK",
    "META",
    "PROCESSORS",
    "Allocations",
    "gpu_on_paper",
    "longest",
    "peak",
    "predict",
]
SAVED = Path(__file__).resolve().parent / "memory_model.json"
STEP, MOST = step_7b.STEP_OF_LENGTH, 1 << 18  # tokens: the lengths that are looked at


def _rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
    return torch.ops.aten._fused_rms_norm(x, shape, weight, eps)[0]


def _nothing(*_: Any, **__: Any) -> None:
    pass


@contextlib.contextmanager
def gpu_on_paper() -> Iterator[None]:
    """Treat tensors of device "meta" as a GPU's, with what the benchmark runs besides the product."""
    with contextlib.ExitStack() as stack:

        def patch(owner: Any, **names: Any) -> None:
            for name, x in names.items():
                stack.enter_context(mock.patch.object(owner, name, x))

        stack.enter_context(on_paper("cuda"))
        with contextlib.suppress(ImportError):  # then there is nothing to predict of it
            from trl.kernels import chunked_logprob

            patch(chunked_logprob, _forward_tile=_nothing, _backward_tile=_nothing)
            patch(chunked_logprob, _addmm_fp32=_nothing)
        patch(functional, rms_norm=_rms_norm)  # what it is on a GPU, in bfloat16
        yield


def peak(trained: step_7b.Trained, size: step_7b.Size, provider: str) -> int:
    """Predict the peak of one update in bytes; weights, gradients and inputs included."""
    heads, inputs = step_7b.heads_of(provider), step_7b.batch(size, trained.model.c.V, META)
    parameters = [p for model in trained if model for p in model.parameters()]
    allocations = Allocations(META)
    for x in (*inputs.values(), *parameters):
        allocations.hold(x)
    with gpu_on_paper(), allocations:
        step_7b.update(trained, inputs, *heads)
    step_7b.clear(trained.model)
    return allocations.peak


def predict(config: decoder.Config = decoder.QWEN_7B) -> Iterator[dict[str, Any]]:
    """Yield rows like those of `step_7b`, without times."""
    size, searched = step_7b.BATCH["cuda"], step_7b.SEARCHED["cuda"]
    for mode in step_7b.MODES:
        trained = step_7b.build(config, mode, META, torch.bfloat16)
        for provider in step_7b.PROVIDERS:
            who = {"mode": mode, "provider": provider}
            found = peak(trained, size, provider)
            yield {**who, "kind": "batch", **size._asdict(), "peak_bytes": found}
            peak_at = functools.cache(
                lambda T, of=trained, who=provider: peak(of, searched._replace(T=T), who)
            )
            for cap in step_7b.CAPS:
                fits = longest(peak_at, cap)
                about = {"kind": "longest", "cap_bytes": cap, "B": searched.B, "P": searched.P}
                yield {**who, **about, "fits": fits, "fails": fits + STEP}


def longest(peak_at: Callable[[int], int], cap: float) -> int:
    """Find the longest completion, a multiple of `STEP`, whose peak is at most `cap` bytes; else 0."""
    lengths = range(STEP, MOST, STEP)
    return STEP * bisect.bisect_right(lengths, cap, key=peak_at)


def load(path: Path = SAVED) -> dict[str, Any]:
    """Return {"torch": the version whose operators were counted, "step": rows of `predict`}."""
    return json.loads(path.read_text())


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--save", action="store_true", help=f"write {SAVED.name} anew")
    options = parser.parse_args()
    rows = []
    for row in predict():
        print(row, flush=True)
        rows.append(row)
    if options.save:
        document = {"torch": torch.__version__.split("+")[0], "step": rows}
        SAVED.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
