"""Numbers and objects that are not accepted: the error names the argument and the value."""

import pytest
import torch

from grpo_fast import Objective
from grpo_fast.loss import grpo_loss, linear_grpo_loss, policy_loss
from grpo_fast.ops import group_advantage, linear_logprob, logprob
from grpo_fast.weights import clip_cov, importance_weights, truncated_importance

IDS = torch.zeros(4, 3, dtype=torch.int64)
LOGITS, LOGPS, A = torch.zeros(4, 3, 9), -torch.ones(4, 3), torch.ones(4)
HIDDEN, WEIGHT = torch.ones(4, 3, 5), torch.ones(9, 5)
MEAN = Objective(reduction="token_mean")


def loss(**options):
    return policy_loss(LOGPS, advantages=A, **options)


def head(**options):
    return linear_grpo_loss(HIDDEN, WEIGHT, IDS, advantages=A, **options)


def scores(**options):
    return linear_logprob(HIDDEN, WEIGHT, IDS, **options)


CASES = {
    "num_items 1e39": (lambda: loss(num_items=1e39, objective=MEAN), "num_items: .*1e"),
    "num_items tensor": (
        lambda: loss(num_items=torch.tensor(1e39, dtype=torch.float64), objective=MEAN),
        "num_items: .*1e",
    ),
    "epsilon_high": (lambda: Objective(epsilon_high=1e39), "epsilon_high: .*float32.*1e"),
    "beta": (lambda: Objective(beta=1e39), "beta: .*float32.*1e"),
    "entropy_coef": (lambda: Objective(entropy_coef=-1e39), "entropy_coef: .*float32.*-1e"),
    "entropy": (lambda: loss(entropy=[1.0]), "entropy: want a tensor, got list"),
    "tp_group": (lambda: head(tp_group="x"), "tp_group: want .*ProcessGroup, got str"),
    "generator": (lambda: clip_cov(LOGPS, LOGPS, A, generator=3), "generator: want .*got 3"),
    "no columns": (
        lambda: linear_grpo_loss(HIDDEN[..., :0], WEIGHT[:, :0], IDS, advantages=A),
        r"hidden: .*D > 0, got \(4, 3, 0\)",
    ),
    "chunk_size": (lambda: head(chunk_size=2**40), f"chunk_size: want at most .*{2**40}"),
    "temperature": (lambda: logprob(LOGITS, IDS, temperature=1e-45), "temperature: .*1e-45"),
    "temperature per token": (
        lambda: logprob(LOGITS, IDS, temperature=torch.full((4, 3), 1e-45)),
        "temperature: .*e-45",
    ),
    "temperature 0-dim": (
        lambda: grpo_loss(LOGITS, IDS, advantages=A, temperature=torch.tensor(1e-45)),
        "temperature: .*e-45",
    ),
    "large temperature": (lambda: scores(temperature=1e39), r"temperature: .*1e\+39"),
    "softcap": (lambda: scores(softcap=1e39), r"softcap: .*1e\+39"),
    "logit_scale": (lambda: scores(logit_scale=1e-45), "logit_scale: .*1e-45"),
    "lora scaling": (
        lambda: scores(lora=(WEIGHT[:2], WEIGHT[:, :2], float("nan"))),
        "lora scaling: .*nan",
    ),
    "lora": (lambda: scores(lora=3), "lora: want .*got int"),
    "cap": (lambda: truncated_importance(LOGPS, LOGPS, None), "cap: want a number, got None"),
    "high": (
        lambda: importance_weights(LOGPS, LOGPS, high=float("inf")),
        "high: want a finite number >= 0.0, got inf",
    ),
    "eps": (lambda: group_advantage(A, group_size=2, eps="a"), "eps: want a number, got 'a'"),
    "large eps": (lambda: group_advantage(A, group_size=2, eps=1e39), r"eps: .*1e\+39"),
    "objective": (lambda: loss(objective="grpo"), "objective: want an Objective.*'grpo'"),
}


@pytest.mark.parametrize(("call", "match"), CASES.values(), ids=CASES)
def test_named_with_the_value(call, match):
    with pytest.raises((ValueError, TypeError), match=match):
        call()


def test_overlapping_rows_cannot_collect_a_gradient():
    weight = WEIGHT.clone().requires_grad_()
    shared = torch.zeros(1, 5).expand(9, 5)
    with pytest.raises(ValueError, match=r"dw_out: its rows overlap, strides \(0, 1\)"):
        linear_grpo_loss(HIDDEN, weight, IDS, advantages=A, dw_out=shared)


def test_a_huge_number_of_items_is_a_number():
    assert loss(num_items=2**70, objective=MEAN).loss.item() == pytest.approx(-12 / 2**70)


def test_no_temperature_gives_nan():
    for temperature in (1.2e-38, 3e38):
        assert logprob(LOGITS, IDS, temperature=temperature).isfinite().all()
