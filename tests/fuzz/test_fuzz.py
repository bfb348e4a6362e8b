"""The fuzzer: a fixed subset of its cases, and whether it knows all public functions."""

import importlib
import math
import re
from pathlib import Path

import pytest
import torch

import grpo_fast
from tests.fuzz import oracle
from tests.fuzz.drawing import UndecidedError, compare, refused
from tests.fuzz.running import CASES, LAUNCHES, WITHOUT_STRATEGY, chunk, prepared, shares, tasks

ROOT = Path(__file__).resolve().parents[2]
# Cases of each function in this file. `make fuzz` runs thousands.
FEW = {"grpo_loss": 14, "linear_grpo_loss": 10, "policy_loss": 8, "wrong arguments": 60}


@pytest.mark.parametrize("name", CASES)
def test_some_cases(name):
    with prepared("torch"):
        found = chunk(name, range(FEW.get(name, 5)))
    assert not found.failures, said(found.failures[0])


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_few_cases_in_the_interpreter(name):
    pytest.importorskip("triton", reason="the kernels need Triton")
    with prepared("triton"):
        found = chunk(name, range(2), "triton")
    assert not found.failures, said(found.failures[0])


def said(failure):
    return f"{failure.error}; {failure.about}; again: {failure.command}"


def public_names():
    """What `__all__` of the modules and docs/api.md list, without their modules."""
    names = {x.rpartition(".")[2] for x in re.findall(r"^::: (\S+)", API, re.MULTILINE)}
    for module in ("", ".loss", ".ops", ".weights", ".diagnostics"):
        names |= set(importlib.import_module(f"grpo_fast{module}").__all__)
    modules = {"diagnostics", "loss", "ops", "presets", "reference", "weights"}
    return names - modules


API = (ROOT / "docs" / "api.md").read_text()


def test_every_public_function_has_a_strategy_or_a_reason():
    known = {name.rpartition(".")[2] for name in CASES}
    missing = public_names() - known - set(WITHOUT_STRATEGY)
    assert not missing, (
        f"neither in CASES nor in WITHOUT_STRATEGY (tests/fuzz/running.py): {missing}"
    )
    assert not known & set(WITHOUT_STRATEGY)
    stale = set(WITHOUT_STRATEGY) - public_names()
    assert not stale, f"no public names: {stale}"


def test_the_oracle_knows_every_option_and_nothing_of_the_library():
    assert set(oracle.DEFAULTS) == set(grpo_fast.objective.OPTIONS)
    assert {x: grpo_fast.objective.DEFAULTS[x] for x in oracle.DEFAULTS} == oracle.DEFAULTS
    assert "grpo_fast" not in Path(oracle.__file__).read_text()


def test_the_oracle_by_hand():
    """PPO's clip, with A = 1 and -1, at ratios of 2 and 1."""
    logp = torch.tensor([2.0, 1.0]).log().double().requires_grad_()
    given = oracle.Given(
        [torch.arange(1), torch.arange(1, 2)],
        torch.ones(2).double(),
        torch.tensor([1.0, -1.0]).double(),
        old=torch.zeros(2).double(),
    )
    found = oracle.loss(logp, None, given)
    torch.testing.assert_close(found.loss.item(), (-1.2 + 1.0) / 2)
    (grad,) = torch.autograd.grad(found.loss, logp)
    assert grad.tolist() == [0.0, 0.5]
    assert found.metrics["clip_fraction_high"] == 0.5
    assert oracle.advantages([0.0, 2.0], [[0, 1]], eps=0.0) == pytest.approx(
        [-(0.5**0.5), 0.5**0.5]
    )
    logs, H = oracle.log_probs(
        torch.zeros(1, 4).double(), torch.tensor([2]), torch.tensor([True]), torch.ones(1).double()
    )
    assert logs.exp().item() == pytest.approx(0.25)
    assert H.exp().item() == pytest.approx(4.0)


def test_the_exact_oracle_has_1_minus_p_of_a_confident_token():
    """With a gap of 50 nats, where float64 rounds p to 1; and it is the usual one for other tokens."""
    z = torch.tensor([[50.0, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    given = (
        torch.zeros(2, dtype=torch.long),
        torch.ones(2, dtype=torch.bool),
        torch.ones(2).double(),
    )
    logp, _ = oracle.log_probs(z, *given, exact=True)
    (grad,) = torch.autograd.grad(logp.sum(), z)
    rest, p = math.exp(-50), 1 / (1 + math.e)
    assert logp.tolist() == pytest.approx([-rest, math.log(p)], rel=1e-12)
    assert grad[0].tolist() == pytest.approx([rest, -rest], rel=1e-12)
    assert grad[1].tolist() == pytest.approx([1 - p, p - 1], rel=1e-12)


def test_a_wrong_result_is_a_failure(monkeypatch):
    """It is found, is made simpler, says how to repeat it, and the other cases go on."""
    monkeypatch.setitem(CASES, "reference.logprob", wrong_by_mask)
    with prepared("torch"):
        found = chunk("reference.logprob", range(20, 40), most=99)
        again = chunk("reference.logprob", range(found.failures[0].seed, 40), most=99)
    assert found.failures == again.failures
    assert 5 < len(found.failures) < 20
    for failure in found.failures:
        assert list(failure.about) == ["mask"]
        seed = f"--only reference.logprob --seed {failure.seed} --cases 1"
        assert failure.command.endswith(seed)
    assert 0 < found.undecided < 10


def wrong_by_mask(p):
    """A case that fails for two of its choices, whatever it draws else."""
    p.pick("dtype", "float32", "float16")
    if p.pick("kl", "k3", "k2", "k1", "abs", "k3_unbiased") == "abs":
        raise UndecidedError
    one, two = torch.ones(1), torch.ones(1).double()
    compare("x", one + (p.pick("mask", None, "bool", "int64") is not None), two, one)


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1.1])
def test_the_comparison_fails(value):
    one = torch.ones(2)
    compare("x", one, one.double(), one)
    with pytest.raises(AssertionError, match="x: "):
        compare("x", torch.tensor([1.0, value]), one.double(), one)
    far = torch.tensor([1.0, 1e99]).double()
    compare("x", torch.tensor([1.0, torch.inf]), far, one)
    with pytest.raises(AssertionError, match=r"x: 1\.0 at"):
        compare("x", one, far, one)


def test_a_huge_row_does_not_excuse_another():
    truth, got = torch.tensor([[1e6], [1.0]]), torch.tensor([[1e6], [1.01]])
    compare("x", got, truth.double(), truth)
    with pytest.raises(AssertionError, match=r"x: 1\.00999999 at \[1, 0\]"):
        compare("x", got, truth.double(), truth, by_rows=True)


def test_a_rounding_is_allowed_in_its_own_element():
    one, got = torch.ones(2), torch.tensor([1.0, 1.01])
    compare("x", got, one.double(), one, rounding=torch.tensor([0.0, 0.011]))
    for bound in ([0.0, 0.009], [0.011, 0.0], [torch.nan, torch.inf]):
        with pytest.raises(AssertionError, match=r"x: 1\.0"):
            compare("x", got, one.double(), one, rounding=torch.tensor(bound))


@pytest.mark.parametrize("seed", [1386, 2354], ids=["float64", "bfloat16"])
def test_roundings_of_the_gradient_of_logits(seed):
    """A confident token in float64; a gradient of bfloat16 whose roundings add up."""
    with prepared("torch"):
        found = chunk("linear_grpo_loss", range(seed, seed + 1))
    assert not found.failures, said(found.failures[0])


def test_an_error_has_to_name_the_argument():
    def fail(error):
        raise error

    refused(lambda: fail(ValueError("mask: want (2,)")), "mask")
    for error in (ValueError("no"), RuntimeError("mask"), IndexError("mask")):
        with pytest.raises(AssertionError):
            refused(lambda error=error: fail(error), "mask")
    with pytest.raises(AssertionError, match="accepted silently"):
        refused(lambda: None, "mask")


@pytest.mark.parametrize("cases", [1, 50, 4889, 20_000])
def test_every_function_gets_its_share(cases):
    found = shares(list(CASES), cases)
    assert min(found.values()) >= 1
    assert sum(found.values()) >= cases
    for name, count in found.items():
        seeds = [seed for x, seeds in tasks(list(CASES), cases, 7) if x == name for seed in seeds]
        assert seeds == list(range(7, 7 + count))
