"""The facts about a machine that the doctor reports and judges."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

import grpo_fast
from grpo_fast.integrations.shared.packages import VERSIONS, found_version
from grpo_fast.ops.backend import OLDEST_TORCH, OLDEST_TRITON, triton_version

# Distributions by name: from, and below; None for any version. The first three are needed.
RANGES: dict[str, tuple[str | None, str | None]] = {
    "torch": (".".join(map(str, OLDEST_TORCH)), None),
    "einops": ("0.8", None),
    "triton": (".".join(map(str, OLDEST_TRITON)), None),
    "numpy": (None, None),
    **VERSIONS,
    "peft": (None, None),
    "deepspeed": (None, None),
    "liger-kernel": (None, None),
    "vllm": (None, None),
    "kernels": (None, None),
}
DRIVER = Path("/proc/driver/nvidia/version")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU that PyTorch sees; its memory is in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int


@dataclasses.dataclass(frozen=True)
class Machine:
    """The facts about a machine.

    Attributes:
        versions: of the distributions of `RANGES`, None where one is not installed.
        build: of PyTorch: "CPU", "CUDA 12.8" or "ROCm 7.0".
        gpus: those that PyTorch sees.
        gpu_error: what PyTorch raises when it is asked for its GPUs, "" otherwise.
        driver: the version of NVIDIA's driver, "" where none is found.
        compiler: the C compiler that Triton would call, "" without one.
        shadow: the file of a package `kernels` that hides Hugging Face's, which is installed, or "".
        checkouts: the folders of packages that are on the path, but not installed.
        variables: the environment variables that have a meaning here, and unknown ones of this library.
    """

    versions: dict[str, str | None]
    build: str = "CPU"
    gpus: tuple[Gpu, ...] = ()
    gpu_error: str = ""
    driver: str = ""
    compiler: str = "/usr/bin/gcc"
    shadow: str = ""
    checkouts: dict[str, str] = dataclasses.field(default_factory=dict)
    variables: dict[str, str] = dataclasses.field(default_factory=dict)
    python: str = platform.python_version()
    system: str = platform.platform()
    source: str = ""


def examine() -> Machine:
    """Look at this machine. No package is imported but PyTorch and Triton."""
    versions = {name: version_of(name) for name in RANGES}
    found, error = gpus()
    return Machine(
        versions=versions,
        build=build_of_torch(),
        gpus=found,
        gpu_error=error,
        driver=driver(),
        compiler=compiler(),
        shadow=shadow(),
        checkouts=checkouts([name for name, version in versions.items() if version is None]),
        variables=variables(dict(os.environ)),
        source=str(Path(grpo_fast.__file__).parent),
    )


def version_of(name: str) -> str | None:
    """Return the version of a distribution, or of a checkout that is imported; None if it is unknown."""
    if name == "torch":
        return torch.__version__
    if name == "triton":
        with contextlib.suppress(Exception):  # of its import: the paths below say it
            return triton_version()
    return found_version(name)


def checkouts(names: Iterable[str]) -> dict[str, str]:
    """Return the folders of packages on the path, as checkouts are; not of folders without a module."""
    found = ((name, origin_of(name.replace("-", "_"))) for name in names)
    return {name: str(Path(origin).parent) for name, origin in found if origin}


def origin_of(name: str) -> str:
    """Return the file that the import of a package runs first, "" without one."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module that some program has made itself
        return getattr(sys.modules.get(name), "__file__", None) or ""
    return spec.origin or "" if spec else ""


def build_of_torch() -> str:
    """Return for what PyTorch was built."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def gpus() -> tuple[tuple[Gpu, ...], str]:
    """Return the GPUs that PyTorch sees, and the error that it raises instead, or ""."""
    try:
        if not torch.cuda.is_available():
            return (), ""
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception as error:  # of the driver, in whatever class
        return (), " ".join(f"{type(error).__name__}: {error}".split())
    return tuple(Gpu(x.name, (x.major, x.minor), x.total_memory) for x in found), ""


def driver() -> str:
    """Return the first line of the file of NVIDIA's driver, "" where there is no such file."""
    try:
        lines = DRIVER.read_text().splitlines()
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"of an unknown version ({error.strerror})"
    return lines[0] if lines else "of an unknown version"


def compiler() -> str:
    """Return the C compiler that Triton calls: that of CC, even if empty, else gcc, else clang; or ""."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return next((found for found in map(shutil.which, names) if found), "")


def shadow() -> str:
    """Return the file of a package `kernels` that hides Hugging Face's, "" without one.

    An editable install of Hugging Face's does not list its files. Then nothing is said.
    """
    try:
        theirs = importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        return ""
    origin = origin_of("kernels")
    files = {
        x.name: theirs.locate_file(x) for x in theirs.files or () if x.parts[:-1] == ("kernels",)
    }
    if not origin or "__init__.py" not in files:
        return ""
    return "" if Path(origin).resolve() == Path(str(files["__init__.py"])).resolve() else origin


def variables(environment: dict[str, str]) -> dict[str, str]:
    """Return the variables that change what the library does, and those that look as if they did."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith("GRPO_FAST_")
        or name in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "CC")
    }


def python() -> str:
    """Return the interpreter."""
    return f"{platform.python_version()} ({sys.executable})"
