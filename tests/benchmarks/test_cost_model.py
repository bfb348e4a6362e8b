"""The cost model: predictions by hand, and next to a measurement."""

import pytest

from benchmarks.inputs import shapes
from benchmarks.measuring import traffic
from benchmarks.predictions import cost_model
from benchmarks.report import committed

H100 = "NVIDIA H100 80GB HBM3"
S0 = shapes.get("qwen2.5-7b-16k")
SIZES = {"B": 16, "T": 1024, "V": 152_064, "D": 3584, "G": 4}


def predict(stem, case, name="H200", live=S0.N, moving=S0.N, sizes=SIZES, provider=cost_model.OWN):
    top = cost_model.ceilings(name)
    launch = cost_model.Launch(stem, case, sizes, live, moving, provider)
    return cost_model.predict(launch, name, top)


def test_bytes_set_the_time_of_the_kernels():
    passes = S0.N * S0.V * 2 / (4.8e12 * 0.9)
    read = predict("logprob", "forward")
    assert read.bound == "bytes"
    assert read.low == pytest.approx(passes + cost_model.LAUNCH)
    both = predict("grpo", "forward_backward")
    assert both.low == pytest.approx(2 * passes + cost_model.LAUNCH)
    assert both.high == pytest.approx(3 * passes + cost_model.LAUNCH, rel=1e-4)


def test_tokens_without_gradient_are_not_read_again():
    some = predict("grpo", "forward_backward", moving=0)
    assert some.high == pytest.approx(some.low, rel=1e-4)
    none = predict("grpo", "forward_backward", live=0, moving=0)
    assert none.low == pytest.approx(S0.N * S0.V * 2 / (4.8e12 * 0.9) + cost_model.LAUNCH)


def test_matrix_multiplications_set_the_time_from_hidden_states():
    made = predict("linear_grpo", "forward_backward")
    gemms = 6 * S0.N * S0.D * S0.V / (989e12 * 0.8)
    assert gemms < made.low < made.high < 1.25 * gemms


def test_share_of_the_bare_products():
    bare = 6 * S0.N * S0.D * S0.V / cost_model.ceilings("H100").gemm
    own, halves = cost_model.of_products("H100")
    made = predict("linear_grpo", "forward_backward", "H100")
    assert own == f"grpo_fast {made.low / bare:.2f} to {made.high / bare:.2f}"
    assert halves.startswith("grpo_fast-bf16 1.")


@pytest.mark.parametrize("fp32, rows", [(True, 3328), (False, 5504)])
def test_chunks_are_those_of_the_head(fp32, rows):
    h200 = cost_model.GPUS["H200"]
    assert cost_model.chunk(h200, S0.N, S0.D, S0.V, fp32) == rows


def test_each_provider_has_its_own_prediction():
    """By hand: bytes of an entry of the logits, chunks of 3328 (5, of 16,640 rows) and 5504 (3)."""
    top = cost_model.Ceilings(1e12, 1e15, "")
    entries, parameters = S0.N * S0.V, S0.V * S0.D
    for provider, read, chunks, rows, more in (
        ("grpo_fast", 4, 5, 16_640, 2),
        ("grpo_fast-bf16", 2, 3, 16_512, 0),
    ):
        launch = "linear_grpo", "forward_backward", SIZES, S0.N, S0.N, provider
        made = cost_model.predict(cost_model.Launch(*launch), "H200", top)
        gemms = 6 * rows * parameters / 1e15
        assert made.low == pytest.approx(gemms + (read + 2) * entries / 1e12, rel=1e-3)
        dweight = (8 * chunks - 4 + 6) * parameters
        dhidden = 8 * S0.N * S0.D
        high = gemms + ((2 * read + 2 + more) * entries + dweight + dhidden) / 1e12
        assert made.high == pytest.approx(high, rel=1e-3)
    half = predict("linear_grpo", "forward_backward", moving=S0.N // 2)
    every = predict(
        "linear_grpo", "forward_backward", moving=S0.N // 2, provider="grpo_fast-all-rows"
    )
    assert every == predict("linear_grpo", "forward_backward")
    assert half.high < 0.52 * every.high
    none = predict("linear_grpo", "forward_backward", moving=0)
    assert 0 < none.low < none.high < 0.1 * every.low


def test_a_faster_memory_moves_the_bound_to_the_instructions():
    slow = cost_model.Ceilings(1e12, 1e15, "")
    fast = cost_model.Ceilings(1e15, 1e15, "")
    launch = cost_model.Launch("grpo", "forward_backward", SIZES, S0.N, S0.N)
    assert cost_model.predict(launch, "H200", slow).bound == "bytes"
    bound = cost_model.predict(launch, "H200", fast).bound
    assert bound in ("instructions", "exponentials")


def test_every_gpu_of_the_table_has_every_example():
    lines = cost_model.table().splitlines()
    assert len(lines) == 2 + len(cost_model.EXAMPLES)
    assert all(line.count(" to ") == len(cost_model.GPUS) for line in lines[2:])


def run_on(device, **extra):
    entry = {
        "stem": "grpo",
        "case": "forward_backward",
        "provider": "grpo_fast-inplace",
        "shape": "qwen2.5-7b-16k",
        "variant": "full",
        "dtype": "bfloat16",
        "sizes": SIZES,
        "live_tokens": S0.N,
        "moving_tokens": S0.N,
        "median": 2.6e-3,
        "roofs": {"copy": 4e12, "read": 4e12, "gemm": {"bfloat16": 7e14, "float32": 5e13}},
    }
    return committed.Run("grpo", {"device": device}, "2026-01-01", [entry | extra], {})


@pytest.mark.parametrize("device, name", [("NVIDIA H200", "H200"), (H100, "H100")])
def test_prediction_stands_next_to_the_measurement(device, name):
    head, _, row = cost_model.comparison_table([run_on(device)]).splitlines()
    sheet = predict("grpo", "forward_backward", name)
    low = traffic.grpo(S0.N, S0.N, S0.N, S0.V, 2).least / 4e12 + cost_model.LAUNCH
    assert f"full | {sheet.low * 1e3:.2f} to {sheet.high * 1e3:.2f} | {low * 1e3:.2f} to " in row
    assert row.endswith(f"| 2.60 | {2.6e-3 / low:.2f} |")
    assert row.count("|") == head.count("|")


def test_nothing_is_predicted_of_what_the_model_does_not_know():
    assert list(cost_model.comparison(run_on("Another GPU"))) == []
    assert list(cost_model.comparison(run_on(H100, provider="eager"))) == []
    assert list(cost_model.comparison(run_on(H100, stem="policy_loss"))) == []
    step = run_on(H100)
    del step.entries[0]["moving_tokens"]
    assert list(cost_model.comparison(step)) == []


@pytest.mark.parametrize(
    "device, name",
    [
        (H100, "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        (f"{H100} MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("T4", None),
    ],
)
def test_gpu_by_the_name_of_its_driver(device, name):
    assert cost_model.gpu_of(device) == name
