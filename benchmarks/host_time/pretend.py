"""Let Triton launch kernels on a GPU that is not there: they are compiled for sm_90 and never run."""

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

SOURCE = Path(__file__).with_name("driver.c")
LIBRARY = "libcuda.so.1"
MOST_LAUNCHES = 65536  # that driver.c notes
H100 = (9, 0)  # compute capability


class Launch(NamedTuple):
    """A launch: the name of the kernel, and when it was launched, by `time.CLOCK_MONOTONIC`."""

    kernel: str
    time: float


class Driver:
    """The driver of driver.c: what was launched since `forget`."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.count = ctypes.c_int.in_dll(self.library, "launches")
        self.times = (ctypes.c_double * MOST_LAUNCHES).in_dll(self.library, "launch_time")
        self.names = (ctypes.c_char_p * MOST_LAUNCHES).in_dll(self.library, "launch_name")

    def forget(self) -> None:
        self.count.value = 0

    def launches(self) -> list[Launch]:
        names = [(self.names[i] or b"").decode() for i in range(self.count.value)]
        return [Launch(name, self.times[i]) for i, name in enumerate(names)]


def build(folder: Path) -> Path:
    """Compile driver.c; return the library.

    Raises:
        RuntimeError: there is no C compiler. Triton needs one as well.
    """
    from triton.backends.nvidia import driver

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise RuntimeError("no C compiler: want CC, gcc or clang")
    include = Path(driver.__file__).with_name("include")
    library = folder / LIBRARY
    options = ["-shared", "-fPIC", "-O2", f"-I{include}", f"-Wl,-soname,{LIBRARY}"]
    subprocess.run([compiler, *options, str(SOURCE), "-o", str(library)], check=True)
    (folder / "libcuda.so").symlink_to(LIBRARY)  # before 3.6, Triton links with -lcuda
    return library


def start(folder: Path) -> Driver:
    """Make the kernels launch through driver.c from now on, in this process.

    Tensors lie on the CPU. What looks at the device of a tensor finds that kernels are to run; the
    values of arguments are not looked at, as on a GPU.

    Args:
        folder: where the library is built.
    """
    library = build(folder)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    driver = Driver(library)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    class Pretended(nvidia.CudaDriver):
        """Triton's driver of NVIDIA's GPUs without PyTorch's part, which looks for one."""

        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_device_capability = lambda device=0: H100
            self.get_current_stream = lambda device=0: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        def get_current_target(self) -> Any:
            major, minor = H100
            return GPUTarget("cuda", 10 * major + minor, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    triton.runtime.driver.set_active(Pretended())
    _look_like_a_gpu()
    return driver


def _look_like_a_gpu() -> None:
    """Let the library take CPU tensors as those of a GPU."""
    import triton

    from grpo_fast import checks
    from grpo_fast.kernels import on_chip
    from grpo_fast.ops import backend

    if backend.version_of(triton.__version__) < on_chip.OLDEST_TRITON:
        why = f"Triton {triton.__version__} is installed, and it needs 3.8"
        on_chip.unavailable = lambda device: why

    looked = backend.path_of
    found = backend.Path(True, "a GPU is pretended")

    def path_of(x: torch.Tensor) -> Any:
        looked(x)  # it takes its time
        return found

    backend.path_of = path_of
    checked = checks.check_values
    for module in list(
        sys.modules.values()
    ):  # those that have it already; the others take this one
        if getattr(module, "check_values", None) is checked:
            module.check_values = lambda x: False  # type: ignore[attr-defined]


def timed(driver: Driver, call: Callable[[], object]) -> tuple[list[Launch], float]:
    """Return what a call launches, with times since its start, and its own time, in seconds."""
    driver.forget()
    start = time.clock_gettime(time.CLOCK_MONOTONIC)
    call()
    end = time.clock_gettime(time.CLOCK_MONOTONIC)
    return [Launch(name, at - start) for name, at in driver.launches()], end - start
