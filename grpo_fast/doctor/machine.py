"""The facts about a machine that the doctor reports and judges."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

import torch

import grpo_fast
from grpo_fast.integrations.shared.packages import VERSIONS
from grpo_fast.ops.backend import OLDEST_TORCH, OLDEST_TRITON

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
        driver: the version of NVIDIA's driver, "" without one.
        compiler: the C compiler that Triton would call, "" without one.
        shadow: a regular package `kernels` that is not Hugging Face's, "" without one.
        variables: the environment variables that have a meaning here, and unknown ones of this library.
    """

    versions: dict[str, str | None]
    build: str = "CPU"
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    compiler: str = "/usr/bin/gcc"
    shadow: str = ""
    variables: dict[str, str] = dataclasses.field(default_factory=dict)
    python: str = platform.python_version()
    system: str = platform.platform()
    source: str = ""


def examine() -> Machine:
    """Look at this machine. No package is imported but PyTorch."""
    return Machine(
        versions={name: version_of(name) for name in RANGES},
        build=build_of_torch(),
        gpus=gpus(),
        driver=DRIVER.read_text().splitlines()[0] if DRIVER.is_file() else "",
        compiler=compiler(),
        shadow=shadow(),
        variables=variables(dict(os.environ)),
        source=str(Path(grpo_fast.__file__).parent),
    )


def version_of(name: str) -> str | None:
    """Return the version of a distribution; None where it is not installed. Nothing is imported."""
    if name == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def build_of_torch() -> str:
    """Return for what PyTorch was built."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that PyTorch sees."""
    if not torch.cuda.is_available():
        return ()
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(Gpu(x.name, (x.major, x.minor), x.total_memory) for x in found)


def compiler() -> str:
    """Return the C compiler that Triton calls: that of CC, else gcc, else clang; "" if there is none."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    return next((found for found in map(shutil.which, names) if found), "")


def shadow() -> str:
    """Return where a regular package `kernels` is that is not Hugging Face's, "" without one."""
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None or version_of("kernels") is not None:
        return ""
    return spec.origin


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
