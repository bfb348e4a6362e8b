"""Rows of logits compiled by inductor: exact, with the same bits in any batch, and said by everybody."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from grpo_fast import Objective, grpo_loss, linear_logprob, logprob, policy_loss, reference
from grpo_fast.notices import FallbackError, forget, recorded
from grpo_fast.testing import assert_as_accurate
from grpo_fast.torch_kernels import compiled, rows
from tests.support.compiling import compile_every_call

V = 611  # two parts of a row and a rest; odd


@pytest.fixture
def compiling(monkeypatch, device):
    compile_every_call(monkeypatch, device)


def batch(R, dtype=torch.float32):
    """Logits with confident tokens, banned ones, and a large offset."""
    logits = 4 * torch.randn(R, V)
    ids = torch.randint(V, (R,))
    logits[0, ids[0]] = 40
    logits[1 % R, :300] = -torch.inf
    logits[1 % R, ids[1 % R]] = 1
    logits[-1] += 500
    return logits.to(dtype), ids


def graded(function, logits, *args, upstream=None, **kwargs):
    """Return the results of a function of logits, and the gradient for a random upstream gradient."""
    logits = logits.clone().requires_grad_()
    found = function(logits, *args, **kwargs)
    found = found if isinstance(found, tuple) else (found,)
    weights = [torch.linspace(-1, 2, len(x), dtype=x.dtype) for x in found]
    total = sum((x * w).sum() for x, w in zip(found, weights, strict=True))
    (gradient,) = torch.autograd.grad(total, logits)
    return *(x.detach() for x in found), gradient


def plain(logits, ids, temperature=1.0, return_entropy=False):
    """Return what `logprob` does, by PyTorch's operators, in the dtype of the logits, at least float32."""
    scale = temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    logp = (wide / scale).log_softmax(-1)
    entropy = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)
    chosen = logp.gather(-1, ids[:, None]).squeeze(-1)
    return (chosen, entropy) if return_entropy else chosen


@pytest.mark.parametrize(
    "dtype, given",
    [(torch.float32, {}), (torch.bfloat16, {"return_entropy": True})],
    ids=["float32", "bfloat16-entropy-temperatures"],
)
def test_as_exact_as_pytorch(dtype, given, compiling):
    logits, ids = batch(5, dtype)
    if given:
        given = given | {"temperature": torch.tensor([0.5, 1.0, 2.0, 1.3, 0.7])}
    with recorded() as calls:
        ours = graded(logprob, logits, ids, **given)
    assert "compiled, blocks of at most" in calls[0].ran
    truth = graded(plain, logits.double(), ids, **given)
    usual = graded(plain, logits, ids, **given)
    for mine, exact, theirs in zip(ours, truth, usual, strict=True):
        assert_as_accurate(mine, theirs, exact)


def test_the_same_bits_in_any_batch(compiling):
    """For logits with gaps between the rows, with and without a mask, and in both operators."""
    logits, ids = batch(6)
    logp = logprob(logits, ids)
    for some in ([3], [0, 1], [5, 2, 4, 0]):
        assert logprob(logits[some], ids[some]).tolist() == logp[some].tolist()
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    given = {"advantages": torch.ones(6), "mask": mask}
    out = grpo_loss(logits, ids, **given, old_logps=logp)
    assert out.metrics["ratio_min"] == out.metrics["ratio_max"] == 1
    assert out.logps[mask.bool()].tolist() == logp[mask.bool()].tolist()
    plain = rows.read_block(rows.Block(logits, ids, 1.0, None), False)[0]
    assert plain.logp.tolist() == logp.tolist()


def test_the_gradient_in_place_is_that_beside_it(compiling):
    logits, ids = batch(6)
    mask = torch.tensor([1, 1, 0, 1, 1, 1])
    given = {"advantages": torch.linspace(-1, 1, 6), "mask": mask}
    objective = Objective(beta=0.1)
    given |= {"objective": objective, "ref_logps": logprob(logits, ids) - 0.2}
    found = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        copy = leaf * 1
        grpo_loss(copy, ids, **given, inplace=inplace).loss.backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    leaf = logits.double().requires_grad_()
    reference.grpo_loss(leaf, ids, **given).backward()
    torch.testing.assert_close(found[0].double(), leaf.grad, rtol=1e-5, atol=1e-7)
    assert not found[0][2].any()


def test_a_soft_cap(compiling):
    hidden, weight = torch.randn(4, 8), torch.randn(V, 8)
    ids = torch.randint(V, (4,))
    given = {"softcap": 5.0, "logit_scale": 0.5}
    found = []
    for x in (hidden, hidden.double()):
        leaf = x.clone().requires_grad_()
        logits = leaf @ weight.to(x.dtype).T
        capped = 5 * torch.tanh(logits * 0.5 / 5)
        usual = capped.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
        found.append((usual.detach(), *torch.autograd.grad(usual.square().sum(), leaf)))
    leaf = hidden.clone().requires_grad_()
    ours = linear_logprob(leaf, weight, ids, **given)
    mine = (ours.detach(), *torch.autograd.grad(ours.square().sum(), leaf))
    for x, usual, exact in zip(mine, *found, strict=True):
        assert_as_accurate(x, usual, exact)


def test_each_objective_has_its_own_numbers(compiling):
    """Packed tokens: the second and third objective differ from the first in a number alone."""
    logp = -torch.rand(40)
    given = {"advantages": torch.randn(40), "old_logps": logp + torch.randn(40)}
    given["cu_seqlens"] = torch.tensor([0, 15, 40])
    for epsilon in (0.1, 0.3, 0.5):
        objective = Objective(epsilon_low=epsilon, epsilon_high=epsilon)
        with recorded() as calls:
            loss = policy_loss(logp, **given, objective=objective).loss
        assert "policy_loss_fwd" in calls[0].ran
        want = reference.policy_loss(logp.double(), **given, objective=objective)
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)


def test_which_calls_are_compiled(monkeypatch):
    x = torch.ones(3)
    if compiled.why_not():
        pytest.skip(compiled.why_not())
    for value, small, large in (("", False, True), ("0", False, False), ("1", True, True)):
        monkeypatch.setenv("GRPO_FAST_COMPILE", value)
        assert compiled.compiles(x, 10, 20) is small
        assert compiled.compiles(x, 20, 20) is large
    assert not compiled.compiles(x[:0], 20, 20)
    assert not compiled.compiles(x.to("meta"), 20, 20)
    monkeypatch.setenv("GRPO_FAST_COMPILE", "yes")
    with pytest.raises(ValueError, match="GRPO_FAST_COMPILE='yes': want 0 or 1"):
        compiled.compiles(x, 10, 20)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiled.why_not.cache_clear()
    try:
        monkeypatch.setenv("GRPO_FAST_COMPILE", "")
        assert not compiled.compiles(torch.ones(3), 20, 20)
        assert "no C++ compiler" in compiled.summary()
        monkeypatch.setenv("GRPO_FAST_COMPILE", "1")
        with pytest.raises(RuntimeError, match=r"GRPO_FAST_COMPILE=1, but .* no C\+\+ compiler"):
            compiled.compiles(torch.ones(3), 20, 20)
    finally:
        compiled.why_not.cache_clear()


def test_a_part_of_the_lowest_numbers(compiling):
    """Padded vocabularies are masked with them; their u e is 0, not -inf times 0."""
    logits, ids = batch(5)
    logits[1, :300], logits[:, rows.PART :] = 0, torch.finfo(torch.float32).min
    ids = ids % rows.PART
    ours = graded(logprob, logits, ids, return_entropy=True)
    truth = graded(plain, logits.double(), ids, return_entropy=True)
    usual = graded(plain, logits, ids, return_entropy=True)
    for mine, exact, theirs in zip(ours, truth, usual, strict=True):
        assert_as_accurate(mine, theirs, exact)


def test_rows_far_apart_need_no_code_of_their_own(compiling):
    """The last rows of sequences have a stride for each length."""
    made, even = [], V + 5  # the gradient of odd vocabularies has one of eight strides
    for T in (3, 4, 7):
        logits, ids = torch.randn(2, T, even), torch.randint(even, (2, 1))
        found = []
        for inplace in (False, True):
            leaf = logits.clone().requires_grad_()
            given = {"advantages": torch.tensor([1.0, -2.0]), "inplace": inplace}
            out = grpo_loss((leaf * 1)[:, -1:], ids, **given)
            out.loss.backward()
            found.append((out.logps, leaf.grad))
        leaf = logits.clone().requires_grad_()
        logp = logprob(leaf[:, -1:], ids)
        (logp.flatten() * torch.tensor([-0.5, 1.0])).sum().backward()
        for got in found:
            torch.testing.assert_close(got, (logp.detach(), leaf.grad))
        torch.testing.assert_close(logp.flatten(), plain(leaf[:, -1], ids[:, 0]))
        made.append(compiled._compiled.cache_info().misses)
    assert made[0] == made[2]


def test_the_device_of_new_tensors_does_not_matter(compiling):
    logits, ids = batch(3)
    want = logprob(logits, ids, temperature=0.5)
    compiled._compiled.cache_clear()
    with torch.device("meta"):
        found = logprob(logits, ids, temperature=0.5)
    torch.testing.assert_close(found, want, rtol=0, atol=0)


def test_threads_may_compile_at_once(compiling):
    sizes = (V + 2, V + 4)
    inputs = [(torch.randn(3, n), torch.randint(n, (3,))) for n in sizes]
    compiled._compiled.cache_clear()
    with ThreadPoolExecutor(len(sizes)) as pool:
        for got, given in zip(pool.map(lambda x: logprob(*x), inputs), inputs, strict=True):
            torch.testing.assert_close(got, plain(*given))
    assert not compiled._failure


def test_rows_are_computed_in_blocks_if_compiling_fails(compiling, monkeypatch):
    """All rows are one block until then."""
    monkeypatch.setattr(compiled, "_failure", "")
    monkeypatch.setattr(rows, "BLOCK_ELEMENTS", 2 * V)
    logits, ids = batch(5)
    sizes = []

    def difference(z, *rest):
        sizes.append(len(z))
        return scaled_difference(z, *rest)

    scaled_difference = rows.scaled_difference
    monkeypatch.setattr(rows, "scaled_difference", difference)
    for name in ("_read_parts", "_gradient"):
        monkeypatch.setattr(compiled, "_failure", "")
        usually = compiled._compiled

        def compile_others(function, *rest, name=name, usually=usually):
            if function.__name__ == name:
                raise OSError("no space left")
            return usually(function, *rest)

        monkeypatch.setattr(compiled, "_compiled", compile_others)
        forget()
        with pytest.warns(UserWarning, match="no space left"):
            ours = graded(logprob, logits, ids, return_entropy=True)
        usual = graded(plain, logits.double(), ids, return_entropy=True)
        for mine, theirs in zip(ours, usual, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)
        monkeypatch.setattr(compiled, "_compiled", usually)
    assert sizes == [2, 2, 1] * 3  # forwards and backwards, then backwards


def test_a_compiler_that_fails_is_a_fallback(compiling, monkeypatch):
    def broken(*given):
        raise OSError("no space left")

    monkeypatch.setattr(compiled, "_compiled", broken)
    monkeypatch.setattr(compiled, "_failure", "")
    forget()
    logits, ids = batch(2)
    with pytest.warns(UserWarning, match=r"uncompiled: inductor failed: OSError: no space left"):
        found = logprob(logits, ids)
    assert "no space left" in compiled.summary()
    monkeypatch.setenv("GRPO_FAST_COMPILE", "0")
    torch.testing.assert_close(found, logprob(logits, ids), rtol=0, atol=0)
    monkeypatch.setenv("GRPO_FAST_COMPILE", "1")
    monkeypatch.setattr(compiled, "_failure", "")
    monkeypatch.setenv("GRPO_FAST_STRICT", "1")
    with pytest.raises(FallbackError, match="no space left"):
        logprob(logits, ids)


def test_too_many_objectives_are_a_fallback(compiling, monkeypatch):
    monkeypatch.setattr(compiled, "_seen", {})
    monkeypatch.setattr(compiled, "MOST_OBJECTIVES", 2)
    forget()

    def function(x, number):
        return (x + number,)

    assert all(compiled._worth_it(function, (i,)) for i in (1, 2, 1))
    with pytest.warns(UserWarning, match="more than 2 objectives"):
        assert compiled.call(function, (3,), torch.ones(3)) is None
