"""Losses of padded tokens that one compiled call computes: exact, and the same to a caller."""

import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.loss import policy_loss
from grpo_fast.notices import forget, recorded
from grpo_fast.ops import coefficients
from grpo_fast.testing import assert_as_accurate
from grpo_fast.torch_kernels import compiled
from grpo_fast.torch_kernels import policy_loss as twin
from tests.support.cases import in_double, loss_and_grad
from tests.support.compiling import compile_every_call
from tests.support.objectives import OBJECTIVES

B, T = 5, 37  # two blocks of 16 tokens and a rest
BY_TOKEN = Objective(reduction="token_mean", beta=0.1, epsilon_high=0.28, dual_clip=1.1)
BY_SEQUENCE = Objective(ratio="sequence", kl="k3_unbiased", beta=0.2, epsilon_low=0.05)
ON_POLICY = Objective(surrogate="reinforce", reduction="fixed_length", max_length=50)


@pytest.fixture
def one_call(monkeypatch, device):
    """Ask for compiled code, and return the calls of it; the fallback to single parts is an error."""
    compile_every_call(monkeypatch, device)
    calls = []

    def call(function, static, *tensors, moving=1):
        calls.append(function)
        return compiled.call(function, static, *tensors, moving=moving)

    monkeypatch.setattr(twin, "call", call)
    return calls


@pytest.fixture
def uncompiled(monkeypatch, device):
    """Run the function that is compiled as it is, and return the calls of it."""
    if device != "cpu":
        pytest.skip("the kernels run")
    calls = []

    def call(function, static, *tensors, moving):
        calls.append(function)
        return function(*tensors, *static)

    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    monkeypatch.setattr(twin, "call", call)
    monkeypatch.setattr(twin, "pays_off", lambda logp: True)
    return calls


def batch(rows=B, length=T):
    """Log-probs and all arguments that go with them; the last sequence is masked."""
    torch.manual_seed(rows)
    logps = -2 * torch.rand(rows, length)
    mask = torch.rand(rows, length) > 0.2
    mask[-1] = rows == 1
    logps[~mask] = torch.nan
    noise = 0.3 * torch.randn(2, rows, length)
    return logps, {
        "advantages": torch.randn(rows),
        "mask": mask,
        "old_logps": logps + noise[0],
        "ref_logps": logps + noise[1],
    }


def parts(monkeypatch, logps, arguments):
    """Return what `policy_loss` does where it calls the parts of the loss one by one."""
    with monkeypatch.context() as patch:
        patch.setattr(twin, "pays_off", lambda logp: False)
        patch.setenv("GRPO_FAST_COMPILE", "0")
        return policy_loss(logps, **arguments)


def same(monkeypatch, logps, arguments):
    """Compare a call with the specification, and its other results with those of the single parts."""
    finite = {
        key: x.nan_to_num() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for key, x in arguments.items()
    }
    actual = loss_and_grad(policy_loss, logps, upstream=-3.0, **arguments)
    clean = logps.nan_to_num()
    baseline = loss_and_grad(reference.policy_loss, clean.float(), upstream=-3.0, **finite)
    truth = loss_and_grad(reference.policy_loss, clean.double(), upstream=-3.0, **in_double(finite))
    assert actual[1].dtype == logps.dtype
    floor = 1e-5 if logps.dtype == torch.float32 else 4e-3
    for name, a, b, t in zip(("loss", "dlogps"), actual, baseline, truth, strict=True):
        assert_as_accurate(a, b, t, name=name, floor=floor)
    found, want = policy_loss(logps, **arguments), parts(monkeypatch, logps, arguments)
    assert list(found.metrics) == list(want.metrics)
    torch.testing.assert_close(found._asdict(), want._asdict(), equal_nan=True)
    assert found.logps.dtype == torch.float32


@pytest.mark.parametrize("name", [x for x in OBJECTIVES if not OBJECTIVES[x].needs_entropy])
def test_the_function_that_is_compiled(name, uncompiled, monkeypatch):
    """It composes the parts on (B, T), where each part alone takes (N,)."""
    logps, arguments = batch()
    arguments |= {
        "objective": OBJECTIVES[name],
        "mask": arguments["mask"] * torch.rand(B, T),
        "token_weights": torch.rand(B, T),
    }
    if OBJECTIVES[name].surrogate != "vespo":
        arguments["importance_weights"] = torch.rand(B) + 0.5
    if OBJECTIVES[name].surrogate == "topr":
        arguments["scores"] = torch.randn(B)
    want = parts(monkeypatch, logps, arguments)
    found = policy_loss(logps, **arguments)
    assert len(uncompiled) == 1
    torch.testing.assert_close(found._asdict(), want._asdict(), equal_nan=True)
    arguments |= {"mask": None, "old_logps": arguments["old_logps"].nan_to_num()}
    arguments["ref_logps"] = arguments["ref_logps"].nan_to_num()
    logps = logps.nan_to_num().requires_grad_()
    results = []
    for way in (parts, lambda _, *given: policy_loss(given[0], **given[1])):
        out = way(monkeypatch, logps, arguments)
        results.append((*torch.autograd.grad(out.loss, logps), out.statistics, out.metrics))
    assert len(uncompiled) == 2
    torch.testing.assert_close(*results)


def test_objectives_of_tokens(one_call, monkeypatch):
    """Any shape and any numbers run the same compiled code."""
    compiled._compiled.cache_clear()
    for rows, length, items in ((B, T, 100), (1, 60, 7.5), (3, 2, torch.tensor(11))):
        logps, arguments = batch(rows, length)
        arguments |= {"objective": BY_TOKEN, "num_items": items, "loss_scale": 1 / length}
        same(monkeypatch, logps, arguments)
    assert set(one_call) == {twin._of_padded_batch}
    assert compiled._compiled.cache_info().misses == 1


def test_objectives_of_sequences(one_call, monkeypatch):
    """With a floating mask, weights of tokens and of sequences, and an entropy for the metrics."""
    for rows, length in ((B, T), (1, 60)):
        logps, arguments = batch(rows, length)
        same(
            monkeypatch,
            logps,
            {
                **arguments,
                "objective": BY_SEQUENCE,
                "mask": arguments["mask"] * torch.rand(rows, length),
                "advantages": torch.randn(rows, length),
                "token_weights": torch.rand(rows, length),
                "importance_weights": torch.rand(rows) + 0.5,
                "entropy": torch.rand(rows, length),
            },
        )
    assert one_call


def test_small_losses_are_computed_by_one_thread(one_call, monkeypatch):
    """The gradient of a token has the same bits by several threads."""
    seen, usually = [], compiled._compiled

    def watch(*key):
        seen.append(key[-1])
        return usually(*key)

    monkeypatch.setattr(compiled, "_compiled", watch)
    logps, arguments = batch()
    found, threads = [], torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for least in (logps.numel() + 1, logps.numel()):
            monkeypatch.setattr(compiled, "ALONE", least)
            x = logps.clone().requires_grad_()
            out = policy_loss(x, **arguments, objective=BY_SEQUENCE)
            found.append((*torch.autograd.grad(out.loss, x), out.metrics))
        policy_loss(logps, **arguments | {"old_logps": None}, objective=BY_SEQUENCE)
    finally:
        torch.set_num_threads(threads)
    assert seen == [1, 3, 3]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_values_of_sequences_are_those_of_their_tokens(one_call):
    logps, arguments = batch()
    arguments |= {"importance_weights": torch.rand(B) + 0.5, "scores": torch.randn(B)}
    arguments["objective"] = Objective.preset("topr", beta=0.1)
    want = policy_loss(logps, **arguments)
    for name in ("advantages", "importance_weights", "scores"):
        for shape in ((B, 1), (B, T)):
            x = arguments[name][:, None].expand(shape)
            found = policy_loss(logps, **arguments | {name: x})
            torch.testing.assert_close(found.statistics, want.statistics, rtol=1e-6, atol=1e-6)
            wrong = x[:-1]
            with pytest.raises(ValueError, match=f"policy_loss: {name}: want"):
                policy_loss(logps, **arguments | {name: wrong})
    assert one_call


@pytest.mark.parametrize("way", ["compiled", "in parts"])
def test_extremes_without_a_token(way, request, backend, device):
    """Those of other ranks remain, when the statistics are folded."""
    one_call = request.getfixturevalue("one_call") if way == "compiled" else None
    logps, arguments = batch()
    arguments |= {"objective": BY_TOKEN, "num_items": 50.0, "loss_scale": 1.0}
    arguments |= {"mask": torch.zeros(B, T, dtype=torch.bool, device=device)}
    given = {key: x.to(device) if torch.is_tensor(x) else x for key, x in arguments.items()}
    out = policy_loss(logps.to(device), **given)
    assert out.statistics[-2:].tolist() == [torch.inf, -torch.inf]
    assert out.metrics["ratio_max"] == out.metrics["ratio_min"] == 1
    assert one_call is None or one_call


def test_on_policy_in_half_precision(one_call, monkeypatch):
    """Without mask, old and reference log-probs; the log-probs are a slice."""
    logps = -torch.rand(T, B).bfloat16().T
    same(monkeypatch, logps, {"advantages": torch.randn(B), "objective": ON_POLICY})
    assert one_call


def test_gradients_as_those_of_any_loss(one_call):
    """A gradient from above that is no constant, a loss changed in place, and no second derivative."""
    logps, arguments = batch()
    arguments |= {"objective": BY_TOKEN, "num_items": 50.0, "loss_scale": 1.0}
    leaf = logps.clone().requires_grad_()
    grad = torch.autograd.grad(policy_loss(leaf, **arguments).loss, leaf)[0]
    factor = torch.tensor(2.0, requires_grad=True)
    loss = policy_loss(leaf, **arguments).loss
    by_logps, by_factor = torch.autograd.grad(loss * factor, (leaf, factor), retain_graph=True)
    torch.testing.assert_close(by_logps, 2 * grad)
    torch.testing.assert_close(by_factor, loss.detach())
    for upstream in (loss, loss * factor):
        (first,) = torch.autograd.grad(upstream, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="policy_loss: second derivatives"):
            torch.autograd.grad(first.sum(), leaf)
    (first,) = torch.autograd.grad(loss * factor, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="policy_loss: second derivatives"):
        torch.autograd.grad(first.sum(), factor)
    loss = policy_loss(leaf, **arguments).loss
    loss /= 2
    with torch.no_grad():
        leaf.zero_()  # what is kept for the backward is the gradient, not the log-probs
    loss.backward()
    torch.testing.assert_close(leaf.grad, grad / 2)
    with torch.no_grad():
        assert not policy_loss(leaf, **arguments).loss.requires_grad
    assert not policy_loss(logps, **arguments).loss.requires_grad


def test_a_wrong_argument_is_named(one_call):
    logps, arguments = batch()
    with pytest.raises(ValueError, match=r"policy_loss: old_logps: want \(5, 37\), got \(5, 36\)"):
        policy_loss(logps, **{**arguments, "old_logps": logps[:, 1:]})
    with pytest.raises(ValueError, match=r"policy_loss: num_items: want .* got -1"):
        policy_loss(logps, **arguments, num_items=-1, objective=BY_TOKEN)
    assert not one_call


def test_log_probs_with_a_sign_to_come(one_call, monkeypatch):
    """The imaginary part of a conjugate is stored without its sign."""
    logps, arguments = batch()
    arguments |= {"objective": BY_TOKEN, "num_items": 50.0, "loss_scale": 1.0}
    want = policy_loss(logps, **arguments)
    for name in ("logps", "old_logps"):
        given = {"logps": logps, **arguments}
        x = torch.complex(torch.zeros(logps.shape), -given[name].clone()).conj().imag
        assert x.is_neg()
        found = policy_loss(**(given | {name: x}))
        torch.testing.assert_close(found.loss, want.loss)


def test_a_log_names_the_call(one_call):
    logps, arguments = batch()
    arguments |= {"objective": BY_TOKEN, "num_items": 50.0, "loss_scale": 1.0}
    with recorded() as calls:
        policy_loss(logps, **arguments)
    (call,) = calls
    assert call.ran == "PyTorch path: GRPO_FAST_BACKEND=torch: padded_loss"


def test_what_is_computed_in_parts(monkeypatch, device):
    """Packed tokens, single tokens, and objectives that need the entropy."""
    monkeypatch.setenv("GRPO_FAST_COMPILE", "1")
    if device != "cpu" or compiled.why_not():
        pytest.skip("nothing is compiled")
    logps, objective = -torch.rand(B, T), Objective()
    assert coefficients.in_one_call(logps, objective, None)
    assert not coefficients.in_one_call(logps.view(-1), objective, None)
    assert not coefficients.in_one_call(logps[:, :1], objective, None)
    assert not coefficients.in_one_call(logps, Objective(entropy_coef=0.1), None)
    vespo = Objective(surrogate="vespo")
    assert coefficients.in_one_call(logps, vespo, None)
    assert not coefficients.in_one_call(logps, vespo, torch.ones(B))
    monkeypatch.setenv("GRPO_FAST_COMPILE", "0")
    assert not coefficients.in_one_call(logps, objective, None)


def test_what_cannot_be_compiled_is_computed_in_parts(one_call, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(compiled, "_compiled", refuse)
    monkeypatch.setattr(compiled, "_failure", "")
    forget()
    logps, arguments = batch()
    want = parts(monkeypatch, logps, arguments)
    with pytest.warns(UserWarning, match="inductor failed: OSError: no space left"):
        found = policy_loss(logps, **arguments)
    torch.testing.assert_close(found._asdict(), want._asdict(), equal_nan=True)
    assert not coefficients.in_one_call(logps, Objective(), None)


def test_a_function_for_one_size_is_refused():
    """What is traced must run for any number of rows."""
    if compiled.why_not():
        pytest.skip("nothing is compiled")

    def fixed(x):
        return (x / len(x),)

    with pytest.raises(RuntimeError, match="fixed is for tensors of a size"):
        compiled._compiled(fixed, (), (compiled._kind(torch.ones(3), 1),), 1, 1)
