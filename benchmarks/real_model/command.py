"""Measure on a real pretrained model, SmolLM2-135M-Instruct, and on questions about countries.

    python -m benchmarks.real_model                      # the first four parts, two hours on one CPU core
    python -m benchmarks.real_model accuracy --save      # one part, into benchmarks/results/<machine>/
    python -m benchmarks.real_model trajectories --which kernels --output_dir runs/evidence

| part | what is compared |
|---|---|
| accuracy | log-probs, loss and gradients of several libraries with float64 |
| on_policy | log-probs of the sampler with those of the update |
| trajectories | a run with this project's loss and one with the plain loss |
| trl | time and memory of a step in TRL's trainer, in ours for TRL, and in the included one |
| learning | accuracy before and after the recipe, for several seeds, has to rise by 0.25; if named |

Further options are those of `grpo-fast train`. Without them those of recipes/smollm2-geo.yaml hold, in
float32 and with one thread. The exit code is 1 if a result of this project is outside its criterion.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import FOLDER, command_line
from benchmarks.measuring import machine
from benchmarks.real_model import accuracy, learning, on_policy, setup, trainers, trajectories
from benchmarks.real_model.sheet import Sheet

PARTS = ("accuracy", "on_policy", "trajectories", "trl")
LEARNING = "learning"  # is made by the commands of a user, and by name only
KINDS = dict(
    zip(PARTS, (accuracy.KIND, on_policy.KIND, trajectories.KIND, trainers.KIND), strict=True)
) | {LEARNING: learning.KIND}
PROMPTS = 8  # of `accuracy`: with 8 completions each
PLACES = (
    "--out",
    "--output_dir",
    "--runs",
    "--model",
    "--reward_dir",
)  # what is not a part of the command


def written(given: Sequence[str]) -> str:
    """Write the command of a run, without the places of its files."""
    kept, skipping = [], False
    for word in given:
        if word.startswith("--"):
            skipping = word.split("=")[0] in PLACES
        if not skipping or word in KINDS:
            kept.append(word)
    return " ".join(["python -m benchmarks.real_model", *kept])


def place(part: str, options: Any) -> Path | None:
    """Return where the results of a part go; None: they are printed only.

    Raises:
        ValueError: nobody could find the code that they are about.
    """
    name = f"{KINDS[part]}-{machine.commit()}.json"
    if options.save and not machine.is_clean(machine.commit()):
        raise ValueError(
            f"--save: commit {machine.commit()!r}: want a clean, known commit; or --out"
        )
    if options.save:
        return FOLDER / "results" / machine.slug() / name
    return options.out / name if options.out else None


def one(part: str, options: Any, given: Sequence[str]) -> bool:
    """Measure a part, and tell whether this project is right."""
    sheet = Sheet(place(part, options), KINDS[part], model=setup.config_of(given).model)
    if part == "accuracy":
        config = setup.config_of(
            given, prompts_per_step=PROMPTS, dtype="float32", share_prompts="off"
        )
        return accuracy.measure(config, sheet)
    if part == "on_policy":
        return on_policy.measure(given, sheet)
    if part == "trl":
        return trainers.measure(given, sheet, options.rounds, options.timed_steps)
    if part == LEARNING:
        return learning.measure(given, sheet, options.output_dir, options.seeds)
    which = options.which or trajectories.WHICH[:2]
    return trajectories.measure(given, sheet, options.output_dir, which, options.runs)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__, "python -m benchmarks.real_model")
    parser.allow_abbrev = False  # --seed is the trainer's
    add = parser.add_argument
    add("part", nargs="?", choices=KINDS, help=f"default: {', '.join(PARTS)}")
    add("--save", action="store_true", help="write JSON for the report; wants a clean commit")
    add("--out", type=Path, help="write JSON into this folder instead")
    add("--which", nargs="+", choices=trajectories.WHICH, help="trajectories: the runs to make")
    default = Path("runs", "real_model")
    add(
        "--output_dir",
        type=Path,
        default=default,
        help=f"trajectories, learning: where the runs are, default {default}",
    )
    add("--runs", type=Path, nargs="+", default=[], help="trajectories: further runs to compare")
    add("--seeds", type=int, nargs="+", default=learning.SEEDS, help="learning: a run for each")
    add("--rounds", type=int, default=trainers.ROUNDS, help="trl: processes of each trainer")
    add("--timed_steps", type=int, default=trainers.STEPS, help="trl: steps, after one")
    words = sys.argv[1:] if arguments is None else list(arguments)
    options, given = parser.parse_known_args(words)
    os.environ.setdefault(machine.COMMAND_VARIABLE, written(words))
    right = True
    for part in [options.part] if options.part else PARTS:
        right &= attempted(part, options, given)
    return int(not right)


def attempted(part: str, options: Any, given: Sequence[str]) -> bool:
    """Measure a part. If it raises, say so: the other parts are measured all the same."""
    try:
        return one(part, options, given)
    except ValueError as error:  # an option, or a model that cannot be loaded
        print(f"{part}: {error}", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    return False
