"""The test files themselves: lists that name them are right, none imports another, and a crash is named."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests import conftest
from tests.support import ranks
from tests.support.mutations import COVERS, SAME, mutants

ROOT = Path(__file__).resolve().parents[2]
TESTS = sorted((ROOT / "tests").glob("*/test_*.py"))


def test_lists_of_test_files():
    fast = re.search(r"^FAST := (.*?)\n\n", (ROOT / "Makefile").read_text(), re.S | re.M)[1]
    for name in (*conftest.SLOW, *conftest.LONG, *fast.replace("\\\n", " ").split()):
        assert (ROOT / "tests" / name).is_file(), name
    for covered, (stems, _) in COVERS.items():
        assert (ROOT / covered).is_file(), covered
        for stem in stems.split():
            assert any(path.stem == f"test_{stem}" for path in TESTS), f"{covered}: {stem}"


def test_every_entry_of_changes_that_make_no_difference_is_used():
    """An entry whose line has changed would excuse nothing, or something else."""
    used = set()
    for name in COVERS:
        mutants(name, used)
    assert SAME.keys() - used == set()


def test_what_files_share_is_in_support():
    for path in TESTS:
        wrong = r"^ *(from|import) tests\.\S*(test_| import test_).*"
        found = re.search(wrong, path.read_text(), re.M)
        assert found is None, f"{path}: {found[0]}"


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_crash_in_native_code_is_named():
    """The mark that runs such a test again looks for these words. The place of the crash is shown."""
    found = f"(?s){ranks.CRASHED} .signal 11.*Segmentation fault.*test_suite.py.* in crash"
    with pytest.raises(AssertionError, match=found):
        ranks.run("tests.project.test_suite:crash", 1)
