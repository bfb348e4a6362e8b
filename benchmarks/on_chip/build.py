"""The variants of the kernel of `on_chip.py`, and their compilation for sm_90, which needs no GPU."""

import dataclasses
import json
import os
import re
import subprocess
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.codegen.launches import Launch, compile_launch, record, specialise
from benchmarks.inputs import shapes
from benchmarks.on_chip.driver import HIDDEN
from grpo_fast import Objective
from grpo_fast.kernels.on_chip import Plan, grpo_fwd_bwd
from grpo_fast.records import Rewards, Targets, Tokens

SHAPE = "qwen2.5-7b-16k"
PTX_TYPES = {"*": "u64", "i32": "u32", "fp32": "f32"}
TARGET = GPUTarget("cuda", 90, 32)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to spread a row.

    relaxed_exit: the barrier behind which a thread block may leave the cluster does not wait for its stores.
    Triton's does, for nothing: it is there so that none leaves while another reads its shared memory.
    """

    plan: Plan
    relaxed_exit: bool = False

    @property
    def name(self) -> str:
        plan = self.plan
        parts = [f"{plan.ctas}x{plan.warps}", plan.keep]
        if plan.registers is not None:
            parts.append(f"r{plan.registers}")
        return "-".join([*parts, "relaxed"] if self.relaxed_exit else parts)


# The first is what the kernel does by itself. The most promising come first.
VARIANTS = (
    Variant(Plan(8, 8, "e")),
    Variant(Plan(8, 8, "e"), relaxed_exit=True),
    Variant(Plan(8, 16, "e", 64)),
    Variant(Plan(8, 16, "bits", 64)),
    Variant(Plan(16, 4, "e")),
    Variant(Plan(16, 8, "e", 64)),
    Variant(Plan(4, 16, "e")),
)


def launch_of(shape: shapes.Shape, plan: Plan) -> Launch:
    """The launch that `on_chip_check.Rows` makes on a batch of this shape."""
    new = partial(torch.empty, device="meta")
    logits = new(shape.B, shape.T, shape.V, dtype=torch.bfloat16)
    ids, mask = new(shape.N, dtype=torch.int64), new(shape.N, dtype=torch.bool)
    weight, advantages, old, ref = (new(shape.N) for _ in range(4))
    targets = Targets(ids, mask, None, 1.0)
    tokens = Tokens(weight, advantages, old, ref, *[None] * 4)
    rewards = Rewards(None, shape.G, None)
    objective = Objective.preset("grpo")  # as `inputs.make_batch` has it
    return record(
        lambda: grpo_fwd_bwd(
            logits, targets, tokens, rewards, False, objective, dlogits=logits, spread=plan
        )
    )


def parameters_of(signature: dict[str, Any]) -> dict[str, str]:
    """The parameters of a compiled kernel and their types; a tuple's members are `name.field`."""
    found: dict[str, str] = {}
    for name, kind in signature.items():
        if isinstance(kind, tuple):
            fields = kind._fields  # type: ignore[attr-defined]
            members = {f"{name}.{x}": k for x, k in zip(fields, kind, strict=True)}
            found |= parameters_of(members)
        elif kind != "constexpr":
            found[name] = kind
    return found


def build(folder: Path, ptxas: str | None) -> None:
    """Compile every variant for sm_90 into `folder`, and say in `manifest.json` how each is launched."""
    from triton import knobs

    if ptxas is not None:
        os.environ["TRITON_PTXAS_BLACKWELL_PATH"] = ptxas  # from it Triton knows which PTX to write
    assembler = knobs.nvidia.ptxas_blackwell
    folder.mkdir(parents=True, exist_ok=True)
    shape = shapes.CUDA[SHAPE]
    entries = []
    for variant in VARIANTS:
        try:
            entry = compile_variant(variant, shape, folder, assembler.path)
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
        "V": shape.V,
        "hidden": HIDDEN,
        "variants": entries,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def compile_variant(
    variant: Variant, shape: shapes.Shape, folder: Path, ptxas: str
) -> dict[str, Any]:
    """Leave the variant's cubin in `folder`; what a launch of it has to know."""
    launch = launch_of(shape, variant.plan)
    compiled = compile_launch(launch, TARGET)
    ptx = compiled.asm["ptx"]
    if variant.relaxed_exit:
        ptx = relax_exit(ptx)
    signature = parameters_of(specialise(launch).signature)
    parameters = [*signature, *HIDDEN]
    types = [PTX_TYPES[x[0] if x[0] == "*" else x] for x in signature.values()]
    types += ["u64"] * len(HIDDEN)
    kernel = ptx[ptx.index(".entry") :]  # what it calls has parameters of its own
    found = re.findall(r"^\s*\.param \.(\w+).*_kernel_param_\d+,?$", kernel, re.MULTILINE)
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
        "strips": launch.arguments["SPREAD"].STRIPS,
        "keep": variant.plan.keep,
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
