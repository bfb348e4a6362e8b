"""Make an environment in a temporary folder, run the tests in it, and say what was found."""

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.versions.environments import Environment

ROOT = Path(__file__).resolve().parents[2]
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "results", "runs", "build", "*.egg-info")
TOOLS = ("pytest", "hypothesis", "setuptools", "numpy")
SHOWN = ("torch", "triton", "transformers", "trl", "numpy", "einops")
MINUTE = 60
LIMIT = 40 * MINUTE  # of one step
TARGET = "sm_90"
VERSIONS = f"""
import importlib.metadata as m, json, platform
found = {{"python": platform.python_version()}}
for name in {SHOWN}:
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        found[name] = None
import torch
found["torch"] = torch.__version__
print(json.dumps(found))
"""


class StepError(Exception):
    """A step that failed: its name, and the line that says why."""


def call(
    step: str, *command: str, cwd: Path, codes: tuple[int, ...] = (0,), **variables: str
) -> str:
    """Run a command and return what it printed.

    Raises:
        StepError: it has another exit status than `codes`, or takes too long.
    """
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("PYTHONPATH", "VIRTUAL_ENV", "TRITON_INTERPRET")
    }
    environment = {**kept, "OMP_NUM_THREADS": "1", **variables}
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise StepError(f"{step}: more than {LIMIT // MINUTE} minutes") from None
    if done.returncode not in codes:
        raise StepError(f"{step}: {reason(done.stderr or done.stdout)}")
    return done.stdout


def reason(text: str) -> str:
    """The line of an output that says what was wrong, without addresses and paths."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no output"]
    line = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
    return re.sub(r"\S*(?:https?:|/)\S*/\S*", "...", line)[:200]


def interpreter(version: str) -> Path:
    """Find a Python: on PATH, or one that pyenv has made.

    Raises:
        StepError: there is none.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    on_path = shutil.which(f"python{version}")
    for path in (*sorted(pyenv.glob(f"{version}.*/bin/python{version}")), on_path):
        if path is None:
            continue
        show = "import sys; print(sys.version_info[:2] == tuple(map(int, sys.argv[1].split('.'))))"
        done = subprocess.run(
            [path, "-c", show, version], capture_output=True, text=True, check=False
        )
        if done.stdout.strip() == "True":
            return Path(path)
    raise StepError(f"Python {version} is not on this machine")


def snapshot(folder: Path) -> tuple[Path, Path]:
    """Copy the tree, so that nothing changes in the meantime, and build the wheel.

    Returns the copy and the wheel.
    """
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT, tree, ignore=IGNORED, symlinks=True)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", "dist", "."]
    call("wheel", *build, cwd=tree)
    return tree, next((tree / "dist").glob("*.whl"))


def run(environment: Environment, folder: Path, tree: Path, wheel: Path, about: dict) -> dict:
    """Make one environment, and return its row; a step that fails ends it, and is its `reason`.

    Args:
        folder: where to make it. tree, wheel: as `snapshot` returns them.
        about: entries of the row: "commit", and "one in", the number of cases of which one runs.
    """
    row = {
        "name": environment.name,
        "asked": [f"python{environment.python}", *environment.pins],
        "date": datetime.date.today().isoformat(),
        **about,
        "machine": f"{os.cpu_count()}-core {platform.machine()}",
    }
    home = folder / environment.name
    try:
        python = str(home / "bin" / "python")
        pip = python, "-m", "pip"
        if Path(python).exists():
            # pip would keep an installed wheel of the same version.
            call("pip", *pip, "uninstall", "-q", "-y", "grpo-fast", cwd=folder)
        else:
            call("venv", str(interpreter(environment.python)), "-m", "venv", str(home), cwd=folder)
        extras = f"[{','.join(environment.extras)}]" if environment.extras else ""
        wanted = [f"{wheel}{extras}", *environment.pins]
        row["requirements"] = [x for x in wanted if not x.startswith("/")]
        call("pip", *pip, "install", "-q", *wanted, *TOOLS, cwd=folder)
        row["versions"] = json.loads(call("import torch", python, "-c", VERSIONS, cwd=folder))
        call("pip check", *pip, "check", cwd=folder, codes=(0, 1))
        row |= checks(environment, python, folder, tree, about["one in"])
    except StepError as error:
        row["reason"] = str(error)
    return row


def checks(environment: Environment, python: str, folder: Path, tree: Path, one_in: int) -> dict:
    """The installed wheel by itself, the tests of the copy, and the kernels compiled for a GPU."""
    call("import grpo_fast", python, "-c", "import grpo_fast; grpo_fast.grpo_loss", cwd=folder)
    call("doctor", python, "-m", "grpo_fast.doctor", cwd=folder)
    found = folder / f"{environment.name}.json"
    files = [f"tests/{name}" for name in environment.files]
    options = ["-q", "-p", "no:cacheprovider", "-p", "tests.versions.sampled", f"--record={found}"]
    options.append(f"--one-in={one_in}")
    call("tests", python, "-m", "pytest", *options, *files, cwd=tree, codes=(0, 1, 2))
    row = {"tests": json.loads(found.read_text())}
    text = call("codegen", python, "-m", "benchmarks.codegen", "--json", TARGET, cwd=tree)
    reports = json.loads(text)
    spilled = [x["case"] for x in reports if x["stack"]]
    return {**row, "compiled": {"target": TARGET, "launches": len(reports), "spilled": spilled}}
