"""`grpo_loss` from logits: the fused kernel, its gradient, and what happens to the logits."""

import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.loss import grpo_loss
from grpo_fast.ops import logprob
from grpo_fast.testing import assert_as_accurate
from tests.support.cases import batch, by_dtype, check, in_double, loss_and_grad
from tests.support.objectives import OBJECTIVES, by_objective
from tests.support.properties import given, settings, st

# One tile, one and two and a rest, shared by programs.
SHAPES = [(2, 3, 7), (3, 4, 1024), (3, 2, 9001), (3, 2, 20_000), (2, 2, 40_000)]


@by_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, backend, device):
    logits, ids, arguments = batch(*shape, device, dtype)
    arguments["objective"] = Objective(beta=0.1, entropy_coef=0.02)
    check(logits, ids, {**arguments, "temperature": 0.8}, upstream=1.5)


@by_objective
def test_every_objective(objective, backend, device):
    logits, ids, arguments = batch(5, 6, 60, device)
    check(logits, ids, {**arguments, "objective": objective})


@settings(max_examples=20)
@given(
    B=st.integers(1, 4),
    T=st.integers(1, 5),
    V=st.integers(2, 1500),
    drift=st.floats(0, 3),
    temperature=st.floats(0.3, 3),
    objective=st.sampled_from(list(OBJECTIVES.values())),
    seed=st.integers(0, 2**16),
)
def test_any_shape(B, T, V, drift, temperature, objective, seed, backend, device):
    torch.manual_seed(seed)
    logits, ids, arguments = batch(B, T, V, device, drift=drift)
    check(logits, ids, {**arguments, "objective": objective, "temperature": temperature})


@pytest.mark.parametrize("shape", [(2, 3, 50), (2, 2, 40_000)], ids=str)
def test_every_optional_argument(shape, backend, device):
    B, T, _ = shape
    logits, ids, arguments = batch(*shape, device)
    arguments |= {
        "advantages": torch.randn(B, T, device=device),
        "importance_weights": torch.rand(B, T, device=device) * 2,
        "token_weights": torch.rand(B, T, device=device),
        "temperature": torch.rand(B, T, device=device) + 0.5,
        "num_items": 37,
        "objective": Objective(reduction="token_mean", beta=0.1),
    }
    check(logits, ids, arguments)
    for name in ("mask", "old_logps", "importance_weights", "token_weights", "num_items"):
        shorter = {k: v for k, v in arguments.items() if k != name}
        if name == "mask":
            logits, ids, clean = batch(*shape, device, garbage=False)
            shorter |= {"old_logps": clean["old_logps"], "ref_logps": clean["ref_logps"]}
        check(logits, ids, shorter)


@pytest.mark.parametrize("V", [90, 40_000])
def test_on_policy_is_the_reinforce_gradient(V, backend, device):
    """Without old log-probs the ratio is 1 exactly, and the gradient that of A log p."""
    logits, ids, arguments = batch(4, 3, V, device, garbage=False)
    del arguments["old_logps"], arguments["ref_logps"]
    objective = Objective(reduction="sequence_sum")
    out = grpo_loss(logits, ids, **arguments, objective=objective)
    assert out.metrics["ratio_min"] == 1
    assert out.metrics["ratio_max"] == 1

    def reinforce(x):
        logp = reference.logprob(x, ids)
        return -(arguments["mask"] * arguments["advantages"].double()[:, None] * logp).sum() / 4

    grad = loss_and_grad(grpo_loss, logits, ids, **arguments, objective=objective)[1]
    want = loss_and_grad(reinforce, logits.double())[1]
    torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("V", [90, 9000, 40_000])
def test_old_log_probs_of_the_same_op_give_a_ratio_of_exactly_one(V, backend, device):
    logits, ids, arguments = batch(3, 4, V, device)
    with torch.no_grad():
        old = logprob(logits, ids, mask=arguments["mask"], temperature=0.9)
    arguments |= {"old_logps": old, "temperature": 0.9}
    for x in (logits, logits.clone().requires_grad_()):  # forward only, and with its gradient
        metrics = grpo_loss(x, ids, **arguments).metrics
        assert metrics["ratio_min"] == 1
        assert metrics["ratio_max"] == 1


@pytest.mark.parametrize("V", [90, 40_000])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_rewards_are_scored_in_the_launch(V, layout, backend, device):
    logits, ids, arguments = batch(6, 3, V, device)
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.3, 0.3, 0.3], device=device)
    del arguments["advantages"]
    if layout == "packed":
        logits, ids = logits.flatten(0, 1), ids.flatten()
        arguments = {k: v.flatten() for k, v in arguments.items()}
        arguments["cu_seqlens"] = torch.arange(0, 19, 3, device=device)
    arguments |= {"rewards": rewards, "group_size": 3}
    check(logits, ids, arguments)
    grad = loss_and_grad(grpo_loss, logits, ids, **arguments)[1]
    assert grad.view(6, 3, V)[3:].eq(0).all()  # nothing to learn from a group of equals


def test_inplace_gives_the_same_bits_in_the_same_memory(backend, device):
    for V in (60, 40_000):
        logits, ids, arguments = batch(3, 4, V, device)
        arguments["objective"] = Objective(beta=0.1, entropy_coef=0.01)
        want = loss_and_grad(grpo_loss, logits, ids, upstream=2.0, **arguments)
        leaf = logits.clone().requires_grad_()
        work = leaf * 1
        out = grpo_loss(work, ids, inplace=True, **arguments)
        (grad,) = torch.autograd.grad(2 * out.loss, leaf)
        torch.testing.assert_close(out.loss, want[0], rtol=0, atol=0)
        torch.testing.assert_close(grad, want[1], rtol=0, atol=0)


@by_objective
@pytest.mark.parametrize("policy", ["on", "off"])
def test_inplace_of_every_objective(objective, policy, backend, device):
    """Objectives that depend on other tokens compute the log-probs first, and then make one launch."""
    logits, ids, arguments = batch(4, 6, 60, device)
    arguments["objective"] = objective
    if policy == "on":
        del arguments["old_logps"]
        if (
            objective.off_policy_threshold is not None
            or objective.quadratic_coef
            or objective.surrogate == "rollout_is"
        ):
            with pytest.raises(ValueError, match="old_logps: needed"):
                grpo_loss(logits, ids, **arguments)
            return
    loss, grad = loss_and_grad(
        lambda x, ids, **a: grpo_loss(x * 1, ids, inplace=True, **a),
        logits,
        ids,
        upstream=-1.5,
        **arguments,
    )
    baseline, truth = (
        loss_and_grad(reference.grpo_loss, x, ids, upstream=-1.5, **a)
        for x, a in ((logits, arguments), (logits.double(), in_double(arguments)))
    )
    for name, a, b, t in zip(("loss", "dlogits"), (loss, grad), baseline, truth, strict=True):
        assert_as_accurate(a, b, t, name=name)


@pytest.mark.parametrize("packed", [False, True])
def test_inplace_overwrites_a_view_of_larger_logits(packed, backend, device):
    logits, ids, arguments = batch(3, 4, 60, device)
    want = loss_and_grad(grpo_loss, logits, ids, **arguments)[1]
    padded = torch.cat([logits, logits.new_zeros(3, 1, 60)], 1).requires_grad_()
    view = (padded * 1)[:, :-1]
    if packed:
        view = view.reshape(12, 60)
        ids = ids.flatten()
        advantages = arguments["advantages"][:, None].expand(3, 4).flatten()
        arguments = {k: v.flatten() for k, v in arguments.items()} | {"advantages": advantages}
        arguments["cu_seqlens"] = torch.arange(0, 13, 4, device=device)
    grpo_loss(view, ids, inplace=True, **arguments).loss.backward()
    torch.testing.assert_close(padded.grad[:, :-1], want, rtol=1e-6, atol=1e-9)
    assert padded.grad[:, -1].eq(0).all()


def overwritten(device):
    logits, ids, arguments = batch(2, 3, 60, device, garbage=False)
    leaf = logits.requires_grad_()
    work = leaf * 1
    return leaf, work, grpo_loss(work, ids, inplace=True, **arguments), ids, arguments


def test_destroyed_logits_cannot_be_used_by_a_loss(backend, device):
    _, work, _, ids, arguments = overwritten(device)
    with pytest.raises(RuntimeError, match="overwritten"):
        grpo_loss(work, ids, **arguments)
    with pytest.raises(RuntimeError, match="overwritten"), torch.no_grad():
        grpo_loss(work, ids, **arguments)


def test_destroyed_logits_pass_no_gradient(backend, device):
    leaf, work, out, _, _ = overwritten(device)
    with pytest.raises(RuntimeError, match="overwritten"):
        (out.loss + work.logsumexp(-1).sum()).backward()
    assert leaf.grad is None


def test_logits_that_others_saved_are_missed_by_autograd(backend, device):
    logits, ids, arguments = batch(2, 3, 60, device, garbage=False)
    work = logits.requires_grad_() * 1
    other = work.logsumexp(-1).sum()  # saves `work`
    out = grpo_loss(work, ids, inplace=True, **arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.loss + other).backward()


def test_inplace_refuses_what_it_cannot_overwrite(backend, device):
    logits, ids, arguments = batch(2, 3, 60, device)
    with pytest.raises(ValueError, match="leaf"):
        grpo_loss(logits.requires_grad_(), ids, inplace=True, **arguments)
    row = torch.zeros(1, 1, 60, device=device).requires_grad_() * 1
    with pytest.raises(ValueError, match="overlap"):
        grpo_loss(row.expand(2, 3, 60), ids, inplace=True, **arguments)


def test_inplace_without_a_gradient_leaves_the_logits_alone(backend, device):
    logits, ids, arguments = batch(2, 3, 60, device)
    before = logits.clone()
    grpo_loss(logits, ids, inplace=True, **arguments)
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_second_and_double_backward_raise(inplace, backend, device):
    logits, ids, arguments = batch(2, 3, 60, device)
    loss = grpo_loss(logits.requires_grad_() * 1, ids, inplace=inplace, **arguments).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    x = torch.ones((), device=device, requires_grad=True)
    loss = grpo_loss(logits * x, ids, inplace=inplace, **arguments).loss * x
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.nan_to_num().square().sum().backward()


def test_backward_hands_its_buffer_over(backend, device):
    """The gradient of a leaf is the buffer itself, not a copy: the memory that `inplace=False` promises."""
    logits, ids, arguments = batch(2, 3, 60, device)
    leaf = logits.requires_grad_()
    loss = grpo_loss(leaf, ids, **arguments).loss
    node = loss.grad_fn
    while not hasattr(node, "dlogits"):
        node = node.next_functions[0][0]
    buffer = node.dlogits.data_ptr()
    loss.backward()
    assert leaf.grad.data_ptr() == buffer


def test_strided_logits_are_not_copied_and_match(backend, device):
    logits, ids, arguments = batch(3, 4, 704, device)
    wide = torch.cat([logits, logits[:, :1]], 1)[:, :-1]
    assert not wide.is_contiguous()
    want = loss_and_grad(grpo_loss, logits, ids, **arguments)
    x = wide.detach().requires_grad_()
    out = grpo_loss(x, ids, **arguments)
    (grad,) = torch.autograd.grad(out.loss, x)
    torch.testing.assert_close(out.loss, want[0], rtol=0, atol=0)
    torch.testing.assert_close(grad, want[1], rtol=0, atol=0)


def test_weights_of_exactly_one(backend, device):
    logits, ids, arguments = batch(3, 4, 30, device)
    arguments |= {"objective": Objective(reduction="token_mean", beta=0.1), "num_items": 1}
    check(logits, ids, arguments)


def test_forward_only_gives_the_same_loss(backend, device):
    for V in (60, 40_000):
        logits, ids, arguments = batch(3, 4, V, device)
        arguments["objective"] = Objective(beta=0.1, entropy_coef=0.01)
        with_grad = grpo_loss(logits.clone().requires_grad_(), ids, **arguments)
        without = grpo_loss(logits, ids, **arguments)
        assert not without.loss.requires_grad
        for name, a in without.metrics.items():
            torch.testing.assert_close(a, with_grad.metrics[name], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(without.logps, with_grad.logps, rtol=0, atol=0)
        torch.testing.assert_close(without.loss, with_grad.loss, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("objective", [Objective(), Objective(ratio="sequence")])
def test_entropy_on_request_changes_nothing_else(objective, backend, device):
    logits, ids, arguments = batch(3, 4, 60, device)
    arguments["objective"] = objective
    plain = grpo_loss(logits.clone().requires_grad_(), ids, **arguments)
    asked = grpo_loss(logits.clone().requires_grad_(), ids, return_entropy=True, **arguments)
    assert plain.entropy is None
    assert "entropy" not in plain.metrics
    mask = arguments["mask"]
    want = reference.entropy(logits.double())[mask]
    torch.testing.assert_close(asked.entropy[mask].double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(asked.metrics["entropy"].double(), want.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(asked.loss, plain.loss, rtol=1e-6, atol=1e-7)


def test_gradient_properties(backend, device):
    logits, ids, arguments = batch(4, 5, 304, device, garbage=False)
    arguments["objective"] = Objective(beta=0.1, entropy_coef=0.05)
    out, grad = loss_and_grad(grpo_loss, logits, ids, **arguments)
    assert grad.double().sum(-1).abs().max() < 1e-7  # over the vocabulary
    assert grad[~arguments["mask"]].eq(0).all()
    order = torch.tensor([2, 0, 3, 1], device=device)
    moved = {k: v[order] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    loss2, grad2 = loss_and_grad(grpo_loss, logits[order], ids[order], **moved)
    torch.testing.assert_close(grad2, grad[order], rtol=0, atol=0)
    torch.testing.assert_close(loss2, out, rtol=1e-6, atol=1e-7)


def test_run_to_run_the_same_bits(backend, device):
    logits, ids, arguments = batch(3, 4, 40_000, device)
    arguments["objective"] = Objective(beta=0.1, entropy_coef=0.05)
    one, two = (loss_and_grad(grpo_loss, logits, ids, **arguments) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_overflowing_ratio_passes_no_gradient(backend, device):
    """exp(200) is inf in float32; where the clip cuts it off, nothing of it may reach the gradient."""
    logits, ids, arguments = batch(2, 3, 60, device, garbage=False)
    arguments["old_logps"] = torch.full((2, 3), -200.0, device=device)
    arguments["advantages"] = torch.tensor([1.0, 0.0], device=device)
    arguments["mask"] = torch.ones(2, 3, device=device)
    loss, grad = loss_and_grad(grpo_loss, logits, ids, **arguments)
    torch.testing.assert_close(loss, torch.tensor(-0.6, device=device))
    assert grad.eq(0).all()


def test_nan_logits_of_a_live_token_reach_the_loss(backend, device):
    """A diverged model must show, not be hidden by a clip or a clamp."""
    logits, ids, arguments = batch(2, 3, 60, device, garbage=False)
    logits[0, 0, 5] = torch.nan
    assert grpo_loss(logits, ids, **arguments).loss.isnan()
