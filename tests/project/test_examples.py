"""The examples run, and their models learn."""

import re

import pytest
import torch

from tests.support import ranks
from tests.support.examples import EXAMPLES, load

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries the examples use


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny
    yield
    torch.set_num_threads(threads)


def assert_learnt(history):
    assert history[0] < 0.6
    assert sum(history[-3:]) / 3 > history[0] + 0.2


def test_plain_loop():
    assert_learnt(load("plain_loop").main())


def test_shared_prompts(capsys):
    assert_learnt(load("shared_prompts").main())
    printed = capsys.readouterr().out
    assert re.match(r"route (packed|mask|fork): .* times the work\n", printed)
    assert "within the tolerance" in printed


def test_accelerate_loop():
    pytest.importorskip("accelerate", reason="the example is for Accelerate")
    assert_learnt(load("accelerate_loop").main(cpu=True))


def test_trl_train(tmp_path):
    pytest.importorskip("trl", "1.15", reason="the example is for TRL")
    assert_learnt(load("trl_train").main(str(tmp_path), use_cpu=True, disable_tqdm=True))


def test_all_are_run():
    for path in EXAMPLES.glob("*.py"):
        assert f"test_{path.stem}" in globals(), path


def accelerate_on_a_rank():
    torch.set_num_threads(1)
    assert_learnt(load("accelerate_loop").main(cpu=True))


def test_accelerate_loop_in_two_processes():
    pytest.importorskip("accelerate", reason="the example is for Accelerate")
    ranks.run("tests.project.test_examples:accelerate_on_a_rank", 2)
