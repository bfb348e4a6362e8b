"""Write what was measured on a real pretrained model."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.report.markdown import memory_text, table

TITLE = "#### On a real model"
KINDS = ("real_accuracy", "real_on_policy", "real_trajectories", "real_trl")
Document = dict[str, Any]


def section(documents: dict[str, Document]) -> Iterator[str]:
    """Write the parts that were measured.

    Args:
        documents: the newest of each of `KINDS`.
    """
    if not documents:
        return
    models = dict.fromkeys(d["model"].rstrip("/").split("/")[-1] for d in documents.values())
    yield f"{TITLE} ({', '.join(models)})\n"
    yield (
        "What is compared, and what it means: [docs/evidence.md](../docs/evidence.md). Prompts are "
        "questions about countries; completions are the model's own, of 16 tokens at most.\n"
    )
    for kind, write in zip(KINDS, (_accuracy, _on_policy, _trajectories, _trl), strict=True):
        if kind in documents:
            yield from write(documents[kind])


def _origin(document: Document) -> str:
    info = document["machine_info"]
    versions = ", ".join(
        f"{k} {v}" for k, v in {"torch": info["torch"], **document["versions"]}.items()
    )
    return f"Commit {info['commit']}, {document['datetime'][:10]}, `{info['command']}`; {versions}."


def _absent(document: Document) -> Iterator[str]:
    absent = document["machine_info"]["absent"]
    if absent:
        yield "Not measured: " + "; ".join(f"{k} ({v})" for k, v in absent.items()) + ".\n"


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}g}" if abs(value) < 0.01 else f"{value:.3f}"


def _error(value: float | None) -> str:
    return "none" if value is None else f"{value:.1e}" if value else "0"


def _accuracy(document: Document) -> Iterator[str]:
    """Write errors against float64; each beside that of plain PyTorch."""
    batch = document["batch"]
    yield "##### Accuracy\n"
    yield (
        f"{_origin(document)} {batch['completions']} completions with {batch['tokens']:,} tokens, "
        f"hidden states of {batch['hidden_size']} entries, {batch['vocabulary']:,} entries of the "
        f"vocabulary. Ratios to the old policy from {batch['ratio_min']:.2f} to {batch['ratio_max']:.2f}, "
        f"{100 * batch['outside_clip_range']:.0f} % of them outside the clip range; beta {batch['beta']}. "
        "Errors against float64 from the same inputs: of log-probs in nats, of the others in units of "
        "the largest true entry. `x plain` is the largest error over that of plain PyTorch (`eager`) in "
        "the same dtype.\n"
    )
    rows = document["real_accuracy"]
    results = [name for name in dict.fromkeys(row["result"] for row in rows) if name != "loss"]
    for result in results:
        head = [result, "dtype", "largest error", "RMS error", "x plain", "entries"]
        lines = [_accuracy_row(row) for row in rows if row["result"] == result]
        yield table(head, lines, left=(0, 1)) + "\n"
    head = ["loss", "dtype", "error", "error of plain"]
    lines = [
        [row["provider"], row["dtype"], _error(row["max_error"]), _error(row["plain_max_error"])]
        for row in rows
        if row["result"] == "loss"
    ]
    yield table(head, lines, left=(0, 1)) + "\n"
    own = [row for row in rows if row["provider"].startswith("grpo_fast")]
    within = sum(row["within"] for row in own)
    yield f"Within the criterion: {within} of {len(own)} results of grpo_fast.\n"
    yield from _absent(document)


def _accuracy_row(row: dict[str, Any]) -> list[str]:
    unit = 1.0 if row["result"] == "log-probs" else row["largest"]
    plain = row["plain_max_error"]
    return [
        row["provider"],
        row["dtype"],
        _error(row["max_error"] / unit),
        _error(row["rms_error"] / unit),
        f"{row['max_error'] / plain:.2g}" if plain else "",
        f"{row['entries']:,}",
    ]


def _on_policy(document: Document) -> Iterator[str]:
    """Write the sampler beside the update, and the ratios of the trainer."""
    rows = document["real_on_policy"]
    yield "##### The sampler and the update\n"
    yield (
        f"{_origin(document)} The difference of log-probs, per token and in nats, between `generate` with "
        "its KV cache and the forward of the first update, with the same weights. `again`: the largest "
        "difference between the log-probs of the loss and those of a second forward.\n"
    )
    head = [
        "dtype",
        "share_prompts",
        "tokens",
        "mean",
        "mean of absolutes",
        "largest",
        "ratio from",
    ]
    head += ["to", "again"]
    names = ("mean", "mean_abs", "max_abs")
    lines = [
        [
            *(row["dtype"], row["share_prompts"], f"{row['tokens']:,}"),
            *(_error(row[name]) for name in names),
            *(f"{row[name]:.5f}" for name in ("ratio_min", "ratio_max")),
            _error(row["again_max_abs"]),
        ]
        for row in rows
        if row["row"] == "sampler"
    ]
    yield table(head, lines, left=(0, 1)) + "\n"
    trained = [row for row in rows if row["row"] == "trainer"]
    low = min(row["ratio_min"] for row in trained)
    high = max(row["ratio_max"] for row in trained)
    yield (
        f"In the metrics of the trainer, over {sum(r['steps'] for r in trained)} steps with "
        f"{sum(r['micro_batches'] for r in trained)} micro-batches, the ratio was from {low:g} to {high:g}. "
        "It is so by construction: with one update for each batch the old log-probs are those of the same "
        "forward.\n"
    )
    yield from _absent(document)


def _trajectories(document: Document) -> Iterator[str]:
    """Write the ends of the runs, and how far each pair is apart."""
    rows = document["real_trajectories"]
    yield "##### Training with this loss and with the plain one\n"
    yield (
        f"{_origin(document)} Runs of the included trainer with the same options; `plain` has all logits in "
        "float32 and the objective of `grpo_fast.reference`. First and last: means of 20 steps. "
        "Held out: accuracy of the last checkpoint.\n"
    )
    head = ["run", "seed", "steps", "path", "commit", "first reward", "last reward"]
    head += ["first accuracy", "last accuracy", "held out", "answers"]
    runs = [row for row in rows if row["row"] == "run"]
    yield table(head, map(_run_row, runs), left=(0, 3, 4)) + "\n"
    yield (
        "Pairs of runs. `equal`: steps until a completion is another one. Gaps: between the means of 20 "
        "steps of the two runs.\n"
    )
    head = ["runs", "steps", "equal", "reward: RMS gap", "largest", "accuracy: RMS gap", "largest"]
    names = ("reward_gap_rms", "reward_gap_max", "accuracy_gap_rms", "accuracy_gap_max")
    lines = [
        [
            *(" and ".join(row["names"]), row["steps"], _equal(row)),
            *(_number(row[name]) for name in names),
        ]
        for row in rows
        if row["row"] == "difference"
    ]
    yield table(head, lines) + "\n"
    for row in rows:
        if row["row"] == "difference" and row.get("steps_with_equal_completions"):
            yield (
                f"{' and '.join(row['names'])}: while the completions were equal, the largest difference "
                f"of the loss was {_error(row['loss_until_then'])}, of the gradient norm "
                f"{_error(row['grad_norm_until_then'])}, of the entropy "
                f"{_error(row['entropy_until_then'])}.\n"
            )
    yield from _absent(document)


def _equal(row: dict[str, Any]) -> str:
    if "steps_with_equal_completions" not in row:
        return ""
    return "all" if row["all_equal"] else str(row["steps_with_equal_completions"])


def _run_row(row: dict[str, Any]) -> list[Any]:
    ends = []
    for name in ("reward", "accuracy"):
        ends += [_mean(row[name][:20]), _mean(row[name][-20:])]
    held = row["heldout"] or {"accuracy": None, "answers": ""}
    about = [
        row["name"],
        row["seed"],
        row["steps"],
        row.get("path", "kernels"),
        row.get("commit", ""),
    ]
    return [*about, *ends, _number(held["accuracy"]), held["answers"]]


def _mean(values: Sequence[float | None]) -> str:
    known = [x for x in values if x is not None]
    return _number(sum(known) / len(known)) if known else ""


def _trl(document: Document) -> Iterator[str]:
    """Write a step of each trainer: medians, and extremes in brackets."""
    yield "##### A step of training\n"
    yield (
        f"{_origin(document)} Four prompts with eight completions each, float32, one thread, each trainer "
        "in a process of its own, in turns. Medians, smallest and largest of the steps in brackets. "
        "`sampling` has the rewards; `update` is the rest of the step. The memory is the peak beyond what "
        "was resident before training. `trl` is TRL's trainer, `grpo_fast` ours for TRL, `shared` with "
        "shared prompts; `trainer` is the included one. Each samples its own completions.\n"
    )
    head = ["trainer", "step", "sampling", "update", "tokens", "memory", "steps"]
    lines = [
        [
            row["provider"],
            *(_spread(row, name) for name in ("step", "sampling", "update")),
            f"{row['tokens']:,.0f}",
            memory_text(row["peak_extra_bytes"]),
            row["steps"],
        ]
        for row in document["real_trl"]
    ]
    yield table(head, lines) + "\n"
    yield from _absent(document)


def _spread(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.2f} s ({row[f'{name}_min']:.2f} to {row[f'{name}_max']:.2f})"
