"""Write RESULTS.md and the README's numbers from results/*/*.json."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import FOLDER, ROOT, command_line
from benchmarks.codegen import saved as compiled
from benchmarks.measuring import traffic
from benchmarks.predictions import cost_model, memory_model
from benchmarks.report import experiments, learning, ppo, real_model, study, tables
from benchmarks.report.committed import (
    ResultError,
    Run,
    documents,
    load,
    newest,
    shared_prompts,
    steps,
)
from benchmarks.report.headline import headline

HEADER = """\
# Results

This page has every measurement with machine, commit and command. `python -m benchmarks.report`
writes it from `benchmarks/results/`. [README.md](README.md#what-is-measured) says what is measured,
and how. A number belongs to the commit that is named above its table, not to the newest one.

The title of a table is the name of a benchmark. `grpo` is `grpo_loss`, from logits; `linear_grpo` is
`linear_grpo_loss`, from hidden states; `trl_step` is a step of TRL's trainer. The line above a table
has the shape: B completions of T tokens, V vocabulary entries, groups of G, hidden states of D
entries.

The columns:

- **provider**: who computes it; [README.md](README.md#what-is-measured) explains the names.
- **time, ±**: the median of the rounds, and half of their interquartile range.
- **vs eager**: the time of eager PyTorch over this one; above 1 is faster.
- **GB/s, of copy** (or of read): the bytes that have to move, by the formula in the kernel's
  docstring, in this time; and their share of what a copy (or a read) reached in the same run.
- **TFLOP/s, of gemm**: the matrix multiplications that have to be done, whatever the provider does;
  and their share of what a large multiplication reached in the same run.
- **x bare GEMMs**: the time over that of the three multiplications with the head alone.
- **extra memory, of eager's**: the peak during the call beyond its inputs, the gradient included;
  over that of eager PyTorch, so below 1 is less.
- **error**: the largest error against float64, where the largest true entry is 1.
"""
NO_GPU = """\
No GPU has run these benchmarks yet: there are no GPU numbers, and none follow from the CPU's.
"""
CPU_NOTE = """\
CPU numbers: PyTorch operators, not the kernels. They say nothing about the speed on a GPU.
"""
WITHOUT_GPU = """\
## What is known without a GPU

Compiled with Triton {triton} for four targets, {count} launches each; the table shows the main ones,
[codegen.json](codegen/codegen.json) all of them. Over all launches: at most {stack} bytes of stack
and {registers} registers. Tests hold these numbers; `python -m benchmarks.codegen` prints them anew.
"""
TRAFFIC = """
### Bytes

N tokens, of which `live` count and `moving` have a gradient; V entries of w bytes; of launches on
logits the rows of logits alone. Counted in Triton's interpreter by the tests.
"""
PREDICTED = """
### Predicted times

`python -m benchmarks.predictions.cost_model`: bytes, instructions and ceilings, bfloat16. The range
is from "what is read again is found in the cache" to "nothing is". Nothing here is measured.
Ceilings: {origin}. From hidden states, times the three bare products on an H100: {products}. Before
gradients were written over the logits, a review expected 1.15 to 1.30 with float32 logits; measured
were 1.28, and 1.17 with bfloat16 ones (commit c671b21).
"""
PREDICTED_MEMORY = """
### Predicted memory of a 7B update

`python -m benchmarks.predictions.memory_model`, operators of torch {torch}: every storage counted on
tensors without contents, chunks as on a GPU of {processors} multiprocessors. Weights and gradients
are included, an optimiser's state is not. Providers differ in the head alone: where they agree, the
backward pass of a layer or the gradients at its end set the peak. Nothing here is measured.
"""
MAIN_LAUNCHES = (
    *("logprob_fwd", "logprob_fwd split", "logprob_bwd", "grpo", "grpo split"),
    *("grpo split entropy extras", "grpo 151665", "grpo overlap", "scale_rows"),
    *("reduction_weights", "policy_loss", "token_statistics", "group_advantage"),
)
MAIN_STEMS = ("grpo", "linear_grpo", "trl_step")  # the first tables of a device
PREDICTIONS_MET = """\
The model (`python -m benchmarks.predictions.cost_model`) next to what came out: with the data sheet's
ceilings, as it was written before any run, and with the rates measured in the run itself, which the
last column uses.
"""
LEARNED = ROOT / "docs" / "smollm2.md"
# Pages, with what writes their tables and their pictures.
PAGES: dict[Path, tuple[Callable[[Path], str], Callable[[Path], bytes]]] = {
    LEARNED: (learning.text, learning.picture),
    ROOT / "docs" / "study.md": (study.text, study.picture),
    ROOT / "docs" / "ppo.md": (ppo.text, ppo.picture),
}
MARKERS = ("<!-- measured: python -m benchmarks.report -->\n", "<!-- end of measured -->\n")


def render(results: Path) -> str:
    runs, whole = load(results), steps(results)
    known = [document["machine_info"] for document in documents(results)]
    sections = [HEADER]
    for kind, name in (("cuda", "GPU"), ("cpu", "CPU")):
        devices = sorted({info["device"] for info in known if info["device_type"] == kind})
        sections.append(f"## {name}\n")
        if kind == "cpu":
            sections.append(CPU_NOTE)
        if not devices:
            sections.append(NO_GPU if kind == "cuda" else "No CPU has been measured yet.\n")
        for device in devices:
            sections.append(f"### {device}\n")
            sections.extend(_device(results, device, runs, whole))
    return "\n".join([*sections, *_without_gpu()])


def _device(
    results: Path, device: str, runs: list[Run], whole: list[dict[str, Any]]
) -> Iterator[str]:
    """Say whether a device is right; then the main tables, the others, and what was tried."""

    def here(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [d for d in documents if d["machine_info"]["device"] == device]

    yield from map(experiments.right_line, here(newest(results, "smoke")))
    mine = [run for run in runs if run.device == device]
    main = [run for run in mine if run.stem in MAIN_STEMS]
    for run in main:
        yield from tables.run_section(run)
    for document in here(whole):
        yield from tables.step_section(document, memory_model.load()["step"])
    for document in here(shared_prompts(results)):
        yield from tables.shared_prompt_section(document)
    real = {kind: here(newest(results, kind)) for kind in real_model.KINDS}
    yield from real_model.section({kind: found[-1] for kind, found in real.items() if found})
    for run in mine:
        if run not in main:
            yield from tables.run_section(run)
    yield from experiments.section(
        here(newest(results, "experiment")), here(newest(results, "variants"))
    )
    if comparison := cost_model.comparison_table(mine):
        yield "#### Prediction and measurement\n"
        yield PREDICTIONS_MET
        yield comparison + "\n"


def _without_gpu() -> Iterator[str]:
    code = compiled.load()
    rows = code["rows"]
    targets = {row["target"] for row in rows}
    yield WITHOUT_GPU.format(
        triton=code["triton"],
        count=len(rows) // len(targets),
        stack=max(row["stack"] for row in rows),
        registers=max(row["registers"] for row in rows),
    )
    yield compiled.table(row for row in rows if row["case"] in MAIN_LAUNCHES)
    yield TRAFFIC
    yield traffic.table()
    products = ", ".join(cost_model.of_products("H100"))
    yield PREDICTED.format(origin=cost_model.ceilings("H200").origin, products=products)
    yield cost_model.table() + "\n"
    memory = memory_model.load()
    yield PREDICTED_MEMORY.format(torch=memory["torch"], processors=memory_model.PROCESSORS)
    yield from tables.step_tables(memory["step"], [])


def with_headline(readme: str, text: str) -> str:
    """Replace what stands between the markers of the README, or of another page.

    Raises:
        ResultError: it has no markers.
    """
    first, last = MARKERS
    if readme.count(first) != 1 or readme.count(last) != 1:
        title = readme.partition("\n")[0]
        raise ResultError(f"{title}: want {first.strip()} and {last.strip()} once")
    between = re.escape(first) + r".*?" + re.escape(last)
    return re.sub(between, lambda _: f"{first}\n{text}\n{last}", readme, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER / "results")
    parser.add_argument("--output", type=Path, default=FOLDER / "RESULTS.md")
    parser.add_argument("--readme", type=Path, help="default: the repository's, with --output's")
    options: Any = parser.parse_args(arguments)
    readme = options.readme
    if readme is None and options.output == FOLDER / "RESULTS.md":
        readme = ROOT / "README.md"
    try:
        text = render(options.results)
        if readme:
            readme.write_text(with_headline(readme.read_text(), headline(options.results)))
        if readme == ROOT / "README.md":
            for page, (text_of, picture_of) in PAGES.items():
                page.write_text(with_headline(page.read_text(), text_of(options.results)))
                if picture := picture_of(options.results):
                    page.with_suffix(".svg").write_bytes(picture)
    except ResultError as error:
        print(error, file=sys.stderr)
        return 1
    options.output.write_text(text)
    return 0
