"""Compile variants of `kernels/on_chip.py` for sm_90, to be launched where Triton is too old for it.

    python -m benchmarks.on_chip --out FOLDER [--ptxas PATH]
    python -m benchmarks.experiments.variants grpo --cubins FOLDER --out FILE.json

Reductions across a cluster need Triton 3.8, which most machines with a GPU do not have. (Where it
is installed, `GRPO_FAST_ON_CHIP=1` switches the kernel on.) So the kernel is compiled ahead of
time, which needs Triton 3.8 and no GPU. `variants` launches the result through the CUDA driver, on
a GPU of compute capability 9.0. A driver refuses what a much newer assembler made: `--ptxas` takes
an older one.
"""

import dataclasses
import json
import os
import re
import subprocess
import tempfile
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks import command_line
from benchmarks.codegen.launches import Launch, compile_launch, record, specialise
from benchmarks.experiments import variants
from benchmarks.inputs.batches import make_batch
from benchmarks.on_chip.driver import HIDDEN, MANIFEST
from grpo_fast.kernels.on_chip import Plan, grpo_fwd_bwd

# Rows of S0, fewer of them: Triton asks which sizes 16 divides, and the kernel takes no count of rows.
SHAPE = dataclasses.replace(variants.S0, B=4, T=16)
PTX_TYPES = {"*": "u64", "i32": "u32", "fp32": "f32"}
TARGET = GPUTarget("cuda", 90, 32)


# The first is what the kernel does by itself. The most promising come first.
VARIANTS = {
    "8x8-e": Plan(8, 8, "e"),
    "8x8-e-relaxed": Plan(8, 8, "e"),
    "8x16-e-r64": Plan(8, 16, "e", 64),
    "8x16-bits-r64": Plan(8, 16, "bits", 64),
    "16x4-e": Plan(16, 4, "e"),
    "16x8-e-r64": Plan(16, 8, "e", 64),
    "4x16-e": Plan(4, 16, "e"),
}
# The barrier behind which a thread block may leave the cluster does not wait for its stores.
# Triton's does, for nothing: it is there so that none leaves while another reads its shared memory.
RELAXED = "-relaxed"


def launch_of(plan: Plan) -> Launch:
    """Record the launch that `variants grpo` makes, with rows spread by a plan."""
    x = make_batch(SHAPE, "full", torch.device("cpu"), torch.bfloat16)
    module = SimpleNamespace(grpo_fwd_bwd=partial(grpo_fwd_bwd, spread=plan))
    return record(lambda: variants.launch(module, x, x.logits, x.logits))


def parameters_of(signature: dict[str, Any]) -> dict[str, str]:
    """List the parameters of a compiled kernel with their types; a tuple's members are `name.field`."""
    found: dict[str, str] = {}
    for name, kind in signature.items():
        if isinstance(kind, tuple):
            fields = kind._fields  # type: ignore[attr-defined]
            members = {f"{name}.{x}": k for x, k in zip(fields, kind, strict=True)}
            found |= parameters_of(members)
        elif kind != "constexpr":
            found[name] = kind
    return found


def build(folder: Path) -> None:
    """Compile every variant into `folder`, and say in its manifest how each is launched."""
    folder.mkdir(parents=True, exist_ok=True)
    assembler = triton.knobs.nvidia.ptxas_blackwell
    entries = []
    for name in VARIANTS:
        try:
            entry = compile_variant(name, folder, assembler.path)
        except Exception:
            print(f"{name}: does not compile\n{traceback.format_exc(limit=-1)}")
            continue
        entries.append(entry)
        print(
            f"{name:16} {entry['registers']:4} registers, {entry['stack']:4} B stack, "
            f"{entry['spilled']:4} B spilled, {entry['shared']:4} B shared memory"
        )
    manifest = {"triton": triton.__version__, "ptxas": assembler.version, "variants": entries}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def compile_variant(name: str, folder: Path, ptxas: str) -> dict[str, Any]:
    """Leave the variant's cubin in `folder`; return what a launch of it has to know."""
    launch = launch_of(VARIANTS[name])
    compiled = compile_launch(launch, TARGET)
    ptx = compiled.asm["ptx"]
    if name.endswith(RELAXED):
        ptx = relax_exit(ptx)
    signature = parameters_of(specialise(launch).signature)
    parameters = [*signature, *HIDDEN]
    types = [PTX_TYPES[x[0] if x[0] == "*" else x] for x in signature.values()]
    types += ["u64"] * len(HIDDEN)
    kernel = ptx[ptx.index(".entry") :]  # what it calls has parameters of its own
    found = re.findall(r"^\s*\.param \.(\w+).*_kernel_param_\d+,?$", kernel, re.MULTILINE)
    if found != types:
        raise ValueError(f"{name}: the parameters are {found}, want {types}")
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise ValueError(f"{name}: wants scratch memory, of which there is none")
    cubin, log = assemble(ptx, ptxas)
    (folder / f"{name}.cubin").write_bytes(cubin)

    def logged(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, log)))

    return {
        "name": name,
        "cubin": f"{name}.cubin",
        "kernel": metadata.name,
        "num_ctas": metadata.num_ctas,
        "num_warps": metadata.num_warps,
        "shared": metadata.shared,
        "parameters": list(zip(parameters, types, strict=True)),
        "registers": logged(r"Used (\d+) registers"),
        "stack": logged(r"(\d+) bytes stack frame"),
        "spilled": logged(r"(\d+) bytes spill (?:stores|loads)"),
    }


def relax_exit(ptx: str) -> str:
    """Take from the last cluster barrier the release that makes it wait for the stores before it."""
    arrive = "barrier.cluster.arrive.aligned;"
    before, found, after = ptx.rpartition(arrive)
    if not found or "st.global" in after or "ld.shared::cluster" in after:
        raise ValueError("the last cluster barrier is not where it was expected")
    return f"{before}{arrive.replace('arrive', 'arrive.relaxed')}{after}"


def assemble(ptx: str, ptxas: str) -> tuple[bytes, str]:
    """Return the cubin, and what the assembler says of it; its options are Triton's."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        options = ["-v", "--regAllocOptLevel=2", "--gpu-name=sm_90a"]
        command = [ptxas, *options, str(source), "-o", str(out)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{ptxas}: {result.stderr}")
        return out.read_bytes(), result.stderr


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cubins")
    parser.add_argument("--ptxas", help="an assembler older than Triton's own")
    options = parser.parse_args()
    if options.ptxas is not None:  # from it Triton knows which PTX to write
        os.environ["TRITON_PTXAS_BLACKWELL_PATH"] = options.ptxas
    build(options.out)
    return 0
