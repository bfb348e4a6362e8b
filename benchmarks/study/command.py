"""Make the study: options of GRPO, and PPO beside GRPO, on arithmetic, with several seeds.

    make study                                          # all of it
    python -m benchmarks.study --parts groups --seeds 0 1 --steps 50
    python -m benchmarks.study --save                   # writes JSON for the report; wants a clean commit

| part | what is varied |
|---|---|
| groups | G = 2, 4, 8, 16, with the same number of completions in a step |
| normalisation | advantages divided by the standard deviation of the group, or not |
| kl | KL to the policy before GRPO, or none |
| clip | the clip range, symmetric or higher above |
| ratio | of tokens, or of sequences as in GSPO |
| ppo | PPO, and what is between PPO and GRPO |
| tuning | learning rates of both methods, on a seed that no other part has |
| cost | time and memory of a step on SmolLM2-135M-Instruct, GRPO beside PPO |

All runs of a seed start from the same weights: the model after its warm-up. A run that is complete is not
made again, so a call that was interrupted goes on where it was.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import FOLDER, command_line
from benchmarks.measuring import machine
from benchmarks.real_model.setup import rounded
from benchmarks.real_model.sheet import Sheet
from benchmarks.study import cost, loop, runs, summary, variants
from benchmarks.study.runs import Run

KIND = "study"
TUNING, COST = "tuning", "cost"
PARTS = (*variants.PARTS, TUNING, COST)
WINDOW = loop.EVERY  # steps of a mean in the file of results
CURVES = ("reward", "accuracy", "clip_fraction", "cpu_seconds", "seconds")
SEEN = ("entropy", "kl")  # measured once for so many steps
# What is announced, in seconds of one core of an AMD EPYC: a warm-up, a step of GRPO and of PPO, and `cost`.
START_TAKES, GRPO_TAKES, PPO_TAKES, COST_TAKES = 35.0, 0.15, 0.3, 900.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs that are missing, print a line for each variant, and write the results if wanted."""
    parser = command_line(__doc__, "python -m benchmarks.study")
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    add("--seeds", type=int, nargs="+", default=variants.SEEDS, help="default: 0 1 2 3 4")
    add("--steps", type=int, default=variants.STEPS, help=f"of a run, default {variants.STEPS}")
    add("--jobs", type=int, default=1, help="processes at a time, each with one thread; default 1")
    default = Path("runs", "study")
    add("--output_dir", type=Path, default=default, help=f"where the runs are, default {default}")
    add("--save", action="store_true", help="write JSON for the report; wants a clean commit")
    add("--out", type=Path, help="write JSON to this file instead")
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(words)
    os.environ.setdefault(machine.COMMAND_VARIABLE, written(words))
    for name in ("steps", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: want 1 or more, got {getattr(options, name)}")
    if variants.TUNING_SEED in options.seeds or len(set(options.seeds)) < len(options.seeds):
        parser.error(
            f"--seeds: want each once, and not {variants.TUNING_SEED}, the one of {TUNING}; "
            f"got {options.seeds}"
        )
    if options.save and not machine.is_clean(machine.commit()):
        parser.error(
            f"--save: commit {machine.commit()!r}: want a clean, known commit; or give --out"
        )
    try:
        study(options, Sheet(_target(options), KIND, window=WINDOW, steps=options.steps))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def written(words: Sequence[str]) -> str:
    """Write the command without the places of its files."""
    kept, skipping = [], False
    for word in words:
        if word.startswith("--"):
            skipping = word.split("=")[0] in ("--out", "--output_dir")
        if not skipping:
            kept.append(word)
    return " ".join(["python -m benchmarks.study", *kept])


def _target(options: Any) -> Path | None:
    if options.save:
        return FOLDER / "results" / machine.slug() / f"{KIND}-{machine.commit()}.json"
    return options.out


def planned(options: Any) -> tuple[list[Run], list[Run]]:
    """Return the warm-ups and the runs of some parts and seeds, whether they are made or not."""
    folder, steps = options.output_dir, options.steps
    wanted: list[Run] = [
        (v, seed, steps, folder) for seed in options.seeds for v in variants.of_parts(options.parts)
    ]
    if TUNING in options.parts:
        wanted += [(v, variants.TUNING_SEED, steps, folder) for v in variants.candidates()]
    return [(None, seed, steps, folder) for seed in dict.fromkeys(w[1] for w in wanted)], wanted


def announced(starts: Sequence[Run], wanted: Sequence[Run], options: Any) -> str:
    """Say what is to be made, and about how long it takes."""
    missing = [run for run in (*starts, *wanted) if runs.known(run) is None]
    seconds = (
        sum(
            START_TAKES if v is None else steps * (PPO_TAKES if v.critic else GRPO_TAKES)
            for v, _, steps, _ in missing
        )
        / options.jobs
    )
    if COST in options.parts:
        seconds += COST_TAKES
    made = len(starts) + len(wanted) - len(missing)
    return (
        f"{len(missing)} runs to make, {made} are there: about {seconds / 60:.0f} minutes "
        f"({options.jobs} at a time, each on one core of an AMD EPYC)"
    )


def study(options: Any, sheet: Sheet) -> None:
    """Make what is missing, and write it down.

    Raises:
        ValueError: a run in the folder has other options, or is of another commit.
    """
    starts, wanted = planned(options)
    print(announced(starts, wanted, options), flush=True)
    sheet.rows += list(runs.all_of(starts, options.jobs))
    found: list[dict[str, Any]] = []
    for i, run in enumerate(runs.all_of(wanted, options.jobs), 1):
        found.append(run)
        print(f"{i}/{len(wanted)} {line_of(run)}", flush=True)
    reported = [run for run in found if run["seed"] != variants.TUNING_SEED]
    sheet.rows += map(condensed, reported)
    sheet.rows += (
        {"row": TUNING, "variant": run["variant"], **rounded_all(summary.values_of(run))}
        for run in found
        if run["seed"] == variants.TUNING_SEED
    )
    sheet.rows += (rounded_all(row) for row in summary.means(reported))
    if COST in options.parts:
        try:
            sheet.rows += cost.all_of(options.output_dir)
        except RuntimeError as reason:
            sheet.skip(COST, str(reason))
    sheet.write()
    for row in sheet.rows:
        if row["row"] == "mean":
            print(summary.line_of(row))


def line_of(run: dict[str, Any]) -> str:
    """Return a run in one line."""
    values = summary.values_of(run)
    return (
        f"{run['variant']}, seed {run['seed']}: reward {values['reward']:.3f} in training, "
        f"held-out accuracy {values['accuracy']:.3f}, {values['cpu_seconds']:.3f} s a step"
    )


def condensed(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run with means of `WINDOW` steps instead of steps."""
    steps = {
        name: [rounded(x) for x in (values if name in SEEN else averaged(values))]
        for name, values in run["steps"].items()
        if name in (*CURVES, *SEEN)
    }
    return {k: v for k, v in run.items() if k != "datetime"} | {"steps": steps}


def averaged(values: Sequence[float]) -> list[float]:
    """Return the means of `WINDOW` values; the last one may be of fewer."""
    parts = (values[at : at + WINDOW] for at in range(0, len(values), WINDOW))
    return [sum(part) / len(part) for part in parts]


def rounded_all(value: Any) -> Any:
    """Round all numbers of a row."""
    if isinstance(value, dict):
        return {name: rounded_all(x) for name, x in value.items()}
    return rounded(value) if isinstance(value, float) else value
