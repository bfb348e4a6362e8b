"""torch.set_default_dtype is the caller's: no result depends on it, to the bit."""

import contextlib

import pytest
import torch

from grpo_fast import Objective, diagnostics, reference, weights
from grpo_fast.loss import grpo_loss, linear_grpo_loss, metrics_from, policy_loss
from grpo_fast.ops import group_advantage, linear_logprob, logprob
from tests.cases import batch, loss_and_grad, tokens
from tests.test_grpo import by_objective

by_default = pytest.mark.parametrize(
    "default", [torch.float64, torch.bfloat16, torch.float16], ids=str
)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def flat(x):
    """The tensors of a result, in order."""
    if isinstance(x, torch.Tensor):
        return [x.detach()]
    if isinstance(x, dict):
        return [y for name in sorted(x) for y in flat(x[name])]
    return [] if x is None else [y for part in x for y in flat(part)]


def unchanged(fn, default):
    """`fn()` has the same bits and dtypes under another default."""
    want = flat(fn())
    with default_dtype(default):
        got = flat(fn())
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def arguments_of(objective, device):
    logits, ids, arguments = batch(3, 5, 40, device)
    arguments |= {"objective": objective, "importance_weights": torch.rand(3, device=device) + 0.5}
    return logits, ids, arguments


@by_default
@by_objective
def test_objectives(objective, default, backend, device):
    logits, ids, arguments = arguments_of(objective, device)
    mask = arguments["mask"]
    share = torch.where(mask, torch.rand(3, 5, device=device) + 0.1, 0)
    logps = torch.where(mask, arguments["old_logps"] + 0.1, 0)
    entropy = torch.rand(3, 5, device=device)

    def results():
        yield loss_and_grad(grpo_loss, logits, ids, **arguments)
        with torch.no_grad():
            out = grpo_loss(logits, ids, **arguments | {"mask": share, "temperature": 0.7})
        yield out
        yield metrics_from(out.statistics)
        given = {"entropy": entropy} if objective.needs_entropy else {}
        yield loss_and_grad(policy_loss, logps, **arguments, **given)
        yield loss_and_grad(reference.policy_loss, logps, **arguments, **given)
        full = {k: x for k, x in arguments.items() if k != "importance_weights"}
        full["advantages"] = arguments["advantages"][:, None].expand(3, 5)
        yield diagnostics.token_diagnostics(logps, **full)

    unchanged(lambda: list(results()), default)


@by_default
@pytest.mark.parametrize("name", ["token_mean", "everything", "top entropy, gspo"])
@pytest.mark.parametrize("compact", [True, False])
def test_from_hidden_states(compact, name, default, backend, device):
    from tests.test_grpo import OBJECTIVES

    objective = OBJECTIVES[name]
    _, ids, arguments = arguments_of(objective, device)
    arguments |= {"compact": compact, "softcap": 5.0, "logit_scale": 0.5, "temperature": 1.3}
    hidden, weight = torch.randn(3, 5, 8, device=device), torch.randn(40, 8, device=device)
    unchanged(lambda: loss_and_grad(linear_grpo_loss, hidden, weight, ids, **arguments), default)
    rewards = {k: x for k, x in arguments.items() if k != "advantages"}
    rewards |= {"rewards": torch.tensor([1.0, 0.5, 0.0], device=device), "group_size": 3}
    unchanged(lambda: linear_grpo_loss(hidden, weight, ids, **rewards), default)
    ids = ids.clamp(min=0)
    unchanged(lambda: linear_logprob(hidden, weight, ids, return_entropy=True), default)
    unchanged(lambda: logprob(hidden, ids % 8, temperature=0.9, return_entropy=True), default)


@by_default
def test_packed_rewards(default, backend, device):
    logits, ids, _ = batch(1, 7, 20, device, garbage=False)
    ends = torch.tensor([0, 3, 3, 7, 7], device=device)
    for objective in (Objective(beta=0.1, kl="k3_unbiased"), Objective(surrogate="topr")):
        arguments = {"rewards": torch.tensor([1, 0, 0, 1], device=device), "group_size": 2}
        arguments |= {"objective": objective, "cu_seqlens": ends, "num_items": 3}
        arguments |= {"old_logps": torch.full((7,), -3.0, device=device)}
        arguments["ref_logps"] = torch.full((7,), -2.5, device=device)
        if objective.reduction != "token_mean":
            del arguments["num_items"]
        for fn in (grpo_loss, reference.grpo_loss):
            unchanged(lambda fn=fn, a=arguments: fn(logits[0], ids[0], **a), default)


@by_default
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale, default, backend, device):
    for rewards in (torch.rand(12, device=device), torch.randint(5, (12,), device=device)):
        for options in ({}, {"baseline": "leave_one_out"}, {"unbiased": False}):
            for fn in (group_advantage, reference.group_advantage):
                unchanged(
                    lambda f=fn, r=rewards, o=options: f(r, group_size=4, scale=scale, **o), default
                )
    several = torch.rand(12, 3, device=device)
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        unchanged(
            lambda a=aggregation: group_advantage(several, group_size=4, aggregation=a), default
        )


@by_default
def test_weights(default, device):
    old, sampling, mask = tokens(device)
    A = torch.randn(6, device=device)
    share = torch.where(mask, torch.rand(6, 9, device=device) + 0.1, 0)

    def results():
        for level in weights.LEVELS:
            for mode in weights.MODES:
                for m in (mask, share):
                    options = {"level": level, "mode": mode, "low": 0.5, "high": 1.3, "mask": m}
                    yield weights.importance_weights(old, sampling, **options)
        yield weights.geometric_mean(old.exp(), mask=mask, eps=0.1)
        yield weights.kpop(old, sampling, 0.1, mask=mask)
        yield weights.binary_divergence(old, sampling, mask=mask, floor=0.01)
        yield weights.binary_divergence(old, sampling, mask=mask, kind="tv")
        yield weights.m2po(old, sampling, 0.1, mask=mask)
        yield weights.top_entropy(old.abs(), 0.3, mask=mask)
        yield weights.kl_cov(old, A, mask=mask, fraction=0.2)
        generator = torch.Generator(device).manual_seed(0)
        options = {"mask": mask, "fraction": 0.3, "low": -1.0, "generator": generator}
        yield weights.clip_cov(old, sampling, A, **options)
        yield weights.varied_groups(A, group_size=3)
        yield diagnostics.kl_estimate(old, sampling)

    unchanged(lambda: list(results()), default)
