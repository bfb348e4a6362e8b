"""The other libraries' providers, where they are installed and run without a GPU: each computes its contract.

Liger's Triton kernels run in Triton's interpreter here. What needs a GPU is a skip that says so.
"""

import builtins
import sys

import pytest
import torch

from benchmarks import providers
from benchmarks.inputs import hidden, shapes
from benchmarks.inputs.batches import make_batch
from benchmarks.measuring import calls, gate

CPU = torch.device("cpu")
SHAPE = shapes.Shape(B=4, T=12, V=1003, G=2, D=48)
NAMES = [(stem, name) for stem, table in providers.PROVIDERS.items() for name in table]
VARIANTS = {"policy_loss": shapes.VARIANTS, "grpo": shapes.VARIANTS, "sequence_loss": ("gspo",)}
VARIANTS["linear_grpo"] = (*shapes.VARIANTS, shapes.REALISTIC, shapes.DEAD)
CASES = [
    (stem, name, variant)
    for stem, name in NAMES
    if name != "compile"
    for variant in VARIANTS.get(stem, ("full",))
]
THEIRS = ("trl", "liger", "cce", "quack", "verl")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the libraries
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the gate checks real inputs"),
]


def load(stem, name):
    try:
        return providers.load(stem, name)
    except providers.UnavailableError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def batches():
    made = {}

    def get(variant, hidden):
        if (variant, hidden) not in made:
            made[variant, hidden] = make_batch(
                SHAPE, variant, CPU, torch.float32, seed=1, hidden=hidden
            )
        return made[variant, hidden]

    return get


def result(stem, name, fn, batch):
    run = calls.forward if stem == "group_advantage" else calls.forward_backward
    return run(fn, calls.prepare(stem, name, batch))


@pytest.mark.parametrize("stem, name, variant", CASES)
def test_computes_its_contract(stem, name, variant, batches):
    fn = load(stem, name)
    batch = batches(variant, stem in providers.HIDDEN_PROVIDERS)
    errors = gate.check(stem, batch, *result(stem, name, fn, batch), factor=gate.factor_of(name))
    assert 0 <= max(errors.values()) < 1e-3


@pytest.mark.parametrize("stem, name", [x for x in NAMES if providers.library(x[1]) in THEIRS])
def test_missing_is_a_reason(stem, name, monkeypatch):
    """On a CPU, with nothing else installed."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    real = builtins.__import__

    def without(module, *args, **kwargs):
        if module.split(".")[0] in ("trl", "liger_kernel", "cut_cross_entropy", "quack", "verl"):
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(providers.UnavailableError, match=r"needs? a GPU|not installed"):
        providers.load(stem, name)


def test_what_a_head_imports_when_called_is_known_at_load(monkeypatch):
    pytest.importorskip("liger_kernel", reason="it is Liger's scaled cross-entropy")

    def lacking(device):
        raise ImportError("cutedsl backend requires the NVIDIA CUTLASS Python DSL")

    module = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    monkeypatch.setattr(f"{module}._resolve_implementation", lacking)
    with pytest.raises(providers.UnavailableError, match="CUTLASS"):
        providers.load("linear_logprob", "liger-scaled-ce")


@pytest.fixture
def hopper(monkeypatch):
    """Loaders find a GPU of compute capability 9.0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Writes modules to import, {path: source}, in place of what is installed."""
    monkeypatch.syspath_prepend(tmp_path)
    roots = set()

    def loaded():
        return [name for name in sys.modules if name.split(".")[0] in roots]

    def write(files):
        for name, source in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
            roots.add(name.split("/")[0])
        for name in loaded():
            monkeypatch.delitem(sys.modules, name)

    yield write
    for name in loaded():
        del sys.modules[name]


def test_quack_in_a_folder_that_it_refuses_is_a_reason(hopper, package):
    refusal = "raise TypeError('epilogue fn depends on <ContextVar>.\\nHoist it')"
    package({"quack/__init__.py": "", "quack/linear_cross_entropy.py": refusal})
    with pytest.raises(providers.UnavailableError, match=r"^QuACK: epilogue .* <ContextVar>\.$"):
        providers.load("linear_cross_entropy", "quack")


def test_a_broken_verl_is_known_at_load(hopper, package):
    head = "def linear_cross_entropy(*args):\n    from . import kernels"
    package(
        {
            "verl/__init__.py": "",
            "verl/utils/kernel/__init__.py": "",
            "verl/utils/kernel/linear_cross_entropy.py": head,
            "verl/utils/kernel/kernels.py": "import no_such_library_at_all",
        }
    )
    with pytest.raises(providers.UnavailableError, match="no_such_library_at_all"):
        providers.load("linear_logprob", "verl")


@pytest.mark.parametrize(
    "message, cause, missing",
    [
        ("Failed to import trl.trainer.grpo_trainer because", ImportError("lacks it"), True),
        ("Failed to import trl.trainer.grpo_trainer because", ValueError("broken"), False),
        ("Failed to import trl.trainer.grpo_trainer because", None, False),
        ("CUDA error: an illegal memory access", ImportError("lacks it"), False),
    ],
)
def test_a_runtime_error_is_a_reason_only_if_it_hides_an_import(
    message, cause, missing, monkeypatch
):
    def load():
        raise RuntimeError(message) from cause

    monkeypatch.setitem(providers.PROVIDERS["grpo"], "lazy", load)
    want = (providers.UnavailableError, "not installed: lacks it")
    with pytest.raises(want[0] if missing else RuntimeError, match=want[1] if missing else message):
        providers.load("grpo", "lazy")


@pytest.mark.parametrize("which", ["value", "dhidden", "dweight"])
@pytest.mark.parametrize("stem", providers.HIDDEN_PROVIDERS)
def test_gate_refuses_what_is_slightly_off(stem, which, batches):
    batch = batches("full", True)
    value, (dhidden, dweight) = result(stem, "eager", providers.load(stem, "eager"), batch)
    off = {"value": value, "dhidden": dhidden, "dweight": dweight}
    off[which] = off[which] * 1.002
    with pytest.raises(AssertionError, match=f"{stem}: {which}"):
        gate.check(stem, batch, off["value"], (off["dhidden"], off["dweight"]))


def test_the_gate_knows_whose_code_it_checks():
    assert gate.factor_of("grpo_fast-bf16") == gate.factor_of("eager") == gate.FACTOR
    assert gate.factor_of("cce-exact") == gate.FACTOR_OF_PEERS


def test_hidden_states_have_the_published_entropies():
    made = hidden.make(512, 512, 20_000, CPU, torch.float32, seed=0)
    seen = hidden.describe(made.hidden, made.weight, 512)
    assert seen["entropy_below_0.01"] == pytest.approx(0.506, abs=0.02)
    assert seen["entropy_above_0.672"] == pytest.approx(0.2, abs=0.02)
    logp = torch.log_softmax(made.hidden @ made.weight.mT, -1)
    drawn = logp.gather(1, made.ids[:, None]).mean().item()
    mean_entropy = -(logp.exp() * logp).sum(1).mean().item()
    assert drawn == pytest.approx(-mean_entropy, rel=0.2)  # ids come from their own distributions


def test_a_realistic_batch():
    shape = shapes.Shape(B=80, T=200, V=0, G=4)
    batch = make_batch(shape, "realistic", CPU, torch.float32)
    lengths = batch.arguments["mask"].sum(1)
    assert 0.42 < lengths.float().mean().item() / shape.T < 0.58
    assert 0 < (lengths == shape.T).float().mean().item() < 0.2  # cut off at T
    groups = batch.arguments["advantages"].view(-1, 4)
    assert (groups == 0).all(1).float().mean().item() == pytest.approx(0.4)
    assert 0.25 < batch.moving / shape.N < 0.35
    dead = make_batch(shape, shapes.DEAD, CPU, torch.float32)
    assert dead.moving == dead.live == shape.N * 2 // 5
