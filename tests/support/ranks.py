"""Run a function of a test module in several processes that form a gloo group."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
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
    module, name = function.split(":")
    # A wrapped model that is freed after its process group waits for threads that wait for the interpreter:
    # the group is left here, when the function's objects are gone. A library's thread that still runs while
    # the interpreter is torn down can abort a process that has succeeded: it leaves without that. One that
    # hangs or crashes says where.
    code = (
        "import faulthandler, gc, json, os, sys, warnings; warnings.simplefilter('ignore')\n"
        "faulthandler.enable()\n"
        f"faulthandler.dump_traceback_later({seconds - 10}, exit=True)\n"
        "import torch.distributed as dist\n"
        f"from {module} import {name} as function\n"
        "from tests.support.ranks import quick_kernels\n"
        "with quick_kernels():\n"
        "    for case in json.loads(sys.argv[1]):\n"
        "        print('case', *case, flush=True)\n"
        "        function(*case)\n"
        "        gc.collect()\n"
        "if dist.is_initialized(): dist.destroy_process_group()\n"
        "sys.stdout.flush(); sys.stderr.flush(); os._exit(0)"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(number):
        variables = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(number),
            "LOCAL_WORLD_SIZE": str(number),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "GRPO_FAST_BACKEND": "torch",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            **environment,
        }
        command = [sys.executable, "-c", code, json.dumps(cases)]
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=variables,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    codes = [process.returncode for process in processes]
    failed = [i for i, code in enumerate(codes) if code]
    # the cause before who lost it
    failed.sort(key=lambda i: "by peer" in outputs[i])
    ends = {i: f" {CRASHED} (signal {-codes[i]})" if codes[i] in CRASHES else "" for i in failed}
    assert not failed, "\n".join(f"rank {i}{ends[i]}:\n{outputs[i][-4000:]}" for i in failed)
