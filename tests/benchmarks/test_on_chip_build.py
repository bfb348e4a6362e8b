"""The kernel that keeps rows on the chip: what it compiles to, and its launch without Triton."""

import ctypes
import json
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the kernel needs Triton")
import triton

from benchmarks.codegen import reports as codegen
from benchmarks.codegen.launches import record
from benchmarks.experiments import variants
from benchmarks.inputs import shapes
from benchmarks.inputs.batches import make_batch
from benchmarks.measuring import gate
from benchmarks.on_chip import build as on_chip_build
from benchmarks.on_chip import cases as on_chip_cases
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
    return codegen.collect(on_chip_cases.TARGETS, on_chip=True)


def spread(case):
    """How the launch of a case spreads a row."""
    return record(on_chip_cases.CASES[case]).arguments["SPREAD"]


def test_nothing_spills(reports):
    assert len(reports) == len(on_chip_cases.CASES) * len(on_chip_cases.TARGETS)
    assert {(x.case, x.target): x.stack for x in reports if x.stack} == {}


def test_two_thread_blocks_are_resident(reports):
    """Half the multiprocessor waits for its cluster while the other half moves bytes."""
    few = {(x.case, x.target): x.registers for x in reports if x.resident_programs() < 2}
    assert few == {}


def test_rows_are_moved_16_bytes_at_once(reports):
    for x in reports:
        for moved in x.accesses.values():
            assert moved["128"] >= spread(x.case).STRIPS, x
            assert sum(n for bits, n in moved.items() if bits != "128") < FEW, x


def test_a_single_thread_block_waits_for_no_cluster(reports):
    for x in reports:
        assert bool(x.cluster_barriers) == (spread(x.case).CTAS > 1), x


@pytest.mark.parametrize("case", on_chip_cases.CASES)
def test_a_launch_asks_for_its_cluster_and_for_fused_products(case):
    arguments = record(on_chip_cases.CASES[case]).arguments
    assert arguments["num_ctas"] == arguments["SPREAD"].CTAS
    assert arguments["num_warps"] * 32 == arguments["SPREAD"].THREADS
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
    first, *_ = on_chip_build.VARIANTS.values()
    assert first == on_chip.plan(variants.S0.V, bonus=False)
    for name, plan in on_chip_build.VARIANTS.items():
        most = [f"r{plan.registers}"] * bool(plan.registers)
        parts = "-".join([f"{plan.ctas}x{plan.warps}", plan.keep, *most])
        assert name.removesuffix(on_chip_build.RELAXED) == parts


def test_only_the_last_barrier_is_relaxed():
    arrive = "barrier.cluster.arrive.aligned;"
    ptx = f"a\n{arrive}\nst.global\n{arrive}\nret;"
    got = on_chip_build.relax_exit(ptx)
    assert got == f"a\n{arrive}\nst.global\nbarrier.cluster.arrive.relaxed.aligned;\nret;"
    with pytest.raises(ValueError, match="not where it was expected"):
        on_chip_build.relax_exit(f"{arrive}\nst.global")


def test_a_folder_of_compiled_kernels_is_loaded_by_name(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(driver, "Kernel", lambda *given: made.append(given) or "kernel")
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    entry = {"name": "8x8-e", "cubin": "8x8-e.cubin"}
    (tmp_path / driver.MANIFEST).write_text(json.dumps({"variants": [entry]}))
    assert driver.load(tmp_path) == {"cubin 8x8-e": "kernel"}
    assert made == [(tmp_path, entry)]


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU `variants --cubins` checks it"
)
@pytest.mark.parametrize("keep", ["e", "bits"])
def test_the_check_of_the_benchmark(keep, monkeypatch):
    """The kernel in the interpreter in place of the driver's: both ways to keep a row, in several strips."""
    monkeypatch.setattr(on_chip, "plan", lambda V, bonus: on_chip.Plan(2, 1, keep))
    batch = make_batch(shapes.Shape(B=2, T=4, V=1000, G=2), "full", CPU, torch.float16)
    launched = []

    class Kernel(driver.Kernel):
        def __init__(self):
            pass

        def __getitem__(self, grid):
            launched.append(grid)
            return interpreted[grid]

    interpreted = on_chip._on_chip_kernel
    gradient = torch.full_like(batch.logits, torch.nan)
    loss = variants.launch(Kernel(), batch, batch.logits.clone(), gradient)
    gate.check("grpo", batch, loss.sum(), (gradient,))
    assert launched == [(8,)]
