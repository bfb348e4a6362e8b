"""The kernel of `on_chip.py`: a row of logits stays in registers from the statistics to the gradient."""

from typing import no_type_check

import triton
import triton.language as tl

from grpo_fast.kernels.rows import load_scored, load_target
from grpo_fast.kernels.terms import token_policy_terms
from grpo_fast.kernels.tiles import (
    LOG2E,
    LOWEST,
    dlogits_factors,
    dlogits_target,
    include_target,
)

INFINITY = tl.constexpr(float("inf"))
LARGE = tl.constexpr(3.4e38)


@triton.jit
@no_type_check
def again(x, value):
    """The bfloat16 entries x in float32, converted anew once `value` is known.

    The compiler would rather keep a first conversion, in twice as many registers. It cannot know that value
    is not LARGE; where it is, the result is not finite anyway, and the last bit of x does not matter.
    """
    bit = tl.where(value > LARGE, 1, 0).to(tl.int16)
    return (x.to(tl.int16, bitcast=True) ^ bit).to(tl.bfloat16, bitcast=True).to(tl.float32)


@triton.jit
@no_type_check
def merge_softmax(m, s, m_other, s_other):
    """The statistics (m, s) of two sets of entries taken together."""
    top = tl.maximum(m, m_other)
    return top, s * tl.exp2(m - top) + s_other * tl.exp2(m_other - top)


@triton.jit
@no_type_check
def on_chip_kernel(
    logits_ptr,  # (N, V) bf16
    ids_ptr,  # (N,) int64
    mask_ptr,  # (N,) bool
    weight_ptr,  # (N,) fp32
    advantages_ptr,  # (N,) fp32
    old_logp_ptr,  # (N,) fp32
    ref_logp_ptr,  # (N,) fp32
    dlogits_ptr,  # (N, V) bf16, may be logits_ptr
    loss_ptr,  # (N,) fp32
    logp_ptr,  # (N,) fp32
    kl_ptr,  # (N,) fp32
    stride,  # of logits and dlogits
    V,
    inv_temperature,
    low,
    high,
    beta,
    CTAS: tl.constexpr,
    THREADS: tl.constexpr,  # of one thread block
    STRIPS: tl.constexpr,
    KEEP: tl.constexpr,
):
    """One program a row. Strip i holds the columns from i * STRIP on, eight in a row for each thread.

    KEEP: what stays in registers: "e", 2^(x - m) in float32, m being the thread's own maximum; or "bits", the
    logits as they were read, half the registers and twice the exponentials.
    """
    STRIP: tl.constexpr = CTAS * THREADS * 8
    row = tl.program_id(0).to(tl.int64)
    live = tl.load(mask_ptr + row) != 0
    target = load_target(ids_ptr, row, V)
    row_ptr = logits_ptr + row * stride
    drow_ptr = dlogits_ptr + row * stride
    # [CTAS, THREADS]: the first axis is the one that Triton spreads over the cluster.
    first = (tl.arange(0, CTAS)[:, None] * THREADS + tl.arange(0, THREADS)[None, :]) * 8
    offs = first[:, :, None] + tl.arange(0, 8)[None, None, :]
    keep = offs < V - (STRIPS - 1) * STRIP  # of the last strip, the only one that may not be full
    if live:
        x = ()
        for i in tl.static_range(STRIPS - 1):
            x = x + (tl.load(row_ptr + i * STRIP + offs),)  # noqa: RUF005 (Triton knows no *x)
        tail_ptr = row_ptr + (STRIPS - 1) * STRIP
        x = x + (tl.load(tail_ptr + offs, mask=keep, other=-float("inf")),)  # noqa: RUF005
        z = load_scored(row_ptr, target)
        old_logp = tl.load(old_logp_ptr + row)
        ref_logp = tl.load(ref_logp_ptr + row)
        advantage = tl.load(advantages_ptr + row)
        weight = tl.load(weight_ptr + row)
        # All loads are under way before the first is waited for: no load crosses a barrier.
        tl.debug_barrier()
        scale = inv_temperature * LOG2E
        # The scored entry may be the maximum, which only has to be large enough. It is left out of the sum.
        m_own = tl.max(x[0].to(tl.float32), axis=2)
        for i in tl.static_range(1, STRIPS):
            m_own = tl.maximum(m_own, tl.max(x[i].to(tl.float32), axis=2))
        m_own = tl.maximum(m_own * scale, LOWEST)
        s_own = tl.zeros([CTAS, THREADS], tl.float32)
        e = ()
        for i in tl.static_range(STRIPS):
            if KEEP == "e":
                y = x[i].to(tl.float32)
            else:
                y = again(x[i], m_own[:, :, None])
            y = tl.exp2(tl.fma(y, scale, -m_own[:, :, None]))
            y = tl.where(offs == target - i * STRIP, 0.0, y)
            e = e + (y,)  # noqa: RUF005
            s_own += tl.sum(y, axis=2)
        # Within each thread block, then once across the cluster. It also orders the load of the scored logit,
        # by every thread, before the store over it, by one.
        m, s = tl.reduce(tl.reduce((m_own, s_own), 1, merge_softmax), 0, merge_softmax)
        m, s, log2_s, logp, entropy = include_target(m, s, 0.0, z, scale)
        loss, dlogp, kl, _clip = token_policy_terms(
            logp,
            old_logp,
            ref_logp,
            advantage,
            advantage,
            1.0,
            low,
            high,
            INFINITY,
            INFINITY,
            -INFINITY,
            INFINITY,
            beta,
            INFINITY,
            INFINITY,
            "clip",
            "k3",
            "own",
            True,
        )
        dlogp = tl.where(weight == 0, 0.0, weight * dlogp)
        tl.store(loss_ptr + row, tl.where(weight == 0, 0.0, weight * loss))
        tl.store(logp_ptr + row, logp)
        tl.store(kl_ptr + row, kl)
        k0, _k1 = dlogits_factors(dlogp, 0.0, entropy, s, log2_s, inv_temperature)
        k_own = (k0 * tl.exp2(m_own - m))[:, :, None]
        for i in tl.static_range(STRIPS):
            if KEEP == "e":
                d = e[i] * k_own
            else:
                d = tl.exp2(tl.fma(again(x[i], k0), scale, -m)) * k0
            d = d.to(dlogits_ptr.dtype.element_ty)
            if i + 1 < STRIPS:
                tl.store(drow_ptr + i * STRIP + offs, d)
            else:
                tl.store(drow_ptr + i * STRIP + offs, d, mask=keep)
        # The scored column lies in one thread block: its barrier is enough to write over it last.
        tl.debug_barrier()
        dtarget = dlogits_target(dlogp, 0.0, entropy, logp, inv_temperature)
        owner = tl.where(target < 0, -1, target % STRIP // 8 * 8)
        tl.store(
            drow_ptr + target + tl.zeros([CTAS, THREADS], tl.int32),
            dtarget.to(dlogits_ptr.dtype.element_ty),
            mask=first == owner,
        )
    else:
        zeros = tl.zeros([CTAS, THREADS, 8], tl.float32).to(dlogits_ptr.dtype.element_ty)
        for i in tl.static_range(STRIPS - 1):
            tl.store(drow_ptr + i * STRIP + offs, zeros)
        tl.store(drow_ptr + (STRIPS - 1) * STRIP + offs, zeros, mask=keep)
        tl.store(loss_ptr + row, 0.0)
        tl.store(logp_ptr + row, 0.0)
        tl.store(kl_ptr + row, 0.0)


# The kernel's arguments as Triton's types; what it specialises on at run time is said here by hand.
SIGNATURE = {
    "logits_ptr": "*bf16",
    "ids_ptr": "*i64",
    "mask_ptr": "*i1",
    **{f"{x}_ptr": "*fp32" for x in ("weight", "advantages", "old_logp", "ref_logp")},
    "dlogits_ptr": "*bf16",
    **{f"{x}_ptr": "*fp32" for x in ("loss", "logp", "kl")},
    "stride": "i32",
    "V": "i32",
    **dict.fromkeys(("inv_temperature", "low", "high", "beta"), "fp32"),
}
