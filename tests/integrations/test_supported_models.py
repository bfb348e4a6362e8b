"""Some of the models that docs/models.md lists: the head is exact, or refused."""

import logging
import re

import pytest

pytest.importorskip("transformers", reason="the models are its own")
pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # of sizes that transformers would not have chosen

from tests.support import models  # noqa: E402

EXACT = ["deepseek_v3", "gemma2", "gpt2", "jamba", "llama", "llama4_text", "mixtral", "qwen3_next"]
REFUSED = {"roberta": "check_head|not those of its last hidden states", "electra": "layers between"}


def listed(section):
    text = models.PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return set(re.findall(r"`([\w-]+)`", text)) - {"check_head"}


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    logger = logging.getLogger("transformers")
    level = logger.level
    models.quiet()
    yield
    logger.setLevel(level)


@pytest.mark.parametrize("name", EXACT)
def test_log_probs_and_gradients_are_the_models_own(name):
    outcome, why = models.one(name)
    assert outcome == "exact", why
    assert name in listed("Exact")


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_with_layers_before_its_head_is_refused(name):
    outcome, why = models.one(name)
    assert outcome == "refused"
    assert re.search(REFUSED[name], why)
    assert name in listed("Refused")


def test_no_model_is_wrong_without_an_error():
    assert "## Wrong" not in models.PAGE.read_text()
    assert len(listed("Exact")) > 130
