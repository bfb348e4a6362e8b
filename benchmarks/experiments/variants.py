"""Variants of a kernel side by side on the same inputs: what an experiment of NOTES.md is run with.

    python -m benchmarks.experiments.variants grpo --out FILE  # times, in place, at S0
    python -m benchmarks.experiments.variants grpo --compile   # nothing is timed: fills Triton's cache
    python -m benchmarks.experiments.variants grpo --once      # one launch of each, for a profiler
    python -m benchmarks.experiments.variants vocabularies | logprob | head

A variant is this project's `kernels/` with some text replaced (`VARIANTS`), or another folder of kernels
(`--folder NAME=PATH`), imported under a name of its own. Every variant is held against float64 on some rows
before it is timed, by events on the device; the inputs are new in every round.
"""

import argparse
import dataclasses
import functools
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import ROOT
from benchmarks.inputs import shapes
from benchmarks.measuring import machine
from benchmarks.measuring import recorder as results
from grpo_fast import Objective, reference
from grpo_fast.testing import assert_as_accurate

KERNELS = ROOT / "kernels"
ROUNDS, WARMUP = 20, 3
CHECKED = 16  # rows
OBJECTIVE = Objective.preset("grpo", beta=0.04)

Edit = tuple[str, str, str]  # file, text, what stands there instead


def _parts(n: int) -> Edit:
    """At most so many programs share a row."""
    return ("schedules.py", "\nPARTS = 16 ", f"\nPARTS = {n} ")


def _side(n: int) -> Edit:
    """How many segments of a float32 row are read at a time."""
    return ("grpo.py", "side = 4 if entropy", f"side = {n} if entropy")


def _stages(n: int) -> Edit:
    """Pipeline the loop that writes the gradient in so many stages."""
    loop = "    for i in range(0, full):\n        base = start + (full - 1 - i if BACKWARDS"
    return ("rows.py", loop, loop.replace("range(0, full)", f"tl.range(0, full, num_stages={n})"))


def _tile(threads: int, k: int) -> list[Edit]:
    """Threads of a program, and the elements of each of its lanes."""
    tile = "K, T, warps = 4, 8 * threads, threads // WARP_SIZE"
    return [
        ("schedules.py", "threads = 128 if capped else 256", f"threads = {threads}"),
        ("schedules.py", tile, tile.replace("= 4", f"= {k}")),
    ]


def _hint(of_pass: str, hint: str) -> Edit:
    """What the loads (and stores) of a pass tell the cache."""
    now = {"FIRST_OF_TWO": "evict_last", "ONLY_ONE": "evict_first", "REWRITE": "evict_first"}
    line = f'\n{of_pass} = tl.constexpr("{{}}")'
    return ("rows.py", line.format(now[of_pass]), line.format(hint))


NO_LAST = _hint("FIRST_OF_TWO", "")
NO_FIRST = _hint("REWRITE", "")
# Segments of one tile for halves too: two at a time in `grpo`, two one after the other in `logprob`.
SIDE_BY_SIDE: list[Edit] = [
    ("schedules.py", "if capped or itemsize < 4 or", "if capped or"),
    (
        "schedules.py",
        "T, steps = 16 // itemsize * threads, 2",
        "T, steps = 16 // itemsize * threads, 1",
    ),
    ("schedules.py", "\nSEGMENTS = 4 ", "\nSEGMENTS = 2 "),
]
VARIANTS: dict[str, list[Edit]] = {
    "as it is": [],
    "no hints": [NO_LAST, NO_FIRST],
    "evict_first alone": [NO_LAST],
    "evict_last alone": [NO_FIRST],
    "two segments side by side": [*SIDE_BY_SIDE, _side(2)],
    "float32: 2 segments at a time": [_side(2)],
    "float32: 1 segment at a time": [_side(1)],
    "5 parts": [_parts(5)],
    "8 parts": [_parts(8)],
    "19 parts": [_parts(32)],
    "stages 2": [_stages(2)],
    "stages 3": [_stages(3)],
    "K 8": _tile(256, 8),
    "K 2": _tile(256, 2),
    "128 threads": _tile(128, 4),
    "512 threads": _tile(512, 2),
    "backwards": [("grpo.py", "= not OVERLAP and ((not SPLIT", "= not OVERLAP and ((True")],
}
ON_CHIP = "on chip"  # what GRPO_FAST_ON_CHIP=1 runs, where it can
LOGPROB: dict[str, list[Edit]] = {
    "as it is": [],
    "evict_last": [_hint("ONLY_ONE", "evict_last")],
    "no hints": [_hint("ONLY_ONE", "")],
    "two segments one after the other": SIDE_BY_SIDE,
    "5 parts": [_parts(5)],
    "K 8": _tile(256, 8),
}


def load(name: str, edits: list[Edit], folder: Path | None = None) -> Callable[[str], Any]:
    """The kernels under a package of their own: from the name of a file to its module."""
    package = "variant_" + "".join(c if c.isalnum() else "_" for c in name)
    root = Path(tempfile.gettempdir()) / "grpo_fast_variants"  # the same path: Triton's cache holds
    target = root / package
    target.mkdir(parents=True, exist_ok=True)
    (target / "__init__.py").write_text("")
    sources = {path.name: path.read_text() for path in (folder or KERNELS).glob("*.py")}
    for file, old, new in edits:
        assert old in sources[file], f"{name}: {file} holds no {old!r}"
        sources[file] = sources[file].replace(old, new)
    for file, text in sources.items():
        (target / file).write_text(text.replace("grpo_fast.kernels", package))
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    return lambda stem: importlib.import_module(f"{package}.{stem}")


@dataclasses.dataclass
class Inputs:
    """What `grpo_fwd_bwd` takes, and the logits again, to start every round with."""

    source: Tensor  # (B, T, V)
    work: Tensor
    tokens: dict[str, Tensor]


def make(shape: shapes.Shape, dtype: torch.dtype, padded: int = 0) -> Inputs:
    """Logits of a shape on the GPU, their rows `padded` apart, and what belongs to their tokens."""
    B, T, V = shape.B, shape.T, shape.V
    torch.manual_seed(0)
    new = functools.partial(torch.empty, device="cuda", dtype=dtype)
    source = new(B, T, padded or V)[..., :V]
    source.normal_(0, 2)
    work = new(B, T, padded or V)[..., :V]
    ids = torch.randint(V, (B * T,), device="cuda")
    pieces = zip(source.flatten(0, 1).split(512), ids.split(512), strict=True)
    logp = torch.cat([reference.logprob(x.float(), i) for x, i in pieces])
    noise = functools.partial(torch.randn, B * T, device="cuda")
    tokens = {
        "ids": ids,
        "weight": torch.full((B * T,), 1 / (B * T), device="cuda"),
        "advantages": noise(),
        "old_logp": logp + 0.05 * noise(),
        "ref_logp": logp + 0.1 * noise(),
    }
    return Inputs(source, work, tokens)


def launch(module: Any, x: Inputs, out: Tensor) -> tuple[Tensor, ...]:
    """Call `grpo_fwd_bwd` of a variant's kernels on `x.work`."""
    given: dict[str, Any] = dict.fromkeys(
        ("mask", "rewards", "sequence", "importance", "score", "coefficient", "entropy_weight")
    )
    given |= {"temperature": None, "inv_temperature": 1.0, "return_entropy": False}
    given |= {"group_size": 1, "objective": OBJECTIVE} | x.tokens
    return module.grpo_fwd_bwd(x.work, dlogits=out, **given)


def check(module: Any, x: Inputs, out: Tensor) -> float:
    """The worst error of some rows of the gradient, relative to the largest entry."""
    x.work.copy_(x.source)
    loss, logp, *_ = launch(module, x, out)
    N = loss.numel()
    rows = torch.linspace(0, N - 1, CHECKED, device="cuda").long()
    flat, grads = x.source.flatten(0, 1), out.flatten(0, 1)  # views, padded or not

    def spec(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        z = flat[rows].to(dtype).requires_grad_()
        logps = reference.logprob(z, x.tokens["ids"][rows])
        some = {k: v[rows].to(dtype)[:, None] for k, v in x.tokens.items() if k != "ids"}
        value = reference.policy_loss(
            logps[:, None],
            advantages=some["advantages"],
            old_logps=some["old_logp"],
            ref_logps=some["ref_logp"],
            objective=OBJECTIVE,
        )
        (grad,) = torch.autograd.grad(value * CHECKED / N, z)
        return logps.detach(), grad

    (t_logp, t_grad), (p_logp, p_grad) = spec(torch.float64), spec(torch.float32)
    assert_as_accurate(logp[rows], p_logp, t_logp, name="logp")
    assert_as_accurate(grads[rows], p_grad.to(out.dtype), t_grad, name="dlogits")
    assert grads.isfinite().all(), "a gradient is not finite"
    worst = (grads[rows].double() - t_grad).abs().max() / t_grad.abs().max()
    return worst.item()


def timed(run: Callable[[], object], before: Callable[[], object], rounds: int = ROUNDS) -> dict:
    """Median and quartiles of the seconds between events; `before` each is not timed."""
    spans = []
    for _ in range(WARMUP + rounds):
        before()
        spans.append(machine.between_events(run))
    torch.cuda.synchronize()
    seconds = [a.elapsed_time(b) / 1e3 for a, b in spans[WARMUP:]]
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": middle, "iqr": high - low, "min": min(seconds), "rounds": rounds}


class Sheet:
    """Rows of results, written after each."""

    def __init__(self, out: Path | None, suite: str) -> None:
        self.out = out
        self.document: dict[str, Any] = {"experiment": suite, "rows": []}
        if out:
            self.document["machine_info"] = machine.describe() | {"absent": {}}
            self.document["benchmarks"] = []

    def add(self, **row: Any) -> None:
        self.document["rows"].append(row)
        print(row, flush=True)
        if self.out:
            results.write(self.out, self.document)


def attempt(sheet: Sheet, about: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
    """A row, or why there is none; an error that takes the GPU from this process ends it."""
    try:
        sheet.add(**about, **run())
    except Exception as error:
        message = next(iter(str(error).splitlines()), "")
        sheet.add(**about, failed=f"{type(error).__name__}: {message}")
        if machine.lost():
            raise SystemExit(1) from error


def folders(options: Any) -> dict[str, Path]:
    return {name: Path(path) for name, path in (x.split("=", 1) for x in options.folder)}


def grpo_modules(options: Any) -> dict[str, Any]:
    found = {}
    chosen: dict[str, tuple[list[Edit], Path | None]] = {k: (v, None) for k, v in VARIANTS.items()}
    chosen |= {ON_CHIP: ([], None)} | {x: ([], path) for x, path in folders(options).items()}
    for name, (edits, folder) in chosen.items():
        if options.only and not any(word in name for word in options.only):
            continue
        try:
            module = load(name, edits, folder)
            why = name == ON_CHIP and module("on_chip").unavailable(torch.device("cuda"))
            if why or (name == ON_CHIP and options.float32):
                print(f"{name}: {why or 'it takes halves'}")
                continue
            found[name] = module("on_chip" if name == ON_CHIP else "grpo")
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}")
    return found


def suite_grpo(options: Any) -> None:
    """In place at S0; `--compile` on a few rows, `--once` one launch each."""
    shape = shapes.get("qwen2.5-7b-16k")
    dtype = torch.float32 if options.float32 else torch.bfloat16
    if options.float32:
        shape = shapes.get("qwen2.5-7b-4k")
    if options.compile:
        shape = dataclasses.replace(shape, B=1, T=64)
    x = make(shape, dtype)
    out = x.work
    if options.float32:  # as in the head: float32 logits, a bfloat16 gradient beside them
        out = torch.empty_like(x.work, dtype=torch.bfloat16)
    sheet = Sheet(options.out, f"grpo {dtype}")
    for name, module in grpo_modules(options).items():
        about = {"variant": name, "shape": [shape.B, shape.T, shape.V], "dtype": str(dtype)}

        def row(module: Any = module) -> dict[str, Any]:
            if options.compile or options.once:
                x.work.copy_(x.source)
                launch(module, x, out)
                torch.cuda.synchronize()
                return {}
            worst = check(module, x, out)
            found = timed(lambda: launch(module, x, out), lambda: x.work.copy_(x.source))
            moved = x.work.nbytes + out.nbytes
            return {"error": worst, **found, "bytes_per_second": moved / found["median"]}

        attempt(sheet, about, row)


def suite_vocabularies(options: Any) -> None:
    """`grpo` in place, per entry, where rows start aligned and where they do not."""
    sheet = Sheet(options.out, "vocabularies")
    base = load("as it is", [])("grpo")
    for V, padded in (
        *((50_257, 0), (50_257, 50_304), (128_256, 0), (128_264, 0), (128_264, 128_272)),
        *((151_665, 0), (151_665, 151_680), (32_000, 0), (262_144, 0)),
    ):
        shape = shapes.Shape(B=8, T=1024, V=V, G=4)
        x = make(shape, torch.bfloat16, padded)

        def row(x: Inputs = x) -> dict[str, Any]:
            worst = check(base, x, x.work)
            found = timed(lambda: launch(base, x, x.work), lambda: x.work.copy_(x.source), 10)
            moved = 2 * x.source.numel() * x.source.element_size()
            return {"error": worst, **found, "bytes_per_second": moved / found["median"]}

        attempt(sheet, {"V": V, "stride": padded or V, "rows": shape.N}, row)
        del x


def suite_logprob(options: Any) -> None:
    """The forward pass at S0, and a multiplication right after it."""
    shape = shapes.get("qwen2.5-7b-16k")
    if options.compile:
        shape = dataclasses.replace(shape, B=1, T=64)
    x = make(shape, torch.bfloat16)
    sheet = Sheet(options.out, "logprob forward")
    a, b = (torch.randn(4096, 4096, device="cuda").bfloat16() for _ in range(2))
    c = torch.empty_like(a)

    def gemm() -> None:
        torch.mm(a, b, out=c)

    truth = reference.logprob(x.source[0, :64].double(), x.tokens["ids"][:64])
    for name, edits in LOGPROB.items():
        module = load(f"logprob {name}", edits)("logprob")

        def run(module: Any = module) -> Tensor:
            return module.logprob_fwd(x.source, x.tokens["ids"], None, None, 1.0, False)[0]

        def row(run: Callable[[], Tensor] = run) -> dict[str, Any]:
            logp = run()[:64].double()
            assert (logp - truth).abs().max() < 1e-4
            if options.compile:
                return {}
            found = timed(run, lambda: None)
            after = timed(gemm, run, 10)["median"]
            rate = x.source.nbytes / found["median"]
            return {**found, "bytes_per_second": rate, "gemm_after": after}

        attempt(sheet, {"variant": name}, row)
    if not options.compile:
        flush = torch.empty_like(x.work)
        after = timed(gemm, lambda: flush.copy_(x.source), 10)
        sheet.add(variant="a copy of the logits, then the multiplication", **after)


def suite_head(options: Any) -> None:
    """`linear_grpo_loss` at S0 by chunk length, and its multiplications alone."""
    from grpo_fast.loss import linear_grpo_loss

    shape = shapes.get("qwen2.5-7b-16k")
    B, T, V, D = shape.B, shape.T, shape.V, shape.D
    torch.manual_seed(0)
    hidden = torch.randn(B, T, D, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(V, D, device="cuda") * D**-0.5).bfloat16().requires_grad_()
    ids = torch.randint(V, (B, T), device="cuda")
    given: dict[str, Any] = {"advantages": torch.randn(B, device="cuda"), "compact": False}
    given["old_logps"] = torch.full((B, T), -12.0, device="cuda")
    given["objective"] = Objective()
    sheet = Sheet(options.out, "head by chunk length")

    def gemms(C: int, wide: bool) -> Callable[[], None]:
        h, w = hidden.detach().view(-1, D), weight.detach()
        z = torch.empty(C, V, device="cuda", dtype=torch.float32 if wide else torch.bfloat16)
        dz = z.view(torch.bfloat16)[:, :V]  # over the logits, as the head has it
        dh = torch.empty(C, D, device="cuda", dtype=torch.float32)
        dw = torch.empty(V, D, device="cuda", dtype=torch.float32)

        def run() -> None:
            for start in range(0, len(h), C):
                part = h[start : start + C]
                n = len(part)
                if wide:
                    torch.mm(part, w.T, out_dtype=torch.float32, out=z[:n])
                else:
                    torch.mm(part, w.T, out=z[:n])
                torch.mm(dz[:n], w, out_dtype=torch.float32, out=dh[:n])
                beta = int(start > 0)
                torch.addmm(dw, dz[:n].T, part, beta=beta, out_dtype=torch.float32, out=dw)

        return run

    for wide in (False, True):
        for C in (2048, 2944, 3328, 3584, 4096, 5504):
            if wide and C > 4096:
                continue
            about = {"logits": "fp32" if wide else "bf16", "chunk": C}

            def whole(C: int = C, wide: bool = wide) -> dict[str, Any]:
                def step() -> None:
                    out = linear_grpo_loss(
                        *(hidden, weight, ids),
                        chunk_size=C,
                        logits_dtype="fp32" if wide else "bf16",
                        **given,
                    )
                    torch.autograd.grad(out.loss, (hidden, weight))

                found = timed(step, lambda: None, 3)
                return {**found, "gemms": timed(gemms(C, wide), lambda: None, 2)["median"]}

            attempt(sheet, about, whole)


SUITES = {
    "grpo": suite_grpo,
    "vocabularies": suite_vocabularies,
    "logprob": suite_logprob,
    "head": suite_head,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compile", action="store_true", help="on a few rows, without a time")
    parser.add_argument("--once", action="store_true", help="one launch each, without a time")
    parser.add_argument("--float32", action="store_true", help="float32 logits, 4,096 tokens")
    parser.add_argument("--only", action="append", help="variants whose name holds this")
    parser.add_argument(
        "--folder", action="append", default=[], metavar="NAME=PATH", help="other kernels"
    )
    options = parser.parse_args()
    start = time.monotonic()
    SUITES[options.suite](options)
    print(f"{options.suite}: {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
