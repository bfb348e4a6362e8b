"""Results as Markdown."""

from collections.abc import Iterator
from typing import Any

from benchmarks.committed import Run

# Less than this is below what the measurement can tell apart (pages, allocator blocks).
SMALLEST_MEMORY = 1 << 20
ROOFS = {"copy": "copied bytes", "read": "read bytes", "gemm": "matrix multiplication"}


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
    absent = [f"- {who}: {why}" for who, why in sorted(run.absent.items())]
    if absent:
        yield "\n".join(["Not measured:\n", *absent, ""])


def eager_of(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((e for e in entries if e["provider"] == "eager"), None)


def case_table(entries: list[dict[str, Any]]) -> str:
    first = entries[0]
    sizes = ", ".join(f"{name} {size:,}" for name, size in first["sizes"].items() if size)
    heads, rated = first["roof"] == "gemm", first["roof"] is not None
    eager = eager_of(entries)
    lines = [f"{title(first)}: {sizes}, {first['dtype']}{_about(first)}\n"]
    speed = f"{'TFLOP/s' if heads else 'GB/s'} | of {first['roof']} | " if rated else ""
    columns = f"| provider | time | ± | vs eager | {speed}{'x bare GEMMs | ' if heads else ''}"
    columns += "extra memory | vs eager | error |"
    lines += [columns, "|---|" + "---:|" * (columns.count("|") - 2)]
    for e in entries:
        cells = [
            e["provider"],
            time_text(e["median"]) + _device_time(e),
            f"{50 * e['iqr'] / e['median']:.0f} %",
            f"{eager['median'] / e['median']:.2f}x" if eager else "",
            *(_speed(e) if rated else ()),
            *([f"{e['median'] / e['bare_gemms_seconds']:.2f}"] if heads else []),
            memory_text(e["peak_extra_bytes"]),
            memory_ratio(e, eager),
            _errors(e),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def title(entry: dict[str, Any]) -> str:
    return f"{entry['case'].replace('_', ' + ')}, `{entry['shape']}`, {entry['variant']}"


def _about(entry: dict[str, Any]) -> str:
    if "inputs" not in entry:
        return ""
    share = entry["inputs"]["blocks_kept"]
    return (
        f"; in {100 * share:.0f} % of the 128 x 128 blocks an entry of the softmax is above 2^-12"
    )


def _speed(entry: dict[str, Any]) -> tuple[str, str]:
    roof = entry["roof"]
    if roof == "gemm":
        rate = entry["flops"] / entry["median"]
        top = entry["roofs"]["gemm"].get(entry["dtype"])
        return f"{rate / 1e12:,.2f}", f"{100 * rate / top:.0f} %" if top else ""
    rate = entry["bytes"] / entry["median"]
    return f"{rate / 1e9:,.1f}", f"{100 * rate / entry['roofs'][roof]:.0f} %"


def _errors(entry: dict[str, Any]) -> str:
    return ", ".join(f"{name} {x:.0e}" for name, x in entry.get("errors", {}).items())


def time_text(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.1f} µs"


def _device_time(entry: dict[str, Any]) -> str:
    seconds = entry.get("device_seconds")
    return "" if seconds is None else f" ({time_text(seconds)} without launch)"


def memory_text(extra: int | None) -> str:
    if extra is None:
        return ""
    return "< 1 MiB" if extra < SMALLEST_MEMORY else f"{extra / 2**20:,.0f} MiB"


def memory_ratio(entry: dict[str, Any], eager: dict[str, Any] | None) -> str:
    own = entry["peak_extra_bytes"]
    base = eager and eager["peak_extra_bytes"]
    if not own or not base or base < 16 * SMALLEST_MEMORY:
        return ""
    return f"{own / base:.3f}"


def step_section(document: dict[str, Any]) -> Iterator[str]:
    info, rows = document["machine_info"], document["step"]
    yield f"#### A GRPO update of a whole model ({rows[0]['model']}, {rows[0]['dtype']})\n"
    yield (
        f"Commit {info['commit']}, {document['datetime'][:10]}, `{info['command']}`. What is part of it: "
        "[step_7b.py](step_7b.py). The peak holds weights, gradients and activations.\n"
    )
    same = [row for row in rows if row["kind"] == "batch"]
    if same:
        yield "\n".join(
            [
                "| trained | head | sequences x (prompt + completion) | time | tokens / s | peak memory |",
                "|---|---|--:|--:|--:|--:|",
                *(
                    f"| {r['mode']} | {r['provider']} | {r['B']} x ({r['P']} + {r['T']}) "
                    f"| {time_text(r['seconds'])} | {r['tokens_per_second']:,.0f} "
                    f"| {memory_text(r['peak_bytes'])} |"
                    for r in same
                ),
                "",
            ]
        )
    lengths = [row for row in rows if row["kind"] == "longest"]
    if lengths:
        yield "\n".join(
            [
                "| trained | memory | head | longest completion that ran | shortest that did not |",
                "|---|--:|---|--:|--:|",
                *(
                    f"| {r['mode']} | {r['cap_bytes'] / 1e9:.0f} GB | {r['provider']} "
                    f"| {r['fits'] or 'none'} | {r['fails'] or 'not reached in time'} |"
                    for r in lengths
                ),
                "",
            ]
        )
    absent = [f"- {who}: {why}" for who, why in sorted(info["absent"].items())]
    if absent:
        yield "\n".join(["Not measured:\n", *absent, ""])
