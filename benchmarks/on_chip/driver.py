"""Launch kernels that were compiled elsewhere through the CUDA driver's own interface, without Triton."""

import ctypes
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from grpo_fast.kernels import on_chip

MANIFEST = "manifest.json"  # of a folder of cubins
# Triton 3.9 appends two pointers, null where nothing is asked for (`backends/nvidia/driver.c`).
HIDDEN = ("global_scratch", "profile_scratch")
C_TYPES: dict[str, Any] = {"u64": ctypes.c_uint64, "u32": ctypes.c_int32, "f32": ctypes.c_float}


# The driver's structures and constants, from cuda.h.
class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id and a union of 64 bytes, of which three words are used here."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("count", ctypes.c_uint),
    ]


CLUSTER_DIMENSION, CLUSTER_SCHEDULING = 4, 5  # CU_LAUNCH_ATTRIBUTE_...
SPREAD = 1  # CU_CLUSTER_SCHEDULING_POLICY_SPREAD
DYNAMIC_SHARED, NON_PORTABLE_CLUSTER = 8, 14  # CU_FUNC_ATTRIBUTE_...
PORTABLE_CLUSTER = 8
STATIC_LIMIT = 48 << 10  # bytes of shared memory that need not be asked for


def load(folder: Path) -> "dict[str, Kernel]":
    """Load all variants of a folder that `benchmarks.on_chip` wrote, by name."""
    manifest = json.loads((folder / MANIFEST).read_text())
    torch.zeros(1, device="cuda")  # makes the context current
    return {f"cubin {entry['name']}": Kernel(folder, entry) for entry in manifest["variants"]}


class Kernel:
    """A variant, loaded into the current CUDA context; it stands in for the module `on_chip`."""

    def __init__(self, folder: Path, entry: dict[str, Any]) -> None:
        self.entry = entry
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        self.image = (folder / entry["cubin"]).read_bytes()
        self.call("cuModuleLoadData", ctypes.byref(self.module), self.image)
        name = entry["kernel"].encode()
        self.call("cuModuleGetFunction", ctypes.byref(self.function), self.module, name)
        wanted = {DYNAMIC_SHARED: entry["shared"]} if entry["shared"] > STATIC_LIMIT else {}
        wanted |= {NON_PORTABLE_CLUSTER: 1} if entry["num_ctas"] > PORTABLE_CLUSTER else {}
        for attribute, value in wanted.items():
            self.call("cuFuncSetAttribute", self.function, attribute, value)

    def call(self, function: str, *arguments: Any) -> None:
        status = getattr(self.driver, function)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{function}: {status}, {(text.value or b'?').decode()}")

    def config(self, programs: int) -> LaunchConfig:
        """Return the launch configuration of `programs` clusters; its grid counts thread blocks."""
        ctas = self.entry["num_ctas"]
        attributes = (LaunchAttribute * 2)()
        attributes[0].id = CLUSTER_DIMENSION
        attributes[0].value[:3] = (ctas, 1, 1)
        attributes[1].id = CLUSTER_SCHEDULING
        attributes[1].value[0] = SPREAD
        return LaunchConfig(
            grid=(programs * ctas, 1, 1),
            block=(32 * self.entry["num_warps"], 1, 1),
            shared=self.entry["shared"],
            stream=torch.cuda.current_stream().cuda_stream,
            attributes=attributes,
            count=len(attributes),
        )

    def grpo_fwd_bwd(self, *arguments: Any, **more: Any) -> Any:
        """Launch this kernel as `on_chip.grpo_fwd_bwd` launches Triton's."""
        with mock.patch.object(on_chip, "_on_chip_kernel", self):
            return on_chip.grpo_fwd_bwd(*arguments, **more)

    def about(self) -> dict[str, int]:
        """Return the registers of a thread, and how many rows are in flight at once."""
        return {"registers": self.entry["registers"], "rows_in_flight": self.clusters()}

    def clusters(self) -> int:
        """Count the clusters that the GPU holds at once."""
        count = ctypes.c_int()
        config = ctypes.byref(self.config(1024))
        function = "cuOccupancyMaxActiveClusters"
        self.call(function, ctypes.byref(count), self.function, config)
        return count.value

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return a function that launches `grid` programs, as a kernel of Triton does."""
        return functools.partial(self.launch, grid[0])

    def launch(self, programs: int, **arguments: Any) -> None:
        """Launch with those arguments that the kernel takes; the others are constants in it."""
        values = []
        for name, kind in self.entry["parameters"]:
            first, *fields = name.split(".")  # `targets.ids`: a member of a named tuple
            value = 0 if name in HIDDEN else functools.reduce(getattr, fields, arguments[first])
            if isinstance(value, Tensor):
                value = value.data_ptr()
            values.append(C_TYPES[kind](value))
        # One address for each parameter; `values` keeps them alive until the launch has copied them.
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        config = ctypes.byref(self.config(programs))
        self.call("cuLaunchKernelEx", config, self.function, addresses, None)
