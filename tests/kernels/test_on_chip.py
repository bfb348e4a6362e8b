"""`GRPO_FAST_ON_CHIP=1`: the same loss, gradient and metrics from a kernel that reads each row once."""

import functools
import os
import warnings

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from grpo_fast import Objective, checks, notices, reference
from grpo_fast.kernels import on_chip
from grpo_fast.loss import grpo_loss, linear_grpo_loss
from grpo_fast.testing import assert_as_accurate
from tests.support.cases import batch, in_double, loss_and_grad

HALF = torch.float16 if os.environ.get("TRITON_INTERPRET") == "1" else torch.bfloat16
HERE = on_chip.unavailable(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
needs_clusters = pytest.mark.skipif(bool(HERE), reason=HERE)
# One strip and several; a cluster of four; of eight.
SIZES = [4096, 50_304, 81_928]


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    """A fallback would warn, and a warning is an error."""
    notices.forget()
    monkeypatch.setenv("GRPO_FAST_BACKEND", "triton")
    monkeypatch.setenv("GRPO_FAST_ON_CHIP", "1")


@pytest.fixture
def launches(monkeypatch):
    """The shapes of the logits that the kernel was launched on."""
    seen = []
    launcher = on_chip.grpo_fwd_bwd

    def counted(logits, *args, **kwargs):
        seen.append(tuple(logits.shape))
        return launcher(logits, *args, **kwargs)

    monkeypatch.setattr(on_chip, "grpo_fwd_bwd", counted)
    return seen


def ours(inplace):
    """`grpo_loss` on logits that are no leaf."""
    return lambda x, *args, **kwargs: grpo_loss(1 * x, *args, inplace=inplace, **kwargs)


def check(logits, ids, arguments, inplace=False, upstream=1.0):
    actual = loss_and_grad(ours(inplace), logits, ids, upstream=upstream, **arguments)
    baseline = loss_and_grad(reference.grpo_loss, logits, ids, upstream=upstream, **arguments)
    truth = loss_and_grad(
        reference.grpo_loss, logits.double(), ids, upstream=upstream, **in_double(arguments)
    )
    for name, a, b, t in zip(("loss", "dlogits"), actual, baseline, truth, strict=True):
        assert_as_accurate(a, b, t, name=name)


OBJECTIVES = {
    "KL": Objective(beta=0.1),
    "on policy": Objective(reduction="token_mean", epsilon_high=0.28),
    "bonus": Objective(beta=0.2, entropy_coef=0.02, dual_clip=1.5, reduction="token_mean"),
    "entropy by tokens": Objective(entropy_coef=-0.1, entropy_reduction="token_mean"),
    "sapo": Objective(surrogate="sapo", tau_neg=1.5, beta=0.1),
    "topr": Objective(surrogate="topr", topr_weight_neg=0.5, beta=0.1),
    "gspo": Objective(
        ratio="sequence", epsilon_low=0.05, beta=0.1
    ),  # coefficients known beforehand
    "dppo": Objective(surrogate="dppo_kl", epsilon_low=0.01, beta=0.1, kl="k3_unbiased"),
}


@needs_clusters
@pytest.mark.parametrize(
    ("V", "name"), [(1000, x) for x in OBJECTIVES] + [(V, "KL") for V in SIZES] + [(4104, "bonus")]
)
def test_matches_reference(V, name, launches, device):
    few, objective = V < 5000, OBJECTIVES[name]
    logits, ids, arguments = batch(3, 3 if few else 2, V, device, HALF)
    for row, column in ((0, 0), (2, V - 1)):  # the scored entry at an end of the row
        old = ids[row, 0].item()
        logits[row, 0, [old, column]] = logits[row, 0, [column, old]]
        ids[row, 0] = column
    arguments["objective"] = objective
    if name == "on policy":
        del arguments["old_logps"], arguments["ref_logps"]
    if name == "topr":
        arguments["scores"] = -arguments["advantages"]
    check(logits, ids, {**arguments, "temperature": 0.8}, inplace=few, upstream=1.5)
    assert launches == [tuple(logits.shape)]


@needs_clusters
def test_every_optional_argument(launches, device):
    B, T, V = 3, 4, 4104
    logits, ids, arguments = batch(B, T, V, device, HALF)
    arguments |= {
        "advantages": torch.randn(B, 2 * T, device=device)[:, ::2],  # one for each token, strided
        "importance_weights": torch.rand(T, device=device).expand(B, T),
        "token_weights": torch.rand(B, T, device=device),
        "temperature": torch.rand(B, T, device=device) + 0.5,
        "num_items": 37,
    }
    for entropy_coef in (0.0, 0.1):
        objective = Objective(reduction="token_mean", beta=0.1, entropy_coef=entropy_coef)
        check(logits, ids, {**arguments, "objective": objective})
    assert len(launches) == 2


@needs_clusters
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_rewards(layout, launches, device):
    logits, ids, arguments = batch(6, 3, 1000, device, HALF)
    del arguments["advantages"]
    if layout == "packed":
        logits, ids = logits.flatten(0, 1), ids.flatten()
        arguments = {k: v.flatten() for k, v in arguments.items()}
        arguments["cu_seqlens"] = torch.arange(0, 19, 3, device=device)
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.3, 0.3, 0.3], device=device)
    arguments |= {"rewards": rewards, "group_size": 3}
    check(logits, ids, arguments)
    assert len(launches) == 1


@needs_clusters
@pytest.mark.parametrize("coef", [0.0, 0.1])
def test_results_are_those_of_the_other_kernel(coef, monkeypatch, launches, device):
    """Log-probs, entropies and metrics; the logits a view of wider ones, with rows apart."""
    wide, ids, arguments = batch(3, 5, 4120, device, HALF)
    logits = wide[:, 1:, :4104].requires_grad_()
    arguments = {k: v[:, 1:] if v.ndim == 2 else v for k, v in arguments.items()}
    arguments["objective"] = Objective(beta=0.1, entropy_coef=coef)
    ids = torch.where(ids < 4104, ids, 5)[:, 1:]
    one = grpo_loss(logits, ids, return_entropy=True, **arguments)
    monkeypatch.delenv("GRPO_FAST_ON_CHIP")
    two = grpo_loss(logits, ids, return_entropy=True, **arguments)
    assert len(launches) == 1
    torch.testing.assert_close(one.logps, two.logps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.entropy, two.entropy, rtol=1e-5, atol=1e-5)
    assert one.metrics.keys() == two.metrics.keys()
    for name, x in one.metrics.items():
        torch.testing.assert_close(x, two.metrics[name], rtol=1e-4, atol=1e-6, msg=name)


@needs_clusters
def test_logits_of_the_head(launches, monkeypatch, device):
    """Chunks of them, whose results go where the head wants them."""
    states, ids, arguments = batch(3, 4, 16, device, HALF, garbage=False)
    arguments["objective"] = Objective(beta=0.1, entropy_coef=0.1)
    weight = 0.2 * torch.randn(64, 16, device=device).to(HALF)
    given = {"logits_dtype": "bf16", "chunk_size": 4, "compact": False, **arguments}
    loss, grad = loss_and_grad(linear_grpo_loss, states, weight, ids % 64, **given)
    assert launches == 3 * [(1, 4, 64)]
    monkeypatch.delenv("GRPO_FAST_ON_CHIP")
    other, want = loss_and_grad(linear_grpo_loss, states, weight, ids % 64, **given)
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, want, rtol=1e-2, atol=1e-4)


@needs_clusters
@pytest.mark.parametrize("coef", [0.0, 0.1])
def test_inplace_gives_the_same_bits_in_the_same_memory(coef, device):
    logits, ids, arguments = batch(3, 4, 4104, device, HALF)
    arguments["objective"] = Objective(beta=0.1, entropy_coef=coef)
    one, two = (
        loss_and_grad(ours(x), logits, ids, upstream=2.0, **arguments) for x in (True, False)
    )
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@needs_clusters
def test_chunks_of_the_head(monkeypatch, launches, device):
    """Their results are written where those of the whole batch belong."""
    hidden = torch.randn(2, 3, 8, device=device).half().requires_grad_()
    weight = torch.randn(104, 8, device=device).half()
    ids = torch.randint(0, 104, (2, 3), device=device)
    objective = Objective(beta=0.1, entropy_coef=0.02)
    given = {"advantages": torch.randn(2, device=device), "objective": objective}
    given["ref_logps"] = torch.randn(2, 3, device=device) - 4
    found = []
    for switch in ("1", "0"):
        monkeypatch.setenv("GRPO_FAST_ON_CHIP", switch)
        options = {"chunk_size": 4, "logits_dtype": "bf16"}
        out = linear_grpo_loss(hidden, weight, ids, **given, **options)
        found.append((out.loss, out.logps, out.metrics, *torch.autograd.grad(out.loss, hidden)))
    assert launches == [(1, 4, 104), (1, 2, 104)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_a_row_has_the_same_bits_in_any_batch(device):
    logits, ids, arguments = batch(3, 4, 1000, device, HALF)
    alone = {k: v[2:] for k, v in arguments.items()}
    grad = loss_and_grad(grpo_loss, logits, ids, **arguments)[1]
    one = loss_and_grad(grpo_loss, logits[2:], ids[2:], upstream=1 / 3, **alone)[1]
    torch.testing.assert_close(grad[2:], one, rtol=2e-3, atol=0)  # the factor is rounded once more


@needs_clusters
@pytest.mark.parametrize("coef", [0.0, 0.1])
@pytest.mark.parametrize("V", [64, 4104])
def test_banned_and_confident_tokens(V, coef, device):
    """Logits of -inf, the scored one's too; p next to 1, whose gradient is what is left of it."""
    logits, ids, arguments = batch(1, 6, V, device, HALF, garbage=False)
    logits[0, torch.arange(3), ids[0, :3]] = -torch.inf
    logits[0, 1, V // 2 :] = -torch.inf
    logits[0, 3, 2:] = -torch.inf
    logits[0, 4, ids[0, 4]] = 30.0
    ids[0, 3] = 1
    arguments["old_logps"] = torch.full((1, 6), -1.0, device=device)
    del arguments["ref_logps"]
    for inplace in (False, True):
        check(logits, ids, {**arguments, "objective": Objective(entropy_coef=coef)}, inplace)


@needs_clusters
@pytest.mark.parametrize(
    ("V", "temperature", "coef"), [(64, 1e-30, 0.0), (64, 1e-30, 0.1), (2056, 1e-9, 0.1)]
)
def test_numbers_that_are_too_large_for_their_scale(V, temperature, coef, monkeypatch, device):
    """Rows of which a first pass makes nothing are read again, as the other kernel reads them."""
    logits = torch.randn(1, 6, V, device=device).to(HALF)
    logits[0, 1] = torch.finfo(HALF).min
    logits[0, 2, 5:] = torch.finfo(HALF).min
    logits[0, 3, [3, 7, 20]] = 9.0
    ids = torch.tensor([[3, 1, 2, 7, V - 1, 0]], device=device)
    ids[0, 0] = logits[0, 0].argmax()
    arguments = {
        "advantages": torch.tensor([[1.0, -1.0, 0.5, -0.5, 1.0, 1.0]], device=device),
        "old_logps": torch.full((1, 6), -2.0, device=device),
        "objective": Objective(entropy_coef=coef),
        "temperature": temperature,
    }
    found = [loss_and_grad(ours(inplace), logits, ids, **arguments) for inplace in (False, True)]
    monkeypatch.delenv("GRPO_FAST_ON_CHIP")
    want = loss_and_grad(ours(False), logits, ids, **arguments)
    for loss, grad in found:
        torch.testing.assert_close(loss, want[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, want[1], rtol=2e-3, atol=0)


@needs_clusters
def test_nan_comes_out_and_nothing_of_a_token_without_weight_does(device):
    logits, ids, arguments = batch(2, 3, 1000, device, HALF, garbage=False)
    logits[0, 0, 5] = torch.nan
    assert grpo_loss(logits.requires_grad_(), ids, **arguments).loss.isnan()
    weights = torch.ones(2, 3, device=device)
    weights[0, 0] = 0
    arguments["token_weights"] = weights
    for coef in (0.0, 0.1):
        arguments["objective"] = Objective(entropy_coef=coef)
        loss, grad = loss_and_grad(grpo_loss, logits, ids, **arguments)
        assert loss.isfinite()
        assert grad[0, 0].eq(0).all()
        assert grad.isfinite().all()


@needs_clusters
@pytest.mark.parametrize("bad", [-1, 1000, 2**32 + 1])
def test_ids_outside_the_vocabulary_give_nan(bad, monkeypatch, device):
    monkeypatch.setattr(checks, "check_values", lambda x: False)
    logits, ids, arguments = batch(1, 3, 1000, device, HALF, garbage=False)
    del arguments["mask"]
    wrong = ids.clone()
    wrong[0, 2] = bad
    one, two = (grpo_loss(logits.clone().requires_grad_(), x, **arguments) for x in (ids, wrong))
    torch.testing.assert_close(one.logps[0, :2], two.logps[0, :2], rtol=0, atol=0)
    assert two.logps[0, 2].isnan()
    assert two.loss.isnan()


REASONS = {
    "float32": (lambda new: new(1, 2, 64).float(), "float32"),
    "odd": (lambda new: new(1, 2, 63), "8 does not divide the 63"),
    "stride": (lambda new: new(1, 2, 68)[..., :64], "multiple of 16 bytes"),
    "offset": (lambda new: new(200).flatten()[1:129].view(1, 2, 64), "multiple of 16 bytes"),
    "long": (lambda new: new(1, 1, on_chip.MAX_V + 8), "do not fit"),
}


@needs_clusters
@pytest.mark.parametrize("make, why", REASONS.values(), ids=REASONS)
def test_what_it_cannot_do_the_other_kernel_does_and_a_warning_says_so(make, why, launches, device):
    logits = make(functools.partial(torch.zeros, dtype=HALF, device=device))
    ids = torch.zeros(logits.shape[:2], dtype=torch.int64, device=device)
    given = {"advantages": torch.ones(1, device=device)}
    with pytest.warns(UserWarning, match=f"GRPO_FAST_ON_CHIP=1 has no effect.*{why}"):
        grpo_loss(logits.requires_grad_(), ids, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = grpo_loss(logits, ids, **given).loss  # once is enough
    assert loss.isfinite()
    assert launches == []


def test_what_else_it_cannot_do(monkeypatch):
    x = torch.zeros(1, 2, 64, dtype=HALF)
    assert not on_chip.unsupported(x, x)
    assert "soft cap" in on_chip.unsupported(x, x, 30.0)
    assert "float32" in on_chip.unsupported(x, x.float())
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(on_chip.triton, "__version__", "3.7.1")
    assert "Triton 3.7.1 is installed, and it needs 3.8" in on_chip.unavailable(gpu)
    monkeypatch.setattr(on_chip.triton, "__version__", "3.10.0")
    for capability, why in (((8, 9), "capability 8.9"), ((9, 0), ""), ((12, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda x, c=capability: c)
        assert why in on_chip.unavailable(gpu)
        assert bool(why) == bool(on_chip.unavailable(gpu))
        large = on_chip.MAX_V if capability[0] == 9 else on_chip.MAX_V // 2
        assert on_chip.most_entries(gpu) == large
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "AMD" in on_chip.unavailable(gpu)


def test_the_switch(monkeypatch, launches, device):
    logits, ids, arguments = batch(1, 2, 64, device, HALF)
    monkeypatch.setenv("GRPO_FAST_ON_CHIP", "yes")
    with pytest.raises(ValueError, match="GRPO_FAST_ON_CHIP='yes': want 0 or 1"):
        grpo_loss(logits.requires_grad_(), ids, **arguments)
    for off in ("0", ""):
        monkeypatch.setenv("GRPO_FAST_ON_CHIP", off)
        grpo_loss(logits, ids, **arguments)
    assert launches == []
    monkeypatch.setenv("GRPO_FAST_ON_CHIP", "1")
    monkeypatch.setenv("GRPO_FAST_BACKEND", "torch")
    with pytest.warns(UserWarning, match="no effect here: PyTorch's operators run"):
        grpo_loss(logits, ids, **arguments)


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("V", [8, 1000, 20_480, 20_488, 32_000, 151_936, 163_840, on_chip.MAX_V])
def test_a_cluster_holds_its_row(V, bonus):
    spread = on_chip.plan(V, bonus)
    thread_block = spread.warps * 32 * 8 * spread.strips(V)
    assert spread.ctas * thread_block >= V
    assert thread_block <= on_chip.ENTRIES
    assert spread.ctas in (1, 2, 4, 8, 16)
    assert spread.ctas == 1 or spread.ctas // 2 * on_chip.ENTRIES < V
