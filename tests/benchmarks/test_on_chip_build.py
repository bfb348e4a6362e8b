"""The kernel that keeps rows on the chip: what it compiles to, and its launch without Triton."""

import ctypes
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the kernel needs Triton")
import triton

from benchmarks.codegen.launches import specialise
from benchmarks.inputs import shapes
from benchmarks.on_chip import build as on_chip_build
from benchmarks.on_chip import check as on_chip_check
from benchmarks.on_chip import codegen as on_chip_codegen
from benchmarks.on_chip import driver
from grpo_fast.kernels import on_chip

CPU = torch.device("cpu")
OLD = tuple(int(n) for n in triton.__version__.split(".")[:2]) < on_chip.OLDEST_TRITON
# Narrow accesses of a row: what belongs to its token, and the loops of `read_again`, which hardly ever run.
FEW = 30


@pytest.fixture(scope="module")
def reports():
    if OLD:
        pytest.skip(f"Triton {triton.__version__} has no reductions over a cluster: 3.8 has")
    return on_chip_codegen.collect()


def test_nothing_spills(reports):
    assert len(reports) == len(on_chip_codegen.CASES) * len(on_chip_codegen.TARGETS)
    assert {(x.case, x.target): x.stack for x in reports if x.stack} == {}


def test_two_thread_blocks_are_resident(reports):
    """Half the multiprocessor waits for its cluster while the other half moves bytes."""
    assert {(x.case, x.target): x.registers for x in reports if x.thread_blocks() < 2} == {}


def test_rows_are_moved_16_bytes_at_once(reports):
    for x in reports:
        assert x.loads["128"] >= x.strips, x
        assert x.stores["128"] >= x.strips, x
        assert sum(n for bits, n in x.loads.items() if bits != "128") < FEW, x
        assert sum(n for bits, n in x.stores.items() if bits != "128") < FEW, x


def test_a_single_thread_block_waits_for_no_cluster(reports):
    for x in reports:
        assert bool(x.cluster_barriers) == (x.ctas > 1), x


@pytest.mark.parametrize("case", on_chip_codegen.CASES)
def test_a_launch_asks_for_its_cluster_and_for_fused_products(case):
    arguments = on_chip_codegen.CASES[case].launch().arguments
    assert arguments["num_ctas"] == arguments["CTAS"]
    assert arguments["num_warps"] * 32 == arguments["THREADS"]
    assert arguments["enable_fp_fusion"] is True


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
    kernel[(5,)](low=0.75, V=1003, x=x, num_ctas=8, KEEP="e")
    assert seen["attribute"] == (4, [8, 1, 1])
    assert seen["config"] == ([40, 1, 1], [128, 1, 1], 64, 7, 2)
    assert seen["values"] == [x.data_ptr(), 1003, 0.75, 0]


def test_variants():
    names = "8x8-e 8x8-e-relaxed 8x16-e-r64 8x16-bits-r64 16x4-e 16x8-e-r64 4x16-e"
    assert [variant.name for variant in on_chip_build.VARIANTS] == names.split()
    shape = shapes.CUDA[on_chip_build.SHAPE]
    assert on_chip_build.VARIANTS[0].plan == on_chip.plan(shape.V, bonus=False)


def test_what_is_checked_and_timed_is_what_was_compiled():
    """The driver launches one specialisation: constants, types and divisors of both shapes are the same."""
    plan = on_chip_build.VARIANTS[0].plan
    shape = shapes.CUDA[on_chip_build.SHAPE]
    timed, checked = (on_chip_build.launch_of(x, plan) for x in (shape, on_chip_check.CHECKED))
    kernel = on_chip._on_chip_kernel
    if os.environ.get("TRITON_INTERPRET") == "1":
        kernel = triton.JITFunction(kernel.fn, do_not_specialize=["T_len"])
    one, two = (specialise(x._replace(fn=kernel)) for x in (timed, checked))
    assert one == two


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
@pytest.mark.parametrize("keep", ["e", "bits"])
def test_the_check_of_the_benchmark(keep, monkeypatch):
    """The kernel in the interpreter in place of the driver's: both ways to keep a row, in several strips."""
    plan = on_chip.Plan(2, 1, keep)
    monkeypatch.setattr(on_chip, "plan", lambda V, bonus: plan)
    rows = on_chip_check.Rows.make(shapes.Shape(B=2, T=4, V=1000, G=2), "padded", CPU)
    assert 0 < rows.mask.sum() < len(rows.mask)
    rows.logits[~rows.mask] = torch.nan
    gradient = torch.full_like(rows.logits, torch.nan)
    result = {**rows.run(on_chip._on_chip_kernel, rows.logits, gradient), "gradient": gradient}
    for name, error in on_chip_check.errors(rows, {"kernel": result}).items():
        # The interpreter's bfloat16 is truncated, hardware's is rounded.
        factor = (
            2 * on_chip_check.FACTOR if name in ("gradient", "scored") else on_chip_check.FACTOR
        )
        bound = factor * error["plain"] + on_chip_check.FLOOR * error["largest"]
        assert error["kernel"] <= bound, name
