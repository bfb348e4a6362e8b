"""The benchmark of a TRL step: what is wrong gets no number."""

import pytest
import torch

pytest.importorskip("trl", "1.16", reason="the benchmark is of TRL's trainer")
pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and its libraries

from benchmarks import bench_trl_step as bench  # noqa: E402
from benchmarks import measure  # noqa: E402

SIZES = {"B": 2, "T": 6, "V": 50, "D": 16}


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    monkeypatch.setattr(measure, "ABSENT", {})


def setup(provider, variant):
    trainer = bench._trainer(provider, variant, SIZES, layers=1)
    return trainer, bench._inputs(SIZES, torch.device("cpu"), variant)


@pytest.mark.parametrize("variant", ["on-policy", "off-policy-kl"])
@pytest.mark.parametrize("provider", bench.PROVIDERS)
def test_providers_agree(provider, variant):
    trainer, inputs = setup(provider, variant)
    bench._check(trainer, inputs, provider)
    loss, gradient = bench._step(trainer, inputs)
    assert loss.isfinite()
    assert gradient.abs().max() > 0
    assert type(trainer).__module__.startswith("grpo_fast") == (provider == "grpo_fast")


def test_one_that_is_slightly_off_is_refused():
    trainer, inputs = setup("grpo_fast", "on-policy")
    fused = trainer._compute_loss
    trainer._compute_loss = lambda *args: 1.001 * fused(*args)
    with pytest.raises(AssertionError, match="loss: error"):
        bench._check(trainer, inputs, "grpo_fast")
    assert measure.ABSENT["trl_step grpo_fast"].startswith("wrong result: loss")
