"""What the wheel ships, and that the checkout never shadows Hugging Face's `kernels`."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    pytest.importorskip("setuptools", minversion="77", reason="builds the wheel without isolation")
    out = tmp_path_factory.mktemp("wheel")
    # Build from a copy: setuptools would reuse a stale build/ beside pyproject.toml.
    source = tmp_path_factory.mktemp("source") / "repo"
    skip = shutil.ignore_patterns("build", "*.egg-info", ".*", "runs", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skip)
    cmd = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*cmd, "-w", out, source], check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return {n for n in zipfile.ZipFile(path).namelist() if ".dist-info/" not in n}


def test_wheel_ships_every_module_and_nothing_else(wheel):
    library = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "grpo_fast").rglob("*.py")
        if "kernels" not in p.parts
    }
    kernels = {f"grpo_fast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    page = {
        f"grpo_fast/trainer/explain/{x}" for x in ("page.html", "page.css", "page.js", "step.json")
    }
    assert wheel == library | kernels | page | {"grpo_fast/py.typed"}


def test_kernels_is_never_a_regular_top_level_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "grpo_fast" / "kernels").is_symlink()


def test_checkout_imports_without_installation():
    pytest.importorskip("transformers", reason="its hub_kernels module imports `kernels`")
    code = "import grpo_fast.kernels.logprob, transformers.integrations.hub_kernels"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
