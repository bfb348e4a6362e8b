"""Write the smoke checks and the experiments as Markdown."""

from collections.abc import Iterator
from typing import Any

from benchmarks.report.markdown import share_text, table, time_text

NAMED = 5  # failed tests whose names are shown
WIDEST = 120  # characters of an error's message
# These keys of a row of `variants` say how its time was measured. Other floats are times, and what
# is left names the row.
STATISTICS = ("median", "iqr", "min", "rounds", "error", "bytes_per_second", "failed")
COLUMNS = {"gemms": "multiplications alone", "gemm_after": "a multiplication after it"}
ON_HOST = "time on the host"  # the experiment of `benchmarks.host_time`
# Experiments whose bytes are read, and nothing of that size is written.
READS = ("logprob forward", "logprob forward, all long rows read by segments")


def when(document: dict[str, Any]) -> str:
    """Name commit and date, as far as the file has them."""
    commit, date = document["machine_info"]["commit"], document["datetime"][:10]
    return ", ".join(x for x in (f"commit {commit}", date) if x)


def counts(document: dict[str, Any]) -> tuple[int, int, int]:
    """Count the checks that are right, all checks, and their groups."""
    groups = list(_groups(document).values())
    checks = [check for group in groups for check in group["checks"]]
    return sum(x["outcome"] == "right" for x in checks), len(checks), len(groups)


def all_right(document: dict[str, Any]) -> bool:
    """Say whether every group ran to its end and every check is right; tests do not count here."""
    right, total, _ = counts(document)
    return right == total > 0 and all(x["ended"] == "right" for x in _groups(document).values())


def _groups(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: x for name, x in document["smoke"].items() if name != "tests"}


def right_line(document: dict[str, Any]) -> str:
    """Write the outcome of the smoke checks as one paragraph."""
    right, total, groups = counts(document)
    text = [
        f"Right on this device: {right} of {total} checks in {groups} groups "
        f"({when(document)}, `{document['machine_info']['command']}`)."
    ]
    wrong, unfinished = [], []
    for name, group in _groups(document).items():
        bad = [x for x in group["checks"] if x["outcome"] != "right"]
        wrong += [f"{name}: {x['case']} ({x['outcome']}: {_line(x['message'])})" for x in bad]
        if group["running"]:
            unfinished.append(f"{name} ({group['ended']} in {group['running']})")
        elif group["ended"] != "right" and not bad:
            unfinished.append(f"{name} ({group['ended']})")
    if wrong:
        text.append(f"Not right: {'; '.join(wrong)}.")
    if unfinished:
        text.append(f"Not run to the end: {'; '.join(unfinished)}.")
    if "tests" in document["smoke"]:
        text.append(_tests_text(document["smoke"]["tests"]))
    return " ".join(text) + "\n"


def _tests_text(tests: dict[str, Any]) -> str:
    failed, ended = tests["failed"], tests["ended"]
    if not failed:
        known = "all passed" if ended == "right" else f"{ended}; none is known to have failed"
        return f"Tests of the kernels: {known}."
    names = ", ".join(f"`{name}`" for name in failed[:NAMED])
    more = f" and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
    early = "" if ended == "not right" else f", then {ended}"
    return f"Tests of the kernels: {len(failed)} failed{early}: {names}{more}."


def _line(message: str) -> str:
    """Cut an error's first line to what fits into a cell."""
    first = next(iter(message.strip().splitlines()), "")
    short = first if len(first) <= WIDEST else f"{first[:WIDEST]}..."
    return short.replace("|", "\\|")


def experiment_table(document: dict[str, Any]) -> str:
    """Write the rows of one suite of `variants`; what all of them share stands above."""
    name, rows = document["experiment"], document["rows"]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    times = [key for key in keys if _is_time(key, rows)]
    about = [key for key in keys if any(_is_about(key, row[key]) for row in rows if key in row)]
    texts = {key: [_text(row.get(key)) for row in rows] for key in about}
    same = [key for key in about if len(rows) > 1 and len(set(texts[key])) == 1]
    about = [key for key in about if key not in same]
    rated = any("bytes_per_second" in row for row in rows)
    roof = "read" if name in READS else "copy"
    top = document["machine_info"]["bandwidth"].get(roof)
    head = [*about, "time", "±", *(["GB/s", f"of a {roof}"] if rated else [])]
    head += [COLUMNS.get(key, key.replace("_", " ")) for key in times]
    fixed = "".join(f", {key} {texts[key][0]}" for key in same)
    lines = []
    for i, row in enumerate(rows):
        cells = [*(texts[key][i] for key in about), *_time_cells(row)]
        if rated:
            rate = row.get("bytes_per_second")
            cells += [f"{rate / 1e9:,.1f}" if rate else "", share_text(rate, top)]
        lines.append([*cells, *(time_text(row[key]) if key in row else "" for key in times)])
    text = table(head, lines, left=range(len(about)))
    return f"**{name}**{fixed} ({when(document)})\n\n{text}\n"


def _time_cells(row: dict[str, Any]) -> list[str]:
    if "median" in row:
        return [time_text(row["median"]), f"{50 * row['iqr'] / row['median']:.1f} %"]
    return [f"failed: {_line(row.get('failed', 'no time'))}", ""]


def _is_about(key: str, value: Any) -> bool:
    return key not in STATISTICS and not isinstance(value, float)


def _is_time(key: str, rows: list[dict[str, Any]]) -> bool:
    return key not in STATISTICS and any(isinstance(row.get(key), float) for row in rows)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " x ".join(map(_text, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value).removeprefix("torch.")


def on_chip_table(document: dict[str, Any]) -> str:
    """Write the rows that `on_chip` measured before it was a part of `variants`.

    Each stands next to the kernel that was measured in turns with it.
    """
    rows = []
    for x in document["variants"]:
        ours, own = x["time"]["on_chip"], x["time"]["grpo_fast"]
        rows.append(
            [
                *(x["name"], x["registers"], x["rows_in_flight"]),
                "yes" if x["check"]["right"] else "no",
                *_time_cells({"median": ours["ms"] / 1e3, "iqr": ours["iqr_ms"] / 1e3}),
                *(f"{ours['bytes_per_s'] / 1e9:,.1f}", f"{100 * ours['of_copy']:.0f} %"),
                *(time_text(own["ms"] / 1e3), f"{own['ms'] / ours['ms']:.2f}x"),
            ]
        )
    head = ["variant", "registers", "rows in flight", "right", "time", "±", "GB/s", "of a copy"]
    head += ["grpo_fast, in turns", "times faster"]
    return (
        f"**Rows that stay on the chip**, [on_chip](on_chip/build.py), Triton {document['triton']}, "
        f"ptxas {document['ptxas']}, V {document['V']:,} ({when(document)})\n\n"
        f"{table(head, rows, left=(0, 3))}\n"
    )


def section(experiments: list[dict[str, Any]], on_chip: list[dict[str, Any]]) -> Iterator[str]:
    on_host = [x for x in experiments if x["experiment"] == ON_HOST]
    timed = [x for x in experiments if x["experiment"] != ON_HOST]
    if timed or on_chip:
        yield "#### Experiments\n"
        yield (
            "`python -m benchmarks.experiments.variants`: one launch between two events on the "
            "device. What was expected of each: [NOTES.md](NOTES.md).\n"
        )
        yield from map(experiment_table, timed)
        yield from map(on_chip_table, on_chip)
    if on_host:
        yield "#### Time on the host\n"
        yield (
            "`python -m benchmarks.host_time`, one thread: a call and its backward, with kernels "
            "that are compiled for sm_90 and launched, but never run. An idle GPU waits until the "
            "logits are read.\n"
        )
        yield from map(experiment_table, on_host)
