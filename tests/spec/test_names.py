"""Errors for wrong names, and for names of other libraries: the message suggests ours."""

import inspect
from typing import get_args

import pytest
import torch

import grpo_fast
from grpo_fast import Objective
from grpo_fast.objective import KL, OPTIONS, Ratio, Reduction, Surrogate
from grpo_fast.ops.group_advantage import AGGREGATIONS, BASELINES
from grpo_fast.presets import PRESETS
from grpo_fast.spelling import ARGUMENTS, CHOICES, LOSS_ARGUMENTS, spelled

X, IDS = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "meant"),
    {
        "GRPO": "grpo",
        "dr-grpo": "dr_grpo",
        "DrGRPO": "dr_grpo",
        "dapo ": "dapo",
        "trl-dapo": "trl/dapo",
        "verl_vanilla": "verl/vanilla",
        "gprp": "grpo",
        "vanilla": "verl/vanilla' or 'xtuner/vanilla",
    }.items(),
)
def test_presets(name, meant):
    with pytest.raises(ValueError, match=f"is unknown; did you mean '{meant}'. The list is") as e:
        Objective.preset(name)
    assert len(str(e.value)) < 200


def test_presets_of_a_trainer_and_none_at_all():
    with pytest.raises(ValueError, match=r"'verl/grpo' is unknown; there are verl/vanilla, verl/g"):
        Objective.preset("verl/grpo")
    with pytest.raises(ValueError, match=r"preset 'zzz' is unknown. The list is grpo_fast.presets"):
        Objective.preset("zzz")
    with pytest.raises(TypeError, match="preset: want a name, such as 'grpo', got None"):
        Objective.preset(None)


def test_a_spelling_means_one_preset():
    assert len({spelled(name) for name in PRESETS}) == len(PRESETS)


OF_OBJECTIVE = {
    "epsilon": "did you mean 'epsilon_low' and 'epsilon_high'",
    "clip_ratio": "did you mean 'epsilon_low' and 'epsilon_high'",
    "kl_coef": "did you mean 'beta'",
    "loss_type": "did you mean 'surrogate' and 'reduction'",
    "entropy_coeff": "did you mean 'entropy_coef'",
    "epsilonlow": "did you mean 'epsilon_low'",
    "num_generations": r"it belongs to the losses: grpo_loss\(..., group_size=",
    "mask": r"it belongs to the losses: grpo_loss\(..., mask=",
    "foo": "keyword argument 'foo'$",
}


@pytest.mark.parametrize(("name", "hint"), OF_OBJECTIVE.items(), ids=OF_OBJECTIVE)
def test_options(name, hint):
    for make in (Objective, lambda **given: Objective.preset("dapo", **given)):
        with pytest.raises(TypeError, match=rf"Objective\(\) got an unexpected .*{hint}"):
            make(**{name: 1})


OF_FUNCTIONS = {
    "num_generations": ("grpo_loss", "did you mean 'group_size'"),
    "old_per_token_logps": ("grpo_loss", "did you mean 'old_logps'"),
    "attention_mask": ("linear_grpo_loss", "did you mean 'mask'"),
    "labels": ("grpo_loss", "did you mean 'completion_ids'"),
    "input_ids": ("logprob", "did you mean 'ids'"),
    "response_mask": ("linear_logprob", "did you mean 'mask'"),
    "scale_rewards": ("group_advantage", "did you mean 'scale'"),
    "advantage": ("policy_loss", "did you mean 'advantages'"),
    "beta": ("grpo_loss", r"objective=Objective\(beta=\.\.\.\)"),
    "cliprange": ("policy_loss", r"objective=Objective\(epsilon_low=\.\.\., epsilon_high=\.\.\.\)"),
}


@pytest.mark.parametrize(("name", "case"), OF_FUNCTIONS.items(), ids=OF_FUNCTIONS)
def test_arguments(name, case):
    function, hint = case
    with pytest.raises(TypeError, match=rf"^{function}\(\) got an unexpected .*'{name}'; .*{hint}"):
        getattr(grpo_fast, function)(X, IDS, **{name: 1})


CHOSEN = [
    ({"kl": "K3"}, "did you mean 'k3'"),
    ({"kl": "low_var_kl"}, "did you mean 'k3'"),
    ({"reduction": "token-mean"}, "did you mean 'token_mean'"),
    ({"reduction": "seq-mean-token-sum"}, "did you mean 'sequence_sum'"),
    ({"surrogate": "ppo"}, "did you mean 'clip'"),
    ({"surrogate": "GSPO"}, r"did you mean Objective.preset\('gspo'\)"),
    ({"reduction": "mean"}, "fixed_length$"),
    ({"kl": 3}, "k3_unbiased$"),
]


@pytest.mark.parametrize(("given", "hint"), CHOSEN, ids=[str(given) for given, _ in CHOSEN])
def test_choices(given, hint):
    with pytest.raises(ValueError, match=f"is unknown; choose from .*{hint}"):
        Objective(**given)
    with pytest.raises(ValueError, match=r"baseline='RLOO' is unknown.*mean 'leave_one_out'\?"):
        grpo_fast.group_advantage(torch.zeros(2), group_size=2, baseline="RLOO")


def test_the_tables_hold_names_that_exist():
    functions = [getattr(grpo_fast, name) for name in ("grpo_loss", "policy_loss", "logprob")]
    functions += [grpo_fast.linear_grpo_loss, grpo_fast.group_advantage]
    arguments = {name for f in functions for name in inspect.signature(f).parameters}
    assert set(LOSS_ARGUMENTS) <= arguments
    for name, ours in ARGUMENTS.items():
        assert set(ours) <= arguments | set(OPTIONS), name
        assert name not in OPTIONS, f"{name} is an option of ours"
    choices = [x for kind in (Surrogate, Ratio, Reduction, KL) for x in get_args(kind)]
    assert set(CHOICES.values()) <= {*choices, *BASELINES, *AGGREGATIONS}


def test_signatures_survive():
    """Help, type checkers and compilers see the function itself."""
    assert list(inspect.signature(Objective).parameters) == list(OPTIONS)
    assert inspect.signature(Objective).parameters["beta"].default == 0.0
    assert grpo_fast.grpo_loss.__name__ == "grpo_loss"
    assert grpo_fast.grpo_loss.__doc__.startswith("Return the GRPO loss")
    graph = torch.compile(
        lambda x, beta: (
            grpo_fast.policy_loss(
                x, advantages=IDS[:, 0], ref_logps=x, objective=Objective(beta=beta)
            ).loss
        ),
        backend="eager",
        fullgraph=True,
    )
    assert graph(X[..., 0], 0.1) == 0
