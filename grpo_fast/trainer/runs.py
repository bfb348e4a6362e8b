"""The files of a run: its folder and lock, config.yaml, metrics.jsonl, completions.jsonl and curve.png."""

import contextlib
import io
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from matplotlib.figure import Figure

from grpo_fast.notices import fell_back
from grpo_fast.trainer import checkpoints, files
from grpo_fast.trainer.config import TrainConfig
from grpo_fast.trainer.smoothing import WINDOW, moving_means

LOCK, PID = ".lock", ".pid"
# The names that a run writes, with the hidden names of files.py.
MADE = re.compile(
    r"\.lock|\.pid|grpo_fast|\.?(config\.yaml|metrics\.jsonl|completions\.jsonl|curve\.png|report\.html"
    r"|pid|checkpoints|reference|server_weights)"
    r"(\.(partial|old|deleted))?"
)


def check(config: TrainConfig) -> None:
    """Raise the errors that `create` would raise, and change nothing.

    Raises:
        FileExistsError: `config.name` is taken and `config.overwrite` is not set, what is there is not a
            run, or a process is writing to it.
        ValueError: `config.output_dir` is not a folder.
    """
    for option in ("output_dir", "name", "dataset"):
        text = getattr(config, option) or ""
        if text != text.encode(errors="ignore").decode():
            raise ValueError(f"{option}={text!r}: not UTF-8, which safetensors needs of a path")
    parent = Path(config.output_dir)
    if parent.exists() and not parent.is_dir():
        raise ValueError(f"output_dir={config.output_dir!r}: not a folder")
    path = parent / (config.name or "")
    if config.name is None or not path.exists():
        return
    check_free(path)
    if not config.overwrite and not _unused(path):
        raise FileExistsError(_what_is_there(path, config.name))
    for option in ("model", "dataset", "reward_dir"):
        needed = Path(getattr(config, option) or "").expanduser().resolve()
        if path.resolve() in (needed, *needed.parents) and getattr(config, option):
            raise FileExistsError(
                f"overwrite: {option}={getattr(config, option)!r} is in {path}, which would be "
                "deleted; choose another --name"
            )
    strange = sorted(p.name for p in path.iterdir() if not MADE.fullmatch(p.name))
    if strange and (path / "config.yaml").is_file():
        raise FileExistsError(
            f"overwrite: {path} has what no run has made: {', '.join(strange[:5])}; move it away, or choose "
            "another --name"
        )
    # A run that died before it wrote anything is one, too.
    if not any((path / name).is_file() for name in ("config.yaml", LOCK)) and any(path.iterdir()):
        raise FileExistsError(f"overwrite: {path} is not a run, it has no config.yaml")


def create(config: TrainConfig) -> Path:
    """Make the folder of a run. Without `config.name` it is the first free of arithmetic, arithmetic-2, ...

    Raises:
        FileExistsError, ValueError: as `check`.
    """
    check(config)
    parent = Path(config.output_dir).resolve()  # a reward function may change the working directory
    parent.mkdir(parents=True, exist_ok=True)
    if config.name is not None:
        path = parent / config.name
        if path.exists():
            with hold(path):
                _empty(path)
        else:
            path.mkdir()
        return path
    stem = Path(config.dataset).stem if config.dataset else config.task.replace(":", "-")
    while True:
        path = parent / files.free_name(parent, stem)
        try:
            path.mkdir()
        except FileExistsError:  # another run was faster
            continue
        return path


@contextlib.contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Keep other processes from writing to a run; the lock ends with this process, however it ends.

    Raises:
        FileExistsError: a process holds the run; the message has its number.
    """
    lock = FileLock(run_dir / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except NotImplementedError:
        fell_back("lock", f"the file system of {run_dir} has no locks", tell=print)
    except Timeout:
        try:
            process = (run_dir / PID).read_text()
        except OSError:
            process = "unknown"
        raise FileExistsError(
            f"{run_dir}: process {process} is writing to this run; choose another --name, or wait "
            "until it has ended"
        ) from None
    owner = os.getpid()
    try:
        files.write(run_dir / PID, str(owner).encode())
        yield
    finally:
        if os.getpid() == owner:  # and no child of a reward function
            with contextlib.suppress(OSError):
                (run_dir / PID).unlink()
            lock.release()


def _unused(path: Path) -> bool:
    """Tell whether a run died before it wrote anything; its folder is as good as none."""
    names = {".lock", ".pid", ".pid.partial", ".config.yaml.partial"}
    return (path / LOCK).exists() and {p.name for p in path.iterdir()} <= names


def check_free(run_dir: Path) -> None:
    """Refuse a run to which a process is writing.

    Raises:
        FileExistsError: the message names the process.
    """
    if (run_dir / LOCK).exists():
        with hold(run_dir):
            pass


def _empty(run_dir: Path) -> None:
    """Delete a run except its lock. config.yaml, which marks it as a run, is deleted last."""
    last = run_dir / "config.yaml"
    for path in [*(p for p in run_dir.iterdir() if p != last), last]:
        if path.name not in (LOCK, PID) and (path.exists() or path.is_symlink()):
            files.remove(path)


def _what_is_there(path: Path, name: str) -> str:
    found = checkpoints.checkpoints(path)
    if not found:
        return (
            f"name={name!r}: {path} exists, without a checkpoint; give another --name, or replace it "
            "with --overwrite"
        )
    step = int(found[-1].name.strip(".").removeprefix("step-").removesuffix(".old"))
    return (
        f"name={name!r}: {path} exists; its newest checkpoint, of step {step}, is {found[-1]}. To go on "
        f"with it: grpo-fast train --resume {path}. To start another run from its weights: --model "
        f"{found[-1]} --name {files.free_name(path.parent, name)}. (--overwrite deletes the run and its "
        "checkpoints.)"
    )


def find(config: TrainConfig) -> Path | None:
    """Return the folder of the run that `config.resume` names; None: there is none yet.

    Raises:
        ValueError: a path was given, and it is no run.
    """
    if config.resume != "latest":
        path = Path(config.resume or "")
        if not (path / "config.yaml").is_file():
            raise ValueError(f"resume={config.resume!r}: not a run, it has no config.yaml")
        return path.resolve()
    parent = Path(config.output_dir).resolve()
    if config.name is not None:
        path = parent / config.name
        return path if (path / "config.yaml").is_file() else None
    runs = [path.parent for path in parent.glob("*/config.yaml")]
    return max(runs, key=_last_written, default=None)


def find_free(config: TrainConfig) -> Path | None:
    """Return what `find` returns, if no process is writing to it.

    Raises:
        FileExistsError, ValueError: as `check_free` and `find`.
    """
    run_dir = find(config)
    if run_dir is not None:
        check_free(run_dir)
    return run_dir


def _last_written(run_dir: Path) -> float:
    names = ("config.yaml", "metrics.jsonl")
    return max((run_dir / n).stat().st_mtime for n in names if (run_dir / n).exists())


class Lines:
    """A file of one object per line, on disk as soon as it is written: metrics.jsonl, completions.jsonl.

    Args:
        remember: keep the rows in `rows`, too.
    """

    def __init__(self, path: Path, remember: bool = True) -> None:
        self.path, self.remember = path, remember
        self.rows: list[dict[str, Any]] = []

    def go_on(self, step: int) -> None:
        """Keep the rows of the steps before `step`, and delete all others."""
        if not self.path.exists():
            return
        rows = []
        for line in self.path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):  # the end of a process that was killed
                rows.append(json.loads(line))
        rows = [row for row in rows if row["step"] < step]
        files.write(self.path, b"".join((json.dumps(row) + "\n").encode() for row in rows))
        self.rows = rows if self.remember else []

    def write(self, *rows: dict[str, Any]) -> None:
        """Append rows. NaN stands for a value that was not measured, and becomes null: JSON has no NaN.

        Raises:
            OSError: it cannot be written; the message names the file, which then ends with the row
                before, as `rows` does.
        """
        clean = [
            {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in row.items()
            }
            for row in rows
        ]
        line = "".join(json.dumps(row) + "\n" for row in clean).encode()
        size = None
        try:
            with self.path.open("ab", buffering=0) as file:  # one write, no half lines
                size = os.fstat(file.fileno()).st_size
                if file.write(line) < len(line):
                    file.write(line[os.fstat(file.fileno()).st_size - size :])
                os.fsync(file.fileno())
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
            raise files.named(error, self.path) from error
        if self.remember:
            self.rows += clean

    def recent(self, name: str) -> float:
        """Return the mean of a metric over the last steps, without those where it is null; else NaN."""
        means = moving_means([row[name] for row in self.rows[-WINDOW:]])
        return math.nan if not means or means[-1] is None else means[-1]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw reward, KL and entropy over the steps.

    Raises:
        OSError: it cannot be written; the message names `path`, and the picture that was there stays.
    """
    figure = Figure(figsize=(7, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in rows]
    curves = {name: [row[name] for row in rows] for name in ("reward", "entropy", "kl")}
    curves["mean"] = moving_means(curves["reward"])
    curves = {k: [math.nan if x is None else x for x in v] for k, v in curves.items()}
    top.plot(steps, curves.pop("reward"), color="C0", alpha=0.35, label="batch")
    top.plot(steps, curves.pop("mean"), color="C0", label=f"mean of {WINDOW} steps")
    top.set(ylabel="reward")
    top.legend(loc="lower right")
    for (name, values), colour in zip(curves.items(), ("C1", "C2"), strict=True):
        if not all(map(math.isnan, values)):
            bottom.plot(steps, values, color=colour, label=f"{name} [nats per token]")
    bottom.set(xlabel="step")
    if bottom.lines:
        bottom.legend(loc="best")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    files.write(path, picture.getvalue())
