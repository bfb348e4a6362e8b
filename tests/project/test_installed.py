"""What `make VENV=system` says of a Python that lacks packages."""

from importlib.metadata import PackageNotFoundError

import pytest

from tests.support import installed


@pytest.fixture
def versions(monkeypatch):
    """Installed packages by name; all others are missing."""
    found = {}

    def version(name):
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(installed, "version", version)
    return found


EVERYTHING = {"torch": "2.13.0", "einops": "0.8.2", "triton": "3.7.1", "transformers": "5.23.0"}
EVERYTHING |= {"tokenizers": "0.23.3", "matplotlib": "3.11.2", "pyyaml": "6.0.3", "rich": "15.0.0"}
EVERYTHING |= {
    "filelock": "4.3.1",
    "plotly": "7.1.0",
    "accelerate": "1.15.0",
    "safetensors": "0.8.0",
}


def test_what_is_missing_is_named_with_the_line_that_installs_it(versions, capsys):
    versions |= EVERYTHING
    del versions["transformers"], versions["rich"]
    assert installed.main("train") == 1
    said = capsys.readouterr().out
    assert "lacks what `make train` needs: transformers>=" in said
    assert "pip install 'transformers>=" in said
    assert "rich" in said
    assert "einops" not in said
    assert "pytest" not in said, "only what the target needs"


def test_an_extra_that_names_others_needs_all_of_them(versions, capsys):
    versions |= EVERYTHING
    assert installed.main("test") == 1
    said = capsys.readouterr().out
    assert "pytest-xdist" in said, "of [test] itself"
    assert "pytest-benchmark" in said, "of [bench], which [test] names"


def test_another_version_is_a_warning(versions, capsys):
    versions |= EVERYTHING | {"torch": "2.7.0"}
    assert installed.main("train") == 0
    assert capsys.readouterr().out == "warning: torch>=2.8 is wanted, 2.7.0 is installed\n"


def test_an_old_python_is_named(monkeypatch, capsys):
    monkeypatch.setattr(installed.sys, "version_info", (3, 10, 4))
    assert installed.main("train") == 1
    assert "make needs Python 3.11 or newer" in capsys.readouterr().out
