"""Predict how long a kernel takes, from bytes, instructions and the ceilings of a GPU.

    time = max(bytes / bandwidth, instructions / issue rate, exponentials / their rate) + launch

Bytes are those of `traffic`; the range is from "every second read is found in the cache" to "none
is". Instructions per element are those of the compiled kernels (`codegen.json`). The path from
hidden states adds its matrix multiplications, in chunks of the rows that this project would take
there. Ceilings are measured ones of that GPU where a result holds them, else the data sheet's times
an assumed share. Each line says which. A prediction stays next to the measurement that comes later.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from benchmarks import command_line
from benchmarks.codegen import saved as compiled
from benchmarks.inputs import shapes
from benchmarks.measuring import traffic
from benchmarks.report import markdown
from benchmarks.report.committed import Run
from grpo_fast.ops.head import chunk_length

# The share of the data sheet that a plain copy and a large bfloat16 multiplication reach: assumed,
# not measured.
SHARE_OF_BANDWIDTH, SHARE_OF_GEMM = 0.90, 0.80
LAUNCH = 5e-6
EXPONENTIALS = {"read": 1.25, "write": 1.0}  # per element: the fold rescales once in K = 4
MAX_V_PER_PROGRAM = 32_768  # kernels/schedules.py: longer rows are split
HALF, FULL = 2, 4  # bytes of an entry
OWN, BF16, ALL_ROWS = "grpo_fast", "grpo_fast-bf16", "grpo_fast-all-rows"  # from hidden states


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet (dense rates, boost clock)."""

    target: str  # of the compiled code
    processors: int  # multiprocessors, compute units
    lanes: int  # instructions of a lane per cycle and processor
    special: int  # exponentials per cycle and processor
    clock: float  # Hz
    bandwidth: float  # bytes / s
    bfloat16: float  # FLOP / s
    driver: str  # a pattern of what its driver calls it: this one, not its siblings


GPUS = {
    "H200": Gpu("sm_90", 132, 128, 16, 1.98e9, 4.80e12, 989e12, "NVIDIA H200"),
    "H100": Gpu("sm_90", 132, 128, 16, 1.98e9, 3.35e12, 989e12, "NVIDIA H100 80GB HBM3"),
    "A100": Gpu("sm_80", 108, 128, 16, 1.41e9, 2.04e12, 312e12, "NVIDIA A100-SXM4-80GB"),
    "MI300X": Gpu("gfx942", 304, 64, 16, 2.10e9, 5.30e12, 1307e12, r"AMD Instinct MI300X( .*)?"),
}


class Ceilings(NamedTuple):
    bandwidth: float
    gemm: float
    origin: str


class Prediction(NamedTuple):
    """Seconds, from the best case of the cache to the worst, and what sets the lower one."""

    low: float
    high: float
    bound: str

    def __str__(self) -> str:
        return f"{self.low * 1e3:.2f} to {self.high * 1e3:.2f}"


class Launch(NamedTuple):
    """A benchmark of this project's own kernels in bfloat16."""

    stem: str
    case: str
    sizes: dict[str, int]
    live: int
    moving: int
    provider: str = OWN

    def __str__(self) -> str:
        return f"{self.stem}, {self.case.replace('_', ' + ')} | {self.provider}"


def gpu_of(device: str) -> str | None:
    """Find the entry of `GPUS` that a device is; None for others, such as a part of one (MIG)."""
    return next((name for name, gpu in GPUS.items() if re.fullmatch(gpu.driver, device)), None)


def ceilings(name: str, roofs: dict[str, Any] | None = None) -> Ceilings:
    """Return what a run measured on this GPU, or the assumed share of the data sheet."""
    gpu = GPUS[name]
    assumed = gpu.bfloat16 * SHARE_OF_GEMM
    if roofs:
        return Ceilings(roofs["copy"], roofs["gemm"].get("bfloat16", assumed), "measured")
    share = f"x {SHARE_OF_BANDWIDTH:.2f} (copy), x {SHARE_OF_GEMM:.2f} (GEMM)"
    return Ceilings(gpu.bandwidth * SHARE_OF_BANDWIDTH, assumed, f"data sheet {share}: assumed")


def _work(gpu: Gpu, case: str, loops: dict[str, int]) -> tuple[float, float]:
    """Return the seconds to issue the instructions, and the exponentials, of loops over elements."""
    rows = compiled.load()["rows"]
    row = next(x for x in rows if (x["target"], x["case"]) == (gpu.target, case))
    cycles = gpu.processors * gpu.clock
    issue = sum(row["per_element"][kind] * n for kind, n in loops.items()) / gpu.lanes / cycles
    special = sum(EXPONENTIALS[kind] * n for kind, n in loops.items()) / gpu.special / cycles
    return issue, special


def _bounded(moved: traffic.Traffic, top: Ceilings, work: tuple[float, float]) -> Prediction:
    low, high = moved.least / top.bandwidth, moved.most / top.bandwidth
    limits = {"bytes": low, "instructions": work[0], "exponentials": work[1]}
    bound = max(limits, key=lambda name: limits[name])
    return Prediction(max(limits.values()) + LAUNCH, max(high, *work) + LAUNCH, bound)


def predict(launch: Launch, name: str, top: Ceilings) -> Prediction | None:
    """Predict a launch on a GPU; None where the model has nothing to say."""
    gpu, sizes, live, moving = GPUS[name], launch.sizes, launch.live, launch.moving
    V, N, w = sizes["V"], sizes["B"] * sizes["T"], HALF
    split = " split" if V > MAX_V_PER_PROGRAM else ""
    if launch.stem == "logprob":
        work = _work(gpu, f"logprob_fwd{split}", {"read": live * V})
        if launch.case == "forward":
            return _bounded(traffic.logprob_forward(live, V, w), top, work)
        back = _work(gpu, "logprob_bwd", {"write": live * V})
        both = (work[0] + back[0], work[1] + back[1])
        return _bounded(traffic.logprob(N, live, V, w), top, both)
    if launch.stem == "grpo":
        work = _work(gpu, f"grpo{split}", {"read": live * V, "write": moving * V})
        return _bounded(traffic.grpo(N, live, moving, V, w), top, work)
    if launch.stem == "linear_grpo":
        rows = N if launch.provider == ALL_ROWS else moving
        return _linear_grpo(gpu, sizes, rows, launch.provider != BF16, top)
    return None


def chunk(gpu: Gpu, rows: int, D: int, V: int, fp32: bool) -> int:
    """Return how many rows of logits the head makes at a time for bfloat16 hidden states."""
    hidden: Any = SimpleNamespace(dtype=torch.bfloat16, is_cuda=True, shape=(rows, D))
    options: Any = SimpleNamespace(fp32_logits=fp32, chunk_size=0, widest=V)
    return chunk_length.chunk_rows(rows, D, chunk_length.row_limit(hidden, options), gpu.processors)


def _linear_grpo(
    gpu: Gpu, sizes: dict[str, int], rows: int, fp32: bool, top: Ceilings
) -> Prediction:
    """Add up three multiplications, the kernel on each chunk, and the traffic of dweight.

    Logits and their gradient share a workspace of 2 or 4 bytes an entry, which sets the length of a
    chunk.
    """
    D, V = sizes["D"], sizes["V"]
    C = chunk(gpu, rows, D, V, fp32)
    chunks = max(-(-rows // C), 1)
    gemms = 6 * chunks * C * D * V / top.gemm  # the last chunk is filled up
    split = " split" if V > MAX_V_PER_PROGRAM else ""
    launch = "grpo overlap" if fp32 else f"grpo{split}"
    work = _work(gpu, launch, {"read": rows * V, "write": rows * V})
    moved = traffic.grpo(rows, rows, rows, V, FULL if fp32 else HALF)
    kernel = _bounded(dataclasses.replace(moved, written=rows * V * HALF), top, work)
    # What the products move beyond those of halves: dweight in float32, which the first chunk does
    # not read, a cast of it at the end, and float32 logits; dhidden in float32, which a launch of
    # its own rounds.
    extra = ((2 * chunks - 1) * FULL + FULL + HALF) * V * D + fp32 * (FULL - HALF) * rows * V
    extra += (FULL - HALF + FULL + HALF) * rows * D
    # They hide between none and all of these bytes behind their arithmetic.
    return Prediction(
        gemms + kernel.low, gemms + kernel.high + extra / top.bandwidth, "matrix multiplications"
    )


def _example(
    stem: str, shape_name: str, case: str = "forward_backward", provider: str = OWN
) -> tuple[str, Launch]:
    shape = shapes.get(shape_name)
    return shape_name, Launch(stem, case, dataclasses.asdict(shape), shape.N, shape.N, provider)


EXAMPLES = (
    _example("logprob", "qwen2.5-7b-16k", "forward"),
    _example("logprob", "qwen2.5-7b-16k"),
    *(_example("grpo", shape) for shape in ("qwen2.5-7b-16k", "llama3-8b-16k", "gpt2-16k")),
    *(_example("linear_grpo", "qwen2.5-7b-16k", provider=who) for who in (OWN, BF16)),
)


def table() -> str:
    """Predict for GPUs that nothing was measured on."""
    rows = []
    for shape, launch in EXAMPLES:
        made = [predict(launch, name, ceilings(name)) for name in GPUS]
        bounds = ", ".join(dict.fromkeys(p.bound for p in made if p))
        rows.append([launch, f"`{shape}`", *made, bounds])
    names = (f"{name}, ms" for name in GPUS)
    head = ["launch", "provider", "shape", *names, "set by"]
    # A launch names its provider in a cell of its own.
    return markdown.table(head, rows, left=(0, 1, 2, len(head) - 1))


def of_products(name: str) -> Iterator[str]:
    """Divide the predictions from hidden states by the time of their three products alone."""
    top = ceilings(name)
    for launch in (x for _, x in EXAMPLES if x.stem == "linear_grpo"):
        made = predict(launch, name, top)
        assert made
        bare = 6 * launch.moving * launch.sizes["D"] * launch.sizes["V"] / top.gemm
        yield f"{launch.provider} {made.low / bare:.2f} to {made.high / bare:.2f}"


def comparison(run: Run) -> Iterator[list[Any]]:
    """Put predictions next to measurements, for a run on a GPU that the model knows."""
    name = gpu_of(run.device)
    for e in run.entries if name else ():
        if not e["provider"].startswith(OWN) or e["dtype"] != "bfloat16":
            continue
        if "moving_tokens" not in e:  # a step of a trainer
            continue
        tokens = e["live_tokens"], e["moving_tokens"]
        launch = Launch(e["stem"], e["case"], e["sizes"], *tokens, e["provider"])
        sheet, roofs = (
            predict(launch, str(name), ceilings(str(name), x)) for x in (None, e["roofs"])
        )
        if sheet and roofs:
            times = f"{e['median'] * 1e3:.2f}", f"{e['median'] / roofs.low:.2f}"
            yield [launch, f"`{e['shape']}`, {e['variant']}", sheet, roofs, *times]


def comparison_table(runs: Iterable[Run]) -> str:
    """Write the comparison of all runs as a table; "" where there is none."""
    rows = [row for run in runs for row in comparison(run)]
    head = ["launch", "provider", "case", "predicted by the data sheet, ms"]
    head += ["by the measured rates, ms", "measured, ms", "measured / lower"]
    return markdown.table(head, rows, left=(0, 1, 2)) if rows else ""


def main() -> None:
    command_line(__doc__).parse_args()
    print(table())
    print(f"\nTimes the bare products: H100, {', '.join(of_products('H100'))}.")
    print(f"Ceilings: {ceilings('H200').origin}.")


if __name__ == "__main__":
    main()
