"""`GRPO_FAST_LOG=1`: a line for each call, and nothing while it is off."""

import importlib.util
import io
import logging
import sys

import pytest
import torch

from grpo_fast import (
    Objective,
    group_advantage,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    logprob,
    notices,
    policy_loss,
)
from grpo_fast.ops import backend

B, T, V, D = 2, 3, 50, 8


@pytest.fixture
def lines(monkeypatch, caplog):
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    caplog.set_level(logging.INFO, logger="grpo_fast")
    notices.log_calls()
    yield lambda: [x.getMessage() for x in caplog.records]
    notices.log_calls(False)


def tensors():
    logits = torch.randn(B, T, V, requires_grad=True)
    return logits, torch.randint(V, (B, T)), torch.randn(B)


def calls():
    logits, ids, advantages = tensors()
    hidden, weight = torch.randn(B, T, D), torch.randn(V, D, requires_grad=True)
    given = {"advantages": advantages}
    old = torch.zeros(B, T)
    sequence = {"old_logps": old, "objective": Objective(ratio="sequence"), **given}
    return {
        "logprob": ("logprob_fwd", lambda: logprob(logits, ids).sum()),
        "grpo_loss": ("grpo_fwd_bwd", lambda: grpo_loss(logits, ids, **given).loss),
        "policy_loss": (
            "sequence_loss_fwd",
            lambda: policy_loss(logprob(logits, ids), **sequence).loss,
        ),
        "linear_logprob": (
            "chunks of 6 tokens: 1, logits in float32",
            lambda: linear_logprob(hidden, weight, ids).sum(),
        ),
        "linear_grpo_loss": (
            "gradients: token",
            lambda: linear_grpo_loss(hidden, weight, ids, **given).loss,
        ),
        "group_advantage": (
            "group_advantage_fwd",
            lambda: group_advantage(advantages, group_size=2),
        ),
    }


@pytest.mark.parametrize("name", calls())
def test_a_call_is_a_line(name, lines):
    ran, call = calls()[name]
    found = call()
    if found.requires_grad:
        found.backward()  # no lines of its own
    *before, line = lines()
    assert len(before) == (name == "policy_loss")
    assert line.startswith(f"{name}: (2,")
    assert "PyTorch path (GRPO_FAST_BACKEND=torch)" in line
    assert ran in line


def test_tensors_are_named(lines):
    logits, ids, advantages = tensors()
    grpo_loss(logits.bfloat16(), completion_ids=ids, advantages=advantages)
    assert lines()[0].startswith(
        "grpo_loss: (2, 3, 50) bfloat16, completion_ids (2, 3) int64, advantages (2,) float32 on cpu; "
    )


def test_a_call_that_fails_is_a_line_too(lines, monkeypatch):
    with pytest.raises(ValueError, match="group_size"):
        group_advantage(torch.ones(5), group_size=2)
    assert lines() == ["group_advantage: (5,) float32 on cpu; raised ValueError"]
    assert not notices.noting()
    monkeypatch.setattr(backend, "_function", lambda path: lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        group_advantage(torch.ones(4), group_size=2, unbiased=False)
    assert lines()[1].endswith("): group_advantage_fwd; raised ZeroDivisionError")


def test_parts_that_are_whole_sequences_have_no_fixed_length(lines):
    """Chunks of 4 tokens: the second sequence does not fit beside the first one."""
    hidden, weight = torch.randn(B, T, D), torch.randn(V, D, requires_grad=True)
    given = {"advantages": torch.ones(B), "old_logps": torch.zeros(B, T), "chunk_size": 4}
    objective = Objective(ratio="sequence")
    linear_grpo_loss(hidden, weight, torch.zeros(B, T, dtype=int), objective=objective, **given)
    assert "gradients: aligned; chunks of whole sequences, at most 4 tokens each, " in lines()[-1]


def test_compiled_calls_log_their_operators_without_a_graph_break(lines):
    logits, ids, advantages = tensors()
    torch.compiler.reset()
    step = torch.compile(
        lambda x: grpo_loss(x, ids, advantages=advantages).loss, fullgraph=True, backend="aot_eager"
    )
    step(logits).backward()
    (line,) = lines()
    assert line.startswith("operator grpo: (2, 3, 50) float32")
    assert "grpo_fwd_bwd" in line


def test_the_forward_of_shared_prompts(lines):
    pytest.importorskip("transformers", reason="the model is Hugging Face's")
    from grpo_fast import shared_prompt
    from grpo_fast.doctor.paths import tiny_model

    plan = shared_prompt.plan(torch.full((1, 30), 5), torch.full((4, 3), 6), group_size=4)
    shared_prompt.forward(tiny_model(torch.device("cpu")), plan)
    assert lines()[-1].startswith(
        "shared_prompt.forward: route mask (132 tokens padded, 42 different ones; "
    )


def test_off_means_off(caplog):
    caplog.set_level(logging.INFO, logger="grpo_fast")
    calls()["logprob"][1]()
    assert not caplog.records
    assert not notices._ACTIVE


def test_lines_go_to_stderr_where_nobody_listens(monkeypatch, capsys):
    """A handler of the user's, or a level, stays as it is."""
    logger = logging.Logger("mine")
    monkeypatch.setattr(notices, "LOGGER", logger)
    call = notices.Call("mine", "(4,)", {"a path": {"one": None, "two": None}, "chunks": {}})
    notices._write(call)
    notices._write(call)
    assert capsys.readouterr().err == 2 * "mine: mine: (4,); a path: one, two; chunks\n"
    assert logger.level == logging.INFO
    seen = logging.Logger("theirs", logging.WARNING)
    handler = logging.Handler()
    seen.addHandler(handler)
    monkeypatch.setattr(notices, "LOGGER", seen)
    notices._write(call)
    assert seen.handlers == [handler]
    assert seen.level == logging.WARNING
    assert not capsys.readouterr().err


def test_a_handler_that_comes_later_takes_over(monkeypatch, capsys):
    """As of logging.basicConfig after the first call; and stderr may be another one by then."""
    root, logger = logging.RootLogger(logging.WARNING), logging.Logger("mine")
    logger.parent = root
    monkeypatch.setattr(notices, "LOGGER", logger)
    call = notices.Call("mine", "(4,)", {})
    notices._write(call)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    notices._write(call)
    line = "mine: mine: (4,); nothing to compute\n"
    assert capsys.readouterr().err == sys.stderr.getvalue() == line
    handler = logging.StreamHandler(io.StringIO())
    root.addHandler(handler)
    notices._write(call)
    assert handler.stream.getvalue() == "mine: (4,); nothing to compute\n"
    assert sys.stderr.getvalue() == line
    logger.disabled = True  # by logging.config.dictConfig
    root.removeHandler(handler)
    notices._write(call)
    assert sys.stderr.getvalue() == line


@pytest.mark.parametrize("value, on", [("1", True), ("0", False), ("", False)])
def test_the_variable_is_read_at_import(value, on, monkeypatch):
    monkeypatch.setenv("GRPO_FAST_LOG", value)
    specification = importlib.util.spec_from_file_location("read_again", notices.__file__)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module._ACTIVE is on


@pytest.mark.skipif(bool(torch.version.hip), reason="AMD's warps have 64 threads")
def test_schedules_in_words():
    """As a line has them where kernels run."""
    pytest.importorskip("triton", reason="the schedules are those of the kernels")
    from grpo_fast.kernels import grpo, logprob, on_chip
    from grpo_fast.records import Outputs

    out = Outputs(*[None] * 5)
    long, short = (torch.empty(1, 1, V, dtype=torch.float16) for V in (151_936, 1000))
    parts = "10 programs a row, 16,384 entries each, 8 warps"
    assert str(logprob.schedule_of(long)) == f"{parts}; the last one finishes the row"
    words = f"{parts}; each waits for the others"
    assert str(grpo.schedule_of(long, torch.empty_like(long), None, out)) == words
    one = "1 program a row of 1,000 entries, 4 warps"
    assert str(logprob.schedule_of(short)) == one
    assert str(grpo.schedule_of(short, short, None, out)) == one
    words = "a cluster of 8 thread blocks holds a row"
    assert on_chip.schedule_of(long, long, None, out) == words
