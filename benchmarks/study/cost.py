"""Time and memory of a step of GRPO and of PPO on a pretrained model, SmolLM2-135M-Instruct.

The arithmetic model is so small that Python's own memory hides its. Here each provider trains in a process of
its own, in turns, with the options of recipes/smollm2-geo.yaml, float32 and one thread: 32 completions a step
and one update of each model. The memory is the peak of the resident set beyond what was resident before the
model was loaded. The time is that of the process's own work, because the machine may be busy, and that on
the wall. The first step of each process is not counted.

    python -m benchmarks.study.cost PROVIDER STEPS OUT     # the process of one provider
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
from benchmarks.measuring import machine, memory, recorder
from benchmarks.real_model import setup
from benchmarks.study import runs
from benchmarks.study.loop import Loop
from benchmarks.study.variants import Critic, Variant
from grpo_fast.trainer import sizing
from grpo_fast.trainer.known_models import describe

COMPLETIONS = 32  # as in the recipe, 4 prompts with 8 each
STEPS, ROUNDS = 2, 2
KL = {"beta": 0.04}
PROVIDERS = {
    v.name: v
    for v in (
        Variant("grpo", "GRPO, no KL", 8),
        Variant("grpo-kl", "GRPO, KL", 8, KL),
        Variant("ppo", "PPO, no KL", 1, critic=Critic()),
        Variant("ppo-kl", "PPO, KL", 1, KL, Critic()),
        Variant("ppo-kl-4x8", "PPO, KL, 4 prompts with 8 completions", 8, KL, Critic()),
    )
}
LARGE = "Qwen/Qwen2.5-7B"  # the model of the prediction
TIMES = ("cpu_seconds", "seconds", "sampling_seconds", "update_seconds")


def measured(provider: str, steps: int) -> dict[str, Any]:
    """Train some steps in this process; return their times, and the memory in bytes."""
    variant = PROVIDERS[provider]
    options = {"prompts_per_step": COMPLETIONS // variant.samples, "steps": steps}
    config = setup.config_of([], **options, **variant.options)
    found: dict[str, Any] = {}

    def train() -> None:
        loop = Loop(variant, config, *setup.loaded(config))
        rows = [loop.step(step) for step in range(steps)]
        found.update({name: [row[name] for row in rows] for name in (*TIMES, "tokens")})
        found["held"] = loop.held()

    found["peak_extra_bytes"] = memory.peak_extra_bytes(train)
    return found


def once(provider: str, steps: int, path: Path) -> dict[str, Any]:
    """Measure a provider in a process of its own, unless the file `path` has it; return what it measured.

    Raises:
        RuntimeError: it failed; the message has its last line.
        ValueError: the file is of another commit, or has another number of steps.
    """
    about = {"commit": machine.commit(), "counted": steps}
    found = runs.reused(path, about)
    if found is not None:
        return found
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        command = [sys.executable, "-m", "benchmarks.study.cost", provider, str(steps), str(out)]
        environment = machine.environment() | {"GRPO_FAST_BACKEND": "torch", "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if ran.returncode or not out.exists():
            lines = ran.stderr.strip().splitlines() or ["no message"]
            raise RuntimeError(f"{provider}: {lines[-1]}")
        found = about | json.loads(out.read_text())
    recorder.write(path, found)
    seconds = statistics.median(found["cpu_seconds"][1:])
    print(f"{provider}: {seconds:.1f} s of CPU time a step", flush=True)
    return found


def row_of(provider: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians and extremes over the steps of all processes, without the first of each."""
    row: dict[str, Any] = {"row": "cost", "provider": provider, "text": PROVIDERS[provider].text}
    for name in TIMES:
        times = [x for one in found for x in one[name][1:]]
        row[name] = {"median": statistics.median(times), "min": min(times), "max": max(times)}
    peaks = [one["peak_extra_bytes"] for one in found]
    return row | {
        "steps": sum(len(one["seconds"]) - 1 for one in found),
        "rounds": len(found),
        "tokens": statistics.median(x for one in found for x in one["tokens"][1:]),
        "peak_extra_bytes": statistics.median(peaks) if None not in peaks else None,
        "peak_spread": max(peaks) - min(peaks) if None not in peaks else None,
        "held": found[0]["held"],
    }


def predicted() -> dict[str, Any]:
    """Return the bytes of the models of a large model's training, as `grpo-fast plan` predicts them.

    Weights in bfloat16, float32 copies in the optimizer, AdamW. The value model has the same as the policy,
    its head apart, and no reference.
    """
    parts = sizing.predict(describe(LARGE), sizing.Workload(beta=KL["beta"]))
    trained = parts.weights + parts.gradients + parts.optimizer + parts.master
    return {
        "row": "predicted",
        "model": LARGE,
        "parameters": parts.parameters,
        "trained": trained,
        "reference": parts.reference,
    }


def all_of(folder: Path, rounds: int = ROUNDS, steps: int = STEPS) -> list[dict[str, Any]]:
    """Measure all providers in turns, forwards and backwards, and return a row for each.

    Args:
        folder: keeps what each process has measured, so an interrupted call goes on.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in PROVIDERS}
    for at in range(rounds):
        for provider in PROVIDERS if at % 2 == 0 else reversed(PROVIDERS):
            path = folder / f"cost-{provider}-{at}.json"
            found[provider].append(once(provider, steps + 1, path))
    return [*(row_of(provider, rows) for provider, rows in found.items()), predicted()]


def main(arguments: Sequence[str]) -> None:
    provider, steps, out = arguments
    Path(out).write_text(json.dumps(measured(provider, int(steps))))


if __name__ == "__main__":
    main(sys.argv[1:])
