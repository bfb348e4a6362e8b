"""Variants of the kernels: every edit still finds its text, and what it makes still imports."""

import sys
import tempfile
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="variants are edited kernels")
from benchmarks.experiments import variants

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


def test_another_folder_of_kernels(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.py").write_text("from grpo_fast.kernels.b import X\n")
    (other / "b.py").write_text("X = 7\n")
    assert variants.load("other", [], other)("a").X == 7


def test_the_kernel_on_chip_is_one_of_them_where_it_can_run(folder, monkeypatch, capsys):
    options = SimpleNamespace(only=[variants.ON_CHIP], folder=[], float32=False)
    monkeypatch.setattr("torch.version.hip", None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    for version, there in (("3.8.0", True), ("3.7.1", False)):
        monkeypatch.setattr("triton.__version__", version)
        found = variants.grpo_modules(options)
        assert list(found) == [variants.ON_CHIP] * there
        assert ("needs 3.8" in capsys.readouterr().out) != there
    monkeypatch.setattr("triton.__version__", "3.8.0")
    assert not variants.grpo_modules(SimpleNamespace(**{**vars(options), "float32": True}))
