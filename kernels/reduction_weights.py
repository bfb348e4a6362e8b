"""What a token weighs in the loss: the reduction, the mask, token weights and the loss scale in one launch.

    w_t   = r m_t x_t s           m the mask, x token weights, s the loss scale
    r     = 1 / (sum of m over the sequence * sequences), 1 / sum of m, 1 / num_items, or a constant
    w^H_t = m_t x_t s / sum of m                                  of an entropy bonus by tokens

A program owns a part of a sequence, or of packed sequences a whole one. Each program adds up all of the mask
that it needs, in the same order: so nobody waits for another, and the bits depend on no order of arrival.
Bytes: what is written, once; token weights once; the mask once, and its sum's part once more by each program,
from the cache.
"""

import functools

import torch
import triton
import triton.language as tl

from grpo_fast.kernels.policy_loss import load_tokens
from grpo_fast.kernels.schedules import compiled_with

COUNTED = 4096  # tokens that a program counts at a time
BLOCK = 2048  # tokens that it writes at a time
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def number_or(ptr, number):
    """The number that lies on the device, or else the one of the launch."""
    if ptr is not None:
        number = tl.load(ptr).to(tl.float32)
    return number


@triton.jit
def shares(mask_ptr, floating_ptr, offs, there):
    """(which tokens count, what each weighs): 1, or its floating mask, which is NaN where it is negative."""
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
    """The sum of the mask over tokens [start, stop), 1 where that is 0; counts are exact, sums float64."""
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
    mask_ptr,  # (N,) bool, or None
    floating_ptr,  # (N,) the mask that the bools were made of, where it is floating; or None
    token_weights_ptr,  # (N,) fp32, or None: 1
    boundaries_ptr,  # (sequences + 1,) int, or None: every T_len tokens
    num_items_ptr,  # one number, or None: num_items
    loss_scale_ptr,  # one number, or None: loss_scale
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
    program = tl.program_id(0)
    b = (program // parts).to(tl.int64)
    start = b * T_len
    stop = start + T_len
    if boundaries_ptr is not None:
        # Within the tensors, and all of them written, whatever the boundaries are: nobody looks at them.
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
            items = number_or(num_items_ptr, num_items)
            items = tl.where(items < 1.0, 1.0, items)
        else:
            items = total_of(mask_ptr, floating_ptr, everything, everything + N, COUNTED)
        weight = tl.div_rn(1.0, items)
    if entropy_weight_ptr is not None:
        total = total_of(mask_ptr, floating_ptr, everything, everything + N, COUNTED)
    scale = number_or(loss_scale_ptr, loss_scale)
    first = start + (program % parts) * columns
    last = tl.minimum(first + columns, stop)
    if boundaries_ptr is not None:
        first = tl.where(b == 0, 0, start)
        last = tl.where(b == sequences - 1, N, stop)
    for base in range(first, last, BLOCK):
        offs = base + tl.arange(0, BLOCK)
        there = offs < last
        live, share = shares(mask_ptr, floating_ptr, offs, there)
        extra = load_tokens(token_weights_ptr, offs, live, 1.0)
        # Select, not multiply: a token without weight has none, whatever the scale is.
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


def reduction_weights_fwd(
    like,
    mask,
    floating,
    token_weights,
    boundaries,
    num_items,
    loss_scale,
    reduction,
    max_length,
    by_tokens,
):
    """Launch the kernel for tokens of the shape of `like`, (B, T) or packed (N,), N > 0.

    Args:
        mask, token_weights: (N,) bool and fp32, or None. floating: (N,) floating, or None.
        boundaries: (num_sequences + 1,), or None: packed tokens are then one sequence.
        num_items, loss_scale: None, a number, or a tensor of one element on the device.
        by_tokens: whether the second kind of weights is wanted.

    Returns:
        weight, share (or None), weight by tokens (or None): (N,) fp32; the sequence of each token, (N,)
        int64, or None without boundaries.
    """
    N = like.numel()
    new = functools.partial(torch.empty, N, device=like.device)
    weight = new(dtype=torch.float32)
    share = None if floating is None else new(dtype=torch.float32)
    entropy_weight = new(dtype=torch.float32) if by_tokens else None
    sequence = None if boundaries is None else new(dtype=torch.int64)
    T_len = like.shape[-1]
    sequences = N // T_len if boundaries is None else len(boundaries) - 1
    if boundaries is not None:
        rows, parts, columns = sequences, 1, N
    elif reduction == "sequence_mean":
        rows, parts, columns = sequences, triton.cdiv(T_len, BLOCK), BLOCK
    else:  # no sequence has a number of its own
        rows, parts, columns, T_len = 1, triton.cdiv(N, BLOCK), BLOCK, N
    pointers = {
        f"{name}_ptr": x if isinstance(x, torch.Tensor) else None
        for name, x in (("num_items", num_items), ("loss_scale", loss_scale))
    }
    _reduction_weights_kernel[(rows * parts,)](
        mask_ptr=mask,
        floating_ptr=floating,
        token_weights_ptr=token_weights,
        boundaries_ptr=boundaries,
        **pointers,
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
        num_items=1.0 if num_items is None or pointers["num_items_ptr"] is not None else num_items,
        loss_scale=1.0
        if loss_scale is None or pointers["loss_scale_ptr"] is not None
        else loss_scale,
        REDUCTION=reduction,
        HAS_ITEMS=num_items is not None,
        COUNTED=COUNTED,
        BLOCK=BLOCK,
        **compiled_with(8),
    )
    return weight, share, entropy_weight, sequence
