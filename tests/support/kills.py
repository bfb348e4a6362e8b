"""Kill runs of the included trainer with SIGKILL at random moments, and compare what they end with.

    python -m tests.support.kills --kills 50

Each run is started again with `--resume latest` until it ends. Then its metrics, its completions and its
weights must be those of a run that nobody killed, bit for bit.
"""

import argparse
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path

from grpo_fast.trainer import checkpoints
from grpo_fast.trainer.cli import main
from tests.support.tiny_runs import arguments, untimed

OPTIONS = {"steps": 12, "save_steps": 2, "num_iterations": 2, "samples": 0, "completions_steps": 3}


def start(folder: Path) -> multiprocessing.Process:
    """A process that makes the run, or goes on with it; it is forked, so that nothing is imported again."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(folder,))
    process.start()
    return process


def _run(folder: Path) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)
    os._exit(main(["train", *arguments(folder, name="run", **OPTIONS), "--resume", "latest"]))


def contents(folder: Path) -> tuple:
    run = folder / "run"
    newest = checkpoints.latest(run)
    files = [run / "completions.jsonl", *sorted(newest.glob("*.safetensors"))]
    return newest.name, untimed(run), [path.read_bytes() for path in files]


def check(folder: Path, kills: int, seed: int, say=lambda text: None) -> int:
    """Return how often a run was killed; raise if one ends with anything else."""
    begin = time.monotonic()
    process = start(folder / "whole")
    process.join()
    assert process.exitcode == 0
    seconds = time.monotonic() - begin
    expected = contents(folder / "whole")
    rng, done, number = random.Random(seed), 0, 0
    while done < kills:
        number += 1
        here = folder / f"run-{number}"
        while True:
            process = start(here)
            process.join(rng.uniform(0, seconds) if done < kills else None)
            if process.exitcode is not None:
                assert process.exitcode == 0, f"run {number} ended with {process.exitcode}"
                break
            process.kill()
            process.join()
            done += 1
            log = here / "run" / "metrics.jsonl"
            steps = log.read_bytes().count(b"\n") if log.exists() else 0
            say(f"kill {done}: run {number}, after {steps} steps")
        assert contents(here) == expected, f"run {number} is another one"
        say(f"run {number}: the same metrics, completions and weights")
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), chosen.kills, chosen.seed, lambda text: print(text, flush=True))
