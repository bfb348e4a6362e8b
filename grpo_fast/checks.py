"""Argument checks of the ops and losses: errors name the argument and the offending value."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_fast.notices import switch
from grpo_fast.objective import Objective
from grpo_fast.operands import LARGEST, SMALLEST, hint, operand, traced
from grpo_fast.overwritten import check_not_overwritten
from grpo_fast.records import Targets

POSITIVE = f"positive and finite, within float32's [{SMALLEST:.4g}, {LARGEST:.4g}]"
LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def shape_of(x: Tensor) -> str:
    """Return the shape as Python writes it: (2, 3)."""
    return str(tuple(x.shape))


def check_tensor(op: str, name: str, x: object) -> Tensor:
    """Return x if it is a tensor that the operators take; refuse anything else.

    Its elements must lie in the memory of this process, with one stride per dimension. The
    operators have no rule for other kinds of tensors, and PyTorch's own errors advise conversions
    that do not help.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name}: want a tensor, got {type(x).__name__}")
    if is_dtensor(x):
        raise TypeError(
            f"{op}: {name} is a DTensor: want an ordinary tensor; {_instead_of_dtensor(name)}"
        )
    if x.is_nested:
        raise TypeError(
            f"{op}: {name} is a nested tensor: want an ordinary one; pass the tokens of all sequences end to "
            f"end, {name}.values(), with their boundaries as cu_seqlens, or torch.nested.to_padded_tensor("
            f"{name}, 0.0) with a mask"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name} is {x.layout}: want a dense tensor; pass {name}.to_dense()")
    return x


def is_dtensor(x: object) -> bool:
    """Whether x is a DTensor, a tensor that processes share (`torch.distributed.tensor`)."""
    return isinstance(x, Tensor) and hasattr(x, "placements") and hasattr(x, "to_local")


def _instead_of_dtensor(name: str) -> str:
    """Return the end of an error message: what to pass in place of a DTensor."""
    if name in ("weight", "bias", "lora A", "lora B", "dw_out"):
        return (
            "under FSDP call this inside the forward of the module that owns it, where it has been gathered "
            "(grpo_fast.integrations.transformers.with_head); with rows spread over processes pass this "
            "process's own, to_local(), and tp_group"
        )
    if name == "logits":
        return (
            "pass logits.full_tensor(), the whole rows on every process; where the vocabulary is spread over "
            "processes, linear_grpo_loss and linear_logprob need no whole rows (tp_group)"
        )
    return (
        f"pass {name}.full_tensor(), or {name}.to_local() where that is what this process works on"
    )


def check_no_tangent(op: str, name: str, x: Tensor) -> None:
    """Refuse forward-mode derivatives and torch.func.grad.

    A custom operator would silently return a forward-mode derivative of 0.
    """
    if torch.compiler.is_compiling():
        return
    if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(
            f"{op}: {name} carries a tangent, but there is no forward-mode derivative (torch.func.jvp)"
        )
    # A tensor of jvp would pass this test, too, so the check above comes first.
    if torch._C._functorch.is_gradtrackingtensor(x):
        raise NotImplementedError(
            f"{op}: {name} is differentiated by torch.func (grad, vjp, jacrev), which custom operators do "
            "not support; use backward() or torch.autograd.grad"
        )


def check_logits(op: str, logits: Tensor, ids: Tensor, ids_name: str) -> Tensor:
    """Check logits and ids; return the logits as (B, T, V) without a copy; (N, V) becomes (1, N, V)."""
    check_tensor(op, "logits", logits)
    check_tensor(op, ids_name, ids)
    check_no_tangent(op, "logits", logits)
    check_not_overwritten(op, logits)
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(
            f"{op}: logits: want float32, bfloat16 or float16, got {logits.dtype} "
            "(grpo_fast.reference computes in any dtype)"
        )
    if logits.ndim not in (2, 3):
        raise ValueError(f"{op}: logits: want (B, T, V) or (N, V), got {shape_of(logits)}")
    if ids.shape != logits.shape[:-1]:
        hint = ""
        if logits.ndim == 3 and ids.ndim == 2 and logits.shape[1] > ids.shape[1]:
            T = ids.shape[1]
            hint = (
                f"; if the logits are of prompts and completions pass those that score the completions: "
                f"logits[:, -{T + 1}:-1], or let the model compute them alone (logits_to_keep={T}, without "
                "the last token)"
            )
        raise ValueError(
            f"{op}: {ids_name}: want {tuple(logits.shape[:-1])}, one per row of logits "
            f"{shape_of(logits)}, got {shape_of(ids)}{hint}"
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"{op}: logits: the vocabulary is empty, got {shape_of(logits)}")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"{op}: logits: the last dimension must be contiguous, got strides {logits.stride()}"
        )
    return logits if logits.ndim == 3 else logits[None]


def check_ids(op: str, name: str, ids: Tensor, mask: Tensor | None, V: int) -> Tensor:
    """Check ids; return them as (N,) int64 or int32, contiguous.

    Where the mask is 0 they are never read and may hold any value.
    """
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name}: want int32 or int64, got {ids.dtype}")
    if check_values(ids):
        bad = (ids < 0) | (ids >= V)
        if mask is not None:
            bad &= mask.view(ids.shape)
        if bad.any():
            where = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"{op}: {name}: {ids[where].item()} at {where} is outside the vocabulary [0, {V})"
            )
    return ids.reshape(-1).contiguous()


def per_token(
    op: str, name: str, x: Tensor | None, like: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor | None:
    """Check `x`, one value per token; return it as (N,) in `dtype`, contiguous."""
    if x is None:
        return None
    return shaped_as_tokens(op, name, x, like, dtype).reshape(-1)


def shaped_as_tokens(
    op: str, name: str, x: Tensor, like: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Check `x`, one value per token; return it in the shape of `like` in `dtype`, contiguous."""
    check_tensor(op, name, x)
    if x.shape != like.shape:
        hint = "" if name.endswith("logps") else _expanded(name, x, like)
        raise ValueError(f"{op}: {name}: want {tuple(like.shape)}, got {shape_of(x)}{hint}")
    return constant(op, name, x, like, dtype)


def constant(op: str, name: str, x: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Check a tensor with any number of values, on the device of `like`; return it in `dtype`, dense."""
    check_device(op, name, x, like)
    check_real(op, name, x)
    x = x.detach() if x.dtype == dtype else x.detach().to(dtype)
    return x.contiguous()


def _expanded(name: str, x: Tensor, like: Tensor) -> str:
    """Return the end of an error message: how to turn one value per sequence into one per token."""
    if like.ndim != 2 or tuple(x.shape) not in ((len(like),), (len(like), 1)):
        return ""
    column = f"{name}[:, None]" if x.ndim == 1 else name
    return f"; for one per sequence pass {column}.expand{tuple(like.shape)}"


def check_shape(op: str, name: str, x: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Refuse a tensor whose shape is none of these."""
    if tuple(x.shape) not in shapes:
        *others, last = (str(shape) for shape in dict.fromkeys(shapes))
        wanted = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{op}: {name}: want {wanted}, got {shape_of(x)}")


def check_real(op: str, name: str, x: Tensor) -> None:
    """Refuse complex numbers. Every real dtype is taken and converted to float32."""
    if x.dtype.is_complex:
        raise TypeError(f"{op}: {name}: want real numbers, got {x.dtype}")


def check_constant(op: str, name: str, x: object) -> None:
    """Refuse a constant argument that requires grad: no gradient would reach it.

    This check is not for log-probs of other policies: every trainer holds them constant, and a
    reference that was scored with a graph, or `old_logps=logps`, is common.
    """
    if not isinstance(x, Tensor):
        return
    check_tensor(op, name, x)
    check_no_tangent(op, name, x)
    if x.requires_grad:
        raise ValueError(
            f"{op}: {name} requires grad, but it is a constant that no gradient reaches; "
            f"pass {name}.detach(), or compute it under torch.no_grad()"
        )


def check_objective(op: str, objective: object) -> None:
    """Refuse anything that is no `Objective`, before its options are read."""
    if not isinstance(objective, Objective):
        raise TypeError(
            f"{op}: objective: want an Objective, such as Objective.preset(name), got {objective!r}"
        )


def check_held(op: str, name: str, x: object, like: Tensor) -> None:
    """Refuse a tensor on the meta device, which holds no values; a number may lie on any other device."""
    if isinstance(x, Tensor) and x.is_meta and not like.is_meta:
        raise ValueError(
            f"{op}: {name} is on meta, which holds no values: want a number or a tensor on {like.device}"
        )


def check_device(op: str, name: str, x: Tensor, like: Tensor) -> None:
    """Refuse an x that is not on the device of the others: nothing is moved silently."""
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, the other arguments on {like.device}")


def check_mask(op: str, mask: Tensor | None, like: Tensor, anywhere: bool = False) -> Tensor | None:
    """Check a mask; return which tokens count, (N,) bool: those whose value is not 0.

    `mask_share` returns the weights of a floating mask.

    Args:
        anywhere: whether the mask may be on the CPU while the other arguments are not.
    """
    if mask is None:
        return None
    check_tensor(op, "mask", mask)
    if mask.shape != like.shape:
        raise ValueError(
            f"{op}: mask: want {tuple(like.shape)}, got {shape_of(mask)}{_other_mask(mask, like)}"
        )
    if not (anywhere and mask.device.type == "cpu"):
        check_device(op, "mask", mask, like)
    check_real(op, "mask", mask)
    if mask.is_floating_point() and check_values(mask):
        bad = ~((mask >= 0) & (mask < math.inf))
        if bad.any():
            where = tuple(bad.nonzero()[0].tolist())
            value = mask[where].item()
            hint = ""
            if value <= -1:
                hint = "; additive attention masks (0 and -inf) are not taken: pass mask == 0 in its place"
            raise ValueError(
                f"{op}: mask: {value} at {where}; a floating mask weighs its tokens, "
                f"want finite numbers >= 0{hint}"
            )
    kept = mask.detach()
    return (kept if kept.dtype == torch.bool else kept != 0).reshape(-1).contiguous()


def _other_mask(mask: Tensor, like: Tensor) -> str:
    """Return the end of an error message: what to pass in place of a mask made for another purpose."""
    if mask.ndim == 4:
        return (
            "; it is a mask of the attention, from token to token: want one entry per scored token, "
            "such as the tokenizer's 2-D mask of the completions"
        )
    if like.ndim == 2 and mask.ndim == 2 and mask.shape[0] == len(like):
        T = like.shape[1]
        if mask.shape[1] > T > 0:
            return (
                f"; if it covers prompts and completions pass mask[:, -{T}:], the completions' part"
            )
    if like.ndim == 1 and mask.numel() == like.numel():
        return "; pass mask.flatten()"
    return _expanded("mask", mask, like)


def floating_mask(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return a floating mask as (N,) on the device of `like`, in its own dtype; None for other masks."""
    if mask is None or not mask.is_floating_point():
        return None
    return mask.detach().to(like.device, non_blocking=True).reshape(-1).contiguous()


def share_of(floating: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight that a floating mask gives each token, in `dtype`.

    A negative weight becomes NaN. On a GPU nobody looks for one, and an additive mask must not give
    a result that looks right.
    """
    return torch.nn.functional.threshold(floating.to(dtype), -SMALLEST, math.nan)


def mask_share(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the weights of a floating mask, (N,) fp32 on the device of `like`; None for other masks."""
    floating = floating_mask(mask, like)
    return None if floating is None else share_of(floating)


def check_temperature(
    op: str, temperature: float | Tensor, like: Tensor, mask: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Check temperatures; return those per token (N,), or None, and 1 / the common one as an operand."""
    check_constant(op, "temperature", temperature)
    check_held(op, "temperature", temperature, like)
    if isinstance(temperature, Tensor) and temperature.ndim > 0:
        values = per_token(op, "temperature", temperature, like)
        assert values is not None
        if check_values(values):
            bad = ~((values >= SMALLEST) & (values <= LARGEST))
            if mask is not None:
                bad &= mask
            if bad.any():
                value = values[bad][0].item()
                raise ValueError(f"{op}: temperature: want {POSITIVE}, got {value}")
        return values, operand(1.0)
    if isinstance(temperature, Tensor):  # 0-dim: it stays on its device
        if not check_values(temperature):
            return temperature.detach().float().expand(like.numel()).contiguous(), operand(1.0)
        temperature = float(temperature)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(
            f"{op}: temperature: want a number or a tensor, got {temperature!r}"
            f"{hint('temperature', temperature)}"
        )
    if not SMALLEST <= temperature <= LARGEST:
        raise ValueError(f"{op}: temperature: want {POSITIVE}, got {temperature}")
    if traced():
        return None, operand(temperature).reciprocal()
    return None, _reciprocal(float(temperature))


@functools.lru_cache(maxsize=64)
def _reciprocal(x: float) -> Tensor:
    """Return 1 / x as an operand, made once: a step has the temperature of the step before."""
    with torch.inference_mode(False):  # autograd may save it
        return operand(x).reciprocal()


def check_targets(
    op: str,
    name: str,
    ids: Tensor,
    logits: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
) -> Targets:
    """Check which entries of rows of logits are scored, and at which temperature; return them flat."""
    check_device(op, name, ids, logits)
    live = check_mask(op, mask, ids)
    flat = check_ids(op, name, ids, live, logits.shape[-1])
    return Targets(flat, live, *check_temperature(op, temperature, ids, live))


def check_cu_seqlens(op: str, cu_seqlens: Tensor, ids: Tensor) -> Tensor:
    """Check the boundaries of packed sequences, (num_seqs + 1,) int: 0, ..., N, never decreasing."""
    check_tensor(op, "cu_seqlens", cu_seqlens)
    if ids.ndim != 1:
        raise ValueError(
            f"{op}: cu_seqlens describes packed (N,) tokens, but the ids are {shape_of(ids)}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: cu_seqlens: want int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"{op}: cu_seqlens: want (num_seqs + 1,), got {shape_of(cu_seqlens)}")
    check_device(op, "cu_seqlens", cu_seqlens, ids)
    if len(cu_seqlens) == 1 and len(ids):
        raise ValueError(f"{op}: cu_seqlens: has no sequence for N = {len(ids)} tokens")
    if check_values(cu_seqlens):
        ends: Sequence[int] = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != len(ids):
            raise ValueError(
                f"{op}: cu_seqlens: must go from 0 to N = {len(ids)}, got {ends[0]} to {ends[-1]}"
            )
        for i in range(len(ends) - 1):
            if ends[i + 1] < ends[i]:
                raise ValueError(
                    f"{op}: cu_seqlens: decreases from {ends[i]} to {ends[i + 1]} at {i + 1}"
                )
    return cu_seqlens


def check_number(
    op: str, name: str, value: float, minimum: float = 0.0, high: float = math.inf
) -> None:
    """Refuse anything but a finite number within the bounds, both included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name}: want a number, got {value!r}{hint(name, value)}")
    if not (minimum <= value <= high and value < math.inf):
        wanted = f">= {minimum}" if high == math.inf else f"in [{minimum}, {high}]"
        raise ValueError(f"{op}: {name}: want a finite number {wanted}, got {value}")


def check_count(op: str, name: str, x: object) -> int:
    """Return x if it is an int above 0; refuse anything else."""
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{op}: {name}: want an int, got {x!r}")
    if x <= 0:
        raise ValueError(f"{op}: {name}: want a positive int, got {x}")
    return x


def check_positive(op: str, name: str, x: object) -> None:
    """Refuse anything but a finite number above 0."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{op}: {name}: want a number, got {x!r}{hint(name, x)}")
    if not SMALLEST <= x <= LARGEST:
        raise ValueError(f"{op}: {name}: want {POSITIVE}, got {x}")


def check_values(x: Tensor) -> bool:
    """Whether the values of an argument are checked.

    They always are on the CPU, elsewhere with GRPO_FAST_VALIDATE=1.

    On a GPU the check is a host sync. In a compiled graph it would be a graph break, so there it is
    left out.
    """
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or switch("GRPO_FAST_VALIDATE")
