"""Read a compiled kernel's assembly: registers, stack, and the instructions of its loops.

Read from NVIDIA's SASS (Triton ships the disassembler) and from AMD's assembly.
"""

import collections
import dataclasses
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import triton


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop, counted for one thread; what a forward branch skips is left out."""

    kind: str  # read, write, zeros or scale: what it does to a row; else other
    instructions: int
    barriers: int
    shuffles: int  # exchanges between lanes, shared memory included
    reloads: int  # of scalars that gfx942 keeps in the lanes of a vector register, for want of scalar ones
    loads: list[int]  # bits of each
    stores: list[int]

    def per_element(self, itemsize: int) -> float:
        return self.instructions / (sum(self.loads or self.stores) / 8 / itemsize)


class Instruction(NamedTuple):
    op: str
    label: str | None  # where it may jump to


Listing = list[str | Instruction]  # labels and instructions, in order


def nvidia_tool(name: str, *args: str) -> str:
    tool = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([tool, *args], capture_output=True, text=True, check=True).stdout


def read_sass(sass: str) -> Iterator[str | Instruction]:
    """Yield labels and instructions, in order."""
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            yield label[1]
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]+)(.*)", line):
            jump = re.search(r"\.L_x_\d+", found[2]) if found[1].startswith("BRA") else None
            yield Instruction(found[1], jump[0] if jump else None)


def read_amdgcn(text: str) -> Iterator[str | Instruction]:
    keeps = set(re.findall(r"\tv_writelane_b32 (v\d+),", text))
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            yield label[1]
        elif found := re.match(r"\t([a-z]\w+)(.*)", line):
            jump = re.search(r"\.LBB\w+", found[2]) if "branch" in found[1] else None
            # A data-parallel primitive is an exchange between lanes within another instruction.
            dpp = re.search(r"row_|quad_perm|wave_sh", found[2])
            kept = re.search(r"v_readlane_b32 s\d+, (v\d+),", line)
            op = "scalar_reload" if kept and kept[1] in keeps else found[1]
            yield Instruction(op + (" dpp" if dpp else ""), jump[0] if jump else None)


def own_code(text: str, kernel: str) -> str:
    """Keep the lines of the kernel itself: its functions are for rows that hardly ever occur."""
    found, inside = [], True
    for line in text.splitlines():
        if function := re.match(r"\s*\.type\s+(\S+?)\s*,\s*@function", line):
            inside = function[1] == kernel
        if inside:
            found.append(line)
    return "\n".join(found)


WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
AMD_WIDTHS = {"ubyte": 8, "byte": 8, "ushort": 16, "short": 16, "dword": 32}
AMD_WIDTHS |= {"dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


def width(op: str) -> int:
    """Return how many bits a load or store of global memory moves for one thread."""
    if op[0].isupper():
        return next((WIDTHS[part] for part in op.split(".") if part in WIDTHS), 32)
    return next(AMD_WIDTHS[part] for part in op.split("_") if part in AMD_WIDTHS)


LOAD = r"LDG\b|(global|buffer|flat)_load"
STORE = r"STG\b|(global|buffer|flat)_store"
BARRIER = r"BAR\b|s_barrier"
CLUSTER_BARRIER = r"UCGABAR_ARV"
SHUFFLE = r"SHFL|LDS\b|STS\b|ds_|v_permlane|v_readlane|.* dpp"
RELOAD = r"scalar_reload"
EXP = r"MUFU\.EX2|v_exp_f32"


def matching(pattern: str, listing: Iterable[str | Instruction]) -> list[str]:
    """List the operations that match, labels left out."""
    return [x.op for x in listing if isinstance(x, Instruction) and re.match(pattern, x.op)]


def count(pattern: str, listing: Iterable[str | Instruction]) -> int:
    return len(matching(pattern, listing))


def widths(pattern: str, listing: Iterable[str | Instruction]) -> dict[str, int]:
    """Count loads or stores by the bits that each moves for one thread."""
    return dict(collections.Counter(str(width(op)) for op in matching(pattern, listing)))


def read_loop(body: list[Instruction]) -> Loop:
    loads, stores = (sorted(map(width, matching(x, body))) for x in (LOAD, STORE))
    kinds = {
        (True, False, True): "read",
        (True, True, True): "write",
        (False, True, False): "zeros",
        (True, True, False): "scale",
    }
    kind = kinds.get((bool(loads), bool(stores), count(EXP, body) > 0), "other")
    barriers, shuffles, reloads = (count(x, body) for x in (BARRIER, SHUFFLE, RELOAD))
    return Loop(kind, len(body), barriers, shuffles, reloads, loads, stores)


UNCONDITIONAL = r"s_branch|s_endpgm|s_setpc|EXIT$"


def comes_back(code: list[Instruction], place: dict[str, int], first: int, last: int) -> bool:
    """Say whether control gets from `first` to `last`: a block moved out of line jumps back."""
    seen, todo = set(), [first]
    while todo:
        i = todo.pop()
        if i == last:
            return True
        if i in seen or i >= len(code):
            continue
        seen.add(i)
        label = code[i].label
        if label is not None and label in place:
            todo.append(place[label])
        if not re.match(UNCONDITIONAL, code[i].op):
            todo.append(i + 1)
    return False


def read_loops(listing: Listing) -> list[Loop]:
    """Find the innermost loops: what lies between a label and a jump back to it."""
    place: dict[str, int] = {}
    code: list[Instruction] = []
    for x in listing:
        if isinstance(x, str):
            place[x] = len(code)
        else:
            code.append(x)
    jumps = [(i, place[x.label]) for i, x in enumerate(code) if x.label in place]
    # `BRA .` after the end is no loop.
    spans = {(to, i) for i, to in jumps if to < i and comes_back(code, place, to, i)}
    loops = []
    for first, last in sorted(spans):
        if any(first <= a and b <= last for a, b in spans - {(first, last)}):
            continue
        skipped = {k for i, to in jumps if first <= i < to <= last for k in range(i + 1, to)}
        loops.append(read_loop([code[k] for k in range(first, last + 1) if k not in skipped]))
    return loops


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"no {pattern} in what the compiler reports")
    return int(found[1])


def read_nvidia(kernel: Any) -> tuple[int, int, Listing]:
    """Return (registers, stack, listing) of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = nvidia_tool("cuobjdump", "-res-usage", file.name)
        sass = own_code(nvidia_tool("nvdisasm", "-c", file.name), kernel.metadata.name)
    registers, stack, local = (
        number(name + r":(\d+)", usage) for name in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local, list(read_sass(sass))


def read_amd(kernel: Any) -> tuple[int, int, Listing]:
    text = kernel.asm["amdgcn"]
    registers = number(r"\.vgpr_count:\s+(\d+)", text)
    stack = number(r"\.private_segment_fixed_size: (\d+)", text)
    return registers, stack, list(read_amdgcn(own_code(text, kernel.metadata.name)))


def offsets_of(ttir: str) -> dict[str, list[str]]:
    """Find the types of the offsets that a kernel adds to each of its pointers.

    The pointers are arguments, or members of a tuple that is one: the compiler calls those by the
    name of the tuple and a number.
    """
    (kernel,) = re.findall(r"tt\.func public .*?^  }", ttir, re.DOTALL | re.MULTILINE)
    arguments = re.findall(r"%(\w+): !tt\.ptr", kernel.splitlines()[0])
    origin = {name: name for name in arguments}
    splats = re.findall(r"%(\w+) = tt\.splat %(\w+) :", kernel)  # a pointer for each lane
    origin |= {copy: name for copy, name in splats if name in arguments}
    added = r"tt\.addptr %(\w+), %\w+ : .*, (?:tensor<[\dx]+x)?(i\d+)>?(?: loc.*)?$"
    found = collections.defaultdict(set)
    for base, kind in re.findall(added, kernel, re.MULTILINE):
        if base in origin:
            found[origin[base]].add(kind)
    return {name: sorted(kinds) for name, kinds in sorted(found.items())}


def lane_orders(ttgir: str, T: int) -> list[str]:
    """Find how reductions over T lanes spread them over registers, lanes and warps.

    The order of the additions follows from it. What else the tensor holds beside the lanes plays no
    part.
    """
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.MULTILINE))
    found = set()
    over_all = (
        rf"tensor<(?:\d+x)?{T}xf32, (?:#ttg.slice<{{dim = 0, parent = )?(#\w+)(?:}}>)?>\) -> "
    )
    for name in re.findall(over_all + r"(?:f32|tensor<\d+xf32, #ttg.slice<{dim = 1)", ttgir):
        found.add(" ".join(map(str, _bits(layouts[name]))))
    return sorted(found)


def _bits(layout: str) -> list[list[int]]:
    """List the steps of the last axis by register, lane and warp, for a blocked or a linear layout."""
    if "linear" in layout:
        kinds = re.findall(r"(?:register|lane|warp) = (\[(?:\[[\d, ]+\](?:, )?)*\])", layout)
        bases = [[basis[-1] for basis in json.loads(kind)] for kind in kinds]
        return [[step for step in steps if step] for steps in bases]
    sizes = re.findall(r"(?:sizePerThread|threadsPerWarp|warpsPerCTA) = \[[^\]]*?(\d+)\]", layout)
    bits, step = [], 1
    for size in map(int, sizes):
        bits.append([step << i for i in range(size.bit_length() - 1)])
        step *= size
    return bits
