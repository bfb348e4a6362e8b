"""Write results as Markdown tables."""

from collections.abc import Iterator
from typing import Any

from benchmarks.report.committed import Run
from benchmarks.report.markdown import SMALLEST_MEMORY, memory_text, share_text, table, time_text


def run_section(run: Run) -> Iterator[str]:
    info = run.info
    versions = [f"{name} {info[name]}" for name in ("driver", "torch", "triton", "python")]
    roofs = [f"{roof} {speed / 1e9:,.1f} GB/s" for roof, speed in info["bandwidth"].items()]
    rates = [
        f"{dtype} GEMM {rate / 1e12:,.2f} TFLOP/s" for dtype, rate in info.get("gemm", {}).items()
    ]
    yield f"#### {run.stem}{'' if run.cuda else ' (CPU)'}\n"
    yield (
        f"Commit {info['commit']}, {run.date[:10]}, `{info['command']}`. "
        f"{', '.join(v for v in versions if not v.endswith(' None'))}, "
        f"{info['threads']} CPU threads. Measured: {', '.join(roofs + rates)}.\n"
    )
    for entries in run.cases():
        yield case_table(entries)
    yield from absent(run.absent)


def eager_of(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((e for e in entries if e["provider"] == "eager"), None)


def case_table(entries: list[dict[str, Any]]) -> str:
    """Write a table of the providers of one case."""
    first = entries[0]
    sizes = ", ".join(f"{name} {size:,}" for name, size in first["sizes"].items() if size)
    heads, rated = first["roof"] == "gemm", first["roof"] is not None
    eager = eager_of(entries)
    head = ["provider", "time", "±", "vs eager"]
    head += ["TFLOP/s" if heads else "GB/s", f"of {first['roof']}"] if rated else []
    head += [*["x bare GEMMs"] * heads, "extra memory", "of eager's", "error"]
    rows = [
        [
            e["provider"],
            time_text(e["median"]) + on_device(e),
            f"{50 * e['iqr'] / e['median']:.0f} %",
            f"{eager['median'] / e['median']:.2f}x" if eager else "",
            *(_speed(e) if rated else ()),
            *([f"{e['median'] / e['bare_gemms_seconds']:.2f}"] if heads else []),
            memory_text(e["peak_extra_bytes"]),
            memory_ratio(e, eager),
            ", ".join(f"{name} {x:.0e}" for name, x in e.get("errors", {}).items()),
        ]
        for e in entries
    ]
    title = f"{first['case'].replace('_', ' + ')}, `{first['shape']}`, {first['variant']}"
    return f"{title}: {sizes}, {first['dtype']}{_about(first)}\n\n{table(head, rows)}\n"


def _about(entry: dict[str, Any]) -> str:
    if "inputs" not in entry:
        return ""
    share = f"{100 * entry['inputs']['blocks_kept']:.0f} %"
    return f"; in {share} of the 128 x 128 blocks an entry of the softmax is above 2^-12"


def _speed(entry: dict[str, Any]) -> tuple[str, str]:
    heads = entry["roof"] == "gemm"
    rate = entry["flops" if heads else "bytes"] / entry["median"]
    return f"{rate / 1e12:,.2f}" if heads else f"{rate / 1e9:,.1f}", roof_share(entry)


def roof_share(entry: dict[str, Any]) -> str:
    """Return an entry's rate as a share of the roof it is held against."""
    top, work = entry["roofs"].get(entry["roof"]), "bytes"
    if entry["roof"] == "gemm":
        top, work = top.get(entry["dtype"]), "flops"
    return share_text(entry[work] / entry["median"], top)


def on_device(entry: dict[str, Any]) -> str:
    """Say how long a call takes on the device alone, where that was measured."""
    seconds = entry.get("event_seconds")
    return "" if seconds is None else f" ({time_text(seconds)} on the device)"


def memory_ratio(entry: dict[str, Any], eager: dict[str, Any] | None) -> str:
    own = entry["peak_extra_bytes"]
    base = eager and eager["peak_extra_bytes"]
    if not own or not base or base < 16 * SMALLEST_MEMORY:
        return ""
    return f"{own / base:.3f}"


def listed(title: str, lines: list[str]) -> Iterator[str]:
    if lines:
        yield "\n".join([f"{title}:\n", *(f"- {line}" for line in lines), ""])


def absent(info: dict[str, Any]) -> Iterator[str]:
    return listed("Not measured", [f"{who}: {why}" for who, why in sorted(info.items())])


def step_section(document: dict[str, Any], predicted: list[dict[str, Any]]) -> Iterator[str]:
    """Write the 7B step; `predicted` are rows of `memory_model`, for their column."""
    info, rows = document["machine_info"], document["step"]
    yield f"#### A GRPO update of a whole model ({rows[0]['model']}, {rows[0]['dtype']})\n"
    yield (
        f"Commit {info['commit']}, {document['datetime'][:10]}, `{info['command']}`. What is part "
        "of it: [step_7b](step_7b/step.py). The peak holds weights, gradients and activations; "
        "predicted is what `python -m benchmarks.predictions.memory_model` had said.\n"
    )
    yield from step_tables(rows, predicted)
    yield from absent(info["absent"])
    yield from listed("Not reached in time", document.get("not_reached", []))


def step_tables(rows: list[dict[str, Any]], predicted: list[dict[str, Any]]) -> Iterator[str]:
    """Write updates that fit or not, updates of a batch, and longest completions."""
    for kind in ("headline", "batch", "longest"):
        chosen = [_columns(row, predicted) for row in rows if row["kind"] == kind]
        if chosen:
            yield table(list(chosen[0]), [row.values() for row in chosen], left=()) + "\n"


def _columns(r: dict[str, Any], predicted: list[dict[str, Any]]) -> dict[str, Any]:
    cells: dict[str, Any] = {"trained": r["mode"]}
    if r["kind"] != "batch":
        cells["memory"] = f"{r['cap_bytes'] / 1e9:.0f} GB"
    cells["head"] = r["provider"]
    if r["kind"] == "longest":
        cells["longest completion that fits"] = r["fits"] or "none"
        cells["shortest that does not"] = r["fails"] or "not reached in time"
        if predicted:
            twin = _twin(r, predicted, ("mode", "provider", "B", "P", "cap_bytes"))
            cells["predicted longest"] = (twin["fits"] or "none") if twin else ""
        return cells
    cells["sequences x (prompt + completion)"] = f"{r['B']} x ({r['P']} + {r['T']})"
    if "seconds" in r:
        cells["time"] = time_text(r["seconds"])
        cells["tokens / s"] = f"{r['tokens_per_second']:,.0f}"
    peak = r["peak_bytes"]
    fits = peak is not None or r["kind"] == "batch"
    cells["peak memory"] = memory_text(peak) if fits else "does not fit"
    if "seconds" in r:
        twin = _twin(r, predicted, ("mode", "provider", "B", "P", "T"))
        cells["predicted"] = memory_text(twin["peak_bytes"]) if twin else ""
    return cells


def shared_prompt_section(document: dict[str, Any]) -> Iterator[str]:
    """Write updates with shared prompts beside the update with a row for each completion."""
    rows, runs = document["shared_prompt"], document["runs"]
    yield f"#### An update with shared prompts ({rows[0]['model']}, {rows[0]['dtype']})\n"
    said = (
        f"Commit {run['machine_info']['commit']}, {run['datetime'][:10]}, "
        f"`{run['machine_info']['command']}`."
        for run in runs
    )
    yield (
        f"{' '.join(said)} Each row is of the last commit that measured it, beside the unshared "
        "update of that commit. One group: a prompt of P tokens, and G completions of R tokens. "
        "Forward, loss and gradients; what each provider is: [shared_prompt](shared_prompt/step.py). "
        "`operations` is how many times the unshared update has the operations of the shared one, its "
        "head included. The memory is the peak beyond weights and their gradients. Where the unshared "
        "batch was forwarded in parts, their number is given, and its memory is that of one of them.\n"
    )
    head = ["P", "G", "R", "unshared", "memory", "provider", "time", "faster"]
    head += ["operations", "memory", "less", "commit"]
    mine = sorted(rows, key=lambda row: [row[key] for key in "PGR"])
    lines = [_shared_row(row, rows) for row in mine if row["provider"] != "unshared"]
    yield f"{table(head, lines)}\n"
    yield from absent(
        {who: why for run in runs for who, why in run["machine_info"]["absent"].items()}
    )


def _shared_row(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Write one provider beside the unshared update of its case."""
    case = ("P", "G", "R", "commit")
    same = (x for x in rows if all(x[k] == row[k] for k in case) and x["provider"] == "unshared")
    base = next(same, None)
    name = row["provider"] + (f" ({row['route']})" if row["route"] else "")
    sizes = [f"{row[k]:,}" for k in "PGR"]
    own = [time_text(row["median"]), memory_text(row["peak_extra_bytes"])]
    if base is None:
        return [*sizes, "", "", name, own[0], "", "", own[1], "", row["commit"]]
    parts = -(-row["G"] // base["rows"])
    peaks = base["peak_extra_bytes"], row["peak_extra_bytes"]
    less = f"{peaks[0] / peaks[1]:.2f}x" if all(peaks) else ""
    return [
        *sizes,
        time_text(base["median"]) + (f" in {parts} parts" if parts > 1 else ""),
        memory_text(peaks[0]),
        name,
        own[0],
        f"{base['median'] / row['median']:.2f}x",
        f"{base['flops'] / row['flops']:.2f}x",
        own[1],
        less,
        row["commit"],
    ]


def _twin(
    row: dict[str, Any], rows: list[dict[str, Any]], keys: tuple[str, ...]
) -> dict[str, Any] | None:
    """Find the row of the same kind and case."""
    return next((x for x in rows if all(x.get(k) == row[k] for k in ("kind", *keys))), None)
