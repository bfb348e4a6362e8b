"""A training step of TRL's trainer, of ours for TRL, and of the included one, on the same prompts.

Each runs in a process of its own, in turns: some steps after one that is not counted. What is timed, on the
clock of the wall:

- `sampling`: completions and their rewards. In TRL `_generate_and_score_completions`, in the included trainer
  `Run.collect`. TRL's has its own generation settings, padding and metrics.
- `update`: the rest of the step, that is forward, loss, backward, clipping, optimizer and logging.

The memory is the peak of the resident set during training, beyond what was resident before it: gradients, the
optimizer's state, caches, activations. It has nothing of the weights.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.measuring import machine
from benchmarks.real_model.sheet import Sheet

KIND = "real_trl"
PROVIDERS = ("trl", "grpo_fast", "grpo_fast-shared", "trainer")
ROUNDS, STEPS = 2, 4
TIMES = ("step", "sampling", "update")


def once(provider: str, given: Sequence[str], steps: int) -> dict[str, Any]:
    """Train in a process of its own, and return what it measured.

    Raises:
        RuntimeError: it failed; the message has its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        module = "benchmarks.real_model.training"
        command = [sys.executable, "-m", module, provider, str(steps), folder, str(out), *given]
        environment = machine.environment() | {"GRPO_FAST_BACKEND": "torch", "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if ran.returncode or not out.exists():
            lines = ran.stderr.strip().splitlines() or ["no message"]
            raise RuntimeError(lines[-1])
        return json.loads(out.read_text())


def measure(given: Sequence[str], sheet: Sheet, rounds: int, steps: int) -> bool:
    """Measure all providers in turns, and write a row for each; tell whether ours have one."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in PROVIDERS}
    for at in range(rounds):
        for provider in PROVIDERS if at % 2 == 0 else reversed(PROVIDERS):
            found[provider] += attempted(provider, given, steps + 1, sheet)
    for provider, runs in found.items():
        if runs:
            sheet.append(row_of(provider, runs))
    return all(found[name] for name in PROVIDERS)


def attempted(
    provider: str, given: Sequence[str], steps: int, sheet: Sheet
) -> list[dict[str, Any]]:
    """Return what a process measured, or nothing if it failed; say which."""
    try:
        found = once(provider, given, steps)
    except RuntimeError as reason:
        sheet.skip(provider, str(reason))
        return []
    print(provider, found, flush=True)
    return [found]


def row_of(provider: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return medians and extremes over the steps of all rounds, without the first of each."""
    row: dict[str, Any] = {"provider": provider, "rounds": len(runs)}
    for name in TIMES:
        times = [x for one in runs for x in one[name][1:]]
        row |= {
            "steps": len(times),
            name: statistics.median(times),
            f"{name}_min": min(times),
            f"{name}_max": max(times),
        }
    tokens = [x for one in runs for x in one["tokens"][1:]]
    peaks = [one["peak_extra_bytes"] for one in runs]
    return row | {
        "tokens": statistics.median(tokens),
        "peak_extra_bytes": statistics.median(peaks) if None not in peaks else None,
        "peak_spread": max(peaks) - min(peaks) if None not in peaks else None,
        "shared": runs[0]["shared"],
    }
