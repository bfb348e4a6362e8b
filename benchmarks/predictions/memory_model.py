"""Predict the peak memory of the 7B step on a GPU, without one.

The update of `step_7b` runs on tensors of device "meta", which have sizes and no contents: the same
modules, the same autograd, the same providers. Every storage is counted from the operator that
makes it to its last reference, in blocks of 512 bytes as PyTorch's allocator does. Where a GPU
takes a fused operator and "meta" does not, the fused one is put in its place; this project's
operators run their own code, for the chunk lengths of a GPU, without launching kernels.

Not counted: what libraries allocate for themselves (cuBLAS some 10 MB), the CUDA context (outside
PyTorch's limit too), and holes between blocks. Predictions are put next to the measurements of a
GPU in RESULTS.md.
"""

import bisect
import contextlib
import functools
import importlib
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import command_line
from benchmarks.step_7b import decoder
from benchmarks.step_7b import step as step_7b
from grpo_fast.ops.head import passes

# The packages export functions of these names.
linear_grpo, linear_logprob = (
    importlib.import_module(f"grpo_fast.ops.{name}") for name in ("linear_grpo", "linear_logprob")
)
SAVED = Path(__file__).resolve().parent / "memory_model.json"
META = torch.device("meta")
BLOCK = 512  # bytes: what the allocator rounds to
STEP, MOST = step_7b.STEP_OF_LENGTH, 1 << 18  # tokens: the lengths that are looked at
PROCESSORS = 132  # multiprocessors of an H100 or H200: they decide the chunk length


class Allocations(TorchDispatchMode):
    """Count the bytes of the storages that operators make, and of those it is told to `hold`.

    Args:
        device: count what lies there; None: everything. Operators take numbers in tensors on the
            CPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.device = device
        self.live = self.peak = 0
        self._known: set[int] = set()

    def hold(self, x: Any) -> None:
        if not isinstance(x, Tensor) or self.device not in (None, x.device):
            return
        storage = x.untyped_storage()
        if storage._cdata in self._known:
            return
        nbytes = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known.add(storage._cdata)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage._cdata, nbytes).atexit = False

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        own = OPERATORS.get(str(func)) if _on_paper(args) else None
        if own:
            with self:
                out = own(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        for x in tree_leaves(out):
            self.hold(x)
        return out


def _on_paper(args: tuple) -> bool:
    return any(isinstance(x, Tensor) and x.device == META for x in tree_leaves(args))


def _into_out(*args: Any, out: Tensor, **_: Any) -> Tensor:
    """Write a float32 product of halves into `out`: this operator exists for GPUs alone."""
    return out


OPERATORS: dict[str, Callable[..., Any]] = {
    "aten._local_scalar_dense.default": lambda x: 1.0,  # a metric on its way to the host
    "aten.mm.dtype_out": _into_out,
    "aten.addmm.dtype_out": _into_out,
    "grpo_fast.linear_grpo.default": linear_grpo._forward,
    "grpo_fast.linear_logprob_fwd.default": linear_logprob._forward,
    "grpo_fast.linear_logprob_bwd.default": linear_logprob._backward_pass,
    "grpo_fast.scale_.default": lambda x, factor: None,
}


def _attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]


def _rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
    return torch.ops.aten._fused_rms_norm(x, shape, weight, eps)[0]


def _nothing(*_: Any, **__: Any) -> None:
    pass


@contextlib.contextmanager
def gpu_on_paper() -> Iterator[None]:
    """Treat tensors of device "meta" as a GPU's; kernels write nothing."""
    properties = SimpleNamespace(multi_processor_count=PROCESSORS)
    with contextlib.ExitStack() as stack:

        def patch(owner: Any, **names: Any) -> None:
            for name, x in names.items():
                stack.enter_context(mock.patch.object(owner, name, x))

        patch(torch.Tensor, is_cuda=True)
        patch(torch.cuda, get_device_properties=lambda _: properties)
        patch(passes, fill=_nothing, read_rows=_nothing, write_rows=_nothing)
        with contextlib.suppress(ImportError):  # then there is nothing to predict of it
            from trl.kernels import chunked_logprob

            patch(chunked_logprob, _forward_tile=_nothing, _backward_tile=_nothing)
            patch(chunked_logprob, _addmm_fp32=_nothing)
        patch(torch, is_autocast_enabled=lambda *_: False)  # it knows no device "meta"
        # What these are on a GPU, in bfloat16.
        patch(functional, scaled_dot_product_attention=_attention, rms_norm=_rms_norm)
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
