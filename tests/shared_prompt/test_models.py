"""Models that docs/shared_prompt_models.md lists, one of each kind; and why others are refused."""

import logging
import re

import pytest
import torch

pytest.importorskip("transformers", reason="the models are its own")
pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # of sizes that transformers would not have chosen

from grpo_fast.shared_prompt import choose, forward, plan  # noqa: E402
from tests.support import models, shared_models  # noqa: E402

SECTIONS = {
    "llama": "packed and mask and fork",
    "gpt_oss": "mask and fork",
    "deepseek_v32": "mask and fork",
    "bloom": "fork",
    "qwen3_next": "fork",
    "llama4_text": "fork",
    "deepseek_v4": "unpadded",
    "minimax_m3_vl_text": "unpadded",
    "jamba": "none",
    "moshi": "none",
}


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    logger = logging.getLogger("transformers")
    level = logger.level
    models.quiet()
    yield
    logger.setLevel(level)


def small(longest=5, other=None):
    """A plan of two prompts with two completions of four tokens each.

    Args:
        longest, other: how many tokens the prompts have; `other` as many by default.
    """
    lengths = torch.tensor([[longest], [other or longest]])
    mask = torch.arange(longest) >= longest - lengths
    prompts, completions = torch.randint(3, 60, (2, longest)), torch.randint(3, 60, (4, 4))
    return plan(prompts, completions, prompt_mask=mask, group_size=2)


@pytest.mark.parametrize("name", SECTIONS)
def test_routes_are_exact_or_refused_as_the_page_says(name):
    found = shared_models.one(name)
    assert shared_models.section_of(found) == SECTIONS[name], found
    heading = shared_models.SECTIONS[SECTIONS[name]].partition("\n")[0]
    text = shared_models.PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    assert f"`{name}`" in text


def test_no_route_is_wrong_without_an_error():
    assert "## Wrong" not in shared_models.PAGE.read_text()


def test_a_layer_that_ignores_the_state_of_its_prompt_is_found():
    """Jamba's own code starts from zeros. With small weights its states still differ by less than 1e-4."""
    model = models.build("jamba", **shared_models.HYBRIDS["jamba"])
    with pytest.raises(ValueError, match="ignore the state of the prompt if more than one token"):
        forward(model, small(), route="fork")
    assert "ignore the state" in choose(model, small(40)).reason


def test_a_window_that_the_model_does_not_use_is_found_before_a_prompt_is_longer():
    """Moshi has full attention, and a window in its configuration that its cache takes."""
    model = models.build("moshi", sliding_window=50)
    for route in ("packed", "mask", "fork"):
        with pytest.raises(ValueError, match="differ from those of its unshared forward"):
            forward(model, small(), route=route)
    assert model.config.sliding_window == 50
    model = models.build("mistral", sliding_window=50)
    forward(model, small(), route="fork")
    assert model.config.sliding_window == 50


def test_a_cache_that_counts_places_is_exact_without_padding_only():
    model = models.build("minimax_m3_vl_text", layer_types=["minimax_m3_sparse", "full_attention"])
    forward(model, small(), route="fork")
    with pytest.raises(ValueError, match=r"MiniMaxM3VLSparseCacheLayer.*must have one length"):
        forward(model, small(5, 3), route="fork")
    with pytest.raises(ValueError, match=r"MiniMaxM3VLSparseCacheLayer.*count places in a row"):
        forward(model, small(), route="mask")


def test_attention_that_is_scaled_by_places_takes_no_mask_of_long_rows():
    """Llama 4 counts places where it should count positions, and the row has several completions."""
    model = models.build("llama4_text", no_rope_layers=[1, 0], floor_scale=12)
    forward(model, small(4), route="mask")  # rows of 10 tokens
    with pytest.raises(ValueError, match=r"place in a row from 12 tokens on"):
        forward(model, small(9), route="mask")
    with pytest.raises(ValueError, match=r"place in a row from 12 tokens on"):
        forward(model, small(4), route="packed")  # one row of 20 tokens


def test_reasons_on_the_page_have_no_class_and_no_number():
    text = shared_models.PAGE.read_text()
    assert not re.search(r"\w+ForCausalLM|e-0\d of their", text)
