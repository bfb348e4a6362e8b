import pytest

from grpo_fast.shared_prompt import passes, plan
from tests.support import shared as support


@pytest.fixture
def ragged():
    """The plan of the ragged batch of all tests."""
    return plan(**support.batch())


@pytest.fixture
def fresh(monkeypatch):
    """As if no model had been tried and nothing had been logged."""
    monkeypatch.setattr(passes, "_SAID", set())
