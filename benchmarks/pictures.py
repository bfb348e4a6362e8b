"""Results as pictures, from committed JSON alone: time and memory over N, rates under their roofs."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.committed import Run

FOLDER = "pictures"
Series = dict[str, list[tuple[int, float, float | None]]]  # provider -> (N, seconds, bytes)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def model_of(shape: str) -> str:
    """The model in the name of a shape: "qwen2.5-7b" of "qwen2.5-7b-16k"."""
    return shape.rpartition("-")[0]


def sweeps(run: Run) -> dict[str, Series]:
    """By model, what was measured at two numbers of tokens or more, from hidden states."""
    found: dict[str, Series] = defaultdict(lambda: defaultdict(list))
    for e in run.entries:
        if e["variant"] == "full" and e["case"] == "forward_backward" and e["roof"] == "gemm":
            N = e["sizes"]["B"] * e["sizes"]["T"]
            memory = e["peak_extra_bytes"]
            found[model_of(e["shape"])][e["provider"]].append((N, e["median"], memory))
    return {
        model: {who: sorted(points) for who, points in series.items() if len(points) > 1}
        for model, series in found.items()
        if any(len(points) > 1 for points in series.values())
    }


def names(run: Run) -> list[str]:
    """The files that `draw` writes for a run."""
    base = f"{slug(run.device)}-{slug(run.stem)}"
    files = [f"{base}-{slug(model)}-over-n.svg" for model in sweeps(run)]
    if run.stem in ("grpo", "linear_grpo"):
        files.append(f"{base}-roofline.svg")
    return files


def draw(run: Run, folder: Path) -> None:
    """Write the pictures of a run; the same bytes from the same results.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "grpo_fast"
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figures = [_over_n(plt, run, model, series) for model, series in sweeps(run).items()]
    if run.stem in ("grpo", "linear_grpo"):
        figures.append(_roofline(plt, run))
    for name, figure in zip(names(run), figures, strict=True):
        figure.savefig(folder / name, metadata={"Date": None})
        plt.close(figure)


def _label(run: Run) -> str:
    return f"{run.device}, {run.info['commit']}, {run.date[:10]}"


def _over_n(plt: Any, run: Run, model: str, series: Series) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for who, points in series.items():
        N = [p[0] for p in points]
        left.plot(N, [p[1] * 1e3 for p in points], marker="o", label=who)
        right.plot(N, [(p[2] or 0) / 2**30 for p in points], marker="o", label=who)
    for axes, text in ((left, "time, ms"), (right, "extra memory, GiB")):
        axes.set_xlabel("tokens")
        axes.set_ylabel(text)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.suptitle(f"{run.stem}, {model}: {_label(run)}", fontsize=9)
    return figure


def _roofline(plt: Any, run: Run) -> Any:
    """The rate of each provider and case, and the roof measured in the same run."""
    heads = run.entries[0]["roof"] == "gemm"
    unit = 1e12 if heads else 1e9
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    amounts: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for e in run.entries:
        amount = e["flops"] if heads else e["bytes"]
        amounts[e["provider"]].append((amount, amount / e["median"] / unit))
    for who, points in amounts.items():
        axes.scatter([p[0] for p in points], [p[1] for p in points], label=who, s=18)
    roofs = run.entries[0]["roofs"]
    tops = roofs["gemm"] if heads else {k: v for k, v in roofs.items() if k != "gemm"}
    for name, top in tops.items():
        axes.axhline(top / unit, linestyle="--", linewidth=1, color="black")
        axes.annotate(
            f"measured {name}", (0.01, top / unit), xycoords=("axes fraction", "data"), fontsize=7
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP that have to be done" if heads else "bytes that have to move")
    axes.set_ylabel("TFLOP/s" if heads else "GB/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    axes.set_title(f"{run.stem}: {_label(run)}", fontsize=9)
    return figure
