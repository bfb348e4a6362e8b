"""The command `grpo-fast explain`."""

import argparse
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from grpo_fast.trainer.explain.record import SHIPPED, StepRecord, load, save

PAGE = Path("explain.html")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    made = argparse.ArgumentParser(
        prog="grpo-fast explain",
        description="one real training step, stage by stage: a page for a browser without network, or text",
        epilog="Without RUN the step is one of SmolLM2-135M that comes with grpo_fast.",
        allow_abbrev=False,
    )
    made.add_argument(
        "place", nargs="?", type=Path, metavar="RUN",
        help="folder of a run or a checkpoint, whose next step is made in memory; or a record (.json)",
    )  # fmt: skip
    made.add_argument("--run", type=Path, metavar="RUN", help="the same, as an option")
    made.add_argument(
        "--text", action="store_true", help="print the stages in the terminal instead"
    )
    made.add_argument("--open", action="store_true", help="open the page in a browser")
    made.add_argument("--output", type=Path, metavar="FILE", help=f"the page; default: {PAGE}")
    made.add_argument("--record", type=Path, metavar="FILE", help="also write the record, as JSON")
    made.add_argument(
        "--updates", type=int, metavar="N", help="updates on the completions (default: 3)"
    )
    made.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, ... (default: cuda if there is one)"
    )
    return made


def explain(arguments: Sequence[str]) -> int:
    """Run `grpo-fast explain`: write a page, or print the stages.

    Raises:
        ValueError: arguments that exclude each other, or a step that cannot be made or read.
        OSError: a file cannot be read or written.
    """
    chosen = parser().parse_args(arguments)
    if chosen.place is not None and chosen.run is not None:
        raise ValueError(f"run: given twice, as {str(chosen.place)!r} and as {str(chosen.run)!r}")
    if chosen.text:
        for name in ("open", "output"):
            if getattr(chosen, name):
                raise ValueError(f"--{name} has no effect with --text, which writes no page")
    record = step_of(chosen.place or chosen.run, chosen.updates, chosen.device)
    if chosen.record is not None:
        save(record, chosen.record.expanduser())
    if chosen.text:
        from grpo_fast.trainer.explain import text

        text.show(record, text.console())
        return 0
    from grpo_fast.trainer.explain import page

    path = (chosen.output or PAGE).expanduser()
    page.write(record, path)
    print(path)
    if chosen.open and not webbrowser.open(path.resolve().as_uri()):
        from grpo_fast.trainer.cli import fail

        return fail("explain", 1, f"open: no browser was found; open {path} in one")
    return 0


def step_of(place: Path | None, updates: int | None, device: str | None) -> StepRecord:
    """Return the record of a step: the one that ships with the package, that of a file, or a new one.

    Raises:
        ValueError: it cannot be made or read, or an option has no effect on it.
    """
    place = None if place is None else place.expanduser()
    if place is None or place.suffix == ".json":
        for name, value in {"updates": updates, "device": device}.items():
            if value is not None:
                raise ValueError(
                    f"{name}={value!r} has no effect on a recorded step; give the folder of a run"
                )
        return load(place or SHIPPED)
    from grpo_fast.trainer.cli import quiet
    from grpo_fast.trainer.explain.capture import capture

    quiet()
    return capture(place, updates, device or "auto")
