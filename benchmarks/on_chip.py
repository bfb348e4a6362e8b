"""Would a row of logits that never leaves the chip be faster? A kernel to find out with, and its measurement.

One program a row, spread over a cluster of thread blocks (Triton's `num_ctas`). Each thread holds its part
of the row in registers from the statistics to the gradient: N V w bytes read, N V w written, nothing read
twice, no cache that has to keep anything. `kernels/grpo.py` reads a row twice and counts on the cache. Same
loss, and the same formulas (`kernels/tiles.py`): the clipped surrogate, KL k3, one ratio a token.

Reductions across a cluster need Triton >= 3.8, which most machines with a GPU do not have. So the kernel is
compiled ahead of time where it is, and launched without Triton through the driver's own interface:

    python -m benchmarks.on_chip build --out FOLDER [--ptxas PATH]
    python -m benchmarks.on_chip run FOLDER --out FILE.json [--seconds 60] [--only NAME]

`build` needs no GPU, `run` one of compute capability 9.0. A driver refuses what a much newer assembler made:
`--ptxas` takes an older one. Each variant is held against float64 and plain PyTorch, then timed in turns with
`grpo_fast.kernels.grpo`, on the same inputs, in place.
"""

import argparse
import ctypes
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks import inputs, machine, shapes
from benchmarks import results as files
from grpo_fast.kernels.grpo import grpo_fwd_bwd
from grpo_fast.kernels.rows import load_scored, load_target
from grpo_fast.kernels.tiles import (
    LOG2E,
    LOWEST,
    dlogits_factors,
    dlogits_target,
    include_target,
    token_policy_terms,
)

SHAPE = "qwen2.5-7b-16k"
CHECKED = shapes.Shape(B=8, T=128, V=shapes.CUDA[SHAPE].V, G=4)
ROWS_AT_ONCE = 64  # whose float64 gradient is taken
FACTOR, FLOOR = 2.0, 1e-5  # as `grpo_fast.testing.assert_as_accurate` has them
ROUNDS, WARMUP = 20, 3
SECONDS_PER_VARIANT = 25
MOST = 5  # variants that one run measures unless told which
COPIED = 1 << 32  # bytes of the copy that the rates are held against
ELEMENTS = 8  # bfloat16 of one 128-bit access
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
# What Triton 3.9 appends (`backends/nvidia/driver.c`): two pointers, null where nothing is asked for.
HIDDEN = ("global_scratch", "profile_scratch")
PTX_TYPES = {"*": "u64", "i32": "u32", "fp32": "f32"}
C_TYPES: dict[str, Any] = {
    "u64": ctypes.c_uint64,
    "u32": ctypes.c_int32,
    "f32": ctypes.c_float,
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to spread a row: `ctas` thread blocks of `warps` warps each.

    relaxed_exit: the barrier behind which a thread block may leave the cluster does not wait for its stores.
    Triton's does, for nothing: it is there so that none leaves while another reads its shared memory.
    """

    ctas: int
    warps: int
    keep: str = "e"
    registers: int | None = None  # at most, a thread
    relaxed_exit: bool = False

    @property
    def name(self) -> str:
        parts = [f"{self.ctas}x{self.warps}", self.keep]
        if self.registers is not None:
            parts.append(f"r{self.registers}")
        return "-".join([*parts, "relaxed"] if self.relaxed_exit else parts)

    @property
    def strip(self) -> int:
        return self.ctas * self.warps * 32 * ELEMENTS

    def constants(self, V: int) -> dict[str, Any]:
        return {
            "CTAS": self.ctas,
            "THREADS": 32 * self.warps,
            "STRIPS": triton.cdiv(V, self.strip),
            "KEEP": self.keep,
        }


# The most promising first.
VARIANTS = (
    Variant(8, 8),
    Variant(8, 8, relaxed_exit=True),
    Variant(16, 8, registers=64),
    Variant(16, 4),
    Variant(8, 4, "bits", 168),
    Variant(16, 8, registers=64, relaxed_exit=True),
    Variant(8, 16, registers=64),
    Variant(4, 32),
    Variant(8, 8, "bits"),
    Variant(8, 4),
)


def build(folder: Path, ptxas: str | None) -> None:
    """Compile every variant for sm_90 into `folder`, and say in `manifest.json` how each is launched."""
    from triton import knobs

    if ptxas is not None:
        os.environ["TRITON_PTXAS_BLACKWELL_PATH"] = ptxas  # from it Triton knows which PTX to write
    assembler = knobs.nvidia.ptxas_blackwell
    folder.mkdir(parents=True, exist_ok=True)
    V = shapes.CUDA[SHAPE].V
    entries = []
    for variant in VARIANTS:
        try:
            entry = compile_variant(variant, V, folder, assembler.path)
        except Exception:
            print(f"{variant.name}: does not compile\n{traceback.format_exc(limit=-1)}")
            continue
        entries.append(entry)
        print(
            f"{variant.name:16} {entry['registers']:4} registers, {entry['stack']:4} B stack, "
            f"{entry['spilled']:4} B spilled, {entry['shared']:4} B shared memory"
        )
    manifest = {
        "triton": triton.__version__,
        "ptxas": assembler.version,
        "V": V,
        "hidden": HIDDEN,
        "variants": entries,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def compile_variant(variant: Variant, V: int, folder: Path, ptxas: str) -> dict[str, Any]:
    """Leave the variant's cubin in `folder`; what a launch of it has to know."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = variant.constants(V)
    signature = {**SIGNATURE, **dict.fromkeys(constants, "constexpr")}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(on_chip_kernel.arg_names)
        if name.endswith("_ptr") or name in ("stride", "V")
    }
    options = {
        "num_ctas": variant.ctas,
        "num_warps": variant.warps,
        "maxnreg": variant.registers,
        "enable_fp_fusion": True,
    }
    source = ASTSource(on_chip_kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    if variant.relaxed_exit:
        ptx = relax_exit(ptx)
    parameters = [*SIGNATURE, *HIDDEN]
    types = [PTX_TYPES[x[0] if x[0] == "*" else x] for x in SIGNATURE.values()]
    types += ["u64"] * len(HIDDEN)
    found = re.findall(r"^\s*\.param \.(\w+).*_param_\d+,?$", ptx, re.MULTILINE)
    if found != types:
        raise ValueError(f"{variant.name}: the parameters are {found}, want {types}")
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise ValueError(f"{variant.name}: wants scratch memory, of which there is none")
    cubin, log = assemble(ptx, ptxas)
    (folder / f"{variant.name}.cubin").write_bytes(cubin)

    def logged(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, log)))

    return {
        "name": variant.name,
        "cubin": f"{variant.name}.cubin",
        "kernel": metadata.name,
        "num_ctas": metadata.num_ctas,
        "num_warps": metadata.num_warps,
        "shared": metadata.shared,
        "strips": constants["STRIPS"],
        "keep": variant.keep,
        "relaxed_exit": variant.relaxed_exit,
        "parameters": list(zip(parameters, types, strict=True)),
        "registers": logged(r"Used (\d+) registers"),
        "stack": logged(r"(\d+) bytes stack frame"),
        "spilled": logged(r"(\d+) bytes spill (?:stores|loads)"),
        "log": log,
    }


def relax_exit(ptx: str) -> str:
    """The last cluster barrier without the release that would make it wait for the stores before it."""
    arrive = "barrier.cluster.arrive.aligned;"
    before, found, after = ptx.rpartition(arrive)
    if not found or "st.global" in after or "ld.shared::cluster" in after:
        raise ValueError("the last cluster barrier is not where it was expected")
    return f"{before}{arrive.replace('arrive', 'arrive.relaxed')}{after}"


def assemble(ptx: str, ptxas: str) -> tuple[bytes, str]:
    """The cubin, and what the assembler says of it; its options are Triton's."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        options = ["-v", "--regAllocOptLevel=2", "--gpu-name=sm_90a"]
        command = [ptxas, *options, str(source), "-o", str(out)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{ptxas}: {result.stderr}")
        return out.read_bytes(), result.stderr


# The driver's structures and constants, from cuda.h.
class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id and a union of 64 bytes, of which three words are used here."""

    _fields_ = [
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_uint * 16),
    ]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("count", ctypes.c_uint),
    ]


assert ctypes.sizeof(LaunchAttribute) == 72
assert ctypes.sizeof(LaunchConfig) == 56
CLUSTER_DIMENSION, CLUSTER_SCHEDULING = 4, 5  # CU_LAUNCH_ATTRIBUTE_...
SPREAD = 1  # CU_CLUSTER_SCHEDULING_POLICY_SPREAD
DYNAMIC_SHARED, NON_PORTABLE_CLUSTER = 8, 14  # CU_FUNC_ATTRIBUTE_...
PORTABLE_CLUSTER = 8
STATIC_LIMIT = 48 << 10  # bytes of shared memory that need not be asked for


class Kernel:
    """A variant, loaded into the current CUDA context."""

    def __init__(self, folder: Path, entry: dict[str, Any]) -> None:
        self.entry = entry
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        self.image = (folder / entry["cubin"]).read_bytes()
        self.call("cuModuleLoadData", ctypes.byref(self.module), self.image)
        name = entry["kernel"].encode()
        self.call("cuModuleGetFunction", ctypes.byref(self.function), self.module, name)
        if entry["shared"] > STATIC_LIMIT:
            self.allow(DYNAMIC_SHARED, entry["shared"])
        if entry["num_ctas"] > PORTABLE_CLUSTER:
            self.allow(NON_PORTABLE_CLUSTER, 1)

    def call(self, function: str, *arguments: Any) -> None:
        status = getattr(self.driver, function)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{function}: {status}, {(text.value or b'?').decode()}")

    def allow(self, attribute: int, value: int) -> None:
        self.call("cuFuncSetAttribute", self.function, attribute, value)

    def config(self, programs: int) -> LaunchConfig:
        """For `programs` clusters; the grid counts thread blocks."""
        ctas = self.entry["num_ctas"]
        attributes = (LaunchAttribute * 2)()
        attributes[0].id = CLUSTER_DIMENSION
        attributes[0].value[:3] = (ctas, 1, 1)
        attributes[1].id = CLUSTER_SCHEDULING
        attributes[1].value[0] = SPREAD
        return LaunchConfig(
            grid=(programs * ctas, 1, 1),
            block=(32 * self.entry["num_warps"], 1, 1),
            shared=self.entry["shared"],
            stream=torch.cuda.current_stream().cuda_stream,
            attributes=attributes,
            count=len(attributes),
        )

    def clusters(self) -> int:
        """How many rows are in flight at once."""
        count = ctypes.c_int()
        config = ctypes.byref(self.config(1024))
        function = "cuOccupancyMaxActiveClusters"
        self.call(function, ctypes.byref(count), self.function, config)
        return count.value

    def launch(self, programs: int, **arguments: Tensor | float) -> None:
        values = []
        for name, kind in self.entry["parameters"]:
            value = 0 if name in HIDDEN else arguments[name]
            if isinstance(value, Tensor):
                value = value.data_ptr()
            values.append(C_TYPES[kind](value))
        # One address for each parameter; `values` keeps them alive until the launch has copied them.
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        config = ctypes.byref(self.config(programs))
        self.call("cuLaunchKernelEx", config, self.function, addresses, None)


@dataclasses.dataclass
class Rows:
    """A batch as both kernels take it: (N,) each, and (N, V) logits."""

    batch: inputs.Batch
    logits: Tensor
    ids: Tensor
    mask: Tensor
    weight: Tensor
    advantages: Tensor
    old_logp: Tensor
    ref_logp: Tensor

    @staticmethod
    def make(shape: shapes.Shape, variant: str, device: torch.device) -> "Rows":
        batch = inputs.make_batch(shape, variant, device, torch.bfloat16)
        assert batch.logits is not None
        given = batch.arguments
        mask = given["mask"]
        if mask is None:
            mask = torch.ones_like(batch.ids, dtype=torch.bool)
        weight = mask / (mask.sum(1, keepdim=True).clamp(min=1) * shape.B)
        advantages = given["advantages"][:, None].expand(shape.B, shape.T)
        return Rows(
            batch,
            batch.logits.flatten(0, 1),
            batch.ids.flatten(),
            mask.flatten().contiguous(),
            weight.float().flatten(),
            advantages.flatten().contiguous(),
            given["old_logps"].flatten(),
            given["ref_logps"].flatten(),
        )

    def run(self, kernel: Kernel, logits: Tensor, dlogits: Tensor) -> dict[str, Tensor]:
        """The kernel of this module."""
        N, V = logits.shape
        objective = self.batch.objective
        out = {name: torch.full_like(self.weight, torch.nan) for name in ("loss", "logp", "kl")}
        kernel.launch(
            N,
            logits_ptr=logits,
            ids_ptr=self.ids,
            mask_ptr=self.mask,
            weight_ptr=self.weight,
            advantages_ptr=self.advantages,
            old_logp_ptr=self.old_logp,
            ref_logp_ptr=self.ref_logp,
            dlogits_ptr=dlogits,
            **{f"{name}_ptr": x for name, x in out.items()},
            stride=logits.stride(0),
            V=V,
            inv_temperature=1.0,
            low=1.0 - objective.epsilon_low,
            high=1.0 + objective.epsilon_high,
            beta=objective.beta,
        )
        return out

    def run_own(self, logits: Tensor, dlogits: Tensor) -> dict[str, Tensor]:
        """grpo_fast's."""
        shape = self.batch.shape
        loss, logp, _, kl, _ = grpo_fwd_bwd(
            logits.view(shape.B, shape.T, shape.V),
            self.ids,
            self.mask,
            self.weight,
            self.advantages,
            None,
            shape.G,
            None,
            self.old_logp,
            self.ref_logp,
            None,
            None,
            None,
            None,
            None,
            1.0,
            False,
            self.batch.objective,
            dlogits.view(shape.B, shape.T, shape.V),
        )
        return {"loss": loss, "logp": logp, "kl": kl}

    def expected(self, rows: slice, dtype: torch.dtype) -> dict[str, Tensor]:
        """What plain PyTorch makes of some rows in `dtype`; the gradient in the logits' dtype or float64."""
        objective, live = self.batch.objective, self.mask[rows]
        z = self.logits[rows].to(dtype).requires_grad_()
        given = (self.weight, self.advantages, self.old_logp, self.ref_logp)
        weight, advantages, old, ref = (x[rows].to(dtype) for x in given)
        logp = torch.log_softmax(z, -1).gather(-1, self.ids[rows, None]).squeeze(-1)
        ratio = (logp - old).exp()
        clipped = ratio.clamp(1 - objective.epsilon_low, 1 + objective.epsilon_high)
        kl = (ref - logp).exp() - (ref - logp) - 1
        surrogate = -torch.minimum(ratio * advantages, clipped * advantages)
        loss = torch.where(live, weight * (surrogate + objective.beta * kl), 0)
        (grad,) = torch.autograd.grad(loss.sum(), z)
        grad = torch.where(live[:, None], grad, 0)
        values = {"loss": loss, "logp": logp, "kl": kl}
        values = {name: torch.where(live, x, 0).detach() for name, x in values.items()}
        return {**values, "gradient": grad if dtype == torch.float64 else grad.bfloat16()}


def check(kernel: Kernel, device: torch.device) -> dict[str, Any]:
    """Whether the kernel is right, in place and not: errors against float64 beside plain PyTorch's."""
    rows = Rows.make(CHECKED, "padded", device)
    sure = torch.arange(0, CHECKED.N, 16, device=device)  # tokens with p next to 1
    rows.logits[sure, rows.ids[sure]] += 12.0
    poisoned = torch.where(rows.mask[:, None], rows.logits, torch.nan)
    apart, within = torch.full_like(poisoned, torch.nan), poisoned.clone()
    results = {
        "apart": {**rows.run(kernel, poisoned, apart), "gradient": apart},
        "within": {**rows.run(kernel, within, within), "gradient": within},
    }
    own = poisoned.clone()
    results["grpo_fast"] = {**rows.run_own(own, own), "gradient": own}
    torch.cuda.synchronize()
    report: dict[str, Any] = {
        "masked_rows": int((~rows.mask).sum()),
        "same_bits": all(
            torch.equal(results["apart"][name], x)  # noqa: TID251 (the answer is a result)
            for name, x in results["within"].items()
        ),
        "errors": {},
    }
    report["errors"] = errors(rows, results)
    report["right"] = report["same_bits"] and all(
        entry[name] <= FACTOR * entry["plain"] + FLOOR * entry["largest"] + 1e-15
        for entry in report["errors"].values()
        for name in ("apart", "within")
    )
    return report


def errors(rows: Rows, results: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """The largest error of each result, by quantity.

    "scored" is the gradient of the scored logits in units of the weight times 1 - p, which is all that is
    left of it where a token is confident.
    """
    found: dict[str, dict[str, float]] = {}

    def note(quantity: str, who: str, x: Tensor) -> None:
        entry = found.setdefault(quantity, {})
        worst = x.nan_to_num(nan=torch.inf).max().item()
        entry[who] = max(entry.get(who, 0.0), worst)

    for start in range(0, len(rows.ids), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        truth = rows.expected(some, torch.float64)
        scored = rows.ids[some, None]
        unit = rows.weight[some].double() * -torch.expm1(truth["logp"])
        unit = torch.where(rows.mask[some], unit, 1.0)[:, None]
        everyone = {"plain": rows.expected(some, torch.float32)}
        everyone |= {
            who: {name: x[some] for name, x in result.items()} for who, result in results.items()
        }
        for name, true in truth.items():
            note(name, "largest", true.abs())
            for who, result in everyone.items():
                error = (result[name].double() - true).abs()
                note(name, who, error)
                if name == "gradient":
                    note("scored", who, error.gather(1, scored) / unit)
        note("scored", "largest", truth["gradient"].gather(1, scored).abs() / unit)
    return found


def timed(fn: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    fn()
    stop.record()
    return start, stop


def summary(events: list[tuple[torch.cuda.Event, torch.cuda.Event]], moved: int) -> dict[str, Any]:
    torch.cuda.synchronize()
    times = [start.elapsed_time(stop) for start, stop in events[WARMUP:]]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {
        "ms": middle,
        "iqr_ms": high - low,
        "fastest_ms": min(times),
        "bytes_per_s": moved / middle * 1e3,
        "times_ms": times,
    }


def measure(kernel: Kernel, device: torch.device) -> dict[str, Any]:
    """Both kernels in turns, in place on the same logits, which are put back before each launch."""
    source = torch.zeros(COPIED // 4, device=device)
    target = torch.ones_like(source)
    copies = [timed(functools.partial(target.copy_, source)) for _ in range(WARMUP + ROUNDS)]
    report: dict[str, Any] = {"copy": summary(copies, 2 * COPIED)}
    del source, target
    rows = Rows.make(shapes.CUDA[SHAPE], "full", device)
    x = rows.logits.clone()
    ways: dict[str, Callable[[], object]] = {
        "on_chip": lambda: rows.run(kernel, x, x),
        "grpo_fast": lambda: rows.run_own(x, x),
    }
    events: dict[str, list[Any]] = {name: [] for name in ways}
    for _ in range(WARMUP + ROUNDS):
        for name, way in ways.items():
            x.copy_(rows.logits)
            events[name].append(timed(way))
    moved = 2 * x.nbytes
    for name, pairs in events.items():
        report[name] = summary(pairs, moved)
        report[name]["of_copy"] = report[name]["bytes_per_s"] / report["copy"]["bytes_per_s"]
    report["finite"] = bool(x.isfinite().all())
    return report


def work(folder: Path, entry: dict[str, Any], out: Path) -> None:
    """Check and time one variant, in a process of its own; what is known is written at once."""
    report: dict[str, Any] = {name: x for name, x in entry.items() if name != "log"}

    def note(**more: Any) -> None:
        report.update(more)
        out.write_text(json.dumps(report))

    try:
        device = torch.device("cuda")
        torch.zeros(1, device=device)  # makes the context current
        note(device=torch.cuda.get_device_name(), torch=torch.__version__)
        kernel = Kernel(folder, entry)
        note(rows_in_flight=kernel.clusters())
        note(check=check(kernel, device))
        note(time=measure(kernel, device))
    except Exception:
        note(error=traceback.format_exc())


def run(folder: Path, out: Path, seconds: float, only: list[str]) -> int:
    """Measure variants until the time is up; `out` holds what is known after each."""
    until = time.monotonic() + seconds
    manifest = json.loads((folder / "manifest.json").read_text())
    known = {entry["name"]: entry for entry in manifest["variants"]}
    names = only or list(known)[:MOST]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--only {unknown[0]}: there are {', '.join(known)}")
    head = {name: x for name, x in manifest.items() if name != "variants"}
    results: dict[str, Any] = {**head, "commit": machine.commit(), "variants": []}
    # Forked, so that none has to import PyTorch again. This process must not touch the GPU itself.
    context = multiprocessing.get_context("fork")
    for name in names:
        left = min(until - time.monotonic(), SECONDS_PER_VARIANT)
        if left < 3:
            results["variants"].append({"name": name, "error": "no time left"})
            continue
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "result.json")
            process = context.Process(target=work, args=(folder, known[name], path))
            start = time.monotonic()
            process.start()
            process.join(left)
            report: dict[str, Any] = {"name": name}
            if process.is_alive():
                process.kill()
                process.join()
                report["error"] = f"not done after {left:.0f} s"
            elif process.exitcode:
                report["error"] = f"exit status {process.exitcode}"
            if path.exists():
                report = {**json.loads(path.read_text()), **report}
            report["wall_s"] = round(time.monotonic() - start, 1)
        results["variants"].append(report)
        files.write(out, results)
        print(line(report), flush=True)
    files.write(out, results)
    print("\n".join(["", HEAD, *map(line, results["variants"])]))
    return int(not any("time" in report for report in results["variants"]))


HEAD = f"{'variant':18} {'rows':>5} {'right':>6} {'ms':>15} {'grpo_fast ms':>15} {'ratio':>6}  of a copy"


def line(report: dict[str, Any]) -> str:
    """One variant's row of the table."""
    name = f"{report['name']:18} {report.get('rows_in_flight', '?'):>5}"
    name += f" {report['check']['right']!s:>6}" if "check" in report else f" {'?':>6}"
    if "time" not in report:
        return f"{name} {report.get('error', '').strip().splitlines()[-1:]}"
    ours, own = report["time"]["on_chip"], report["time"]["grpo_fast"]
    return (
        f"{name} {ours['ms']:8.3f} ±{ours['iqr_ms']:5.3f} {own['ms']:8.3f} ±{own['iqr_ms']:5.3f}"
        f" {own['ms'] / ours['ms']:6.3f}  {ours['of_copy']:.1%}, {own['of_copy']:.1%}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--ptxas", help="an assembler older than Triton's own")
    command = commands.add_parser("run")
    command.add_argument("folder", type=Path)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--seconds", type=float, default=60.0)
    command.add_argument("--only", action="append", default=[], help="a variant; may be repeated")
    given = parser.parse_args()
    if given.command == "build":
        build(given.out, given.ptxas)
        return 0
    return run(given.folder, given.out, given.seconds, given.only)


if __name__ == "__main__":
    sys.exit(main())
