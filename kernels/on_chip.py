"""From logits to the GRPO loss and its gradient, with each row read once: a second way to run `grpo`.

The formulas are those of `grpo`. There a row is read twice, and the second read counts on the cache. Here a
row stays in the registers of a cluster of thread blocks (Triton's `num_ctas`) from the statistics to the
gradient. Bytes, at w per logit: N V w read and N V w written, and N w read and written once more for the
scored ones. Masked rows are written only. A row whose numbers are too large (`scoring`) is read three times
more.

A program owns a row, and a cluster is a program. Strip i of the row holds the columns from i * STRIP on,
eight next to each other for each thread. Sums go over the thread, the thread block and the cluster, in this
order: log-probs are as accurate as `logprob`'s, but not the same bits. `dlogits` may be `logits`: a thread
writes what it has read itself, after the sums over the cluster.

Not everything fits: `unsupported` says what `grpo` has to do instead. Reductions over a cluster need Triton
3.8 and compute capability 9.0.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from grpo_fast.kernels.edges import row_offset
from grpo_fast.kernels.group_advantage import group_advantage_fwd
from grpo_fast.kernels.grpo import SCORE_EPS, load_or, new_outputs
from grpo_fast.kernels.policy_loss import scalars
from grpo_fast.kernels.rows import (
    inverse_temperature,
    load_scored,
    load_target,
    write_dlogits,
    write_zeros,
)
from grpo_fast.kernels.schedules import compiled_with
from grpo_fast.kernels.scoring import is_doubtful, read_again, score_statistics
from grpo_fast.kernels.terms import token_policy_terms
from grpo_fast.kernels.tiles import (
    LOG2_ZERO,
    LOG2E,
    LOWEST,
    dlogits_factors,
    dlogits_target,
    dlogits_tile,
    merge_softmax,
    merge_sums,
)

ELEMENTS = tl.constexpr(8)  # halves of one 128-bit access
LARGE = tl.constexpr(3.4e38)
OLDEST_TRITON, OLDEST_CAPABILITY = (3, 8), (9, 0)
PORTABLE_CTAS, MAX_CTAS = 8, 16  # of a cluster; more than eight where a data center's GPU has them
ENTRIES = 20_480  # that a thread block keeps without spilling them
MAX_V = MAX_CTAS * ENTRIES


@triton.jit
def again(x, value):
    """The halves x in float32, converted anew once `value` is known.

    The compiler would rather keep a first conversion, in twice as many registers. It cannot know that value
    is not LARGE; where it is, the result is not finite anyway, and the last bit of x does not matter.
    """
    bit = tl.where(value > LARGE, 1, 0).to(tl.int16)
    return (x.to(tl.int16, bitcast=True) ^ bit).to(x.dtype, bitcast=True).to(tl.float32)


@triton.jit
def read_row(row_ptr, offs, V, STRIPS: tl.constexpr, STRIP: tl.constexpr):
    """The strips of a row; the last is the only one that may not be full."""
    x = ()
    for i in tl.static_range(STRIPS - 1):
        x = x + (tl.load(row_ptr + i * STRIP + offs),)  # noqa: RUF005 (Triton knows no *x)
    tail_ptr = row_ptr + (STRIPS - 1) * STRIP
    keep = offs < V - (STRIPS - 1) * STRIP
    return x + (tl.load(tail_ptr + offs, mask=keep, other=-float("inf")),)  # noqa: RUF005


@triton.jit(do_not_specialize=["T_len"])
def _on_chip_kernel(
    logits_ptr,  # (B, T, V) fp16 or bf16
    ids_ptr,  # (N,)
    mask_ptr,  # (N,) bool, or None
    weight_ptr,  # (N,) fp32
    advantages_ptr,  # (N,) fp32; of sequences where SCORED
    sequence_ptr,  # (N,) int64, or None: row // T_len
    old_logp_ptr,  # (N,) fp32, or None: on policy
    ref_logp_ptr,  # (N,) fp32, or None
    importance_ptr,  # (N,) fp32, or None: 1
    score_ptr,  # (N,) fp32, or None: the advantage
    coefficient_ptr,  # (N,) fp32, or None: 0; what dl/dlogp has besides
    entropy_weight_ptr,  # (N,) fp32, or None: weight
    temperature_ptr,  # (N,) fp32, or None
    dlogits_ptr,  # (B, T, V)
    loss_ptr,  # (N,) fp32
    logp_ptr,  # (N,) fp32
    entropy_ptr,  # (N,) fp32, or None
    kl_ptr,  # (N,) fp32, or None
    clip_ptr,  # (N,) int8
    stride_b,  # this and the next four in units of ELEMENTS, so that the compiler knows the divisor
    stride_t,
    dstride_b,
    dstride_t,
    V,
    T_len,
    inv_temperature,
    low,
    high,
    cap,
    second,
    log_ratio_min,
    log_ratio_max,
    beta,
    gap_clip,
    value_clip,
    entropy_coef,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    SCORED: tl.constexpr,
    BONUS: tl.constexpr,
    CTAS: tl.constexpr,
    THREADS: tl.constexpr,
    STRIPS: tl.constexpr,
    KEEP: tl.constexpr,
):
    """KEEP: what stays in registers: "e", 2^(x - m) in float32, m being the thread's own maximum; or "bits",
    the logits as they were read, half the registers and twice the exponentials. BONUS, an entropy in the
    loss, needs x itself."""
    tl.static_assert(KEEP == "bits" or not BONUS)
    STRIP: tl.constexpr = CTAS * THREADS * ELEMENTS
    HAS_ENTROPY: tl.constexpr = entropy_ptr is not None
    HAS_REF: tl.constexpr = ref_logp_ptr is not None
    V = V * ELEMENTS
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_offset(row, T_len, stride_b, stride_t) * ELEMENTS
    drow_ptr = dlogits_ptr + row_offset(row, T_len, dstride_b, dstride_t) * ELEMENTS
    # [CTAS, THREADS]: the first axis is the one that Triton spreads over the cluster.
    first = (tl.arange(0, CTAS)[:, None] * THREADS + tl.arange(0, THREADS)[None, :]) * ELEMENTS
    offs = first[:, :, None] + tl.arange(0, ELEMENTS)[None, None, :]
    live = True
    if mask_ptr is not None:
        live = tl.load(mask_ptr + row) != 0
    if live:
        target = load_target(ids_ptr, row, V)
        x = read_row(row_ptr, offs, V, STRIPS, STRIP)
        z = load_scored(row_ptr, target)
        inv_temperature = inverse_temperature(temperature_ptr, row, inv_temperature)
        old_logp = load_or(old_logp_ptr, row, 0.0)
        ref_logp = load_or(ref_logp_ptr, row, 0.0)
        weight = tl.load(weight_ptr + row)
        if SCORED:
            sequence = row // T_len
            if sequence_ptr is not None:
                sequence = tl.load(sequence_ptr + row)
            advantage = tl.load(advantages_ptr + sequence)
        else:
            advantage = tl.load(advantages_ptr + row).to(tl.float32)
        # All loads are under way before the first is waited for: no load crosses a barrier.
        tl.debug_barrier()
        scale = inv_temperature * LOG2E
        # The scored entry may be the maximum, which only has to be large enough. It is left out of the sum.
        m_own = tl.max(x[0].to(tl.float32), axis=2)
        for i in tl.static_range(1, STRIPS):
            m_own = tl.maximum(m_own, tl.max(x[i].to(tl.float32), axis=2))
        m_own = tl.maximum(m_own * scale, LOWEST)
        s_own = tl.zeros([CTAS, THREADS], tl.float32)
        t_own = tl.zeros([CTAS, THREADS], tl.float32)
        e = ()
        for i in tl.static_range(STRIPS):
            if KEEP == "e":
                y = x[i].to(tl.float32)
            else:
                y = again(x[i], m_own[:, :, None])
            u = tl.fma(y, scale, -m_own[:, :, None])
            y = tl.where(offs == target - i * STRIP, 0.0, tl.exp2(u))
            s_own += tl.sum(y, axis=2)
            if HAS_ENTROPY:
                t_own += tl.sum(y * tl.maximum(u, LOG2_ZERO), axis=2)
            if KEEP == "e":
                e = e + (y,)  # noqa: RUF005
        # Within each thread block, then once across the cluster. It also orders the loads of the scored
        # logit, by every thread, before the store over it, by one.
        t = 0.0
        if HAS_ENTROPY:
            m, s, t = tl.reduce((m_own, s_own, t_own), 1, merge_softmax)
            m, s, t = tl.reduce((m, s, t), 0, merge_softmax)
        else:
            m, s = tl.reduce(tl.reduce((m_own, s_own), 1, merge_sums), 0, merge_sums)
        doubtful = is_doubtful(m, s, z, scale)
        # Inlined: Triton 3.9 wants the barriers of a cluster in the kernel itself.
        m, s, t, scale, back = read_again(row_ptr, target, V, z, scale, m, s, t, STRIP)
        m, s, log2_s, logp, entropy = score_statistics(m, s, t, z, scale, back, inv_temperature)
        if old_logp_ptr is None:
            old_logp = logp
        loss, dlogp, kl, clip = token_policy_terms(
            logp,
            old_logp,
            ref_logp,
            advantage,
            load_or(score_ptr, row, advantage),
            load_or(importance_ptr, row, 1.0),
            low,
            high,
            cap,
            second,
            log_ratio_min,
            log_ratio_max,
            beta,
            gap_clip,
            value_clip,
            SURROGATE,
            KL,
            KL_GRADIENT,
            HAS_REF,
        )
        dentropy = 0.0
        # Select, not multiply: a token without weight has no say, whatever its loss is.
        loss = tl.where(weight == 0, 0.0, weight * loss)
        dlogp = tl.where(weight == 0, 0.0, weight * dlogp)
        dlogp += load_or(coefficient_ptr, row, 0.0)
        if BONUS:
            dentropy = -entropy_coef * load_or(entropy_weight_ptr, row, weight)
            loss += tl.where(dentropy == 0, 0.0, dentropy * entropy)
        if HAS_ENTROPY:
            tl.store(entropy_ptr + row, entropy)
        tl.store(loss_ptr + row, loss)
        tl.store(logp_ptr + row, logp)
        tl.store(clip_ptr + row, clip.to(tl.int8))
        if HAS_REF:
            tl.store(kl_ptr + row, kl)
        k0, k1 = dlogits_factors(dlogp, dentropy, entropy, s, log2_s, inv_temperature)
        if (dlogp != 0) | (dentropy != 0):
            dtarget = dlogits_target(dlogp, dentropy, entropy, logp, inv_temperature)
            if doubtful:  # what is in the registers has lost too much
                write_dlogits(
                    row_ptr,
                    drow_ptr,
                    target,
                    dtarget,
                    scale,
                    m,
                    k0,
                    k1,
                    0,
                    V,
                    1,
                    STRIP,
                    BONUS,
                    False,
                )
            else:
                k_own = (k0 * tl.exp2(m_own - m))[:, :, None]
                for i in tl.static_range(STRIPS):
                    if KEEP == "e":
                        d = e[i] * k_own
                    else:
                        d = dlogits_tile(again(x[i], k0), scale, m, k0, k1, BONUS)
                    d = d.to(dlogits_ptr.dtype.element_ty)
                    if i + 1 < STRIPS:
                        tl.store(drow_ptr + i * STRIP + offs, d)
                    else:
                        keep = offs < V - (STRIPS - 1) * STRIP
                        tl.store(drow_ptr + i * STRIP + offs, d, mask=keep)
            # The scored column lies in one thread block: its barrier is enough to write over it last.
            tl.debug_barrier()
            owner = tl.where(target < 0, -1, target % STRIP // ELEMENTS * ELEMENTS)
            tl.store(
                drow_ptr + target + tl.zeros([CTAS, THREADS], tl.int32),
                dtarget.to(dlogits_ptr.dtype.element_ty),
                mask=first == owner,
            )
        else:
            write_zeros(drow_ptr, 0, V, 1, STRIP)
    else:
        write_zeros(drow_ptr, 0, V, 1, STRIP)
        tl.store(loss_ptr + row, 0.0)
        tl.store(logp_ptr + row, 0.0)
        tl.store(clip_ptr + row, 0)
        if HAS_ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        if HAS_REF:
            tl.store(kl_ptr + row, 0.0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a row is spread: over `ctas` thread blocks of `warps` warps, eight entries a thread and strip."""

    ctas: int
    warps: int
    keep: str
    registers: int | None = None  # at most, a thread

    def strips(self, V) -> int:
        return triton.cdiv(V, self.ctas * self.warps * 32 * ELEMENTS.value)

    def arguments(self, V) -> dict[str, int | str | bool | None]:
        return {
            "CTAS": self.ctas,
            "THREADS": 32 * self.warps,
            "STRIPS": self.strips(V),
            "KEEP": self.keep,
            "num_ctas": self.ctas,
            "maxnreg": self.registers,
            **compiled_with(self.warps),
        }


def plan(V: int, bonus: bool) -> Plan:
    """The smallest cluster that holds a row of V entries, at two thread blocks a multiprocessor.

    With a bonus in twice the threads: Triton 3.8's planning of clusters gives up on more than eight strips.
    """
    ctas = 1
    while ctas * ENTRIES < V:
        ctas *= 2
    return Plan(ctas, 16, "bits", registers=64) if bonus else Plan(ctas, 8, "e")


def unavailable(device: torch.device) -> str:
    """Why no kernel can keep a row on this device, or "". On CPU tensors the interpreter runs it."""
    if device.type == "cpu":
        return ""
    found = tuple(int(n) for n in triton.__version__.split(".")[:2])
    if found < OLDEST_TRITON:
        return f"Triton {triton.__version__} is installed, and it needs 3.8"
    if torch.version.hip:
        return "AMD's GPUs have no clusters of thread blocks"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and it needs 9.0"
    return ""


def most_entries(device: torch.device) -> int:
    """How long a row may be to fit on the chip: GPUs differ in how large a cluster may be."""
    if device.type != "cpu" and torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return PORTABLE_CTAS * ENTRIES
    return MAX_V


def unsupported(logits: torch.Tensor, dlogits: torch.Tensor, softcap: float | None = None) -> str:
    """Why `grpo_fwd_bwd` cannot take these (B, T, V) logits, in words for a warning; "" where it can."""
    why = unavailable(logits.device)
    if why:
        return why
    V = logits.shape[-1]
    for x in (logits, dlogits):
        if x.dtype not in (torch.float16, torch.bfloat16):
            return f"logits or gradient are {x.dtype}, and it takes float16 and bfloat16"
    if softcap is not None:
        return f"the logits have a soft cap, {softcap}"
    if (most := most_entries(logits.device)) < V:
        return f"rows of {V:,} entries do not fit on the chip, {most:,} do"
    if V % ELEMENTS.value:
        return f"8 does not divide the {V:,} entries of a row"
    for x in (logits, dlogits):
        if x.data_ptr() % 16 or any(x.stride(i) % ELEMENTS.value for i in (0, 1)):
            return "some rows do not start at a multiple of 16 bytes"
    return ""


def grpo_fwd_bwd(
    logits,
    ids,
    mask,
    weight,
    advantages,
    rewards,
    group_size,
    sequence,
    old_logp,
    ref_logp,
    importance,
    score,
    coefficient,
    entropy_weight,
    temperature,
    inv_temperature,
    return_entropy,
    objective,
    dlogits,
    spread: Plan | None = None,
    out=None,
    arrived=None,
):
    """Launch the kernel, with the arguments of `grpo.grpo_fwd_bwd`, for what is not `unsupported`.

    spread: for experiments. arrived: not used, as no program waits for another of its row.
    """
    B, T_len, V = logits.shape
    N = B * T_len
    bonus = bool(objective.entropy_coef)
    if out is None:
        out = new_outputs(logits, return_entropy or bonus, ref_logp is not None)
    loss, logp, entropy, kl, clip = out
    if N:
        # In a launch of its own: a small group's sums would be spread over the cluster here.
        scored = rewards is not None
        if scored:
            advantages = group_advantage_fwd(rewards, group_size, None, "group", SCORE_EPS, True)
        unit = ELEMENTS.value
        _on_chip_kernel[(N,)](
            logits_ptr=logits,
            ids_ptr=ids,
            mask_ptr=mask,
            weight_ptr=weight,
            advantages_ptr=advantages,
            sequence_ptr=sequence if scored else None,
            old_logp_ptr=old_logp,
            ref_logp_ptr=ref_logp,
            importance_ptr=importance,
            score_ptr=score,
            coefficient_ptr=coefficient,
            entropy_weight_ptr=entropy_weight,
            temperature_ptr=temperature,
            dlogits_ptr=dlogits,
            loss_ptr=loss,
            logp_ptr=logp,
            entropy_ptr=entropy,
            kl_ptr=kl,
            clip_ptr=clip,
            stride_b=logits.stride(0) // unit,
            stride_t=logits.stride(1) // unit,
            dstride_b=dlogits.stride(0) // unit,
            dstride_t=dlogits.stride(1) // unit,
            V=V // unit,
            T_len=T_len,
            inv_temperature=inv_temperature,
            **scalars(objective),
            entropy_coef=objective.entropy_coef,
            SURROGATE=objective.variant,
            KL=objective.kl,
            KL_GRADIENT=objective.kl_gradient,
            SCORED=scored,
            BONUS=bonus,
            **(spread or plan(V, bonus)).arguments(V),
        )
    return loss, logp, entropy, kl, clip
