"""The benchmark of a TRL step: a wrong provider gets no number."""

import gc
import json
import sys

import pytest
import torch

pytest.importorskip("trl", "1.15", reason="the benchmark is of TRL's trainer")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of TRL and its libraries
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU TRL moves the model there"),
]

from benchmarks import bench_trl_step as bench  # noqa: E402
from benchmarks.measuring import measure, recorder  # noqa: E402
from grpo_fast import shared_prompt  # noqa: E402
from tests.support.results import Benchmark  # noqa: E402

SHAPE = bench.Model(V=50, D=16, layers=1, heads=2, kv_heads=1, ffn=32, B=2, T=6)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    monkeypatch.setattr(measure, "ABSENT", {})
    monkeypatch.setattr(bench, "LONG_PROMPT", 64)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(bench.shapes, "device", lambda: CPU)


def setup(provider, variant, dtype=torch.float32):
    trainer = bench._trainer(provider, variant, SHAPE, dtype)
    return trainer, bench._inputs(SHAPE, variant)


@pytest.mark.parametrize("variant", bench.VARIANTS)
@pytest.mark.parametrize("provider", bench.PROVIDERS)
def test_providers_agree(provider, variant):
    trainer, inputs = setup(provider, variant)
    errors = bench._check(trainer, inputs, provider, torch.float64)
    assert 0 < errors["gradient"] < 1e-5
    loss, gradient = bench._step(trainer, inputs)
    assert loss.isfinite()
    assert gradient.abs().max() > 0
    assert type(trainer).__module__.startswith("grpo_fast") == provider.startswith("grpo_fast")


@pytest.mark.parametrize("provider", ["grpo_fast", "grpo_fast-shared"])
def test_one_of_them_shares_the_prompt(provider, monkeypatch):
    ran = []
    routes = shared_prompt.passes.ROUTES
    for name, route in dict(routes).items():
        monkeypatch.setitem(
            routes, name, lambda *x, name=name, route=route, **y: ran.append(name) or route(*x, **y)
        )
    trainer, inputs = setup(provider, bench.ONE_PROMPT)
    bench._step(trainer, inputs)
    assert bool({"packed", "mask", "fork"} & set(ran)) == (provider == "grpo_fast-shared")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_plain_head_is_lean_and_accurate(monkeypatch, dtype):
    monkeypatch.setattr(bench, "ENTROPY_ROWS", 4)
    logits = (4 * torch.randn(2, 8, 50)).to(dtype).requires_grad_()
    ids = torch.randint(50, (2, 8))

    def model(**_):
        return type("Output", (), {"logits": logits})

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        logps, entropy, _ = bench._plain_log_probs(1.0)(model, ids, None, 5)
    assert len({x.data_ptr() for x in kept if x.shape[-1] == 50}) == 1, "nothing of the entropy"
    assert not entropy.requires_grad
    assert logps.dtype == entropy.dtype == (dtype if dtype == torch.float64 else torch.float32)
    want = logits.double()[:, -6:-1].log_softmax(-1)
    close = {"rtol": 1e-5, "atol": 1e-5}
    right = want.gather(-1, ids[:, -5:, None]).squeeze(-1)
    torch.testing.assert_close(logps.double(), right, **close)
    torch.testing.assert_close(entropy.double(), -(want.exp() * want).sum(-1).detach(), **close)
    half, _, _ = bench._plain_log_probs(2.0)(model, ids, None, 5)
    warm = (logits[:, -6:-1] / 2).double().log_softmax(-1).gather(-1, ids[:, -5:, None])
    torch.testing.assert_close(half.double(), warm.squeeze(-1), **close)


def test_the_check_leaves_no_copy_of_the_model():
    """A 7B model in float32 takes 30 GB: a copy that waits for the garbage collector is one too many."""
    trainer, inputs = setup("trl", "on-policy")
    rows = bench._some_rows(inputs, SHAPE.V)
    assert rows.tolist() == list(range(SHAPE.V))

    def weights():
        shape = trainer.model.get_output_embeddings().weight.shape
        found = [x for x in gc.get_objects() if isinstance(x, torch.nn.Parameter)]
        return sum(x.shape == shape for x in found)

    gc.collect()
    before = weights()
    gc.disable()
    try:
        bench._plain_step(trainer, inputs, torch.float64, rows)
        assert weights() == before
    finally:
        gc.enable()


def test_the_rows_that_are_checked():
    inputs = {"completion_ids": torch.tensor([[7, 99_999], [7, 31]])}
    rows = bench._some_rows(inputs, 100_000)
    assert {7, 31, 99_999} <= set(rows.tolist())
    assert bench.CHECKED_ROWS <= len(rows) <= bench.CHECKED_ROWS + 3


def test_one_that_is_slightly_off_is_refused():
    trainer, inputs = setup("grpo_fast", "on-policy")
    fused = trainer._compute_loss
    trainer._compute_loss = lambda *args: 1.001 * fused(*args)
    with pytest.raises(AssertionError, match="loss: error"):
        bench._check(trainer, inputs, "grpo_fast", torch.float64)
    assert measure.ABSENT["trl_step grpo_fast"].startswith("wrong result: loss")


@pytest.mark.parametrize("provider", bench.PROVIDERS)
def test_in_bfloat16_the_truth_is_float32(provider):
    trainer, inputs = setup(provider, "off-policy-kl", torch.bfloat16)
    assert trainer.model.dtype == torch.bfloat16
    errors = bench._check(trainer, inputs, provider, torch.float32)
    assert 0 < errors["gradient"] < 0.1


def test_the_benchmark_records_what_it_measures(monkeypatch, tmp_path):
    written = recorder.Recorder(tmp_path / "out.json")
    monkeypatch.setattr(measure, "RECORDER", [written])
    monkeypatch.setattr(bench, "MODELS", {"cpu": {"tiny": SHAPE}})
    bench.bench_step(
        Benchmark("bench_step"), measure.Case("trl_step", "tiny", "on-policy", "grpo_fast")
    )
    (entry,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert entry["stats"]["rounds"] == bench.ROUNDS
    info = entry["extra_info"]
    assert (info["stem"], info["shape"], info["roof"]) == ("trl_step", "tiny", None)
    assert set(info["errors"]) == {"loss", "gradient"}


def test_what_trl_cannot_import_is_a_reason(monkeypatch):
    """An import error of TRL is a reason to skip; as a RuntimeError of `trl` it would end the run."""
    import trl

    for module in (trl, trl.trainer):  # what it has loaded already
        monkeypatch.delitem(vars(module), "GRPOTrainer", raising=False)
    monkeypatch.setitem(sys.modules, "trl.trainer.grpo_trainer", None)
    with pytest.raises(RuntimeError, match=r"Failed to import trl\."):
        _ = trl.GRPOTrainer
    monkeypatch.setattr(bench, "MODELS", {"cpu": {"tiny": SHAPE}})
    with pytest.raises(pytest.skip.Exception):
        bench.bench_step(
            Benchmark("bench_step"), measure.Case("trl_step", "tiny", "on-policy", "trl")
        )
    assert "trl.trainer.grpo_trainer" in measure.ABSENT["trl_step trl"]
