"""Launch every kernel with sizes and layouts at which a wrong mask leaves a tensor.

    python -m benchmarks.run.bounds                # every launch, on this device
    python -m benchmarks.run.bounds grpo           # those whose name holds this
    python -m benchmarks.run.bounds --compile      # compile them for sm_90; nothing runs, no GPU needed

A sanitizer watches the program on a GPU (`sanitize`), and guard bands in Triton's interpreter
(`tests/kernels/test_bounds.py`). Results are not looked at. Every tensor ends where its memory
ends: what is read or written behind it belongs to nobody.
"""

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import triton
import triton.language as tl

from benchmarks import command_line
from benchmarks.host_time import pretend
from benchmarks.run import launches_of_logits, launches_of_tokens
from benchmarks.run.launch_inputs import Kernels, Launch, new

LAUNCHES = "launches"  # what the last line counts
KERNELS: Kernels = launches_of_logits.KERNELS | launches_of_tokens.KERNELS


@triton.jit
def _control_kernel(x_ptr, n):  # type: ignore[no-untyped-def]
    """Write one entry behind a tensor: a sanitizer that says nothing of it sees nothing."""
    tl.store(x_ptr + n, 1.0)


def control() -> None:
    """Launch the one kernel that is wrong."""
    x = new(256)
    _control_kernel[(1,)](x, len(x))


def attempt(case: str, launch: Launch) -> bool:
    """Make a launch, wait for its end, and say what it raised; return whether all is well."""
    print(case, flush=True)  # the last line of a process that dies says where
    try:
        launch()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as reason:
        print(f"{case}: {type(reason).__name__}: {str(reason)[:500]}", flush=True)
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("name", nargs="?", default="", help="launch what holds this in its name")
    parser.add_argument("--control", action="store_true", help="then write outside a tensor")
    parser.add_argument("--compile", action="store_true", help="compile for sm_90, run nothing")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        if options.compile:
            pretend.start(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        done = [
            attempt(f"{kernel}: {case}", launch)
            for kernel, launches in KERNELS.items()
            for case, launch in launches()
            if options.name in f"{kernel}: {case}"
        ]
    print(f"{len(done)} {LAUNCHES}", flush=True)
    if options.control:
        attempt(_control_kernel.__name__, control)
    return int(not all(done))


if __name__ == "__main__":
    sys.exit(main())
