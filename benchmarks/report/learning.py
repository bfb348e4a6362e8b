"""Write what a real model learned: the tables and the picture of docs/smollm2.md."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import pictures
from benchmarks.report.committed import newest
from benchmarks.report.markdown import table, wrapped
from grpo_fast.trainer.results import BASE, DIFFERENCE, TRAINED

KIND = "real_learning"
WINDOW = 10  # steps of a mean in the picture
SHOWN = 8  # questions with answers before and after
Document = dict[str, Any]


def text(results: Path) -> str:
    """Write the tables of the newest document; "" if there is none."""
    documents = newest(results, KIND)
    if not documents:
        return ""
    parts = _tables(documents[-1])
    return "\n\n".join(x if x.startswith("|") else wrapped(x) for x in parts)


def _tables(document: Document) -> Iterator[str]:
    rows = document[KIND]
    runs = [row for row in rows if row["row"] == "run"]
    info = document["machine_info"]
    trained, evaluated = (
        ", ".join(dict.fromkeys(run[name] for run in runs)) for name in ("commit", "evaluated")
    )
    threads = ", ".join(dict.fromkeys(str(run["threads"]) for run in runs))
    versions = ", ".join(
        f"{k} {v}" for k, v in {"torch": info["torch"], **document["versions"]}.items()
    )
    yield (
        f"{info['device']}, threads of a run: {threads}; trained at commit {trained}, evaluated at "
        f"{evaluated}, {document['datetime'][:10]}; `{info['command']}`; {versions}."
    )
    yield table(
        ["temperature", "before GRPO", "after", "difference", "95 % interval", "each seed"],
        [
            _mean(rows, t)
            for t in dict.fromkeys(r["temperature"] for r in rows if r["row"] == "mean")
        ],
        left=(0,),
    )
    yield (
        f"Accuracy is the mean of `names_the_answer` over all completions of the questions about countries "
        f"that were held out ({', '.join(str(run['problems']) for run in runs)} questions, "
        f"{', '.join(str(run['clusters']) for run in runs)} countries). The interval is that of the "
        f"difference: t distribution over {len(runs)} seeds. Each seed holds out other countries, "
        f"drawn at random; some are in two of the draws."
    )
    head = [
        "seed",
        "difference at temperature 1",
        "its 95 % interval",
        "finished, before and after",
    ]
    head += ["tokens of an answer", "steps", "time", "memory"]
    yield table(head, [_run(run) for run in runs], left=(0,))
    yield (
        "These intervals are over the countries that the seed held out. The time is that of the whole "
        "command `grpo-fast train`, with loading and both evaluations, on a machine that was busy with other "
        "work. Memory is the most resident memory."
    )
    yield (
        "By kind of question, at temperature 1, in the mean over the seeds. The best constant is the share "
        "of the most common answer: a model that always says it earns that."
    )
    yield table(["kind", "before", "after", "best constant"], _kinds(runs))
    yield "Answers at temperature 1 to the first held-out questions of seed 0:"
    answers = [
        [a["question"], a["answer"], a[BASE], a[TRAINED]] for a in runs[0]["answers"][:SHOWN]
    ]
    cleaned = [[" ".join(cell.replace("|", "/").split()) for cell in row] for row in answers]
    yield table(["question", "answer", "before", "after"], cleaned, left=(0, 1, 2, 3))


def _mean(rows: list[dict[str, Any]], temperature: float) -> list[str]:
    """Return the cells of a temperature."""
    found = {r["model"]: r for r in rows if r["row"] == "mean" and r["temperature"] == temperature}
    rise = found[DIFFERENCE]
    return [
        f"{temperature:g}" + (" (greedy)" if not temperature else ""),
        f"{found[BASE]['mean']:.3f}",
        f"{found[TRAINED]['mean']:.3f}",
        f"{rise['mean']:+.3f}",
        f"{rise['low']:+.3f} to {rise['high']:+.3f}" if rise["low"] is not None else "",
        ", ".join(f"{x:+.3f}" for x in rise["each"]),
    ]


def _kinds(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Return the cells of each kind of question."""
    found = []
    for kinds in zip(*(run["kinds"] for run in runs), strict=True):
        means = [statistics.fmean(k[name] for k in kinds) for name in (BASE, TRAINED, "constant")]
        found.append([kinds[0]["kind"], *(f"{mean:.3f}" for mean in means)])
    return found


def _run(run: dict[str, Any]) -> list[str]:
    """Return the cells of a run."""
    found = {r["model"]: r for r in run["results"] if r["temperature"] == 1}
    rise, steps = found[DIFFERENCE]["accuracy"], run["steps"]
    return [
        str(run["seed"]),
        f"{rise['mean']:+.3f}",
        f"{rise['low']:+.3f} to {rise['high']:+.3f}" if rise["low"] is not None else "",
        f"{found[BASE]['ended']:.2f}, {found[TRAINED]['ended']:.2f}",
        f"{found[BASE]['length']:.1f}, {found[TRAINED]['length']:.1f}",
        str(len(steps["reward"])),
        f"{run['train_seconds'] / 60:.1f} min",
        f"{max(steps['memory_gib']):.1f} GiB",
    ]


def picture(results: Path) -> bytes:
    """Draw the steps of the runs of the newest document, as SVG; b"" if there is none."""
    documents = newest(results, KIND)
    if not documents:
        return b""
    runs = [row for row in documents[-1][KIND] if row["row"] == "run"]
    charts = {
        "reward/names_the_answer": "accuracy of the samples",
        "reward/one_sentence": "one finished sentence",
        "groups_without_signal": "groups without signal",
    }
    with pictures.drawing(10, 3) as figure:
        for axis, (name, title) in zip(figure.subplots(1, 3), charts.items(), strict=True):
            for run in runs:
                axis.plot(smooth(run["steps"][name]), label=f"seed {run['seed']}")
            axis.set(title=title, xlabel="step", ylim=(0, 1))
            axis.grid(alpha=0.3)
        figure.axes[0].legend()
        return pictures.svg(figure)


def smooth(values: list[float]) -> list[float]:
    """Return the mean of the last `WINDOW` values at each place."""
    return [statistics.fmean(values[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(values))]
