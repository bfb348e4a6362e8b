"""`torch.compile(fullgraph=True)` over runs whose numbers change from step to step."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from grpo_fast import Objective
from grpo_fast.integrations.shared.packages import is_between
from grpo_fast.loss import grpo_loss, linear_grpo_loss, policy_loss
from grpo_fast.ops import group_advantage, linear_logprob, logprob
from grpo_fast.weights import (
    binary_divergence,
    clip_cov,
    geometric_mean,
    icepop,
    importance_weights,
    kl_cov,
    kpop,
    m2po,
    top_entropy,
    truncated_importance,
)

STEPS = 50  # many more than a function may be compiled for
V, D = 17, 8
ids = torch.randint(V, (4, 3), generator=torch.Generator().manual_seed(0))


def shared(device):
    old = torch.linspace(-4, -2, 12, device=device).view(4, 3)
    return {"advantages": torch.tensor([1.0, -1.0, 0.5, -2.0], device=device), "old_logps": old}


def from_logits(hidden, weight, number, objective):
    """The step, with a term of the caller's own in the same number."""
    where = hidden.device
    out = grpo_loss(
        hidden @ weight.T,
        ids.to(where),
        **shared(where),
        ref_logps=shared(where)["old_logps"],
        temperature=number,
        num_items=number if objective.reduction == "token_mean" else None,
        loss_scale=number,
        objective=objective,
    )
    return out.loss * number + out.metrics["clip_fraction_low"]


def from_hidden(hidden, weight, number, objective):
    where = hidden.device
    out = linear_grpo_loss(
        hidden,
        weight,
        ids.to(where),
        **shared(where),
        ref_logps=shared(where)["old_logps"],
        temperature=number,
        softcap=4 * number,
        logit_scale=number,
        lora=(weight[:2], weight[:, :2], number),
        num_items=number if objective.reduction == "token_mean" else None,
        loss_scale=number,
        objective=objective,
        compact=False,
    )
    return out.loss * number


def from_log_probs(hidden, weight, number, objective):
    where = hidden.device
    scored = ids.to(where)
    logp, entropy = logprob(hidden @ weight.T, scored, temperature=number, return_entropy=True)
    logp = logp + linear_logprob(hidden, weight, scored, temperature=number, softcap=number + 3)
    out = policy_loss(
        logp,
        **shared(where),
        ref_logps=shared(where)["old_logps"],
        entropy=entropy,
        num_items=number if objective.reduction == "token_mean" else None,
        loss_scale=number,
        objective=objective,
    )
    return out.loss / number


SCHEDULES = {
    "beta": lambda k: Objective(beta=0.01 + 0.001 * k),
    "entropy": lambda k: Objective(entropy_coef=0.01 + 0.001 * k, epsilon_high=0.1 + 0.01 * k),
    "items": lambda k: Objective(reduction="token_mean", beta=0.1 / (1 + k), dual_clip=2.0 + k),
    "sequences": lambda k: Objective(
        ratio="sequence",
        epsilon_low=0.01 + 0.001 * k,
        entropy_coef=0.01 * (1 + k),
        top_entropy_quantile=0.5 + 0.005 * k,
        off_policy_threshold=0.1 * (1 + k),
    ),
    "vespo": lambda k: Objective(surrogate="vespo", vespo_k_pos=1 + 0.1 * k, beta=0.01 * (1 + k)),
}


def made_inside(hidden, weight, number, objective):
    """The objective is made in the compiled function."""
    made = Objective(beta=number / 10, epsilon_high=number, entropy_coef=number - 1)
    return from_logits(hidden, weight, number, made)


CASES = [
    ("inductor", from_logits, "items"),
    ("inductor", from_logits, "sequences"),
    ("inductor", from_hidden, "beta"),
    ("inductor", from_log_probs, "entropy"),
    ("inductor", made_inside, "beta"),
    ("aot_eager", from_hidden, "vespo"),
    ("aot_eager", from_log_probs, "items"),
]


@pytest.mark.parametrize(("compiler", "step", "schedule"), CASES)
@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_two_graphs_for_any_schedule(step, compiler, schedule, device, monkeypatch):
    """The first step's graph, and one for every other number; values and gradients are those of eager."""
    if step is made_inside and not is_between(torch.__version__, "2.10"):
        pytest.skip(
            "torch 2.8 and 2.9 trace no property of a named tuple that is made in the graph"
        )
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    hidden = torch.randn(4, 3, D, device=device)
    weight = torch.randn(V, D, device=device, requires_grad=True)
    torch.compiler.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for k in range(STEPS):
        given = (hidden, weight, 1.1 + 0.02 * k, SCHEDULES[schedule](k))
        got, want = compiled(*given), step(*given)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        dgot, dwant = (torch.autograd.grad(x, weight)[0] for x in (got, want))
        torch.testing.assert_close(dgot, dwant, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


def advantages_of(x, number):
    return group_advantage(x[:, 0], group_size=2, eps=number)


WEIGHTS = {
    "group_advantage": advantages_of,
    "rewards": lambda x, number: group_advantage(
        x[:, :2], group_size=2, eps=number, aggregation="normalize_then_sum"
    ),
    "importance_weights": lambda x, number: importance_weights(
        x, 2 * x, low=number / 9, high=number
    ),
    "truncated_importance": lambda x, number: truncated_importance(x, 2 * x, number),
    "icepop": lambda x, number: icepop(x, 2 * x, number / 9, number),
    "geometric_mean": lambda x, number: geometric_mean(x.exp(), eps=number),
    "kpop": lambda x, number: kpop(x, 1.1 * x, number / 50),
    "m2po": lambda x, number: m2po(x, 1.1 * x, number / 50),
    "binary_divergence": lambda x, number: binary_divergence(x, 2 * x, floor=number / 9),
    "top_entropy": lambda x, number: top_entropy(x.exp(), number / 3),
    "clip_cov": lambda x, number: clip_cov(x, 1.1 * x, -x, epsilon_low=number / 9, low=0.0),
    "kl_cov": lambda x, number: kl_cov(x, -x, fraction=number / 3),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_numbers_of_other_functions(name, device, monkeypatch):
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    x = -torch.rand(4, 6, device=device) - 0.05

    def step(number):
        return WEIGHTS[name](x, number) * number

    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for k in range(12):
        number = 0.5 + 0.05 * k
        torch.testing.assert_close(compiled(number), step(number), rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


def policy_of_length(x, size):
    objective = Objective(reduction="fixed_length", max_length=size)
    return policy_loss(x, advantages=x.sum(1), objective=objective).loss


def linear_in_groups(x, size):
    leading = x[:, None], x[:5], torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
    return linear_grpo_loss(*leading, rewards=x[:, 0], group_size=size).loss


SIZES = {
    "group_advantage": lambda x, size: group_advantage(x[:, 0], group_size=size),
    "columns of rewards": lambda x, size: group_advantage(x, group_size=size, weights=x[0]),
    "linear_grpo_loss": linear_in_groups,
    "max_length": policy_of_length,
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_two_graphs_for_any_size(name, device, monkeypatch):
    """The first size's graph, and one for every other size."""
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    x = torch.rand(24, 6, device=device)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(SIZES[name], fullgraph=True, backend=counter)
    for size in (2, 3, 4, 6, 8, 12):
        torch.testing.assert_close(compiled(x, size), SIZES[name](x, size))
    assert counter.frame_count <= 2
