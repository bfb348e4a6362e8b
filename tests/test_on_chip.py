"""The kernel that keeps a row on chip: its maths in the interpreter, and its launch without Triton."""

import ctypes
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the kernel needs Triton")

from benchmarks import driver, on_chip_build, on_chip_check, shapes
from benchmarks.on_chip_kernel import SIGNATURE, on_chip_kernel

CPU = torch.device("cpu")
SMALL = {keep: on_chip_build.Variant(2, 1, keep) for keep in ("e", "bits")}  # strips of 512


class Interpreted:
    """In place of `driver.Kernel`."""

    def __init__(self, variant):
        self.variant = variant

    def launch(self, programs, **arguments):
        on_chip_kernel[(programs,)](**arguments, **self.variant.constants(arguments["V"]))


def test_the_drivers_structures_are_laid_out_as_in_cuda_h():
    def offsets(structure):
        return {name: getattr(structure, name).offset for name, _ in structure._fields_}

    assert ctypes.sizeof(driver.LaunchAttribute) == 72
    assert offsets(driver.LaunchAttribute) == {"id": 0, "pad": 4, "value": 8}
    assert ctypes.sizeof(driver.LaunchConfig) == 56
    want = {"grid": 0, "block": 12, "shared": 24, "stream": 32, "attributes": 40, "count": 48}
    assert offsets(driver.LaunchConfig) == want


def test_a_launch_hands_the_driver_the_values_in_order(monkeypatch):
    seen = {}

    def launch(config, function, addresses, extra):
        config = config._obj
        cluster = config.attributes[0]
        seen["attribute"] = cluster.id, cluster.value[:3]
        seen["config"] = config.grid[:], config.block[:], config.shared, config.stream, config.count
        seen["values"] = [
            driver.C_TYPES[kind].from_address(address).value
            for address, (_, kind) in zip(addresses, kernel.entry["parameters"], strict=True)
        ]
        return 0

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    kernel = object.__new__(driver.Kernel)
    kernel.driver = SimpleNamespace(cuLaunchKernelEx=launch)
    kernel.function = ctypes.c_void_p()
    parameters = [["x", "u64"], ["V", "u32"], ["low", "f32"], [driver.HIDDEN[0], "u64"]]
    kernel.entry = {"num_ctas": 8, "num_warps": 4, "shared": 64, "parameters": parameters}
    x = torch.zeros(3)
    kernel.launch(5, low=0.75, V=1003, x=x)
    assert seen["attribute"] == (4, [8, 1, 1])
    assert seen["config"] == ([40, 1, 1], [128, 1, 1], 64, 7, 2)
    assert seen["values"] == [x.data_ptr(), 1003, 0.75, 0]


def test_variants():
    names = (
        "8x8-e 8x8-e-relaxed 16x8-e-r64 16x4-e 8x4-bits-r168 16x8-e-r64-relaxed 8x16-e-r64 4x32-e"
    )
    want = [*names.split(), "8x8-bits", "8x4-e"]
    assert [variant.name for variant in on_chip_build.VARIANTS] == want
    V = shapes.CUDA[on_chip_build.SHAPE].V
    for variant in on_chip_build.VARIANTS:
        constants = variant.constants(V)
        assert list(SIGNATURE) + list(constants) == on_chip_kernel.arg_names
        last = V - (constants["STRIPS"] - 1) * variant.strip
        assert 0 < last <= variant.strip


def test_only_the_last_barrier_is_relaxed():
    arrive = "barrier.cluster.arrive.aligned;"
    ptx = f"a\n{arrive}\nst.global\n{arrive}\nret;"
    got = on_chip_build.relax_exit(ptx)
    assert got == f"a\n{arrive}\nst.global\nbarrier.cluster.arrive.relaxed.aligned;\nret;"
    with pytest.raises(ValueError, match="not where it was expected"):
        on_chip_build.relax_exit(f"{arrive}\nst.global")


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU `benchmarks.on_chip run` checks it"
)
@pytest.mark.parametrize("V", [500, 1003, 1024])  # one strip, a tail, a full last strip
@pytest.mark.parametrize("keep", SMALL)
def test_is_right(keep, V):
    rows = on_chip_check.Rows.make(shapes.Shape(B=2, T=4, V=V, G=2), "padded", CPU)
    ends = (0, V - 1, 0, 0, 511 % V, 512 % V, 7, 8)  # of strips, and of what a thread has
    for row, column in enumerate(ends):
        old = rows.ids[row].item()
        rows.logits[row, [old, column]] = rows.logits[row, [column, old]]
        rows.ids[row] = column
    rows.logits[6, rows.ids[6]] += 12.0  # p next to 1
    assert 0 < rows.mask.sum() < len(rows.mask)
    rows.logits[~rows.mask] = torch.nan
    kernel = Interpreted(SMALL[keep])
    # The gradient in float32: the interpreter's bfloat16 is truncated, hardware's is rounded.
    gradient = torch.full(rows.logits.shape, torch.nan)
    result = {**rows.run(kernel, rows.logits, gradient), "gradient": gradient}
    for name, error in on_chip_check.errors(rows, {"kernel": result}).items():
        # Plain PyTorch's gradient is rounded to bfloat16, which is no yardstick here.
        plain = 0.0 if name in ("gradient", "scored") else error["plain"]
        bound = on_chip_check.FACTOR * plain + on_chip_check.FLOOR * error["largest"]
        assert error["kernel"] <= bound, name

    within, apart = rows.logits.clone(), torch.full_like(rows.logits, torch.nan)
    rows.run(kernel, rows.logits, apart)
    again = rows.run(kernel, within, within)
    same = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(within, apart, **same)
    torch.testing.assert_close(again, {name: result[name] for name in again}, **same)
