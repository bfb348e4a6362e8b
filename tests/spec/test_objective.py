"""`Objective` refuses what it does not know, and options that would have no effect."""

import dataclasses
from typing import get_args

import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.ops.backend import run
from grpo_fast.records import Tokens
from grpo_fast.surrogates import SURROGATES, Row, Surrogate

OBJECTIVE_CASES = {
    "unknown surrogate": (
        {"surrogate": "ppo"},
        ValueError,
        "surrogate='ppo' is unknown; choose from clip",
    ),
    "unknown reduction": ({"reduction": "mean"}, ValueError, "reduction='mean' is unknown"),
    "unknown kl": ({"kl": "k4"}, ValueError, "kl='k4' is unknown"),
    "unhashable choice": ({"kl": ["k3"]}, ValueError, "kl="),
    "negative epsilon": ({"epsilon_low": -0.1}, ValueError, "epsilon_low: .*-0.1"),
    "NaN beta": ({"beta": float("nan")}, ValueError, "beta: .*nan"),
    "negative beta": ({"beta": -1}, ValueError, "beta: .*-1"),
    "text": ({"beta": "0.1"}, TypeError, "beta: .*'0.1'"),
    "bool": ({"entropy_coef": True}, TypeError, "entropy_coef: .*True"),
    "dual_clip below 1": ({"dual_clip": 0.5}, ValueError, "dual_clip: want > 1, got 0.5"),
    "delta of 0": ({"delta": 0}, ValueError, "delta: want > 0"),
    "two bounds": ({"delta": 2.0, "dual_clip": 3.0}, ValueError, "delta=2.0 and dual_clip=3.0"),
    "delta with sapo": (
        {"surrogate": "sapo", "delta": 2.0},
        ValueError,
        "delta=2.0 has no effect.*'sapo'",
    ),
    "tau with clip": (
        {"tau_pos": 2.0},
        ValueError,
        "tau_pos=2.0 has no effect .*'clip'.*belongs to sapo",
    ),
    "epsilon with reinforce": (
        {"surrogate": "reinforce", "epsilon_low": 0.1},
        ValueError,
        "epsilon_low=0.1 has no effect",
    ),
    "cap with clip": ({"ratio_cap": 5.0}, ValueError, "ratio_cap=5.0 has no effect"),
    "penalty with cispo": (
        {"surrogate": "cispo", "quadratic_coef": 0.1},
        ValueError,
        "quadratic_coef=0.1 has no effect",
    ),
    "gap clip with k2": (
        {"kl": "k2", "kl_gap_clip": 20.0},
        ValueError,
        "kl_gap_clip=20.0 has no effect",
    ),
    "no ratio to clamp": (
        {"surrogate": "dro", "log_ratio_clip": 20.0},
        ValueError,
        "log_ratio_clip=20.0 has no effect",
    ),
    "unknown ratio": (
        {"ratio": "seq"},
        ValueError,
        "ratio='seq' is unknown; choose from token, sequence",
    ),
    "a ratio nobody takes": (
        {"ratio": "sequence", "surrogate": "dro"},
        ValueError,
        "ratio='sequence' has no effect with surrogate='dro'",
    ),
    "vespo's option with clip": ({"vespo_k_pos": 1.0}, ValueError, "vespo_k_pos=1.0 has no effect"),
    "vespo's k is no number": (
        {"surrogate": "vespo", "vespo_k_neg": float("nan")},
        ValueError,
        "vespo_k_neg: want a finite number, got nan",
    ),
    "vespo's log W has its own clamp": (
        {"surrogate": "vespo", "log_ratio_clip": 5.0},
        ValueError,
        "log_ratio_clip=5.0 has no effect",
    ),
    "NaN threshold": (
        {"off_policy_threshold": float("nan")},
        ValueError,
        "off_policy_threshold: .*nan",
    ),
    "lambda 0": (
        {"surrogate": "vespo", "vespo_lambda_neg": 0},
        ValueError,
        "vespo_lambda_neg: want > 0",
    ),
    "tau 0": ({"surrogate": "sapo", "tau_neg": 0}, ValueError, "tau_neg: want > 0"),
    "tau None": ({"surrogate": "sapo", "tau_neg": None}, TypeError, "tau_neg: .*None"),
    "cap below": (
        {"surrogate": "cispo", "epsilon_high": -1.0},
        ValueError,
        "epsilon_high: want > -1",
    ),
    "share of less": (
        {"top_entropy_quantile": -0.1},
        ValueError,
        "top_entropy_quantile: want >= 0, got -0.1",
    ),
    "share of more": (
        {"top_entropy_quantile": 1.2},
        ValueError,
        "top_entropy_quantile: want <= 1, got 1.2",
    ),
    "entropy of nothing": (
        {"entropy_reduction": "token_mean"},
        ValueError,
        "entropy_reduction='token_mean' has no effect with entropy_coef=0",
    ),
    "two upper bounds": (
        {"log_ratio_clip": 20.0, "log_ratio_max": 10.0},
        ValueError,
        "log_ratio_clip=20.0 and log_ratio_max=10.0",
    ),
    "no ratio to bound": (
        {"surrogate": "gmpo", "log_ratio_max": 10.0},
        ValueError,
        "log_ratio_max=10.0 has no effect",
    ),
    "topr's weight with clip": ({"topr_weight_neg": 0.5}, ValueError, "belongs to topr"),
    "quadratic DPPO on logp": (
        {"surrogate": "dppo_tv", "quadratic_coef": 0.1},
        ValueError,
        "quadratic_coef=0.1 has no effect with dppo_value='logp'",
    ),
    "k2 as itself": (
        {"kl": "k2", "kl_gradient": "k2"},
        ValueError,
        "kl_gradient='k2' has no effect of its own with kl='k2'",
    ),
    "nothing to be clipped": (
        {"kl_gradient": "k2_clipped"},
        ValueError,
        "kl_gradient='k2_clipped' has no effect of its own without a clamp",
    ),
    "no max_length": ({"reduction": "fixed_length"}, ValueError, "needs max_length"),
    "idle max_length": ({"max_length": 5}, ValueError, "max_length=5 has no effect"),
    "max_length 0": (
        {"reduction": "fixed_length", "max_length": 0},
        ValueError,
        "max_length: .*got 0",
    ),
    "max_length 1.5": (
        {"reduction": "fixed_length", "max_length": 1.5},
        TypeError,
        "max_length: .*1.5",
    ),
}


@pytest.mark.parametrize(
    ("options", "error", "message"), OBJECTIVE_CASES.values(), ids=OBJECTIVE_CASES
)
def test_objective(options, error, message):
    with pytest.raises(error, match=message):
        Objective(**options)


def test_the_entropy_bonus_of_a_trl_preset_is_a_mean_over_tokens():
    assert Objective.preset("trl/grpo", entropy_coef=0.1).entropy_reduction == "token_mean"
    assert Objective.preset("trl/grpo").entropy_reduction == "same"
    same = Objective.preset("trl/grpo", entropy_coef=0.1, entropy_reduction="same")
    assert same.entropy_reduction == "same"
    assert Objective.preset("grpo", entropy_coef=0.1).entropy_reduction == "same"


def test_objective_is_frozen_and_keyword_only():
    with pytest.raises(AttributeError):
        Objective().beta = 0.1
    with pytest.raises(TypeError):
        Objective("clip")
    with pytest.raises(
        ValueError, match="preset 'sapo' is surrogate='sapo', which surrogate='clip' contra"
    ):
        Objective.preset("sapo", surrogate="clip")
    with pytest.raises(ValueError, match=r"delta=2\.0 and dual_clip=3\.0"):
        Objective.preset("verl/vanilla", delta=2.0)
    with pytest.raises(ValueError, match="preset 'gprp' is unknown; did you mean 'grpo'"):
        Objective.preset("gprp")


def test_a_surrogate_without_a_formula_is_an_error(monkeypatch, backend, device):
    """A new row is not enough: no formula of another surrogate may take its place."""
    monkeypatch.setitem(SURROGATES, "mine", Row())
    objective = Objective()
    modes = objective.terms.modes._replace(surrogate="mine")
    object.__setattr__(objective, "surrogate", "mine")
    object.__setattr__(objective, "terms", objective.terms._replace(modes=modes))
    x = torch.zeros(2, device=device)
    with pytest.raises(NotImplementedError, match="no formula for surrogate='mine'"):
        reference.surrogate_loss(x, x, x + 1, x + 1, objective)
    with pytest.raises(Exception, match="surrogate_terms has no formula for"):
        run("policy_loss.policy_loss_fwd", x, x, None, Tokens(x + 1, x + 1), objective)


def test_every_surrogate_has_a_row():
    assert tuple(SURROGATES) == get_args(Surrogate)
    fields = {field.name for field in dataclasses.fields(Objective)}
    assert {option for row in SURROGATES.values() for option in row.options} <= fields
