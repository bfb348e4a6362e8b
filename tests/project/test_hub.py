"""The kernel-hub package: loaded by Hugging Face's own loader, beside an installed grpo_fast."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_fast import hub

ROOT = Path(__file__).resolve().parents[2]
ORACLES = Path(sys.prefix) / "oracles"
LOADER = importlib.util.find_spec("kernels", None) is not None or (ORACLES / "kernels").is_dir()

USE = """
import torch
x = torch.randn(2, 3, 50, requires_grad=True)
ids = torch.randint(50, (2, 3))
A = torch.tensor([1.0, -1.0])
out = kernel.grpo_loss(x, ids, advantages=A, objective=kernel.Objective(entropy_coef=0.1))
(grad,) = torch.autograd.grad(out.loss, x)
W, h = torch.randn(50, 8), torch.randn(2, 3, 8)
linear = kernel.linear_grpo_loss(h, W, ids, advantages=A).loss
"""
COMPARE = """
import grpo_fast.loss
want = grpo_fast.loss.grpo_loss(x, ids, advantages=A, objective=grpo_fast.Objective(entropy_coef=0.1))
assert torch.equal(out.loss, want.loss)
assert torch.equal(grad, torch.autograd.grad(want.loss, x)[0])
assert torch.equal(linear, grpo_fast.loss.linear_grpo_loss(h, W, ids, advantages=A).loss)
assert kernel.grpo_loss is not grpo_fast.loss.grpo_loss
"""
BY_HAND = """
import importlib.util, json, sys
from pathlib import Path
variant = Path(sys.argv[1]) / "build" / "torch-universal"
name = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
kernel = importlib.util.module_from_spec(spec)
sys.modules[name] = kernel
spec.loader.exec_module(kernel)
"""
BY_THE_LOADER = """
import sys
from pathlib import Path
from kernels import get_local_kernel
kernel = get_local_kernel(Path(sys.argv[1]), backend="cpu")
"""


def run(code, folder, *paths, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    hub.build(folder)
    return folder


def test_nothing_refers_to_an_installed_package(folder):
    for path in folder.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) grpo_fast", text, re.MULTILINE), path
        assert '"grpo_fast::' not in text, path


def test_every_import_is_in_the_package(folder):
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                place = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                assert place.is_dir() or place.with_suffix(".py").is_file(), (
                    f"{path}: {node.module}"
                )


def test_the_package_works_by_itself(folder):
    hidden = "import sys\nsys.modules['grpo_fast'] = None  # not importable\n"
    every = "\nfor name in kernel.__all__:\n    getattr(kernel, name)\n"
    run(hidden + BY_HAND + USE + every, folder)


@pytest.mark.skipif(not LOADER, reason="Hugging Face's kernels is not installed")
@pytest.mark.parametrize("interpreted", [False, True])
def test_the_loader_of_the_hub_takes_it(folder, interpreted):
    """Beside an installed grpo_fast, whose operators have the same names; both implementations."""
    switches = {"TRITON_INTERPRET": "1", "GRPO_FAST_BACKEND": "triton"} if interpreted else {}
    run(BY_THE_LOADER + USE + COMPARE, folder, ROOT, ORACLES, HF_HUB_OFFLINE="1", **switches)


def test_the_documented_call_is_that_of_the_packages_page():
    """Of a publisher that the hub does not vouch for, the loader takes nothing without it."""
    page = re.search(r"get_kernel\(.*\)", hub.README)[0].replace("{version}", str(hub.VERSION))
    text = (ROOT / "docs" / "integrations.md").read_text()
    documented = re.search(r"get_kernel\(.*?\)", text)[0]
    assert "trust_remote_code=True" in documented
    assert documented == page.replace("<this repository>", "<repository>")


def test_a_second_build_replaces_the_first(tmp_path):
    variant = hub.build(tmp_path)
    stale = variant / "stale.py"
    stale.write_text("")
    assert hub.build(tmp_path) == variant
    assert not stale.exists()
