"""Rows of logits that hold -inf, or numbers at the ends of float32."""

import pytest
import torch

from grpo_fast import Objective, reference
from grpo_fast.loss import grpo_loss, linear_grpo_loss
from grpo_fast.ops import linear_logprob, logprob
from grpo_fast.testing import assert_as_accurate
from tests.support.cases import HALVES, by_dtype, in_double, loss_and_grad
from tests.support.ranks import needs_gloo, needs_interpreter, run


def banned(V, dtype, device):
    """(logits (5, V), ids): the scored token of rows 0, 1 and 2 has a logit of -inf."""
    logits = torch.randn(5, V, dtype=dtype, device=device)
    ids = torch.tensor([V - 1, 0, V // 2, 1, V - 2], device=device)
    logits[torch.arange(3), ids[:3]] = -torch.inf
    logits[1, V // 2 :] = -torch.inf
    logits[3, 2:] = -torch.inf
    return logits, ids


@by_dtype
@pytest.mark.parametrize("V", [8, 700, 40_000])
def test_entropy_beside_a_banned_scored_token(V, dtype, backend, device):
    """p log p is 0 where p is: no NaN, in any gradient of the row."""
    logits, ids = banned(V, dtype, device)

    def entropy(x):
        return logprob(x, ids, return_entropy=True)[1].sum()

    def want(x):
        return reference.entropy(x).sum()

    actual = loss_and_grad(entropy, logits)
    baseline = loss_and_grad(want, logits)
    truth = loss_and_grad(want, logits.double())
    for name, a, b, t in zip(("entropy", "dlogits"), actual, baseline, truth, strict=True):
        assert_as_accurate(a, b, t, name=name)
    assert actual[1][logits == -torch.inf].eq(0).all()


@by_dtype
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("options", [{}, {"ratio": "sequence"}], ids=str)
def test_entropy_bonus_beside_a_banned_scored_token(options, advantage, dtype, backend, device):
    logits, ids = banned(50, dtype, device)
    arguments = {
        "advantages": torch.full((5,), advantage, device=device),
        "old_logps": torch.full((5, 1), -1.0, device=device),
        "objective": Objective(entropy_coef=0.1, **options),
    }
    given = (logits[:, None], ids[:, None])
    for inplace in (False, True):

        def ours(x, inplace=inplace):
            return grpo_loss(1 * x, given[1], inplace=inplace, **arguments)

        actual = loss_and_grad(ours, given[0])
        baseline = loss_and_grad(reference.grpo_loss, *given, **arguments)
        truth = loss_and_grad(
            reference.grpo_loss, given[0].double(), given[1], **in_double(arguments)
        )
        for name, a, b, t in zip(("loss", "dlogits"), actual, baseline, truth, strict=True):
            assert_as_accurate(a, b, t, name=name)


def check_shards(cases):
    """What each process of the tests below runs: two halves of a vocabulary, shifted by so much each."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    V, n = 12, 6
    mine = slice(rank * n, rank * n + n)
    for *shift, scored in cases:
        torch.manual_seed(0)
        hidden, weight = torch.randn(2, 3, 4), torch.randn(V, 4)
        bias = torch.tensor([float(x) for x in shift]).repeat_interleave(n)
        ids = torch.tensor([[0, 1, 2], [3, 4, scored]])
        arguments = {"advantages": torch.tensor([1.0, -2.0])}
        arguments |= {"objective": Objective(entropy_coef=0.1), "temperature": 0.7}
        arguments["old_logps"] = torch.full((2, 3), -2.0)
        found = []
        for rows, options in ((slice(V), {}), (mine, {"tp_group": group})):
            h, w = (x.clone().requires_grad_() for x in (hidden, weight[rows]))
            options |= {"bias": bias[rows]}
            out = linear_grpo_loss(h, w, ids, **arguments, **options)
            out.loss.backward()
            with torch.no_grad():
                values = linear_logprob(h, w, ids, temperature=0.7, return_entropy=True, **options)
            found.append([out.loss, *values, h.grad, w.grad[mine] if rows == slice(V) else w.grad])
        for whole, part in zip(*found, strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-6, msg=f"{shift} {scored}")
        assert all(x.isfinite().all() for x in (found[1][0], *found[1][2:])), (shift, scored)
        if shift[0] == shift[1] and abs(shift[0]) > 1e20:
            torch.testing.assert_close(values[1], torch.tensor(V).log().expand(2, 3))


SHARDS = [
    *[(0, "-inf", scored) for scored in (5, 9)],
    *[(x, y, s) for x in (0, -3e38) for y in (0, -3e38, -1e12) for s in (5, 9)],
    *[(x, x, 9) for x in (-1e30, -1e12, 1e12, 2e38)],
    *[(1e12, 0, 5), (0, 1e12, 5), (-1e12, -2e12, 9)],
]


@needs_gloo
def test_processes_with_parts_far_apart():
    run("tests.kernels.test_extreme_rows:check_shards", 2, SHARDS)


@needs_gloo
@needs_interpreter
def test_processes_with_parts_far_apart_in_the_kernels():
    switches = {"TRITON_INTERPRET": "1", "GRPO_FAST_BACKEND": "triton"}
    run("tests.kernels.test_extreme_rows:check_shards", 2, SHARDS, **switches)


LEAST = torch.finfo(torch.float32).min
LARGE = [LEAST, -1e38, -7e29, -1e12, -1e10, -3e9, 3e9, 1e30, 2.2e38]


def rows_of(value, V, dtype, device):
    """(logits (9, V), ids): rows of one value and of several, the scored token among the highest or not."""
    if dtype == torch.float16:
        value = max(value, -4e4)  # times 1.5 it must be finite, too
    logits = torch.full((9, V), value, dtype=dtype, device=device)
    ids = torch.tensor([0, 1, 2, 3, V - 1, V // 2, 1, 2, 3], device=device)
    logits[1, 5:] = -torch.inf
    logits[2, 2] = 1.5  # an ordinary logit scored beside them
    logits[3, :20] = torch.randn(20, device=device).to(dtype)  # ordinary logits, one of them scored
    logits[4, :20] = torch.randn(20, device=device).to(dtype)  # and one of the others
    logits[5] *= 1 + torch.rand(V, device=device).to(dtype) / 2 if abs(value) < 2e38 else 1
    logits[6, ::3] *= 0.5
    logits[7, 1:] = -torch.inf
    logits[7, 2] = value
    logits[8, 0] = logits[8, 3] * 0.75
    return logits, ids


@pytest.mark.parametrize(
    ("V", "temperature"), [(64, 1.0), (64, 1e-3), (64, "per token"), (33_000, 1.0)]
)
@pytest.mark.parametrize(
    ("value", "dtype"), [(x, torch.float32) for x in LARGE] + [(LEAST, x) for x in HALVES], ids=str
)
def test_rows_of_large_numbers(V, value, temperature, dtype, backend, device):
    """Softmax knows differences alone: a row of finfo.min is uniform, whatever the temperature."""
    logits, ids = rows_of(value, V, dtype, device)
    if temperature == "per token":
        temperature = torch.logspace(-1, 2, 9, device=device)

    def ours(x):
        return torch.stack(logprob(x, ids, temperature=temperature, return_entropy=True))

    def truth(x):
        z = x.double()
        z = z - z.amax(-1, keepdim=True)  # so that nothing is lost to the temperature
        t = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
        return torch.stack([reference.logprob(z, ids, t), reference.entropy(z, t)])

    upstream = torch.randn(2, 9, device=device)
    x = logits.clone().requires_grad_()
    y = logits.clone().requires_grad_()
    got, want = ours(x), truth(y)
    largest = torch.finfo(torch.float32).max
    beyond = want.abs() > largest  # float32 cannot hold it
    assert got[beyond].eq(-torch.inf).all() or got[beyond].abs().ge(0.99 * largest).all()
    ordinary = want.abs() < 1e4
    torch.testing.assert_close(got[ordinary].double(), want[ordinary], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(got[~beyond].double(), want[~beyond], rtol=1e-5, atol=2e-5)
    for found in (got, want):
        (upstream * torch.where(beyond, 0, found)).sum().backward()
    scale = y.grad.abs().max().item()
    torch.testing.assert_close(x.grad, y.grad, rtol=2e-2, atol=1e-5 * max(scale, 1))


@pytest.mark.parametrize("value", [LEAST, -1e30, -1e10, 1e12])
@pytest.mark.parametrize("V", [64, 33_000])
@pytest.mark.parametrize("inplace", [False, True])
def test_losses_of_rows_of_large_numbers(V, value, inplace, backend, device):
    logits, ids = rows_of(value, V, torch.float32, device)
    arguments = {
        "advantages": torch.linspace(-1, 1, 9, device=device)[:, None],
        "old_logps": torch.full((9, 1), -2.0, device=device),
        "objective": Objective(entropy_coef=0.1),
    }

    def ours(x):
        return grpo_loss((1 * x)[:, None], ids[:, None], inplace=inplace, **arguments)

    def truth(x):
        z = x - x.amax(-1, keepdim=True).detach()
        return reference.grpo_loss(z[:, None], ids[:, None], **in_double(arguments))

    loss, grad = loss_and_grad(ours, logits)
    want, dlogits = loss_and_grad(truth, logits.double())
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), dlogits, rtol=1e-4, atol=1e-7)


def test_ordinary_logits_at_tiny_temperatures(backend, device):
    """All of the probability goes to the highest, shared where there are several."""
    logits = torch.randn(4, 300, device=device)
    logits[1, [3, 77, 200]] = 9.0
    logits[2, 5] = logits[2].max()
    ids = torch.tensor([logits[0].argmax(), 77, 5, 8], device=device)
    for temperature in (1e-9, 1e-12, 1e-20, 1e-30):
        logp, entropy = logprob(logits, ids, temperature=temperature, return_entropy=True)
        want = [0.0, -torch.tensor(3.0).log().item(), -torch.tensor(2.0).log().item()]
        torch.testing.assert_close(logp[:3].cpu(), torch.tensor(want))
        torch.testing.assert_close(entropy[:3].cpu(), -torch.tensor(want))
        low = (logits[3, 8].double() - logits[3].max().double()) / temperature
        assert logp[3].item() == pytest.approx(low.item(), rel=1e-5)


@pytest.mark.parametrize("V", [64, 33_000])
def test_a_nan_among_large_numbers_comes_out(V, backend, device):
    logits = torch.full((2, V), LEAST, device=device)
    logits[:, V - 3] = torch.nan
    logp = logprob(logits, torch.tensor([0, V - 3], device=device))
    assert logp.isnan().all()


@pytest.mark.parametrize("temperature", [1.0, 1e-3])
def test_rows_without_a_softmax_give_nan(temperature, backend, device):
    """A logit of inf, as where float16 overflows, or none above -inf: log p is not that of a large number."""
    logits = torch.randn(3, 40, device=device)
    logits[0, 30] = torch.inf
    logits[1, 5] = torch.inf
    logits[2] = -torch.inf
    ids = torch.tensor([5, 5, 5], device=device)
    assert logprob(logits, ids, temperature=temperature).isnan().all()
    given = {"advantages": torch.ones(3, device=device), "temperature": temperature}
    out = grpo_loss(logits.requires_grad_(), ids, **given)
    assert out.logps.isnan().all()
    assert out.loss.isnan()
