"""Variants of the kernels: every edit still finds its text, and what it makes still imports."""

import os
import sys
import tempfile
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="variants are edited kernels")
from benchmarks.experiments import variants
from benchmarks.inputs import shapes
from benchmarks.inputs.batches import make_batch
from benchmarks.measuring import gate

CPU = torch.device("cpu")
SHAPE = shapes.Shape(B=2, T=1, V=40_000, G=2)

EDITED = [
    *(("grpo", name, name, edits) for name, edits in variants.VARIANTS.items()),
    *(("logprob", name, f"logprob {name}", edits) for name, edits in variants.LOGPROB.items()),
]
STEMS = sorted(path.stem for path in variants.KERNELS.glob("*.py"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the packages are written; none of them stays imported."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path / "grpo_fast_variants"
    for name in set(sys.modules) - known:
        if name.startswith("variant_"):
            del sys.modules[name]


def written(folder):
    (package,) = folder.iterdir()
    return {p.name: p.read_text() for p in package.glob("*.py") if p.name != "__init__.py"}


@pytest.mark.parametrize(
    "stem, name, label, edits", EDITED, ids=[f"{stem}-{name}" for stem, name, *_ in EDITED]
)
def test_every_edit_applies_and_the_package_imports(folder, stem, name, label, edits):
    module = variants.load(label, edits)
    package = module(stem).__package__
    for other in STEMS:
        assert module(other).__package__ == package
    assert package.startswith("variant_")
    texts = written(folder)
    own = {p.name: p.read_text() for p in variants.KERNELS.glob("*.py")}
    assert texts.keys() == own.keys()
    assert not any("grpo_fast.kernels" in text for text in texts.values()), "imports its own files"
    changed = {
        file for file in own if texts[file] != own[file].replace("grpo_fast.kernels", package)
    }
    assert changed == {file for file, *_ in edits}
    assert f"def {'grpo_fwd_bwd' if stem == 'grpo' else 'logprob_fwd'}" in texts[f"{stem}.py"]


@pytest.mark.parametrize("table", ["VARIANTS", "LOGPROB"])
def test_the_kernels_as_they_are_come_first(table):
    """Ratios are taken against the first; no two names make the same package."""
    made = getattr(variants, table)
    assert next(iter(made.values())) == []
    packages = {"".join(c if c.isalnum() else "_" for c in name) for name in made}
    assert len(packages) == len(made)


def test_an_edit_that_finds_nothing_is_named(folder):
    with pytest.raises(AssertionError, match=r"mine: rows.py holds no 'no such text'"):
        variants.load("mine", [("rows.py", "no such text", "")])


INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU `variants` checks them"
)


@INTERPRETED
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", variants.VARIANTS)
def test_every_variant_of_grpo_is_right(folder, name, dtype):
    """On a long row, so that programs share it."""
    batch = make_batch(SHAPE, "full", CPU, dtype)
    module = variants.load(name, variants.VARIANTS[name])("grpo")
    work = variants.like(batch.logits)
    loss = variants.launch(module, batch, work, work)
    gate.check("grpo", batch, loss.sum(), (work,))


@INTERPRETED
@pytest.mark.parametrize("name", variants.LOGPROB)
def test_every_variant_of_logprob_is_right(folder, name):
    batch = make_batch(SHAPE, "full", CPU, torch.float16)
    module = variants.load(f"logprob {name}", variants.LOGPROB[name])("logprob")
    logp = module.logprob_fwd(batch.logits, variants.targets_of(batch), with_entropy=False).logp
    gate.check("logprob", batch, logp.view_as(batch.ids))


def test_the_kernel_on_chip_is_one_of_them_where_it_can_run(folder, monkeypatch, capsys):
    options = SimpleNamespace(only=[variants.ON_CHIP], cubins=None)
    monkeypatch.setattr("torch.version.hip", None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    for version, there in (("3.8.0", True), ("3.7.1", False)):
        monkeypatch.setattr("triton.__version__", version)
        found = variants.grpo_modules(options)
        assert list(found) == [variants.ON_CHIP] * there
        assert ("needs 3.8" in capsys.readouterr().out) != there
