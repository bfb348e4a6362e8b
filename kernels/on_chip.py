"""From logits to the GRPO loss and its gradient, with each row read once: a second way to run `grpo`.

The formulas are those of `grpo`. There a row is read twice, and the second read counts on the cache. Here a
row stays in the registers of a cluster of thread blocks (Triton's `num_ctas`) from the statistics to the
gradient. Bytes, at w per logit: N V w read and N V w written, and N w read and written once more for the
scored ones. Masked rows are written only. A row whose numbers are too large (`scoring`) is read three times
more.

A program is a cluster and owns a row. Strip i of the row holds the columns from i * STRIP on; each thread has
eight neighbouring ones. Sums go over the thread, the thread block and the cluster, in this order. So
log-probs are as accurate as those of `logprob`, but not the same bits. `dlogits` may be `logits`: a thread
writes only what it has read itself, after the sums over the cluster.

What the kernel cannot take (`unsupported`) is for `grpo`. Reductions over a cluster need Triton 3.8 and
compute capability 9.0.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from grpo_fast.kernels.edges import Row, Writer, row_offset
from grpo_fast.kernels.group_advantage import group_advantage_fwd
from grpo_fast.kernels.grpo import new_outputs
from grpo_fast.kernels.rows import (
    inverse_temperature,
    is_live,
    load_scored,
    load_target,
    tile_offsets,
    write_dlogits,
    write_zeros,
)
from grpo_fast.kernels.scalars import modes_of, scalars_of
from grpo_fast.kernels.schedules import Tile, compiled_with
from grpo_fast.kernels.scoring import (
    is_doubtful,
    load_or,
    read_again,
    score_statistics,
    sequence_of,
    store_no_outputs,
    store_outputs,
    weigh,
)
from grpo_fast.kernels.terms import TokenValues, token_policy_terms
from grpo_fast.kernels.tiles import (
    LOG2_ZERO,
    LOG2E,
    LOWEST,
    RowGradient,
    Softmax,
    dlogits_factors,
    dlogits_target,
    dlogits_tile,
    merge_softmax,
    merge_sums,
)
from grpo_fast.records import Z_SCORE, Grouping, Outputs

ELEMENTS = tl.constexpr(8)  # halves of one 128-bit access
LARGE = tl.constexpr(3.4e38)
OLDEST_TRITON, OLDEST_CAPABILITY = (3, 8), (9, 0)
PORTABLE_CTAS, MAX_CTAS = 8, 16  # of a cluster; more than eight where a data center's GPU has them
ENTRIES = 20_480  # that a thread block keeps without spilling them
MAX_V = MAX_CTAS * ENTRIES


class Spread(NamedTuple):
    """How a row lies in the registers of a cluster: compile-time constants.

    KEEP says what stays in registers: "e", 2^(x - m) in float32, m being the thread's own maximum; or "bits",
    the logits as they were read, in half the registers, for twice the exponentials. BONUS, an entropy in the
    loss, needs "bits".
    """

    CTAS: int  # thread blocks of the cluster
    THREADS: int  # of a thread block
    STRIPS: int
    KEEP: str


class Kept(NamedTuple):
    """The part of a row that the threads of a cluster hold."""

    x: Any  # a tuple of strips, [CTAS, THREADS, ELEMENTS] each, as they were read
    e: Any  # likewise 2^(x - m), 0 at the target; empty unless they are kept
    m: Any  # [CTAS, THREADS]: the maximum of each thread


@triton.jit
def again(x, value):
    """The halves x in float32, converted anew once `value` is known.

    Without this, the compiler keeps the first conversion, in twice as many registers. It cannot know that
    `value` is never LARGE. If it were, the result would not be finite anyway, and the last bit of x would not
    matter.
    """
    bit = tl.where(value > LARGE, 1, 0).to(tl.int16)
    return (x.to(tl.int16, bitcast=True) ^ bit).to(x.dtype, bitcast=True).to(tl.float32)


@triton.jit
def read_strips(row_ptr, offs, V, STRIPS: tl.constexpr, STRIP: tl.constexpr):
    """The strips of a row; the last is the only one that may not be full."""
    x = ()
    for i in tl.static_range(STRIPS - 1):
        x = x + (tl.load(row_ptr + i * STRIP + offs),)  # noqa: RUF005 (Triton knows no *x)
    tail_ptr = row_ptr + (STRIPS - 1) * STRIP
    keep = offs < V - (STRIPS - 1) * STRIP
    return x + (tl.load(tail_ptr + offs, mask=keep, other=-float("inf")),)  # noqa: RUF005


@triton.jit
def reduce_row(x, offs, target, scale, HAS_ENTROPY: tl.constexpr, SPREAD: tl.constexpr):
    """(`Kept`, statistics of the row without column `target`), sums taken over the whole cluster.

    It also orders the loads of the scored logit, by every thread, before the store over it, by one.
    """
    STRIPS: tl.constexpr = SPREAD.STRIPS
    STRIP: tl.constexpr = SPREAD.CTAS * SPREAD.THREADS * ELEMENTS
    # The scored entry may be the maximum, which only has to be large enough. It is left out of the sum.
    m_own = tl.max(x[0].to(tl.float32), axis=2)
    for i in tl.static_range(1, STRIPS):
        m_own = tl.maximum(m_own, tl.max(x[i].to(tl.float32), axis=2))
    m_own = tl.maximum(m_own * scale, LOWEST)
    s_own = tl.zeros([SPREAD.CTAS, SPREAD.THREADS], tl.float32)
    t_own = tl.zeros([SPREAD.CTAS, SPREAD.THREADS], tl.float32)
    e = ()
    for i in tl.static_range(STRIPS):
        if SPREAD.KEEP == "e":
            y = x[i].to(tl.float32)
        else:
            y = again(x[i], m_own[:, :, None])
        u = tl.fma(y, scale, -m_own[:, :, None])
        y = tl.where(offs == target - i * STRIP, 0.0, tl.exp2(u))
        s_own += tl.sum(y, axis=2)
        if HAS_ENTROPY:
            t_own += tl.sum(y * tl.maximum(u, LOG2_ZERO), axis=2)
        if SPREAD.KEEP == "e":
            e = e + (y,)  # noqa: RUF005
    # Within each thread block, then once across the cluster.
    t = 0.0
    if HAS_ENTROPY:
        m, s, t = tl.reduce((m_own, s_own, t_own), 1, merge_softmax)
        m, s, t = tl.reduce((m, s, t), 0, merge_softmax)
    else:
        m, s = tl.reduce(tl.reduce((m_own, s_own), 1, merge_sums), 0, merge_sums)
    return Kept(x, e, m_own), Softmax(m, s, t)


@triton.jit
def write_kept(drow, kept, gradient, offs, BONUS: tl.constexpr, SPREAD: tl.constexpr):
    """Write the gradient of a row from what is in the registers; at the target it is not right."""
    STRIPS: tl.constexpr = SPREAD.STRIPS
    STRIP: tl.constexpr = SPREAD.CTAS * SPREAD.THREADS * ELEMENTS
    dtype: tl.constexpr = drow.ptr.dtype.element_ty
    m = gradient.m
    k0 = gradient.k0
    k_own = (k0 * tl.exp2(kept.m - m))[:, :, None]
    for i in tl.static_range(STRIPS):
        if SPREAD.KEEP == "e":
            d = kept.e[i] * k_own
        else:
            d = dlogits_tile(again(kept.x[i], k0), gradient.scale, m, k0, gradient.k1, BONUS)
        d = d.to(dtype)
        if i + 1 < STRIPS:
            tl.store(drow.ptr + i * STRIP + offs, d)
        else:
            keep = offs < drow.body - (STRIPS - 1) * STRIP
            tl.store(drow.ptr + i * STRIP + offs, d, mask=keep)


@triton.jit
def write_target(drow, gradient, first, SPREAD: tl.constexpr):
    """Write the gradient at the target, over what `write_kept` has left there.

    Args:
        first: [CTAS, THREADS], the first column of each thread in the first strip.
    """
    CTAS: tl.constexpr = SPREAD.CTAS
    THREADS: tl.constexpr = SPREAD.THREADS
    STRIP: tl.constexpr = CTAS * THREADS * ELEMENTS
    # The scored column lies in one thread block: its barrier is enough.
    tl.debug_barrier()
    target = gradient.target
    owner = tl.where(target < 0, -1, target % STRIP // ELEMENTS * ELEMENTS)
    tl.store(
        drow.ptr + target + tl.zeros([CTAS, THREADS], tl.int32),
        gradient.dtarget.to(drow.ptr.dtype.element_ty),
        mask=first == owner,
    )


@triton.jit(do_not_specialize=["T_len"])
def _on_chip_kernel(
    logits_ptr,  # (B, T, V) fp16 or bf16
    targets,  # Targets, (N,), without inv_temperature, which would cost registers in there
    tokens,  # Tokens, (N,); the advantages are those of sequences where SCORED
    sequence_ptr,  # (N,) int64, or None: row // T_len
    dlogits_ptr,  # (B, T, V)
    outputs,  # Outputs, (N,); entropy and kl may be None
    stride_b,  # this and the next four in units of ELEMENTS, so that the compiler knows the divisor
    stride_t,
    dstride_b,
    dstride_t,
    V,
    T_len,
    inv_temperature,
    scalars,  # Scalars
    entropy_coef,
    MODES: tl.constexpr,  # Modes
    SCORED: tl.constexpr,
    BONUS: tl.constexpr,
    SPREAD: tl.constexpr,  # Spread
):
    tl.static_assert(SPREAD.KEEP == "bits" or not BONUS)
    STRIP: tl.constexpr = SPREAD.CTAS * SPREAD.THREADS * ELEMENTS
    TILE: tl.constexpr = Tile(1, STRIP)
    HAS_ENTROPY: tl.constexpr = outputs.entropy is not None
    V = V * ELEMENTS
    index = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_offset(index, T_len, stride_b, stride_t) * ELEMENTS
    drow_ptr = dlogits_ptr + row_offset(index, T_len, dstride_b, dstride_t) * ELEMENTS
    drow = Row(drow_ptr, drow_ptr, 0, V)
    # [CTAS, THREADS]: the first axis is the one that Triton spreads over the cluster.
    first = tile_offsets(SPREAD.CTAS, SPREAD.THREADS) * ELEMENTS
    offs = first[:, :, None] + tl.arange(0, ELEMENTS)[None, None, :]
    if is_live(targets.mask, index):
        target = load_target(targets.ids, index, V)
        x = read_strips(row_ptr, offs, V, SPREAD.STRIPS, STRIP)
        z = load_scored(row_ptr, target)
        inv_temperature = inverse_temperature(targets.temperature, index, inv_temperature)
        old_logp = load_or(tokens.old_logp, index, None)
        ref_logp = load_or(tokens.ref_logp, index, None)
        weight = tl.load(tokens.weight + index)
        place = index
        if SCORED:
            place = sequence_of(sequence_ptr, index, T_len)
        advantage = tl.load(tokens.advantages + place).to(tl.float32)
        # All loads are under way before the first is waited for: no load crosses a barrier.
        tl.debug_barrier()
        scale = inv_temperature * LOG2E
        kept, sums = reduce_row(x, offs, target, scale, HAS_ENTROPY, SPREAD)
        doubtful = is_doubtful(sums.m, sums.s, z, scale)
        # Inlined: Triton 3.9 wants the barriers of a cluster in the kernel itself.
        m, s, t, scale, back = read_again(row_ptr, target, V, z, scale, sums, STRIP)
        m, s, log2_s, logp, entropy = score_statistics(
            Softmax(m, s, t), z, scale, back, inv_temperature
        )
        if old_logp is None:
            old_logp = logp
        score = load_or(tokens.score, index, advantage)
        importance = load_or(tokens.importance, index, 1.0)
        token = TokenValues(logp, old_logp, ref_logp, advantage, score, importance)
        loss, dlogp, kl, clip = token_policy_terms(token, scalars, MODES)
        loss, dlogp, dentropy = weigh(
            loss, dlogp, entropy, weight, tokens, index, entropy_coef, BONUS=BONUS
        )
        store_outputs(outputs, index, Outputs(loss, logp, entropy, kl, clip))
        k0, k1 = dlogits_factors(dlogp, dentropy, entropy, s, log2_s, inv_temperature)
        if (dlogp != 0) | (dentropy != 0):
            dtarget = dlogits_target(dlogp, dentropy, entropy, logp, inv_temperature)
            gradient = RowGradient(target, dtarget, scale, m, k0, k1)
            if doubtful:  # what is in the registers has lost too much
                WRITER: tl.constexpr = Writer(TILE, BONUS, False, False)
                write_dlogits(Row(row_ptr, row_ptr, 0, V), drow, gradient, 0, V, WRITER)
            else:
                write_kept(drow, kept, gradient, offs, BONUS, SPREAD)
            write_target(drow, gradient, first, SPREAD)
        else:
            write_zeros(drow, 0, V, TILE)
    else:
        write_zeros(drow, 0, V, TILE)
        store_no_outputs(outputs, index)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a row is spread: over `ctas` thread blocks of `warps` warps; a thread has 8 entries of a strip."""

    ctas: int
    warps: int
    keep: str
    registers: int | None = None  # at most, a thread

    def strips(self, V) -> int:
        return triton.cdiv(V, self.ctas * self.warps * 32 * ELEMENTS.value)

    def arguments(self, V) -> dict[str, Any]:
        return {
            "SPREAD": Spread(self.ctas, 32 * self.warps, self.strips(V), self.keep),
            "num_ctas": self.ctas,
            "maxnreg": self.registers,
            **compiled_with(self.warps),
        }


def plan(V: int, bonus: bool) -> Plan:
    """The smallest cluster that holds a row of V entries, at two thread blocks a multiprocessor.

    With an entropy bonus it has twice the threads: Triton 3.8 cannot plan clusters of more than eight strips.
    """
    ctas = 1
    while ctas * ENTRIES < V:
        ctas *= 2
    return Plan(ctas, 16, "bits", registers=64) if bonus else Plan(ctas, 8, "e")


def schedule_of(logits, dlogits, softcap, out) -> str:
    """How `grpo_fwd_bwd` holds a row of logits where the loss has no entropy bonus."""
    return f"a cluster of {plan(logits.shape[-1], bonus=False).ctas} thread blocks holds a row"


def unavailable(device: torch.device) -> str:
    """Why no kernel can keep a row on this device, or "". With CPU tensors, the interpreter can."""
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
    """How many entries of a row fit on the chip: GPUs differ in how large a cluster may be."""
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
    targets,
    tokens,
    rewards,
    return_entropy,
    objective,
    dlogits,
    spread: Plan | None = None,
    out=None,
    arrived=None,
):
    """Launch the kernel, with the arguments of `grpo.grpo_fwd_bwd`, for what is not `unsupported`.

    Args:
        spread: for experiments.
        arrived: not used, as no program waits for another of its row.
    """
    B, T_len, V = logits.shape
    N = B * T_len
    bonus = bool(objective.entropy_coef)
    if out is None:
        out = new_outputs(logits, return_entropy or bonus, tokens.ref_logp is not None)
    if N:
        # In a launch of its own: a small group's sums would be spread over the cluster here.
        scored = rewards.values is not None
        if scored:
            groups = Grouping(rewards.group_size, None)
            tokens = tokens._replace(
                advantages=group_advantage_fwd(rewards.values, groups, Z_SCORE)
            )
        unit = ELEMENTS.value
        _on_chip_kernel[(N,)](
            logits_ptr=logits,
            targets=targets._replace(inv_temperature=None),
            inv_temperature=targets.inv_temperature,
            tokens=tokens,
            sequence_ptr=rewards.sequence if scored else None,
            dlogits_ptr=dlogits,
            outputs=out,
            stride_b=logits.stride(0) // unit,
            stride_t=logits.stride(1) // unit,
            dstride_b=dlogits.stride(0) // unit,
            dstride_t=dlogits.stride(1) // unit,
            V=V // unit,
            T_len=T_len,
            scalars=scalars_of(objective),
            entropy_coef=objective.entropy_coef,
            MODES=modes_of(objective),
            SCORED=scored,
            BONUS=bonus,
            **(spread or plan(V, bonus)).arguments(V),
        )
    return out
