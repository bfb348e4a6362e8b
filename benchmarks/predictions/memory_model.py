"""Peak memory of the 7B step on a GPU, without one. `python -m benchmarks.predictions.memory_model --save`.

The update of `step_7b` runs on tensors of device "meta", which have sizes and no contents: the same modules,
the same autograd, the same providers. Every storage is counted from the operator that makes it to its last
reference, in blocks of 512 bytes as PyTorch's allocator does. Where a GPU takes a fused operator and "meta"
does not, the fused one is put in its place; this project's operators run their own code, for the chunk
lengths of a GPU, without launching kernels.

Not counted: what libraries allocate for themselves (cuBLAS some 10 MB), the CUDA context (outside PyTorch's
limit too), and holes between blocks. Predictions are put next to the measurements of a GPU in RESULTS.md.
"""

import argparse
import bisect
import contextlib
import copy
import functools
import importlib
import json
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import providers
from benchmarks.step_7b import decoder
from benchmarks.step_7b import step as step_7b
from grpo_fast.ops import _chunks

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
    """Counts the bytes of the storages that operators make, and of those it is told to `hold`.

    Args:
        device: count what lies there; None: everything. Operators take numbers in tensors on the CPU.
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
    """A product of halves with a float32 result: exists for GPUs alone, and writes into `out`."""
    return out


def _flash_backward(dout: Tensor, q: Tensor, *args: Any, **kwargs: Any) -> Any:
    sums = torch.empty(q.shape, dtype=torch.float32, device=q.device)  # of dq, inside the operator
    out = torch.ops.aten._scaled_dot_product_flash_attention_backward(dout, q, *args, **kwargs)
    del sums
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


def _never(*_: Any) -> bool:
    return False


def _properties(device: Any) -> Any:
    return SimpleNamespace(multi_processor_count=PROCESSORS)


@contextlib.contextmanager
def gpu_on_paper() -> Iterator[None]:
    """Tensors of device "meta" are treated as a GPU's, and kernels write nothing."""
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(torch.Tensor, "is_cuda", True))
        enter(mock.patch.object(torch.cuda, "get_device_properties", _properties))
        for name in ("fill", "read_rows", "write_rows"):
            enter(mock.patch.object(_chunks, name, _nothing))
        with contextlib.suppress(ImportError):  # then there is nothing to predict of it
            from trl.kernels import chunked_logprob

            for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
                enter(mock.patch.object(chunked_logprob, name, _nothing))
        # It knows no device "meta".
        enter(mock.patch.object(torch, "is_autocast_enabled", _never))
        # What these are on a GPU, in bfloat16.
        enter(mock.patch.object(functional, "scaled_dot_product_attention", _attention))
        enter(mock.patch.object(functional, "rms_norm", _rms_norm))
        yield


def build(config: decoder.Config, mode: str, dtype: torch.dtype) -> step_7b.Trained:
    """As `step_7b.build`, without values."""
    with META:
        model = decoder.Decoder(config).to(dtype)
        if mode == "full":
            return step_7b.Trained(model, copy.deepcopy(model).requires_grad_(False))
        decoder.add_lora(model, step_7b.RANK)
    return step_7b.Trained(model, None)


def batch(size: step_7b.Size) -> dict[str, Tensor]:
    """As `step_7b.batch`, without values."""
    ids = torch.empty(size.B, size.P + size.T, dtype=torch.long, device=META)
    advantages = torch.empty(size.B, device=META)
    return {"ids": ids, "completion": ids[:, size.P :].contiguous(), "advantages": advantages}


def peak(trained: step_7b.Trained, size: step_7b.Size, provider: str) -> int:
    """Predicted peak of one update, bytes; weights, gradients and inputs included."""
    heads = providers.load("linear_logprob", provider), providers.load("linear_grpo", provider)
    inputs = batch(size)
    models = [model for model in trained if model is not None]
    allocations = Allocations(META)
    for x in (*inputs.values(), *(p for model in models for p in model.parameters())):
        allocations.hold(x)
    with gpu_on_paper(), allocations:
        step_7b.update(trained, inputs, *heads)
    step_7b.clear(trained.model)
    return allocations.peak


def predict(config: decoder.Config = decoder.QWEN_7B) -> Iterator[dict[str, Any]]:
    """Rows like those of `step_7b`, without times."""
    for mode in step_7b.MODES:
        trained = build(config, mode, torch.bfloat16)
        for provider in step_7b.PROVIDERS:
            for row in _of_provider(trained, provider):
                yield {"mode": mode, "provider": provider, **row}


def _of_provider(trained: step_7b.Trained, provider: str) -> Iterator[dict[str, Any]]:
    size, searched = step_7b.BATCH["cuda"], step_7b.SEARCHED["cuda"]
    found = peak(trained, size, provider)
    yield {"kind": "batch", **size._asdict(), "peak_bytes": found}

    @functools.cache
    def peak_at(T: int) -> int:
        return peak(trained, searched._replace(T=T), provider)

    for cap in step_7b.CAPS:
        fits = longest(peak_at, cap)
        about = {"cap_bytes": cap, "B": searched.B, "P": searched.P}
        yield {"kind": "longest", **about, "fits": fits, "fails": fits + STEP}


def longest(peak_at: Callable[[int], int], cap: float) -> int:
    """The longest completion, a multiple of `STEP`, whose peak is at most `cap` bytes; 0 if there is none."""
    lengths = range(STEP, MOST, STEP)
    return STEP * bisect.bisect_right(lengths, cap, key=peak_at)


def load(path: Path = SAVED) -> dict[str, Any]:
    """{"torch": the version whose operators were counted, "step": rows of `predict`}."""
    return json.loads(path.read_text())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help=f"write {SAVED.name} anew")
    options = parser.parse_args(arguments)
    rows = []
    for row in predict():
        print(row, flush=True)
        rows.append(row)
    if options.save:
        document = {"torch": torch.__version__.split("+")[0], "step": rows}
        SAVED.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
