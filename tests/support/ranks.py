"""Run a function of a test module in several processes that form a gloo group."""

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

CRASHED = "crashed in native code"
CRASHES = [-x for x in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)]


def needs_gloo(test: Callable[..., None]) -> Callable[..., None]:
    """Skip a test without gloo, and run it again, once, if a process crashes in native code.

    PyTorch's own threads crash now and then: `pt_gloo_runloop` of torch 2.13 did, once in hundreds of runs,
    in malloc. A test that fails in another way, or crashes twice, fails.
    """
    gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    again = pytest.mark.flaky(reruns=1, only_rerun=CRASHED)
    return again(pytest.mark.skipif(not gloo, reason="torch without gloo")(test))


def _interpreter_runs():
    if not importlib.util.find_spec("triton"):
        return False
    versions = map(importlib.metadata.version, ("triton", "numpy"))
    triton, numpy = (tuple(map(int, x.split(".")[:2])) for x in versions)
    return triton >= (3, 7) or numpy < (2, 4)


needs_interpreter = pytest.mark.skipif(
    not _interpreter_runs(), reason="Triton's interpreter before 3.7 fails with NumPy from 2.4 on"
)


def join() -> None:
    """Join the group of the processes, in one of them, unless an earlier case has."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")


@contextlib.contextmanager
def quick_kernels() -> Iterator[None]:
    """In one of the processes: the interpreter without its repetitions, if the kernels run in it."""
    if (os.environ["GRPO_FAST_BACKEND"], os.environ.get("TRITON_INTERPRET")) != ("triton", "1"):
        yield
        return
    from tests.support.quick import quick

    with quick():
        yield


def run(function: str, number: int, *arguments, seconds: int = 120, **environment: str) -> None:
    """`tests.module:function(*arguments)` in `number` processes with torchrun's environment: all succeed.

    The arguments cross as JSON; `environment` is set besides. The group is left behind the function.
    """
    run_each(function, number, [arguments], seconds, **environment)


def run_each(
    function: str,
    number: int,
    cases: Sequence[Sequence[Any]],
    seconds: int = 240,
    **environment: str,
) -> None:
    """`run` with the arguments of each case in turn, in the same processes: they import and start once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(number)]
        until = time.monotonic() + seconds
        running = []
        try:
            for rank in range(number):
                variables = os.environ | COMMON | environment
                variables |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(number),
                    "LOCAL_WORLD_SIZE": str(number),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
                server = _server(rank, tuple(sorted(environment.items())))
                server.start(function, cases, seconds, str(outputs[rank]), variables)
                running.append(server)
            codes = [server.code(until - time.monotonic()) for server in running]
        finally:
            for server in running:
                server.kill()
        said = [path.read_text(errors="replace") for path in outputs]
    failed = [i for i, code in enumerate(codes) if code]
    # the cause before who lost it
    failed.sort(key=lambda i: "by peer" in said[i])
    ends = {i: f" {CRASHED} (signal {-codes[i]})" if codes[i] in CRASHES else "" for i in failed}
    assert not failed, "\n".join(f"rank {i}{ends[i]}:\n{said[i][-4000:]}" for i in failed)


COMMON = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "GRPO_FAST_BACKEND": "torch",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}


class Server:
    """A process that imports test modules, and forks a process for each call of one of their functions.

    PyTorch, transformers and TRL take seconds to import. Every rank has a server of its own, so that ranks
    differ in what differs between processes, such as the order of a set of words.
    """

    def __init__(self, environment: Sequence[tuple[str, str]]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from tests.support.ranks import serve; serve()"],
            cwd=ROOT,
            env=os.environ | COMMON | dict(environment),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.pid: int | None = None  # of the process that runs
        atexit.register(self.close)

    def close(self) -> None:
        """End the server, whose input ends."""
        self.kill()
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()

    def start(self, *request: Any) -> None:
        """Run a function in a new process; `request` are the arguments of `_in_fork`."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        self.pid = int(self.process.stdout.readline())

    def code(self, seconds: float) -> int:
        """The exit code of the process.

        Raises:
            subprocess.TimeoutExpired: it has not ended in time.
        """
        ready, _, _ = select.select([self.process.stdout], [], [], max(seconds, 0))
        if not ready:
            raise subprocess.TimeoutExpired("a rank", seconds)
        self.pid = None
        return int(self.process.stdout.readline())

    def kill(self) -> None:
        """End the process if it runs."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            self.code(60)


@functools.cache
def _server(rank: int, environment: Sequence[tuple[str, str]]) -> Server:
    return Server(environment)


def serve() -> None:
    """Fork a process for each line of the input; say its number, then its exit code."""

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        with contextlib.suppress(
            BaseException
        ):  # it is raised again, and seen, in the process itself
            importlib.import_module(request[0].split(":")[0])
        pid = os.fork()
        if not pid:
            answers.close()
            _in_fork(*request)
        print(pid, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


def _in_fork(
    function: str,
    cases: Sequence[Sequence[Any]],
    seconds: int,
    output: str,
    variables: dict[str, str],
) -> None:
    """Call a function for each case and leave, without what is done at the end of an interpreter.

    A wrapped model that is freed after its process group waits for threads that wait for the interpreter: the
    group is left here, when the function's objects are gone. A library's thread that still runs while the
    interpreter is torn down can abort a process that has succeeded. One that hangs or crashes says where.
    """
    code = 1
    try:
        with open(output, "w") as file, open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        warnings.simplefilter("ignore")
        faulthandler.enable()
        faulthandler.dump_traceback_later(seconds - 10, exit=True)
        os.environ.clear()
        os.environ.update(variables)
        random.seed()
        module, name = function.split(":")
        call = getattr(importlib.import_module(module), name)
        with quick_kernels():
            for case in cases:
                print("case", *case, flush=True)
                call(*case)
                gc.collect()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
