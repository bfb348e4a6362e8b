"""The table of versions: the page has what was saved, and every bound of pyproject.toml has a row."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from tests.versions import page, running
from tests.versions.environments import ENVIRONMENTS, Environment

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ROWS = page.load()
NAMES = [x.name for x in ENVIRONMENTS]


def oldest(package):
    """The oldest version that pip is asked for."""
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["train"], *extras["trl"]]
    (text,) = {x.split(";")[0].split(",")[0] for x in wanted if x.startswith(f"{package}>=")}
    return text.split(">=")[1]


def test_the_page_is_what_was_saved():
    text = page.PAGE.read_text()
    assert page.written(text, ROWS) == text, "run python -m tests.versions --save"
    assert [row["name"] for row in ROWS] == [x for x in NAMES if x in {r["name"] for r in ROWS}]


@pytest.mark.parametrize("package", ["torch", "triton", "einops", "transformers", "trl"])
def test_the_oldest_versions_were_run(package):
    ran = [row["versions"][package] for row in ROWS if "tests" in row]
    assert any(x and f"{x}.".startswith(f"{oldest(package)}.") for x in ran), package


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_python_was_run(python):
    assert any(row["versions"]["python"].startswith(f"{python}.") for row in ROWS if "tests" in row)
    assert PROJECT["requires-python"] == ">=3.10"


# Two values each, by the assemblers of Triton 3.8 and 3.9: more programs are resident that way.
SPILLS = {"grpo rewards", "grpo split capped high"}


def test_what_ran_was_something():
    """What failed is listed below the table; deprecated calls and spilled registers are corrected."""
    for row in ROWS:
        if "tests" in row:
            assert row["tests"]["passed"] > 5 * row["tests"]["failed"], row["name"]
            assert not row["tests"]["deprecations"], row["name"]
            new = row["versions"]["triton"] >= "3.8"
            assert set(row["compiled"]["spilled"]) <= (SPILLS if new else set()), row["name"]


def test_the_files_of_the_environments_exist():
    assert len(set(NAMES)) == len(NAMES)
    for environment in ENVIRONMENTS:
        for name in environment.files:
            assert (ROOT / "tests" / name).is_file(), name


CASES = """
import warnings, pytest
@pytest.mark.parametrize("i", range(7))
def test_plain(i):
    warnings.warn("old", DeprecationWarning)
    assert i != 3
@pytest.mark.parametrize("name", ["triton"] * 6)
def test_kernel(name):
    pytest.skip("no")
"""


def test_the_record_of_a_run(tmp_path):
    """One in three plain cases, the failing one among them; one in six interpreted ones."""
    (tmp_path / "test_x.py").write_text(CASES)
    options = ["-q", "-c/dev/null", "-p", "tests.versions.sampled", "--one-in=3"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *options,
        f"--record={tmp_path / 'r'}",
        str(tmp_path),
    ]
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    subprocess.run(
        [sys.executable, "-c", code, *command[3:]], cwd=tmp_path, check=False, capture_output=True
    )
    found = json.loads((tmp_path / "r").read_text())
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 1, 1)
    (failure,) = found["failures"]
    assert failure.endswith("test_plain[3]: assert 3 != 3")
    assert found["of other packages"] == ["test_x.py: old"]
    assert not found["deprecations"]


def test_an_environment_that_cannot_be_made_is_a_row(tmp_path):
    row = running.run(
        Environment("none", "3.99", ()), tmp_path, tmp_path, tmp_path, {"commit": "c", "one in": 1}
    )
    assert row["reason"] == "Python 3.99 is not on this machine"
    assert "not finished. Python 3.99 is not on this machine" in page.table([row])


@pytest.mark.parametrize("there", [False, True])
def test_an_environment_that_is_there_gets_the_new_wheel(there, tmp_path, monkeypatch):
    """pip leaves an installed wheel of the same version in its place."""
    if there:
        (tmp_path / "one" / "bin").mkdir(parents=True)
        (tmp_path / "one" / "bin" / "python").touch()
    steps = []

    def call(step, *command, **_):
        steps.append(command[2:4])
        if step == "import torch":
            raise running.StepError(step)

    monkeypatch.setattr(running, "call", call)
    version = ".".join(map(str, sys.version_info[:2]))
    row = running.run(
        Environment("one", version, ()), tmp_path, tmp_path, tmp_path, {"commit": "c", "one in": 1}
    )
    first = ("pip", "uninstall") if there else ("venv", str(tmp_path / "one"))
    assert row["reason"] == "import torch"
    assert [x for x in steps if len(x) > 1][:2] == [first, ("pip", "install")]


def test_reasons_name_no_address():
    text = "WARNING: x\nERROR: no torch==1 at https://a.example/simple/torch or /a/b/c\nhint"
    assert running.reason(text) == "ERROR: no torch==1 at ... or ..."


def test_rows_replace_those_of_the_same_name(tmp_path):
    path = tmp_path / "versions.json"
    rows = [{"name": "a", "x": 1}, {"name": "b"}, {"name": "gone"}]
    page.save(rows, ["b", "a", "gone"], path)
    page.save([{"name": "a", "x": 2}], ["b", "a"], path)
    assert page.load(path) == [{"name": "b"}, {"name": "a", "x": 2}]
