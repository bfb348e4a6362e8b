"""Time variants of a kernel side by side on the same inputs: the experiments of NOTES.md.

    python -m benchmarks.experiments.variants grpo --out FILE  # times, in place, at S0
    python -m benchmarks.experiments.variants grpo --once      # one launch of each, no times
    python -m benchmarks.experiments.variants fp32 | vocabularies | logprob | head

A variant is this project's `kernels/` with some text replaced (`VARIANTS`), imported under a name
of its own; or a kernel that `python -m benchmarks.on_chip` compiled (`--cubins FOLDER`). Every
variant is held against float64 on some rows before it is timed, by events on the device, on new
inputs in every round. Compiled kernels come last, as the most likely to lose the GPU.
"""

import functools
import importlib
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import ROOT, command_line
from benchmarks.inputs import shapes
from benchmarks.inputs.batches import Batch, make_batch
from benchmarks.measuring import gate, machine, recorder
from grpo_fast import Objective, reference
from grpo_fast.loss import linear_grpo_loss
from grpo_fast.records import Rewards, Targets, Tokens

KERNELS = ROOT / "kernels"
ROUNDS, WARMUP = 20, 3
S0 = shapes.get("qwen2.5-7b-16k")

Edit = tuple[str, str, str]  # file, text, what stands there instead
# Parts, stages, tiles, threads, cache hints, segments, and strips of tiles were measured: NOTES.md.
VARIANTS: dict[str, list[Edit]] = {
    "as it is": [],
    "the last program rewrites a row": [
        ("grpo.py", "together = not overlaps(logits, dlogits)", "together = False")
    ],
    **{
        f"{number} registers": [
            ("grpo.py", "waiting = registers_to_wait(logits.device)", f"waiting = {number}")
        ]
        for number in (48, 64)
    },
    # The polls of a row's programs are atomic additions to one address, one after the other.
    "waits by plain loads": [
        (
            "rows.py",
            'seen = tl.atomic_add(place, 0, sem="acquire", scope="gpu")\n',
            "seen = tl.load(place, volatile=True)\n",
        ),
        (
            "rows.py",
            "        if (seen & ARRIVED) < parts:\n",
            '        seen = tl.atomic_add(place, 0, sem="acquire", scope="gpu")\n'
            "        if (seen & ARRIVED) < parts:\n",
        ),
    ],
    # A program has just read its last tile when it begins to rewrite its part.
    "rewrites backwards": [
        ("grpo.py", "((not TILES.SPLIT and TILES.K > 1) or cap is not None)", "(TILES.K > 1)")
    ],
}
ON_CHIP = "on chip"  # what GRPO_FAST_ON_CHIP=1 runs, where it can
LOGPROB: dict[str, list[Edit]] = {"as it is": []}


def load(name: str, edits: list[Edit]) -> Callable[[str], Any]:
    """Import kernels as a package of their own; return a function from a file's name to its module."""
    package = "variant_" + "".join(c if c.isalnum() else "_" for c in name)
    root = Path(tempfile.gettempdir()) / "grpo_fast_variants"  # the same path: Triton's cache holds
    target = root / package
    target.mkdir(parents=True, exist_ok=True)
    (target / "__init__.py").write_text("")
    sources = {path.name: path.read_text() for path in KERNELS.glob("*.py")}
    for file, old, new in edits:
        assert old in sources[file], f"{name}: {file} holds no {old!r}"
        sources[file] = sources[file].replace(old, new)
    for file, text in sources.items():
        (target / file).write_text(text.replace("grpo_fast.kernels", package))
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    return lambda stem: importlib.import_module(f"{package}.{stem}")


def make(shape: shapes.Shape, padded: int = 0, dtype: torch.dtype = torch.bfloat16) -> Batch:
    """Make a batch on the GPU, the rows of its logits `padded` apart."""
    batch = make_batch(shape, "full", torch.device("cuda"), dtype)
    if padded:
        wide = torch.nn.functional.pad(batch.logits, (0, padded - shape.V))
        batch.logits = wide[..., : shape.V]
    return batch


def launch(module: Any, batch: Batch, work: Tensor, out: Tensor) -> Tensor:
    """Call `grpo_fwd_bwd` of a variant's kernels on `work`; return the loss of each token."""
    shape, given = batch.shape, batch.arguments
    rest = dict.fromkeys(("importance", "score", "entropy_weight", "coefficient"))
    tokens = Tokens(
        weight=torch.full((shape.N,), 1 / shape.N, device=work.device),
        advantages=given["advantages"].repeat_interleave(shape.T),
        old_logp=given["old_logps"].flatten(),
        ref_logp=given["ref_logps"].flatten(),
        **rest,
    )
    rewards = Rewards(None, shape.G, None)
    results = module.grpo_fwd_bwd(
        *(work, targets_of(batch), tokens, rewards),
        return_entropy=False,
        objective=batch.objective,
        dlogits=out,
    )
    return results.loss


def targets_of(batch: Batch) -> Targets:
    return Targets(batch.ids.flatten(), mask=None, temperature=None, inv_temperature=1.0)


def timed(run: Callable[[], object], before: Callable[[], object], rounds: int = ROUNDS) -> dict:
    """Take median and quartiles of the seconds between events; `before` is not timed."""
    spans = []
    for _ in range(WARMUP + rounds):
        before()
        spans.append(machine.between_events(run))
    torch.cuda.synchronize()
    seconds = [a.elapsed_time(b) / 1e3 for a, b in spans[WARMUP:]]
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": middle, "iqr": high - low, "min": min(seconds), "rounds": rounds}


class Sheet(recorder.Sheet):
    """The rows of a suite, written after each."""

    def __init__(self, out: Path | None, suite: str) -> None:
        super().__init__(out, "rows", experiment=suite)

    def attempt(self, about: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
        """Add a row, or why there is none; end where an error took the GPU from this process."""
        try:
            self.append(about | run())
        except Exception as error:
            self.append(about | {"failed": recorder.reason_of(error)})
        if machine.lost():
            raise SystemExit(1)


def grpo_modules(options: Any) -> dict[str, Any]:
    """Import every variant that was asked for; say why one cannot be."""
    found = {}
    for name, edits in (VARIANTS | {ON_CHIP: []}).items():
        if not _wanted(name, options):
            continue
        try:
            module = load(name, edits)("on_chip" if name == ON_CHIP else "grpo")
            if name == ON_CHIP and (why := module.unavailable(torch.device("cuda"))):
                raise RuntimeError(why)
            found[name] = module
        except Exception as error:
            print(f"{name}: {recorder.reason_of(error)}")
    if options.cubins:
        from benchmarks.on_chip import driver

        kernels = driver.load(options.cubins)
        found |= {name: kernel for name, kernel in kernels.items() if _wanted(name, options)}
    return found


def _wanted(name: str, options: Any) -> bool:
    return not options.only or any(word in name for word in options.only)


def compared(module: Any, x: Batch, rounds: int = ROUNDS) -> dict[str, Any]:
    """Check a variant in place, then time it."""
    work = like(x.logits)
    loss = launch(module, x, work, work).sum()
    error = gate.check("grpo", x, loss, (work,))["gradient"]
    run = functools.partial(launch, module, x, work, work)
    found = timed(run, functools.partial(work.copy_, x.logits), rounds)
    moved = 2 * x.shape.N * x.shape.V * work.element_size()
    return {"error": error, **found, "bytes_per_second": moved / found["median"]}


def like(x: Tensor) -> Tensor:
    """Copy a tensor with its strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def suite_grpo(options: Any, x: Batch | None = None) -> None:
    """Time `grpo` in place at S0."""
    x = make(S0) if x is None else x
    sheet = Sheet(options.out, f"grpo {x.logits.dtype}")

    def row(module: Any) -> dict[str, Any]:
        if not options.once:
            return compared(module, x)
        work = like(x.logits)
        launch(module, x, work, work)
        torch.cuda.synchronize()
        return {}

    for name, module in grpo_modules(options).items():
        about: dict[str, Any] = {"variant": name, "shape": [*x.logits.shape]}
        about |= {"dtype": str(x.logits.dtype).removeprefix("torch.")}
        about |= module.about() if name.startswith("cubin") else {}
        sheet.attempt(about, functools.partial(row, module))


def suite_fp32(options: Any) -> None:
    """Time `grpo` in place on float32 logits, a quarter of S0."""
    suite_grpo(options, make(shapes.get("qwen2.5-7b-4k"), dtype=torch.float32))


def suite_vocabularies(options: Any) -> None:
    """Time `grpo` in place where rows start aligned, and where they do not."""
    sheet = Sheet(options.out, "vocabularies")
    options.only = options.only or ["as it is"]
    modules = grpo_modules(options)
    for V, padded in (
        *((32_000, 0), (50_257, 0), (128_256, 0), (151_665, 0), (262_144, 0)),
        *((50_257, 50_304), (128_264, 0), (128_264, 128_272), (151_665, 151_680)),
    ):
        shape = shapes.Shape(B=8, T=1024, V=V, G=4)
        x = make(shape, padded)
        for name, module in modules.items():
            about = {"V": V, "stride": padded or V, "rows": shape.N, "variant": name}
            sheet.attempt(about, functools.partial(compared, module, x, 10))
        del x


def suite_logprob(options: Any) -> None:
    """Time the forward pass of `logprob` at S0."""
    x = make(S0)
    sheet = Sheet(options.out, "logprob forward")
    truth, nbytes = reference.logprob(x.logits[0, :64].double(), x.ids[0, :64]), x.logits.nbytes

    def row(module: Any) -> dict[str, Any]:
        def run() -> Tensor:
            return module.logprob_fwd(x.logits, targets_of(x), with_entropy=False).logp

        assert (run()[:64].double() - truth).abs().max() < 1e-4
        if options.once:
            return {}
        found = timed(run, lambda: None)
        return {**found, "bytes_per_second": nbytes / found["median"]}

    for name, edits in LOGPROB.items():
        module = load(f"logprob {name}", edits)("logprob")
        sheet.attempt({"variant": name}, functools.partial(row, module))


def suite_head(options: Any) -> None:
    """Time `linear_grpo_loss` at S0 by chunk length."""
    B, T, V, D = S0.B, S0.T, S0.V, S0.D
    torch.manual_seed(0)
    hidden = torch.randn(B, T, D, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(V, D, device="cuda") * D**-0.5).bfloat16().requires_grad_()
    ids = torch.randint(V, (B, T), device="cuda")
    given: dict[str, Any] = {"advantages": torch.randn(B, device="cuda"), "compact": False}
    given |= {"old_logps": torch.full((B, T), -12.0, device="cuda"), "objective": Objective()}
    sheet = Sheet(options.out, "head by chunk length")

    def step(**how: Any) -> None:
        out = linear_grpo_loss(hidden, weight, ids, **how, **given)
        torch.autograd.grad(out.loss, (hidden, weight))

    lengths = (2048, 2944, 3328, 3584, 4096, 5504)
    for dtype, chunks in (("bf16", lengths), ("fp32", lengths[:-1])):
        for rows in chunks:
            run = functools.partial(step, chunk_size=rows, logits_dtype=dtype)
            row = functools.partial(timed, run, lambda: None, 3)
            sheet.attempt({"logits": dtype, "chunk": rows}, row)


SUITES = {
    "grpo": suite_grpo,
    "fp32": suite_fp32,
    "vocabularies": suite_vocabularies,
    "logprob": suite_logprob,
    "head": suite_head,
}


def main() -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("suite", choices=SUITES)
    add("--out", type=Path, help="JSON file, written anew after each row")
    add("--once", action="store_true", help="no times: for a profiler, or to fill Triton's cache")
    add("--only", action="append", help="variants whose name holds this")
    add("--cubins", type=Path, help="folder that `python -m benchmarks.on_chip` wrote")
    options = parser.parse_args()
    if options.cubins and options.suite != "grpo":
        parser.error(f"--cubins {options.cubins}: for the suite `grpo`, not `{options.suite}`")
    os.environ[machine.COMMAND_VARIABLE] = (
        f"python -m benchmarks.experiments.variants {options.suite}"
    )
    SUITES[options.suite](options)


if __name__ == "__main__":
    main()
