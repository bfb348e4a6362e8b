import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or deterministic mode warns of cuBLAS


def pytest_configure(config):
    """On a GPU PyTorch warns once of a backward whose thread starts with cuBLAS: no error of that test."""
    config.addinivalue_line("filterwarnings", "ignore:Attempting to run cuBLAS:UserWarning")


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    """What the interpreter lacks: bands around buffers, and one rounding in `fma`, as in hardware."""
    if os.environ.get("TRITON_INTERPRET") != "1" or not importlib.util.find_spec("triton"):
        yield
        return
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

    from tests.guards import guarded

    def create_fma(self, x, y, z):
        exact = x.data.astype("float64") * y.data + z.data
        return TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_fma", create_fma)
        patch.setattr(GridExecutor, "__call__", guarded(GridExecutor.__call__))
        yield


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch) -> str:
    """Both implementations of every op: PyTorch's operators, and the kernels (interpreted without a GPU)."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="the kernels need Triton")
    monkeypatch.setenv("GRPO_FAST_BACKEND", request.param)
    return request.param


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """Seed, and fill `torch.empty` with NaN: a kernel that skips an element must fail."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
