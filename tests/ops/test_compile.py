"""`torch.compile(fullgraph=True)`, and what PyTorch asks of a custom operator."""

import pytest
import torch

from grpo_fast import Objective
from grpo_fast.loss import grpo_loss, linear_grpo_loss, policy_loss
from grpo_fast.operands import operand
from grpo_fast.ops import group_advantage, linear_logprob, logprob
from grpo_fast.ops.group_advantage import combine_rewards_op, group_advantage_op
from grpo_fast.ops.grpo import grpo, grpo_
from grpo_fast.ops.head.arguments import Needs, Options, Parameters
from grpo_fast.ops.linear_grpo import LinearArguments, linear_grpo
from grpo_fast.ops.linear_logprob import linear_logprob_bwd, linear_logprob_fwd
from grpo_fast.ops.logprob import logprob_bwd, logprob_fwd
from grpo_fast.ops.policy_loss import policy_loss_op, token_statistics_op
from grpo_fast.ops.reduction_weights import reduction_weights_op
from grpo_fast.ops.scaling import scale_, scale_rows_, scaled_to, weigh_rows
from grpo_fast.ops.sequence_loss import sequence_loss_op
from grpo_fast.records import (
    Grouping,
    Outputs,
    Rewards,
    RowStatistics,
    Sequences,
    Standardization,
    Targets,
    Tokens,
    Weighing,
    flat,
)

V, D = 30, 8


def from_logits(hidden, weight, ids, rewards, old):
    objective = Objective(beta=0.1, entropy_coef=0.01)
    out = grpo_loss(
        hidden @ weight.T,
        ids,
        rewards=rewards,
        group_size=2,
        old_logps=old,
        ref_logps=old,
        objective=objective,
        temperature=0.9,
    )
    return 2 * out.loss, out.metrics["kl"], out.logps


def inplace(hidden, weight, ids, rewards, old):
    advantages = group_advantage(rewards, group_size=2)
    out = grpo_loss(hidden @ weight.T, ids, advantages=advantages, old_logps=old, inplace=True)
    return out.loss / 3, out.metrics["ratio_mean"], out.logps


def packed(hidden, weight, ids, rewards, old):
    logits = (hidden @ weight.T).view(-1, V)
    boundaries = torch.tensor([0, 2, 2, 3, 12], device=hidden.device)
    out = grpo_loss(
        logits,
        ids.view(-1),
        rewards=rewards,
        group_size=2,
        old_logps=old.view(-1),
        cu_seqlens=boundaries,
    )
    return out.loss, out.metrics["ratio_mean"], out.logps


def composed(hidden, weight, ids, rewards, old):
    logp, entropy = logprob(hidden @ weight.T, ids, return_entropy=True)
    objective = Objective(entropy_coef=0.1)
    out = policy_loss(logp, advantages=rewards, old_logps=old, entropy=entropy, objective=objective)
    return 2 * out.loss, out.metrics["clip_fraction_low"], out.logps


def by_sequence(hidden, weight, ids, rewards, old):
    objective = Objective(ratio="sequence", epsilon_low=0.01)
    out = grpo_loss(
        hidden @ weight.T, ids, rewards=rewards, group_size=2, old_logps=old, objective=objective
    )
    return out.loss, out.metrics["clip_fraction_low"], out.logps


def linear(hidden, weight, ids, rewards, old):
    """A small model that ends in the fused head, half of its rows compacted away."""
    advantages = torch.where(torch.arange(4, device=hidden.device) < 2, 0, rewards)
    objective = Objective(surrogate="cispo")
    out = linear_grpo_loss(
        torch.tanh(hidden @ weight.T) @ weight,
        weight,
        ids,
        advantages=advantages,
        old_logps=old,
        objective=objective,
        softcap=5.0,
        chunk_size=4,
    )
    return 2 * out.loss, out.metrics["skipped_fraction"], out.logps


def linear_by_sequence(hidden, weight, ids, rewards, old):
    objective = Objective(ratio="sequence", epsilon_low=0.01, entropy_coef=0.1)
    out = linear_grpo_loss(
        torch.tanh(hidden), weight, ids, advantages=rewards, old_logps=old, objective=objective
    )
    return out.loss, out.entropy, out.logps


def linear_composed(hidden, weight, ids, rewards, old):
    logp, entropy = linear_logprob(
        torch.tanh(hidden), weight, ids, mask=old < 1, return_entropy=True, chunk_size=5
    )
    objective = Objective(entropy_coef=0.1)
    out = policy_loss(logp, advantages=rewards, old_logps=old, entropy=entropy, objective=objective)
    return 2 * out.loss, entropy, out.logps


def inputs(device):
    weight = torch.randn(V, D, device=device)
    hidden = torch.randn(4, 3, D, device=device)
    ids = torch.randint(V, (4, 3), device=device)
    old = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0] - 0.1
    return hidden, weight.requires_grad_(), ids, torch.randn(4, device=device), old


LINEAR = [linear, linear_by_sequence, linear_composed]
STEPS = [from_logits, inplace, packed, composed, by_sequence, *LINEAR]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_full_graph(step, compiler, backend, device):
    arguments = inputs(device)
    want = step(*arguments)
    (dweight,) = torch.autograd.grad(want[0], arguments[1])
    torch.compiler.reset()
    got = torch.compile(step, fullgraph=True, backend=compiler)(*arguments)
    (grad,) = torch.autograd.grad(got[0], arguments[1])
    for a, b in zip((*got, grad), (*want, dweight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def any_length_from_logits(hidden, weight, *rest, objective, cu_seqlens):
    given = arguments_of_any_length(*rest, objective, cu_seqlens)
    return grpo_loss(hidden @ weight.T, **given).loss


def any_length_linear(hidden, weight, *rest, objective, cu_seqlens):
    given = arguments_of_any_length(*rest, objective, cu_seqlens)
    return linear_grpo_loss(hidden, weight, **given, chunk_size=8).loss


def arguments_of_any_length(ids, advantages, old, objective, cu_seqlens):
    return {
        "completion_ids": ids,
        "advantages": advantages,
        "old_logps": old,
        "objective": objective,
        "cu_seqlens": cu_seqlens,
    }


@pytest.mark.parametrize(
    "objective", [Objective(), Objective(ratio="sequence")], ids=["token", "sequence"]
)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    "step", [any_length_from_logits, any_length_linear], ids=lambda f: f.__name__
)
@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_one_graph_for_every_length(step, layout, objective, device, monkeypatch):
    """The lengths of batches vary: more of them than a frame may be compiled for, in one dynamic graph."""
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    weight = torch.randn(V, D, device=device, requires_grad=True)
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=counted)
    for T in range(2, 14):
        hidden, ids = torch.randn(2, T, D, device=device), torch.randint(V, (2, T), device=device)
        old, advantages = torch.full((2, T), -3.0, device=device), torch.ones(2, device=device)
        given = {"objective": objective, "cu_seqlens": None}
        if layout == "packed":
            hidden, ids, old = hidden.flatten(0, 1), ids.flatten(), old.flatten()
            given["cu_seqlens"] = torch.tensor([0, 1, 2 * T], device=device)
        got, want = (f(hidden, weight, ids, advantages, old, **given) for f in (compiled, step))
        torch.testing.assert_close(got, want)
        dgot, dwant = (torch.autograd.grad(x, weight)[0] for x in (got, want))
        torch.testing.assert_close(dgot, dwant, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 2  # of the first length, then of any


def test_opcheck(backend, device):
    """Schema, fake implementation and autograd registration of every operator."""
    N = 6
    logits = torch.randn(2, 3, V, device=device)
    ids = torch.randint(V, (N,), device=device)
    x = torch.rand(N, device=device)
    mask = torch.tensor([1, 1, 0, 1, 1, 1], device=device).bool()
    terms = Objective(beta=0.1, entropy_coef=0.1).terms
    warm, unit = operand(0.9), operand(1.0)
    targets = Targets(ids, mask, None, warm)
    tokens = Tokens(x, x, x, x, None, None, None, None)
    shared = flat(targets, tokens, Rewards(), True, terms)
    tests = ("test_schema", "test_faketensor")
    autograd = (*tests, "test_autograd_registration")

    def check(op, x, *records, tests=tests):
        torch.library.opcheck(getattr(op, "traced", op), (x, *flat(*records)), test_utils=tests)

    graded = logits.clone().requires_grad_()
    check(logprob_fwd, graded, targets, True, tests=autograd)
    check(logprob_fwd, logits, Targets(ids, None, x + 0.5, unit), False)
    check(logprob_bwd, x, x, logits, targets, RowStatistics(-x, x, x, x + 1))
    check(grpo, graded, *shared, tests=autograd)
    check(grpo_, logits.clone(), *shared)
    check(scale_rows_, logits.clone(), x)
    policy = x.clone().requires_grad_(), mask, Tokens(x, x, x, x, x, x, None, None)
    check(policy_loss_op, *policy, terms, tests=autograd)
    gspo = Objective(ratio="sequence", beta=0.1).terms
    check(sequence_loss_op, *policy, Sequences(None, 3, x, None), gspo, tests=autograd)
    clip = torch.zeros(N, dtype=torch.int8, device=device)
    check(token_statistics_op, *Outputs(x, x, x, x, clip), mask, x, x, x)
    rows, half = x.view(2, 3), x.half()
    ends = torch.tensor([0, 2, 6], device=device)
    bare = Weighing(*[None] * 6)
    check(reduction_weights_op, rows, bare, "sequence_sum", 0, False)
    weighing = Weighing(mask, half, x, None, None, warm)
    check(reduction_weights_op, rows, weighing, "sequence_mean", 0, True)
    weighing = Weighing(mask, None, x, ends, x[0], x[1])
    check(reduction_weights_op, x, weighing, "token_mean", 0, True)
    eps, pairs = operand(1e-4), Grouping(2, None)
    labelled, every = Grouping(1, ids), (True, True, True)
    check(group_advantage_op, x, pairs, Standardization("group", eps))
    check(group_advantage_op, x, labelled, Standardization("batch", eps, unbiased=False))
    check(group_advantage_op, x, pairs, Standardization("none", eps, True, *every))
    several, plain = x.view(-1, 2), Standardization("group", eps)
    check(combine_rewards_op, several, x[:2], Grouping(1, None), False, plain)
    skipping = Standardization("none", eps, skip_nan=True, raw_singletons=True)
    check(combine_rewards_op, several, None, Grouping(3, None), True, skipping)


@pytest.mark.parametrize("backend", ["torch"], indirect=True)  # the kernels mutate nothing else
def test_opcheck_of_the_linear_head(backend, device):
    N = 6
    hidden = torch.randn(N, D, device=device)
    weight, bias = torch.randn(V, D, device=device), torch.randn(V, device=device)
    ids = torch.randint(V, (N,), device=device)
    x = torch.rand(N, device=device)
    mask = torch.tensor([1, 1, 0, 1, 1, 1], device=device).bool()
    options = Options(
        lora_scaling=operand(1.0),
        softcap=operand(5.0),
        logit_scale=operand(0.5),
        fp32_logits=True,
        vocab_size=V,
        chunk_size=4,
        tp_group="",
        first_row=0,
        widest=V,
    )
    targets = Targets(ids, mask, None, operand(0.9))
    tokens = Tokens(x, x, x, x, None, None, None, None)
    tests = ("test_schema", "test_faketensor")
    autograd = (*tests, "test_autograd_registration")

    def check(op, x, *records, tests=tests):
        torch.library.opcheck(getattr(op, "traced", op), (x, *flat(*records)), test_utils=tests)

    graded = hidden.clone().requires_grad_()
    head = Parameters(weight.clone().requires_grad_(), bias, None, None)
    check(linear_logprob_fwd, graded, head, targets, mask, True, False, options, tests=autograd)
    frozen = Parameters(weight, bias, None, None)
    check(linear_logprob_fwd, graded, frozen, targets, mask, False, True, options, tests=autograd)
    needs = Needs(True, True, True, False, False)
    given = (frozen, targets, mask, RowStatistics(-x, x, x, x + 1), needs, options)
    check(linear_logprob_bwd, x, x, hidden, *given)
    terms, sequences = Objective(beta=0.1, entropy_coef=0.1).terms, Sequences(None, 3, x, None)
    given = LinearArguments(
        head,
        targets,
        tokens,
        True,
        terms,
        mask,
        sequences,
        options=options,
        needs=needs,
        dw_out=None,
    )
    check(linear_grpo, graded, *given, tests=autograd)
    check(weigh_rows, hidden, x)
    check(scale_, hidden.clone(), x[0])
    check(scaled_to, hidden, x[0], torch.float16)
