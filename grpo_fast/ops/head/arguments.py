"""The arguments of a language-model head: its tensors, its options, and their checks."""

import itertools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_fast.checks import (
    LOGITS_DTYPES,
    check_count,
    check_device,
    check_no_tangent,
    check_positive,
    check_tensor,
    shape_of,
)
from grpo_fast.notices import fell_back
from grpo_fast.operands import LARGEST, hint, operand
from grpo_fast.ops.head.vocab_parallel import rows_of_all
from grpo_fast.spelling import check_choice


class Options(NamedTuple):
    """The options of a head for the operators; the first three are 0-dim, on the CPU."""

    lora_scaling: Tensor
    softcap: Tensor | None
    logit_scale: Tensor
    fp32_logits: bool
    vocab_size: int  # of this process
    chunk_size: int  # 0: chosen here
    tp_group: str  # name of the group that shares the vocabulary; "": none
    first_row: int  # with a group: the place of this process's first row in the vocabulary
    widest: int  # with a group: the most rows of vocabulary that a process has


class Parameters(NamedTuple):
    """The tensors of a head."""

    weight: Tensor  # (rows >= vocab_size, D)
    bias: Tensor | None  # (rows,)
    lora_a: Tensor | None  # (r, D)
    lora_b: Tensor | None  # (rows, r)


# Any mixture of these is taken; the products are in the dtype of `hidden`.
HEAD_DTYPES = (*LOGITS_DTYPES, torch.float64)


class Needs(NamedTuple):
    """The gradients that are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool

    @property
    def parameters(self) -> bool:
        return self.weight or self.bias or self.lora_a or self.lora_b


LONGEST_CHUNK = 1 << 20  # tokens; so many rows of logits are allocated even for a shorter batch


class HeadArguments(NamedTuple):
    """A language-model head as the caller passes it; `grpo_fast.ops.linear_logprob` explains it."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    logits_dtype: str
    vocab_size: int | None
    chunk_size: int | None
    lora: tuple[Tensor, Tensor, float] | None
    tp_group: dist.ProcessGroup | None


def on_gpu(x: Tensor) -> bool:
    """Whether PyTorch's CUDA (or ROCm) operators work on x."""
    return x.is_cuda


def check_head(
    op: str, hidden: Tensor, ids: Tensor, ids_name: str, head: HeadArguments
) -> tuple[Tensor, Parameters, Options, int]:
    """Check a head against hidden states and ids.

    Returns:
        `hidden` as (N, D), the parameters, the options, and the size of the whole vocabulary.
    """
    D = _check_hidden(op, hidden, ids, ids_name, head)
    V, rows, shards = _check_rows(op, hidden, head)
    starts = [0, *itertools.accumulate(shards)]
    sizes = [max(0, min(V - start, n)) for start, n in zip(starts[:-1], shards, strict=True)]
    rank = 0 if head.tp_group is None else head.tp_group.rank()
    a, b, scaling = check_lora(op, head.lora, rows, D)
    parameters = Parameters(head.weight, check_bias(op, head.bias, rows), a, b)
    check_no_tangent(op, "hidden", hidden)
    for name, x in zip(("weight", "bias", "lora A", "lora B"), parameters, strict=True):
        if x is not None:
            check_no_tangent(op, name, x)
            check_operand(op, name, x, hidden)
    if head.softcap is not None:
        check_positive(op, "softcap", head.softcap)
    check_positive(op, "logit_scale", head.logit_scale)
    check_choice("logits_dtype", head.logits_dtype, ("fp32", "bf16"), op)
    size = 0 if head.chunk_size is None else check_count(op, "chunk_size", head.chunk_size)
    if size > LONGEST_CHUNK:
        raise ValueError(
            f"{op}: chunk_size: want at most {LONGEST_CHUNK} tokens, whose logits are in memory, got {size}"
        )
    options = Options(
        lora_scaling=operand(scaling),
        softcap=None if head.softcap is None else operand(head.softcap),
        logit_scale=operand(head.logit_scale),
        fp32_logits=head.logits_dtype == "fp32",
        vocab_size=sizes[rank],
        chunk_size=size,
        tp_group="" if head.tp_group is None else head.tp_group.group_name,
        first_row=starts[rank],
        widest=max(sizes),
    )
    if any(x is not None and x.dtype == torch.float64 for x in (hidden, *parameters)):
        # The operators compute in float32. With a float64 operand nothing may be rounded: all of it
        # becomes float64.
        if head.tp_group is not None:
            raise TypeError(
                f"{op}: tp_group with float64 operands is not supported: convert hidden and the head to "
                "float32"
            )
        if on_gpu(hidden):
            names = ("hidden", "weight", "bias", "lora A", "lora B")
            given = zip(names, (hidden, *parameters), strict=True)
            found = [key for key, x in given if x is not None and x.dtype == torch.float64]
            fell_back("float64", f"{op}: {' and '.join(found)} in float64", quiet=True)
        hidden = hidden.double()
        wide = [None if x is None else x.double() for x in parameters]
        parameters = Parameters(head.weight.double(), *wide[1:])
    return hidden.reshape(-1, D), parameters, options, V


def _check_hidden(op: str, hidden: Tensor, ids: Tensor, ids_name: str, head: HeadArguments) -> int:
    """Check kinds, shapes and devices of the hidden states and ids; return D."""
    check_dtype(op, "hidden", check_tensor(op, "hidden", hidden))
    check_dtype(op, "weight", check_tensor(op, "weight", head.weight))
    check_tensor(op, ids_name, ids)
    if hidden.ndim not in (2, 3):
        raise ValueError(f"{op}: hidden: want (B, T, D) or (N, D), got {shape_of(hidden)}")
    if ids.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: {ids_name}: want {tuple(hidden.shape[:-1])}, one per row of hidden "
            f"{shape_of(hidden)}, got {shape_of(ids)}"
        )
    check_device(op, ids_name, ids, hidden)
    if not hidden.shape[-1]:
        raise ValueError(
            f"{op}: hidden: want (B, T, D) or (N, D) with D > 0, got {shape_of(hidden)}"
        )
    if head.tp_group is not None and not isinstance(head.tp_group, dist.ProcessGroup):
        raise TypeError(
            f"{op}: tp_group: want a torch.distributed.ProcessGroup, got "
            f"{type(head.tp_group).__name__}"
        )
    return hidden.shape[-1]


def _check_rows(op: str, hidden: Tensor, head: HeadArguments) -> tuple[int, int, list[int]]:
    """Check the rows of the head's weight.

    Returns:
        The size of the vocabulary, this process's rows, and the rows of each process.
    """
    weight, group, D = head.weight, head.tp_group, hidden.shape[-1]
    fits = weight.ndim == 2 and weight.shape[1] == D
    # A process may have no rows while others have some: 5 rows in shares of 2 are 2, 2, 1 and 0.
    rows = len(weight) if fits else 0
    shards = [rows] if group is None or not fits else rows_of_all(rows, group, weight.device)
    if not fits or not any(shards):
        raise ValueError(
            f"{op}: weight: want (vocabulary, {D}), since hidden is {shape_of(hidden)}, "
            f"got {shape_of(weight)}"
        )
    size = head.vocab_size
    V = sum(shards) if size is None else check_count(op, "vocab_size", size)
    if sum(shards) < V:
        raise ValueError(f"{op}: vocab_size={V} is more than the {sum(shards)} rows of weight")
    return V, rows, shards


def check_dtype(op: str, name: str, x: Tensor) -> None:
    """Refuse a dtype that a matrix product of the head does not take."""
    if x.dtype not in HEAD_DTYPES:
        raise TypeError(
            f"{op}: {name}: want float32, bfloat16, float16 or float64, got {x.dtype}; integers and "
            "8-bit floats of a quantised head have to be dequantised"
        )


def check_operand(op: str, name: str, x: Tensor, hidden: Tensor) -> None:
    """Refuse a tensor of the head that is not floating, or not on the device of `hidden`."""
    check_device(op, name, x, hidden)
    check_dtype(op, name, x)


def check_bias(op: str, bias: Tensor | None, rows: int) -> Tensor | None:
    """Check that a bias has one value per row of weight; return it."""
    if bias is not None and check_tensor(op, "bias", bias).shape != (rows,):
        raise ValueError(f"{op}: bias: want ({rows},), got {shape_of(bias)}")
    return bias


def check_lora(
    op: str, lora: tuple[Tensor, Tensor, float] | None, rows: int, D: int
) -> tuple[Tensor | None, Tensor | None, float]:
    """Check an adapter on the head; return (A, B, scaling), or (None, None, 1) without one."""
    if lora is None:
        return None, None, 1.0
    if not isinstance(lora, (tuple, list)):
        raise TypeError(f"{op}: lora: want (A, B, scaling), got {type(lora).__name__}")
    if len(lora) != 3:
        raise ValueError(f"{op}: lora: want (A, B, scaling), got {len(lora)} entries")
    a, b, scaling = lora
    check_tensor(op, "lora A", a)
    check_tensor(op, "lora B", b)
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(
            f"{op}: lora scaling: want a number, got {scaling!r}{hint('scaling', scaling)}"
        )
    if not -LARGEST <= scaling <= LARGEST:
        raise ValueError(f"{op}: lora scaling: want a number that float32 can hold, got {scaling}")
    if a.ndim != 2 or a.shape[1] != D:
        raise ValueError(f"{op}: lora A: want (r, {D}), got {shape_of(a)}")
    if b.shape != (rows, len(a)):
        raise ValueError(f"{op}: lora B: want ({rows}, {len(a)}), got {shape_of(b)}")
    return a, b, scaling
