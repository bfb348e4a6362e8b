"""What the README says of the measurements: of a GPU sentences and a few tables, of each CPU a line."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import experiments, tables
from benchmarks.committed import OWN, Run, documents, load, newest

WITHOUT = """\
**No GPU has run the benchmarks yet.** What is known of the GPU path comes from compiling every kernel for
sm_80, sm_90, sm_100 and gfx942 and from counting the bytes it moves; times, and the memory of a 7B update,
are predicted in [RESULTS.md](benchmarks/RESULTS.md#what-is-known-without-a-gpu)."""
CPUS = """\
On CPUs PyTorch's operators run, not the kernels. These times say little about a GPU; all tables are in
[RESULTS.md](benchmarks/RESULTS.md#cpu)."""
WIDTH = 100
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
    runs = [run for run in load(results) if run.stem in STEMS]
    gpus = [d for d in documents(results) if d["machine_info"]["device_type"] == "cuda"]
    parts = []
    if gpus:
        measured = [run for run in runs if run.cuda]
        last = max(measured, key=lambda run: run.date).device if measured else None
        device = last or gpus[-1]["machine_info"]["device"]
        chosen = {run.stem: run for run in measured if run.device == device}
        smoke = [d for d in newest(results, "smoke") if d["machine_info"]["device"] == device]
        parts.append(_wrapped(" ".join(_sentences(device, chosen, smoke))))
        parts += [_table(chosen[stem], variant, more) for stem, variant, more in _tables(chosen)]
        others = sorted({run.device for run in measured} - {device})
        if others:
            parts.append(
                f"Also measured, in [RESULTS.md](benchmarks/RESULTS.md#gpu): {', '.join(others)}."
            )
    else:
        parts.append(_wrapped(WITHOUT))
    lines = [_line(run) for run in runs if not run.cuda]
    if lines:
        parts.append("\n".join([_wrapped(CPUS), "", *lines]))
    return "\n\n".join(parts) + "\n"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()),
        WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _entries(run: Run | None, variant: str) -> list[dict[str, Any]]:
    """The loss and its gradient at S0, the fastest first."""
    found = [
        entry
        for entry in (run.entries if run else ())
        if (entry["case"], entry["shape"], entry["variant"]) == ("forward_backward", S0, variant)
    ]
    return sorted(found, key=lambda entry: entry["median"])


def _tables(runs: dict[str, Run]) -> list[tuple[str, str, str]]:
    return [table for table in TABLES if _entries(runs.get(table[0]), table[1])]


def _sentences(device: str, runs: dict[str, Run], smoke: list[dict[str, Any]]) -> Iterator[str]:
    """Sentences about the loss, the head, a step of TRL and the checks, as far as there are results."""
    first = ""
    for stem, sentence in (
        ("grpo", _of_logits),
        ("linear_grpo", _of_hidden),
        ("trl_step", _of_trl),
    ):
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
    return next((e for e in entries if e["provider"].startswith(OWN)), None)


def _others(entries: list[dict[str, Any]]) -> str:
    """The times of eager PyTorch and of the fastest other library."""
    eager = tables.eager_of(entries)
    other = next((e for e in entries if not e["provider"].startswith((OWN, *PYTORCH))), None)
    said = []
    if eager:
        said.append(f"eager PyTorch takes {tables.time_text(eager['median'])}")
    if other:
        what = f"the fastest other library ({other['provider']})"
        said.append(f"{what}{'' if eager else ' takes'} {tables.time_text(other['median'])}")
    return "; " + ", ".join(said) if said else ""


def _of_logits(run: Run) -> str:
    entries = _entries(run, "full")
    own = _own(entries)
    if own is None:
        return ""
    sizes, time = own["sizes"], tables.time_text(own["median"])
    place = " in place" if own["provider"] == INPLACE else ""
    return (
        f"loss and gradients from {sizes['B'] * sizes['T']:,} x {sizes['V']:,} {own['dtype']} logits take "
        f"{time}{place}, {tables.roof_share(own)} of the rate of a plain {own['roof']}{_others(entries)}"
    )


def _of_hidden(run: Run) -> str:
    said = []
    for variant, what in (
        ("full", "the same loss from hidden states, the head's products included, takes"),
        ("realistic", "on a realistic batch"),
    ):
        entries = _entries(run, variant)
        own = _own(entries)
        if own is None:
            continue
        more = ""
        if variant == "full" and own.get("bare_gemms_seconds"):
            times = own["median"] / own["bare_gemms_seconds"]
            more = f", {times:.2f} times its three matrix multiplications alone"
        takes = "" if variant == "full" else " it takes"
        said.append(f"{what}{takes} {tables.time_text(own['median'])}{more}{_others(entries)}")
    return ". ".join(_capital(text) if i else text for i, text in enumerate(said))


def _of_trl(run: Run) -> str:
    """A sentence about the largest model that was stepped with both trainers."""
    for entries in reversed(list(run.cases())):
        own, trl = _own(entries), next((e for e in entries if e["provider"] == "trl"), None)
        if own and trl:
            return (
                f"a step of TRL's trainer after generation ({own['shape']}) takes "
                f"{tables.time_text(own['median'])} instead of {tables.time_text(trl['median'])}"
            )
    return ""


def _what(entry: dict[str, Any]) -> str:
    sizes = entry["sizes"]
    return f"{sizes['B'] * sizes['T']:,} tokens x {sizes['V']:,} entries, {entry['dtype']}"


def _table(run: Run, variant: str, more: str) -> str:
    entries = _entries(run, variant)
    eager = tables.eager_of(entries)
    lines = [
        f"{STEMS[run.stem]}, {_what(entries[0])}{more}: {run.device}, commit {run.info['commit']}, "
        f"{run.date[:10]}\n",
        "| | time | faster than eager | extra memory |",
        "|---|--:|--:|--:|",
    ]
    for e in entries:
        faster = f"{eager['median'] / e['median']:.2f}x" if eager else ""
        time, memory = tables.time_text(e["median"]), tables.memory_text(e["peak_extra_bytes"])
        lines.append(f"| {e['provider']} | {time} | {faster} | {memory} |")
    return "\n".join(lines)


def _line(run: Run) -> str:
    """The first case of a stem on a CPU."""
    entries = sorted(next(iter(run.cases())), key=lambda entry: entry["median"])
    eager, best = tables.eager_of(entries), _own(entries) or entries[0]
    faster = f", {eager['median'] / best['median']:.2f} times faster than eager" if eager else ""
    return _wrapped(
        f"- {STEMS[run.stem]}, {_what(best)}, {run.device}: {tables.time_text(best['median'])} "
        f"({best['provider']}){faster}; commit {run.info['commit']}, {run.date[:10]}",
        indent="  ",
    )
