"""Count the memory of tensors operator by operator, also of a device that is not there.

`Allocations` counts every storage from the operator that makes it to its last reference, in blocks of
512 bytes as PyTorch's allocator does. Within `on_paper` tensors of device "meta", which have sizes and
no contents, take the operators that a GPU or a CPU takes, and this project's operators run their own
code, for the chunk lengths of that device, without launching kernels.

Not counted: what libraries allocate for themselves (cuBLAS some 10 MB), the CUDA context (outside
PyTorch's limit too), and holes between blocks.
"""

import contextlib
import importlib
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx.experimental import _config as assumptions
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo_fast.ops.head import passes

# The packages export functions of these names.
linear_grpo, linear_logprob = (
    importlib.import_module(f"grpo_fast.ops.{name}") for name in ("linear_grpo", "linear_logprob")
)
META = torch.device("meta")
BLOCK = 512  # bytes: what the allocator rounds to
PROCESSORS = 132  # multiprocessors of an H100 or H200: they decide the chunk length
HALVES = (torch.bfloat16, torch.float16)
ALIGNED = 16  # elements: to which a GPU's attention pads the rows of a mask
# References to a gradient that nobody but autograd holds, as a dispatch mode sees them: that of autograd,
# and three for the call itself.
SOLE = 4


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
        self.trace: list[int] = []  # `live` after each operator
        self._known: set[int] = set()

    def hold(self, x: Any) -> None:
        """Count the storage of a tensor as long as it is referenced."""
        if not isinstance(x, Tensor) or self.device not in (None, x.device):
            return
        storage = x.untyped_storage()
        if storage._cdata in self._known:
            return
        nbytes = _size(storage)
        self._known.add(storage._cdata)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, storage._cdata, nbytes).atexit = False

    def _free(self, key: int, nbytes: int) -> None:
        if key in self._known:  # else it was taken over by a sum
            self._known.discard(key)
            self.live -= nbytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        own = INSIDE.get(str(func)) or (STAND_INS.get(str(func)) if _on_meta(args) else None)
        if own:
            with self:
                out = own(*args, **kwargs)
        else:
            reused = args[0] if _sum_of_gradients(func, args) else None
            out = func(*args, **kwargs)
            if reused is not None:
                storage = reused.untyped_storage()
                self._free(storage._cdata, _size(storage))
        for x in tree_leaves(out):
            self.hold(x)
        self.trace.append(self.live)
        return out


def _size(storage: torch.UntypedStorage) -> int:
    return -(-storage.nbytes() // BLOCK) * BLOCK


def _sum_of_gradients(func: Any, args: tuple) -> bool:
    """Tell whether autograd adds two gradients of one tensor, which takes no new memory.

    Without a dispatch mode autograd adds the second gradient to the first one, in place, if nobody else
    has it. Within a mode it makes a third tensor instead: a tied embedding would count three times.
    """
    if func is not torch.ops.aten.add.Tensor or torch.is_grad_enabled():
        return False
    x, y = args[:2]
    alike = isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype
    # A node's own sums, and gradients that go on elsewhere, have other counts.
    count: Any = getattr(x, "_use_count", None)  # not in every version of PyTorch
    inside = torch._C._current_graph_task_id() != -1
    return bool(alike and inside and count and count() == SOLE and _dense(x))


def _dense(x: Tensor) -> bool:
    """Tell whether a tensor fills its storage."""
    return x.numel() * x.element_size() == x.untyped_storage().nbytes()


def _on_meta(args: tuple) -> bool:
    return any(isinstance(x, Tensor) and x.device == META for x in tree_leaves(args))


def _into_out(*args: Any, out: Tensor, **_: Any) -> Tensor:
    """Write a float32 product of halves into `out`: this operator exists for GPUs alone."""
    return out


# Operators of this project: what they allocate inside is counted, too.
INSIDE: dict[str, Callable[..., Any]] = {
    "grpo_fast.linear_grpo.default": linear_grpo.linear_grpo.by_fields,
    "grpo_fast.linear_logprob_fwd.default": linear_logprob.linear_logprob_fwd.by_fields,
    "grpo_fast.linear_logprob_bwd.default": linear_logprob.linear_logprob_bwd.by_fields,
}
# What takes the place of operators that device "meta" has not.
STAND_INS: dict[str, Callable[..., Any]] = {
    "aten._local_scalar_dense.default": lambda x: 1.0,  # a metric on its way to the host
    "aten.is_nonzero.default": lambda x: True,  # a mask without padding
    "aten.mm.dtype_out": _into_out,
    "aten.addmm.dtype_out": _into_out,
    "grpo_fast.scale_.default": lambda x, factor: None,
}


class Casts:
    """The casts of autocast for linear layers and attention on "meta", which PyTorch's own does not know.

    Autocast keeps the casts of trained float32 weights until its region ends: call `forget` there.

    Args:
        dtype: of the activations; None: no autocast.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self._kept: dict[int, Tensor] | None = {}

    def of(self, x: Tensor) -> Tensor:
        """Return x in the dtype of the activations."""
        if self.dtype is None or not x.is_floating_point() or x.dtype == self.dtype:
            return x
        if self._kept is None or not (x.requires_grad and x.is_leaf):
            return x.to(self.dtype)
        if id(x) not in self._kept:
            self._kept[id(x)] = x.to(self.dtype)
        return self._kept[id(x)]

    def forget(self) -> None:
        """End the region of the forward; the recomputation of a layer keeps nothing beyond itself."""
        self._kept = None


def _gpu_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Run the attention that a GPU chooses: flash for halves without a mask, else memory-efficient."""
    attend: Any = torch.ops.aten
    if mask is None and q.dtype in HALVES:
        return attend._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0]
    if mask is not None:
        rows, columns = mask.shape[-2:]
        padded = -(-columns // ALIGNED) * ALIGNED
        copy = q.new_empty(*mask.shape[:-2], rows, padded)[..., :columns]
        mask = copy.expand(*q.shape[:2], rows, columns)
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
    return attend._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, causal)[0]


def _cpu_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Run the flash attention of a CPU."""
    if mask is not None and mask.dtype == torch.bool:
        mask = q.new_empty(mask.shape)
    attend: Any = torch.ops.aten
    return attend._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)[
        0
    ]


def _nothing(*_: Any, **__: Any) -> None:
    pass


@contextlib.contextmanager
def on_paper(device: str = "cuda", dtype: torch.dtype | None = None) -> Iterator[Casts]:
    """Treat tensors of device "meta" as those of a GPU or a CPU; kernels write nothing.

    Masks are assumed to be full: indexing with one takes all elements.

    Args:
        device: "cuda" or "cpu".
        dtype: of autocast; None: without it.
    """
    casts, gpu = Casts(dtype), device == "cuda"
    plain = functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return plain(casts.of(x), casts.of(weight), bias if bias is None else casts.of(bias))

    def attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, *_: Any, **given: Any
    ) -> Tensor:
        q, k, v = (casts.of(x) for x in (q, k, v))
        run = _gpu_attention if gpu else _cpu_attention
        return run(q, k, v, attn_mask, given.get("is_causal", False))

    with contextlib.ExitStack() as stack:

        def patch(owner: Any, **names: Any) -> None:
            for name, x in names.items():
                stack.enter_context(mock.patch.object(owner, name, x))

        patch(torch, is_autocast_enabled=lambda *_: False)  # it knows no device "meta"
        patch(functional, scaled_dot_product_attention=attention)
        patch(assumptions, meta_nonzero_assume_all_nonzero=True)
        if dtype is not None:
            patch(functional, linear=linear)
        if gpu:
            properties = SimpleNamespace(multi_processor_count=PROCESSORS)
            patch(torch.Tensor, is_cuda=True)
            patch(torch.cuda, get_device_properties=lambda _: properties)
            patch(passes, fill=_nothing, read_rows=_nothing, write_rows=_nothing)
        yield casts
