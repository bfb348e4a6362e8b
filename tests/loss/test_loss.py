"""The public losses: layouts, reductions, metrics, empties, no host sync."""

import dataclasses
import math

import pytest
import torch

from grpo_fast import Objective
from grpo_fast.loss import (
    LossOutput,
    fold_statistics,
    grpo_loss,
    linear_grpo_loss,
    metrics_from,
    policy_loss,
)
from grpo_fast.ops import linear_logprob, logprob
from tests.support.cases import batch, loss_and_grad
from tests.support.objectives import OBJECTIVES, by_objective


def pack(logits, ids, arguments, lengths):
    """Pack the sequences end to end: logits (B, T, V) become (N, V), with `cu_seqlens`."""
    keep = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    packed = {
        name: x[keep] if isinstance(x, torch.Tensor) and x.shape == ids.shape else x
        for name, x in arguments.items()
    }
    packed["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return logits[keep], ids[keep], packed, keep


@by_objective
def test_padded_and_packed_agree_to_the_bit(objective, backend, device):
    """Per token and in the gradient, as 8 divides V; the loss to 1e-6, since its sum has another order."""
    logits, ids, arguments = batch(4, 6, 56, device)
    lengths = torch.tensor([6, 0, 3, 5], device=device)
    logits_p, ids_p, packed, keep = pack(logits, ids, arguments, lengths)
    arguments["mask"] = arguments["mask"] & keep
    packed["mask"] = arguments["mask"][keep]
    packed["cu_seqlens"] = packed["cu_seqlens"].int()
    arguments["objective"] = packed["objective"] = objective
    out = grpo_loss(logits, ids, **arguments)
    out_p = grpo_loss(logits_p, ids_p, **packed)
    torch.testing.assert_close(out_p.loss, out.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out_p.logps, out.logps[keep], rtol=0, atol=0)
    grad = loss_and_grad(grpo_loss, logits, ids, **arguments)[1]
    grad_p = loss_and_grad(grpo_loss, logits_p, ids_p, **packed)[1]
    torch.testing.assert_close(grad_p, grad[keep], rtol=0, atol=0)
    for name, value in out.metrics.items():
        torch.testing.assert_close(out_p.metrics[name], value, rtol=1e-5, atol=1e-6, msg=name)


def by_hand(reduction, losses, num_items=None, max_length=None):
    """The reductions as a loop over sequences of token losses."""
    if reduction == "sequence_mean":
        return sum(sum(x) / max(len(x), 1) for x in losses) / len(losses)
    total = sum(map(sum, losses))
    if reduction == "token_mean":
        return total / (num_items or sum(map(len, losses)))
    return total / (len(losses) * (max_length or 1))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sequence_mean"},
        {"reduction": "token_mean"},
        {"reduction": "sequence_sum"},
        {"reduction": "fixed_length", "max_length": 9},
    ],
    ids=lambda o: o["reduction"],
)
def test_reductions_by_hand(options, layout, backend, device):
    logps = -torch.rand(3, 4, device=device)
    advantages = torch.randn(3, 4, device=device)
    lengths = torch.tensor([4, 0, 2], device=device)
    mask = torch.arange(4, device=device) < lengths[:, None]
    losses = [[-a.item() for a in row[keep]] for row, keep in zip(advantages, mask, strict=True)]
    want = by_hand(options["reduction"], losses, max_length=options.get("max_length"))
    if layout == "packed":
        cu_seqlens = torch.tensor([0, 4, 4, 6], device=device)
        out = policy_loss(
            logps[mask],
            advantages=advantages[mask],
            cu_seqlens=cu_seqlens,
            objective=Objective(**options),
        )
    else:
        out = policy_loss(logps, advantages=advantages, mask=mask, objective=Objective(**options))
    assert out.loss.item() == pytest.approx(want, rel=1e-5)
    if options["reduction"] == "token_mean":
        for num_items in (11, 11.0, torch.tensor(11, device=device)):
            out = policy_loss(
                logps,
                advantages=advantages,
                mask=mask,
                num_items=num_items,
                objective=Objective(**options),
            )
            want = by_hand("token_mean", losses, num_items=11)
            assert out.loss.item() == pytest.approx(want, rel=1e-5)


def test_packed_without_boundaries_is_one_sequence(backend, device):
    logps = -torch.rand(5, device=device)
    advantages = torch.randn(5, device=device)
    one = policy_loss(logps, advantages=advantages)
    padded = policy_loss(logps[None], advantages=advantages[None])
    torch.testing.assert_close(one.loss, padded.loss, rtol=0, atol=0)
    shared = policy_loss(logps, advantages=torch.tensor([2.0], device=device))
    torch.testing.assert_close(shared.loss, torch.tensor(-2.0, device=device))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
def test_masks_of_any_dtype(dtype, backend, device):
    logits, ids, arguments = batch(3, 4, 20, device)
    want = grpo_loss(logits, ids, **arguments)
    arguments["mask"] = arguments["mask"].to(dtype)
    out = grpo_loss(logits, ids, **arguments)
    torch.testing.assert_close(out.loss, want.loss, rtol=0, atol=0)


def test_importance_weights_touch_the_surrogate_alone(backend, device):
    logits, ids, arguments = batch(3, 4, 20, device, garbage=False)
    surrogate = grpo_loss(logits, ids, **arguments).loss
    objective = Objective(beta=0.5)
    whole = grpo_loss(logits, ids, **arguments, objective=objective).loss
    for weights in (torch.full((3,), 3.0), torch.full((3, 1), 3.0), torch.full((3, 4), 3.0)):
        weighted = grpo_loss(
            logits, ids, **arguments, objective=objective, importance_weights=weights.to(device)
        )
        torch.testing.assert_close(weighted.loss, 3 * surrogate + (whole - surrogate))


def test_micro_batches_add_up(backend, device):
    """8 x 1 = 1 x 8 with a common `num_items`, in loss, gradient and metrics."""
    logits, ids, arguments = batch(8, 5, 40, device)
    num_items = int(arguments["mask"].sum())
    options = {"num_items": num_items, "objective": Objective(reduction="token_mean", beta=0.1)}
    loss, grad = loss_and_grad(grpo_loss, logits, ids, **arguments, **options)
    whole = grpo_loss(logits, ids, **arguments, **options)
    total, statistics = 0.0, []
    for b in range(8):
        part = {k: v[b : b + 1] for k, v in arguments.items()}
        x, y = logits[b : b + 1], ids[b : b + 1]
        part_loss, g = loss_and_grad(grpo_loss, x, y, **part, **options)
        torch.testing.assert_close(g, grad[b : b + 1], rtol=0, atol=0)
        total = total + part_loss
        statistics.append(grpo_loss(x, y, **part, **options).statistics)
    torch.testing.assert_close(total, loss, rtol=1e-5, atol=1e-7)
    for name, value in metrics_from(fold_statistics(torch.stack(statistics))).items():
        if name in whole.metrics:
            torch.testing.assert_close(value, whole.metrics[name], rtol=1e-5, atol=1e-6, msg=name)


def test_metrics_mean_what_they_say(backend, device):
    old = torch.log(torch.tensor([[1.0, 0.5, 2.0, 1.0]], device=device)) - 3
    logps = torch.full((1, 4), -3.0, device=device)
    weights = torch.tensor([[1.0, 3.0, 0.1, 1.0]], device=device)
    out = policy_loss(
        logps,
        advantages=torch.ones(1, device=device),
        old_logps=old,
        ref_logps=logps + math.log(2),
        importance_weights=weights,
        mask=torch.tensor([[1, 1, 1, 0]], device=device),
        objective=Objective(beta=0.1),
    )
    ratio = [1.0, 2.0, 0.5]
    rho = [r * w for r, w in zip(ratio, (1.0, 3.0, 0.1), strict=True)]
    want = {
        "tokens": 3,
        "ratio_mean": sum(ratio) / 3,
        "ratio_min": 0.5,
        "ratio_max": 2,
        "clip_fraction_low": 0,
        "clip_fraction_high": 1 / 3,
        "clip_fraction_dual": 0,
        "approx_kl_k1": -sum(map(math.log, ratio)) / 3,
        "approx_kl_k3": sum(r - 1 - math.log(r) for r in ratio) / 3,
        "kl": 2 - math.log(2) - 1,
        "importance_weight_mean": 4.1 / 3,
        "importance_weight_out_of_range": 2 / 3,
        "effective_sample_size": sum(rho) ** 2 / (3 * sum(x * x for x in rho)),
    }
    got = {k: v.item() for k, v in out.metrics.items()}
    assert got == pytest.approx(want, rel=1e-5, abs=1e-6)
    assert all(v.ndim == 0 for v in out.metrics.values())
    out = policy_loss(logps, advantages=torch.ones(1, device=device), old_logps=old)
    assert out.metrics["importance_weight_mean"] == 1
    assert out.metrics["importance_weight_out_of_range"] == 0


def test_the_output(backend, device):
    logits, ids, arguments = batch(3, 4, 20, device)
    out = grpo_loss(logits.requires_grad_(), ids, **arguments)
    assert isinstance(out, LossOutput)
    assert out.loss.ndim == 0
    assert out.loss.requires_grad
    assert out.logps.shape == ids.shape
    assert not out.logps.requires_grad
    assert out.entropy is None
    assert out.logps.isfinite().all()
    with_entropy = grpo_loss(logits, ids, **arguments, objective=Objective(entropy_coef=0.1))
    assert with_entropy.entropy.shape == ids.shape
    assert with_entropy.entropy.isfinite().all()
    assert with_entropy.metrics["entropy"] > 0


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), (3, 4)], ids=str)
@by_objective
def test_legal_empties(objective, shape, backend, device):
    """No token counts: a finite zero that still requires grad, zero gradients, finite metrics."""
    logits = torch.full((*shape, 20), torch.nan, device=device).requires_grad_()
    tokens = torch.zeros(shape, device=device)
    arguments = {
        "advantages": torch.zeros(shape, device=device),
        "old_logps": tokens,
        "ref_logps": tokens,
        "mask": tokens,
        "objective": objective,
    }
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    out = grpo_loss(logits, ids, **arguments)
    assert out.loss == 0
    assert out.loss.requires_grad
    out.loss.backward()
    assert logits.grad.eq(0).all()
    assert all(value.isfinite() for value in out.metrics.values())
    logps = torch.full(shape, torch.nan, device=device).requires_grad_()
    out = policy_loss(logps, entropy=tokens, **arguments)
    out.loss.backward()
    assert out.loss == 0
    assert logps.grad.eq(0).all()
    assert all(value.isfinite() for value in out.metrics.values())


@by_objective
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_no_value_leaves_the_device(objective, layout):
    """Meta tensors have no values: `.item()` or a branch on a value would raise."""
    with torch.device("meta"):
        logits = torch.empty(4, 6, 50, requires_grad=True)
        ids = torch.empty(4, 6, dtype=torch.int64)
        tokens = torch.empty(4, 6)
        x, arguments = logits, {"mask": tokens, "old_logps": tokens, "ref_logps": tokens}
        if layout == "packed":
            x, ids = logits.view(24, 50), ids.view(24)
            arguments = {k: v.view(24) for k, v in arguments.items()}
            arguments["cu_seqlens"] = torch.empty(5, dtype=torch.int32)
        arguments |= {"objective": objective, "temperature": torch.empty(ids.shape)}
        if objective.reduction == "token_mean":
            arguments["num_items"] = torch.empty(())
        out = grpo_loss(x, ids, rewards=torch.empty(4), group_size=2, **arguments)
        out.loss.backward()
        assert out.loss.is_meta
        assert all(value.is_meta for value in out.metrics.values())
        del arguments["temperature"]
        tokens = tokens.view(ids.shape)
        policy_loss(tokens, advantages=tokens, entropy=tokens, **arguments)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="asks CUDA itself whether anything synchronised"
)
def test_no_host_sync_on_the_device():
    # What PyTorch does for determinism looks at indices on the host.
    torch.use_deterministic_algorithms(False)
    logits, ids, arguments = batch(4, 6, 50_000, "cuda", torch.bfloat16)
    leaf = logits.requires_grad_()
    objective = Objective(beta=0.1, entropy_coef=0.1, reduction="token_mean")
    for _ in range(2):  # the first call compiles the kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            grpo_loss(leaf * 1, ids, **arguments, objective=objective, inplace=True).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_presets():
    assert Objective.preset("grpo") == Objective(beta=0.04)
    assert Objective.preset("dapo", beta=0.1) == Objective(
        reduction="token_mean", epsilon_high=0.28, beta=0.1
    )
    assert Objective.preset("dr_grpo", max_length=7).max_length == 7
    assert Objective.preset("bnpo").reduction == "token_mean"


def test_objective_survives_its_terms():
    """All but the reduction, for which a weight per token stands by then."""
    for objective in (*OBJECTIVES.values(), dataclasses.replace(Objective(), beta=0.5)):
        rest = {"reduction": "sequence_mean", "max_length": None, "entropy_reduction": "same"}
        modes, numbers = objective.terms
        found = Objective.from_terms(type(modes).of(modes.key), numbers)
        assert found == dataclasses.replace(objective, **rest)
        assert found.terms.modes == modes._replace(entropy_reduction="same")


CONSTANTS = {
    "advantages": (torch.ones(4, 3), {}),
    "importance_weights": (torch.ones(4, 3), {}),
    "token_weights": (torch.ones(4, 3), {}),
    "rewards": (torch.ones(4), {"advantages": None, "group_size": 2}),
    "scores": (torch.ones(4), {"objective": Objective(surrogate="topr")}),
    "num_items": (torch.ones(()), {"objective": Objective(reduction="token_mean")}),
    "temperature": (torch.ones(4, 3), {}),
    "temperature, one": (torch.ones(()), {}),
}


@pytest.mark.parametrize("which", CONSTANTS)
def test_a_constant_that_requires_grad_is_refused(which):
    name, (value, rest) = which.split(",")[0], CONSTANTS[which]
    given = {"advantages": torch.ones(4), **rest, name: value.clone().requires_grad_()}
    ids = torch.zeros(4, 3, dtype=torch.int64)
    hidden, weight = torch.zeros(4, 3, 2), torch.zeros(5, 2)
    remedy = rf"{name} requires grad.*pass {name}.detach\(\)"
    with pytest.raises(ValueError, match=f"grpo_loss: {remedy}"):
        grpo_loss(torch.zeros(4, 3, 5), ids, **given)
    with pytest.raises(ValueError, match=f"linear_grpo_loss: {remedy}"):
        linear_grpo_loss(hidden, weight, ids, **given)
    if name == "temperature":
        heat = {"temperature": given["temperature"]}
        for scored in (
            lambda: logprob(torch.zeros(4, 3, 5), ids, **heat),
            lambda: linear_logprob(hidden, weight, ids, **heat),
        ):
            with pytest.raises(ValueError, match=f"logprob: {remedy}"):
                scored()
    elif name != "rewards":
        with pytest.raises(ValueError, match=f"policy_loss: {remedy}"):
            policy_loss(torch.zeros(4, 3), **given)


def test_log_probs_of_other_policies_are_constants():
    """They are constants even with a graph: `old_logps=logps`, or a reference scored without no_grad."""
    head = torch.randn(5, 2, requires_grad=True)
    other = torch.randn(5, 2, requires_grad=True)
    hidden, ids = torch.randn(4, 3, 2), torch.randint(5, (4, 3))
    logps, ref = logprob(hidden @ head.T, ids), logprob(hidden @ other.T, ids)
    losses = (
        lambda **rest: policy_loss(logps, **rest),
        lambda **rest: grpo_loss(hidden @ head.T, ids, **rest),
        lambda **rest: linear_grpo_loss(hidden, head, ids, **rest),
    )
    for loss in losses:
        grads = []
        for old, reference in ((logps, ref), (logps.detach(), ref.detach())):
            out = loss(
                advantages=torch.arange(4.0),
                old_logps=old,
                ref_logps=reference,
                objective=Objective(beta=0.1),
            ).loss
            grads += torch.autograd.grad(
                out, (head, other), retain_graph=True, materialize_grads=True
            )
        torch.testing.assert_close(grads[0], grads[2], rtol=0, atol=0)
        assert grads[0].ne(0).any()
        assert grads[1].eq(0).all()
