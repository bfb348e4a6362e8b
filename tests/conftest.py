import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or deterministic mode warns of cuBLAS
# Compiling takes seconds; tests of compiled code ask for it.
os.environ.setdefault("GRPO_FAST_COMPILE", "0")


def pytest_configure(config):
    """Ignore PyTorch's warning on a GPU that the thread of a backward starts with cuBLAS."""
    config.addinivalue_line("filterwarnings", "ignore:Attempting to run cuBLAS:UserWarning")


# Of these files' interpreted cases, which take minutes, one in five of each test runs unless `--slow` asks
# for all.
SLOW = (
    "kernels/test_extreme_rows.py",
    "ops/test_kl.py",
    "ops/test_linear_grpo.py",
    "loss/test_masks.py",
    "loss/test_nan.py",
    "loss/test_rare_options.py",
    "ops/test_reduction_weights.py",
    "ops/test_strides.py",
)
# And of these one in two, on any path: each trains or compiles.
LONG = ("ops/test_compile_schedules.py", "integrations/test_trl_dtypes.py")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run every case of the slow files")


def pytest_collection_modifyitems(config, items):
    """Leave out most cases of the slow files; a file named on the command line runs whole."""
    named = " ".join(config.args)
    if config.getoption("--slow") or ".py" in named or torch.cuda.is_available():
        return
    kept, left_out, counts = [], [], {}
    for item in items:
        name = f"{item.path.parent.name}/{item.path.name}"
        slow = name in SLOW and "triton" in item.nodeid
        step = 5 if slow else 2 if name in LONG else 1
        which = name, slow, item.function
        counts[which] = counts.get(which, -1) + 1
        (kept if counts[which] % step == 0 else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    """Give the interpreter bands around buffers, and an `fma` that rounds once, as in hardware."""
    if os.environ.get("TRITON_INTERPRET") != "1" or not importlib.util.find_spec("triton"):
        yield
        return
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

    from tests.support.guards import guarded
    from tests.support.quick import quick

    def create_fma(self, x, y, z):
        exact = x.data.astype("float64") * y.data + z.data
        return TensorHandle(exact.astype(x.data.dtype), z.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch, quick():
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
