"""The variants of the kernel of `on_chip.py`, and their compilation for sm_90, which needs no GPU."""

import dataclasses
import json
import os
import re
import subprocess
import tempfile
import traceback
from pathlib import Path
from typing import Any

import triton

from benchmarks import shapes
from benchmarks.driver import HIDDEN
from benchmarks.on_chip_kernel import SIGNATURE, on_chip_kernel

SHAPE = "qwen2.5-7b-16k"
ELEMENTS = 8  # bfloat16 of one 128-bit access
PTX_TYPES = {"*": "u64", "i32": "u32", "fp32": "f32"}


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
