"""The runs of the study in a folder: each is made once, and found again by the next call."""

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from transformers.utils import logging

from benchmarks.measuring import machine, recorder
from benchmarks.study import loop
from benchmarks.study.variants import BASE, Variant

START = "start"  # the name of what a seed's runs start from
Run = tuple[
    Variant | None, int, int, Path
]  # variant, seed, steps and folder; without a variant: a warm-up


def place(folder: Path, name: str, seed: int) -> Path:
    """Return the file of a run."""
    return folder / f"{name.replace(' ', '_')}-seed-{seed}.json"


def options_of(variant: Variant | None, steps: int) -> dict[str, Any]:
    """Return what makes a run another one."""
    return {} if variant is None else variant.described() | {"steps": steps}


def reused(path: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a file has found, or None if there is none.

    Args:
        wanted: what the file has to say of its origin.

    Raises:
        ValueError: it says something else.
    """
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(
                f"{path}: made with {name} {found[name]}, not {value}; want another --output_dir"
            )
    return found


def known(run: Run) -> dict[str, Any] | None:
    """Return what a run has found, or None if it is still to be made.

    Raises:
        ValueError: the file is that of a run with other options or of another commit.
    """
    variant, seed, steps, folder = run
    path = place(folder, variant.name if variant else START, seed)
    options = options_of(variant, steps)
    return reused(path, {"options": options, "commit": machine.commit()})


def make(run: Run) -> dict[str, Any]:
    """Make a run, unless it is known, and return what it has found."""
    found = known(run)
    if found is not None:
        return found
    variant, seed, steps, folder = run
    start = folder / f"{START}-seed-{seed}"
    logging.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # lines of several runs would mix
        if variant is None:
            measured: dict[str, Any] = loop.warmed(BASE.config(seed, steps), start)
        else:
            measured = loop.trained(variant, variant.config(seed, steps), start)
    name = variant.name if variant else START
    found = {
        "row": "run" if variant else START,
        "variant": name,
        "seed": seed,
        "commit": machine.commit(),
        "options": options_of(variant, steps),
        **measured,
    }
    recorder.write(place(folder, name, seed), found)
    return found


def all_of(runs: Sequence[Run], jobs: int) -> Iterator[dict[str, Any]]:
    """Yield what runs have found, in their order; `jobs` of them are made at a time.

    Each process has one thread. A warm-up has to be made before the runs that start from it.
    """
    if jobs == 1:
        yield from map(make, runs)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from pool.map(make, runs)
