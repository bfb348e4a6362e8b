"""Write the README's part about measurements: a GPU's sentences and tables, one table for all CPUs.

Nothing is selected by its outcome: a table has every library, or every operation, that was
measured.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import experiments, tables
from benchmarks.report.committed import OWN, Run, documents, load, newest, steps
from benchmarks.report.markdown import memory_text, table, time_text, wrapped

WITHOUT = """\
**No GPU has run the benchmarks yet.** What is known of the GPU path comes from compiling every kernel for
sm_80, sm_90, sm_100 and gfx942 and from counting the bytes it moves; times, and the memory of a 7B update,
are predicted in [RESULTS.md](benchmarks/RESULTS.md#what-is-known-without-a-gpu)."""
CPUS = """\
**On CPUs** PyTorch's operators run, not the kernels, and these times say little about a GPU. One row for
each operation, in the first shape that was measured. {total} cases were measured beside eager PyTorch, and
grpo_fast is slower in {slower} of them; all are in
[RESULTS.md](benchmarks/RESULTS.md#cpu)."""
OTHERS = """\
The other operations on the same device, with their default options. Below 1.00x grpo_fast is slower."""
CASES = {
    "logprob": "log-probs from logits",
    "linear_logprob": "log-probs from hidden states",
    "linear_cross_entropy": "cross-entropy from hidden states",
    "policy_loss": "loss from log-probs",
    "sequence_loss": "GSPO from log-probs",
    "group_advantage": "advantages",
}
S0 = "qwen2.5-7b-16k"
PYTORCH = ("eager", "compile", "torch")  # what the names of PyTorch's own providers begin with
INPLACE = f"{OWN}-inplace"
STEMS = {
    "grpo": "grpo, loss and gradients",
    "linear_grpo": "linear_grpo, loss and gradients",
    "trl_step": "A step of TRL's GRPOTrainer after generation",
}
# The tables of a GPU: stem, variant, and what is to be said of it.
TABLES = (
    ("grpo", "full", ""),
    ("linear_grpo", "full", ""),
    ("linear_grpo", "realistic", ", half of them padding, 40 % of the groups without a gradient"),
)


def headline(results: Path) -> str:
    runs = load(results)
    gpus = [d for d in documents(results) if d["machine_info"]["device_type"] == "cuda"]
    parts = [*_gpu(results, runs, gpus)] if gpus else [wrapped(WITHOUT)]
    cpus = [run for run in runs if not run.cuda]
    rows = _rows(cpus)
    if rows:
        both = [pair for run in cpus for pair in map(_pair, run.cases()) if all(pair)]
        slower = sum(own["median"] > eager["median"] for own, eager in both)
        parts.append(wrapped(CPUS.format(slower=slower, total=len(both))))
        parts.append(_comparison(rows, machine=True))
    return "\n\n".join(parts) + "\n"


def _gpu(results: Path, runs: list[Run], documents: list[dict[str, Any]]) -> Iterator[str]:
    """Write sentences and tables of the GPU that was measured last."""
    measured = [run for run in runs if run.cuda and run.stem in STEMS]
    last = max(measured, key=lambda run: run.date).device if measured else None
    device = last or documents[-1]["machine_info"]["device"]
    chosen = {run.stem: run for run in measured if run.device == device}
    smoke = [d for d in newest(results, "smoke") if d["machine_info"]["device"] == device]
    yield wrapped(" ".join(_sentences(device, chosen, smoke)))
    for stem, variant, more in TABLES:
        if _entries(chosen.get(stem), variant):
            yield _table(chosen[stem], variant, more)
    shown = {stem for stem, *_ in TABLES}
    rest = _rows([x for x in runs if x.cuda and x.device == device and x.stem not in shown])
    if rest:
        yield from (wrapped(OTHERS), _comparison(rest))
    yield from (_step(d) for d in steps(results) if d["machine_info"]["device"] == device)
    others = sorted({run.device for run in measured} - {device})
    if others:
        yield f"Also measured, in [RESULTS.md](benchmarks/RESULTS.md#gpu): {', '.join(others)}."


def _entries(run: Run | None, variant: str) -> list[dict[str, Any]]:
    """Choose the loss and its gradient at S0, the fastest first."""
    found = [
        entry
        for entry in (run.entries if run else ())
        if (entry["case"], entry["shape"], entry["variant"]) == ("forward_backward", S0, variant)
    ]
    return sorted(found, key=lambda entry: entry["median"])


def _sentences(device: str, runs: dict[str, Run], smoke: list[dict[str, Any]]) -> Iterator[str]:
    """Write sentences about the loss, the head and the checks, where measured."""
    first = ""
    for stem, sentence in {"grpo": _of_logits, "linear_grpo": _of_hidden}.items():
        text = sentence(runs[stem]) if stem in runs else ""
        if not text:
            continue
        origin = f"measured {runs[stem].date[:10]} at commit {runs[stem].info['commit']}"
        if not first:
            first = origin
            yield f"On one {device}, {origin}: {text}."
        else:
            yield f"{_capital(text)}{'' if origin == first else f' ({origin})'}."
    for document in smoke[-1:]:
        right, total, _ = experiments.counts(document)
        many = f"All {total}" if experiments.all_right(document) else f"{right} of {total}"
        where = "it" if first else device
        yield f"{many} checks of the kernels against float64 that ran on {where} are right."
    if not first and not smoke:
        yield f"Experiments have run on one {device}, and no benchmark."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _own(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Choose this project's entry with its default options, else the fastest of its others."""
    own = [e for e in entries if e["provider"].startswith(OWN)]
    return min(own, key=lambda e: e["provider"] != OWN, default=None)


def _others(entries: list[dict[str, Any]]) -> str:
    """Name the times of eager PyTorch and of the fastest other library."""
    eager = tables.eager_of(entries)
    other = next((e for e in entries if not e["provider"].startswith((OWN, *PYTORCH))), None)
    said = []
    if eager:
        said.append(f"eager PyTorch takes {time_text(eager['median'])}")
    if other:
        what = f"the fastest other library ({other['provider']})"
        said.append(f"{what}{'' if eager else ' takes'} {time_text(other['median'])}")
    return "; " + ", ".join(said) if said else ""


def _of_logits(run: Run) -> str:
    entries = _entries(run, "full")
    own = _own(entries)
    if own is None:
        return ""
    place = " in place" if own["provider"] == INPLACE else ""
    return (
        f"loss and gradients from {_size(own)} {own['dtype']} logits take "
        f"{time_text(own['median'])}{place}, {tables.roof_share(own)} of the rate of a plain "
        f"{own['roof']}{_others(entries)}"
    )


def _of_hidden(run: Run) -> str:
    said = []
    for variant, what in (
        ("full", "the same loss from hidden states, the head's products included, takes"),
        ("realistic", "on a realistic batch it takes"),
    ):
        entries = _entries(run, variant)
        own = _own(entries)
        if own:
            bare = own.get("bare_gemms_seconds") if variant == "full" else None
            times = f"{own['median'] / bare:.2f}" if bare else ""
            more = f", {times} times its three matrix multiplications alone" if bare else ""
            said.append(f"{what} {time_text(own['median'])}{more}{_others(entries)}")
    return ". ".join(_capital(text) if i else text for i, text in enumerate(said))


def _table(run: Run, variant: str, more: str) -> str:
    entries = _entries(run, variant)
    eager = tables.eager_of(entries)
    sizes = entries[0]["sizes"]
    title = (
        f"{STEMS[run.stem]}, {sizes['B'] * sizes['T']:,} tokens x {sizes['V']:,} entries, "
        f"{entries[0]['dtype']}{more}: {run.device}, commit {run.info['commit']}, {run.date[:10]}"
    )
    busy = any("event_seconds" in e for e in entries)
    rows = [
        [
            e["provider"],
            time_text(e["median"]),
            *[time_text(e["event_seconds"]) if "event_seconds" in e else ""] * busy,
            f"{eager['median'] / e['median']:.2f}x" if eager else "",
            memory_text(e["peak_extra_bytes"]),
        ]
        for e in entries
    ]
    head = ["", "time", *["on the device"] * busy, "faster than eager", "extra memory"]
    return f"{wrapped(title)}\n\n{table(head, rows)}"


def _pair(entries: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Choose the entries of this project's defaults and of eager PyTorch; None where absent."""
    return next((e for e in entries if e["provider"] == OWN), None), tables.eager_of(entries)


def _rows(runs: list[Run]) -> list[tuple[Run, list[dict[str, Any]]]]:
    """Choose the first case that this project took part in, of each operation and direction."""
    found: dict[tuple[str, str, str], tuple[Run, list[dict[str, Any]]]] = {}
    for run in runs:
        for entries in run.cases():
            if _pair(entries)[0] is not None:
                found.setdefault((run.device, run.stem, entries[0]["case"]), (run, entries))
    return list(found.values())


def _comparison(rows: list[tuple[Run, list[dict[str, Any]]]], machine: bool = False) -> str:
    """Write a table of operations: this project beside eager PyTorch and the fastest other."""
    lines = []
    for run, entries in rows:
        own, eager = _pair(entries)
        rest = [e for e in entries if not e["provider"].startswith((OWN, "eager"))]
        other = min(rest, key=lambda e: e["median"], default=None)
        cells = [_operation(run, own), _size(own), time_text(own["median"]) + tables.on_device(own)]
        cells += [*_against(own, eager), *_against(own, other, named=True)]
        lines.append(cells + [f"{run.device}, {run.info['commit']}"] * machine)
    head = ["", "on", "grpo_fast", "eager", "", "fastest other", ""]
    return table(head + ["machine, commit"] * machine, lines, left=(0, 1, 7))


def _against(own: dict[str, Any], other: dict[str, Any] | None, named: bool = False) -> list[str]:
    """Write another's time, and how many times faster this project is."""
    if other is None:
        return ["", ""]
    busy = tables.on_device(other)
    who = f" ({other['provider']}){busy}" if named else busy
    return [time_text(other["median"]) + who, f"{other['median'] / own['median']:.2f}x"]


def _operation(run: Run, entry: dict[str, Any]) -> str:
    if run.stem in STEMS:
        return STEMS[run.stem]
    kinds = {"forward": ", forward", "forward_backward": ", and gradients"}
    return CASES[run.stem] + kinds[entry["case"]] * (run.stem != "group_advantage")


def _size(entry: dict[str, Any]) -> str:
    sizes = entry["sizes"]
    tokens = f"{sizes['B'] * sizes['T']:,}"
    return f"{tokens} x {sizes['V']:,}" if sizes["V"] else f"{tokens} tokens"


def _step(document: dict[str, Any]) -> str:
    """Write the updates of one batch by a whole model, with each library's head."""
    rows = [row for row in document["step"] if row["kind"] == "batch"]
    rows = [row for row in rows if row["mode"] == rows[0]["mode"] and row.get("seconds")]
    if not rows:
        return ""
    first, info = rows[0], document["machine_info"]
    title = (
        f"A GRPO update of a whole model ({first['model']}, {first['dtype']}, {first['mode']}) on "
        f"{first['B']} x ({first['P']} + {first['T']}) tokens: {info['device']}, "
        f"commit {info['commit']}, {document['datetime'][:10]}"
    )
    texts = [
        [row["provider"], time_text(row["seconds"]), memory_text(row["peak_bytes"])] for row in rows
    ]
    return f"{wrapped(title)}\n\n{table(['head', 'time', 'peak memory'], texts)}"
