"""Whether the tests notice changed code: `python -m tests.support.mutants`, or `make mutants`.

A mutant is the tree with one small change in one file: a constant, a comparison, an operator, a negated
condition, a keyword left out. The tests that cover the file run on it, and one that fails kills the mutant.
Survivors are printed: each needs a test, or an entry of `EQUIVALENT` or `SAME` (`mutations.py`) with the
reason why no test can see it. All happens in temporary copies of the tree; kernels run interpreted.
"""

import argparse
import contextlib
import importlib
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing import connection
from pathlib import Path

from tests.support.mutations import COVERS, ROOT, mutants

IGNORED = shutil.ignore_patterns(".*", "__pycache__", "results", "runs", "build", "*.egg-info")
SLOW_TO_IMPORT = ("pytest", "torch._dynamo", "triton.language", "triton.runtime.interpreter")


def run(tree, name, ready):
    """Run the tests of `name` in `tree`, in a process of their own; exit code 0 if they pass."""
    os.setsid()
    os.chdir(tree)
    sys.path[:] = [str(tree), *(x for x in sys.path if x and Path(x).resolve() != ROOT)]
    os.environ["PYTHONPATH"] = str(tree)
    for module in [x for x in sys.modules if x.split(".")[0] in ("tests", "grpo_fast")]:
        del sys.modules[module]
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    import pytest

    files, which = COVERS[name]
    files = [str(path) for x in files.split() for path in Path("tests").glob(f"*/test_{x}.py")]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", which]
    code = pytest.main([*options, *files])
    loaded = sys.modules.get("grpo_fast")
    if loaded is not None and Path(loaded.__file__).parents[1] != tree:
        code = 99  # the tests were those of another tree
    ready.send(int(code))
    os._exit(0)


class Running:
    """One process of tests: `code` is None after the time limit."""

    def __init__(self, context, tree, name, limit, mutant=None):
        self.tree, self.name, self.mutant, self.start = tree, name, mutant, time.time()
        self.deadline, self.source = self.start + limit, (ROOT / name).read_bytes()
        if mutant:
            (low, high), text = mutant[3], mutant[2].encode()
            (tree / name).write_bytes(self.source[:low] + text + self.source[high:])
        self.answer, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=run, args=(tree, name, theirs))
        self.process.start()
        theirs.close()

    def finish(self):
        """(exit code, or None past the deadline; seconds)."""
        try:
            code = self.answer.recv() if self.answer.poll(0) else None
        except EOFError:
            code = 1  # the process died
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        (self.tree / self.name).write_bytes(self.source)
        return code, time.time() - self.start


def main():
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--jobs", type=int, default=2)
    parse.add_argument("--per-file", type=int, default=7)
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--minutes", type=float, default=1e9, help="start no mutant after these")
    parse.add_argument("--files", default=".", help="a regular expression")
    given, start = parse.parse_args(), time.time()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for module in SLOW_TO_IMPORT:  # once, not in each process
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    torch.set_num_threads(1)
    names = [name for name in COVERS if re.search(given.files, name)]
    context, work = multiprocessing.get_context("fork"), []
    for name in names:
        every = mutants(name)
        random.Random(f"{given.seed} {name}").shuffle(every)
        work.append((name, every[: given.per_file]))
    killed, survivors, seconds = dict.fromkeys(names, 0), [], dict.fromkeys(names, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        free, busy, limits = [], [], {}
        for i in range(given.jobs):
            free.append(Path(folder).resolve() / str(i))
            shutil.copytree(ROOT, free[-1], ignore=IGNORED, symlinks=True)
        turns = itertools.zip_longest(*([(name, x) for x in (None, *xs)] for name, xs in work))
        waiting = [x for turn in turns for x in turn if x]  # a mutant of each file in turns
        while waiting or busy:
            if time.time() > start + 60 * given.minutes:
                waiting = []
            ready = [x for x in waiting if x[1] is None or x[0] in limits]
            if free and ready:
                waiting.remove(ready[0])
                name, mutant = ready[0]
                busy.append(Running(context, free.pop(), name, limits.get(name, 600), mutant))
                continue
            connection.wait([x.answer for x in busy], timeout=1)
            for x in [x for x in busy if x.answer.poll(0) or time.time() > x.deadline]:
                busy.remove(x)
                code, spent = x.finish()
                free.append(x.tree)
                seconds[x.name] += spent
                if x.mutant is None:
                    if code != 0:
                        sys.exit(f"{x.name}: its tests fail without a mutant, exit code {code}")
                    limits[x.name] = 30 + 5 * spent  # whoever needs more hangs
                    print(f"{spent:6.1f} s without a mutant  {x.name}", flush=True)
                elif code == 0:
                    line, before, after, _ = x.mutant
                    survivors.append((x.name, line, before, after))
                    print(f"{x.name}:{line}: {before}\n    -> {after}", flush=True)
                else:
                    assert code in (1, 2, 3, None), f"{x.name}: pytest's exit code {code}"
                    killed[x.name] += 1
    tried = {name: killed[name] + sum(x[0] == name for x in survivors) for name in names}
    for name in names:
        print(f"{killed[name]:4} of {tried[name]:3} killed  {seconds[name]:6.0f} s  {name}")
    total = max(sum(tried.values()), 1)
    print(f"killed {sum(killed.values())} of {total} ({sum(killed.values()) / total:.1%})")
    sys.exit(len(survivors) > 0.1 * total)


if __name__ == "__main__":
    main()
