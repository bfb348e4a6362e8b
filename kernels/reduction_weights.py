"""Weights of tokens in the loss: the reduction, the mask, token weights and the loss scale in one launch.

    w_t   = r m_t x_t s           m the mask, x token weights, s the loss scale
    r     = 1 / (sum of m over the sequence * sequences), 1 / sum of m, 1 / num_items, or a constant
    w^H_t = m_t x_t s / sum of m                                  of an entropy bonus by tokens

A program owns a part of a sequence, or a whole sequence where they are packed. Each program adds up all of
the mask that it needs, in the same order. So no program waits for another, and the result does not depend on
an order of arrival. Bytes: what is written, once; token weights once; the mask once, and the part that is
summed once more by each program, from the cache.
"""

import functools

import torch
import triton
import triton.language as tl

from grpo_fast.kernels.policy_loss import load_tokens
from grpo_fast.kernels.schedules import compiled_with, parts_of

COUNTED = 4096  # tokens that a program counts at a time
BLOCK = 2048  # tokens that it writes at a time
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def number_or(ptr, number):
    """The number on the device if there is one, else the number given at launch."""
    if ptr is not None:
        number = tl.load(ptr).to(tl.float32)
    return number


@triton.jit
def shares(mask_ptr, floating_ptr, offs, there):
    """(which tokens count, the share of each): 1, or the floating mask, NaN where that is negative."""
    live = there
    if mask_ptr is not None:
        live = there & (tl.load(mask_ptr + offs, mask=there, other=0) != 0)
    share = live.to(tl.float32)
    if floating_ptr is not None:
        share = tl.load(floating_ptr + offs, mask=live, other=0.0).to(tl.float32)
        share = tl.where(share > -SMALLEST, share, float("nan"))
    return live, share


@triton.jit
def total_of(mask_ptr, floating_ptr, start, stop, COUNTED: tl.constexpr):
    """The sum of the mask over tokens [start, stop); 1 where it is 0. Counts are exact, sums are float64."""
    if floating_ptr is not None:
        weighed = tl.zeros([COUNTED], tl.float64)
        for base in range(start, stop, COUNTED):
            offs = base + tl.arange(0, COUNTED)
            _, share = shares(mask_ptr, floating_ptr, offs, offs < stop)
            weighed += share.to(tl.float64)
        total = tl.sum(weighed, axis=0).to(tl.float32)
    elif mask_ptr is not None:
        counts = tl.zeros([COUNTED], tl.int32)
        for base in range(start, stop, COUNTED):
            offs = base + tl.arange(0, COUNTED)
            live, _ = shares(mask_ptr, floating_ptr, offs, offs < stop)
            counts += live.to(tl.int32)
        total = tl.sum(counts, axis=0).to(tl.float32)
    else:
        total = (stop - start).to(tl.float32)
    return tl.where(total == 0, 1.0, total)


@triton.jit(do_not_specialize=["N", "T_len", "parts", "columns", "sequences"])
def _reduction_weights_kernel(
    weighing,  # Weighing; num_items and loss_scale are None unless they lie on the device
    weight_ptr,  # (N,) fp32
    share_ptr,  # (N,) fp32, or None
    entropy_weight_ptr,  # (N,) fp32, or None
    sequence_ptr,  # (N,) int64, the sequence of each token, or None
    N,
    T_len,
    parts,
    columns,
    sequences,
    constant,
    num_items,
    loss_scale,
    REDUCTION: tl.constexpr,
    HAS_ITEMS: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    mask_ptr = weighing.mask
    floating_ptr = weighing.floating
    boundaries_ptr = weighing.boundaries
    program = tl.program_id(0)
    b = (program // parts).to(tl.int64)
    start = b * T_len
    stop = start + T_len
    if boundaries_ptr is not None:
        # Boundaries are not checked on a GPU. Whatever they are, nothing outside the tensors is touched.
        start = tl.load(boundaries_ptr + b).to(tl.int64)
        stop = tl.load(boundaries_ptr + b + 1).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), N)
        stop = tl.minimum(tl.maximum(stop, 0), N)
    everything = tl.zeros_like(b)
    weight = constant
    if REDUCTION == "sequence_mean":
        length = total_of(mask_ptr, floating_ptr, start, stop, COUNTED)
        weight = tl.div_rn(1.0, length * sequences.to(tl.float32))
    elif REDUCTION == "token_mean":
        if HAS_ITEMS:
            items = number_or(weighing.num_items, num_items)
            items = tl.where(items < 1.0, 1.0, items)
        else:
            items = total_of(mask_ptr, floating_ptr, everything, everything + N, COUNTED)
        weight = tl.div_rn(1.0, items)
    if entropy_weight_ptr is not None:
        total = total_of(mask_ptr, floating_ptr, everything, everything + N, COUNTED)
    scale = number_or(weighing.loss_scale, loss_scale)
    first = start + (program % parts) * columns
    last = tl.minimum(first + columns, stop)
    if boundaries_ptr is not None:
        first = tl.where(b == 0, 0, start)
        last = tl.where(b == sequences - 1, N, stop)
    for base in range(first, last, BLOCK):
        offs = base + tl.arange(0, BLOCK)
        there = offs < last
        live, share = shares(mask_ptr, floating_ptr, offs, there)
        extra = load_tokens(weighing.token_weights, offs, live, 1.0)
        # Select, not multiply: a token without weight adds nothing, whatever the scale is.
        extra = tl.where(extra == 0, 0.0, extra * scale)
        mine = tl.where(live, weight * share * extra, 0.0)
        if boundaries_ptr is not None:
            mine = tl.where((offs >= start) & (offs < stop), mine, float("nan"))
        tl.store(weight_ptr + offs, mine, mask=there)
        if share_ptr is not None:
            tl.store(share_ptr + offs, share, mask=there)
        if entropy_weight_ptr is not None:
            by_tokens = tl.div_rn(share * extra, tl.zeros([BLOCK], tl.float32) + total)
            tl.store(entropy_weight_ptr + offs, tl.where(live, by_tokens, 0.0), mask=there)
        if sequence_ptr is not None:
            tl.store(sequence_ptr + offs, tl.zeros([BLOCK], tl.int64) + b, mask=there)


def reduction_weights_fwd(like, weighing, reduction, max_length, by_tokens):
    """Launch the kernel for tokens of the shape of `like`, (B, T) or packed (N,), N > 0.

    Args:
        weighing: `Weighing`. Packed tokens without boundaries are one sequence.
        by_tokens: whether the second kind of weights is wanted.

    Returns:
        weight, share (or None), weight by tokens (or None): (N,) fp32; the sequence of each token, (N,)
        int64, or None without boundaries.
    """
    N = like.numel()
    boundaries = weighing.boundaries
    new = functools.partial(torch.empty, N, device=like.device)
    weight = new(dtype=torch.float32)
    share = None if weighing.floating is None else new(dtype=torch.float32)
    entropy_weight = new(dtype=torch.float32) if by_tokens else None
    sequence = None if boundaries is None else new(dtype=torch.int64)
    T_len = like.shape[-1]
    sequences = N // T_len if boundaries is None else len(boundaries) - 1
    if boundaries is not None:
        rows, parts, columns = sequences, 1, N
    elif reduction == "sequence_mean":
        rows, parts, columns = sequences, parts_of(T_len, BLOCK), BLOCK
    else:  # no sequence has a number of its own
        rows, parts, columns, T_len = 1, parts_of(N, BLOCK), BLOCK, N
    items_ptr, num_items = on_device_or_not(weighing.num_items)
    scale_ptr, loss_scale = on_device_or_not(weighing.loss_scale)
    _reduction_weights_kernel[(rows * parts,)](
        weighing=weighing._replace(num_items=items_ptr, loss_scale=scale_ptr),
        weight_ptr=weight,
        share_ptr=share,
        entropy_weight_ptr=entropy_weight,
        sequence_ptr=sequence,
        N=N,
        T_len=T_len,
        parts=parts,
        columns=columns,
        sequences=sequences,
        constant=1 / (sequences * (max_length or 1)),
        num_items=num_items,
        loss_scale=loss_scale,
        REDUCTION=reduction,
        HAS_ITEMS=weighing.num_items is not None,
        COUNTED=COUNTED,
        BLOCK=BLOCK,
        **compiled_with(8),
    )
    return weight, share, entropy_weight, sequence


def on_device_or_not(number):
    """(the number if it is a tensor, else None; the number if it is none, else 1)."""
    if isinstance(number, torch.Tensor):
        return number, 1.0
    return None, 1.0 if number is None else number
