"""Try the versions that the project supports: `python -m tests.versions`, or `make versions`.

Each environment of `environments.py` is made in a temporary folder, with pip as it is set up on this machine,
and deleted before the next: the CUDA build of PyTorch takes 7 GB. With `--folder` the environments stay
there, and the next run installs only the wheel and what is missing. In each of them the installed wheel is
imported, `grpo-fast doctor` and a part of the tests run, and every launch of the benchmarks' `codegen` is
compiled for a GPU that need not be there. One that cannot be made is a row with the reason.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measuring.machine import commit
from tests.versions import page, running
from tests.versions.environments import ENVIRONMENTS


def main() -> int:
    """Returns the exit status: 1 if a test failed or an environment could not be made."""
    names = [x.name for x in ENVIRONMENTS]
    parser = argparse.ArgumentParser(
        description="try other versions of Python, PyTorch, Triton, transformers and TRL",
        epilog=f"environments: {', '.join(names)}",
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument(
        "--save", action="store_true", help="write the rows to docs/compatibility.md"
    )
    parser.add_argument(
        "--one-in", type=int, default=10, metavar="N", help="cases of which one runs (default: 10)"
    )
    parser.add_argument(
        "--folder", type=Path, help="make them there, keep them, and use those that are there"
    )
    options = parser.parse_args()
    keep = options.folder is not None
    folder = options.folder.resolve() if keep else Path(tempfile.mkdtemp(prefix="versions-"))
    folder.mkdir(parents=True, exist_ok=True)
    rows, about = [], {"commit": commit(), "one in": options.one_in}
    try:
        tree, wheel = running.snapshot(folder)
        for environment in (x for x in ENVIRONMENTS if x.name in options.only):
            start = time.monotonic()
            print(
                f"{environment.name}: Python {environment.python}, {environment.requirements}",
                flush=True,
            )
            rows.append(running.run(environment, folder, tree, wheel, about))
            minutes = (time.monotonic() - start) / 60
            print(f"  {' | '.join(filter(None, page.cells(rows[-1])[1:]))} ({minutes:.1f} min)")
            tests = rows[-1].get("tests", {})
            for text in (*tests.get("failures", ()), *tests.get("deprecations", ())):
                print(f"    {text}", flush=True)
            if options.save:
                page.save([rows[-1]], names)
                page.PAGE.write_text(page.written(page.PAGE.read_text(), page.load()))
            if not keep:
                shutil.rmtree(folder / environment.name, ignore_errors=True)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return int(any("reason" in row or row["tests"]["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
