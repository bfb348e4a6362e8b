"""The weights of `grpo_fast.weights` against float64 formulas written here and TRL's own statements."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch

from grpo_fast import Objective, reference, weights
from grpo_fast.loss import grpo_loss
from grpo_fast.testing import assert_as_accurate
from tests.support.cases import packed, tokens
from tests.support.oracles import run_of_trl


def ratio(old, sampling, mask, level):
    """rho in the dtype of the log-probs, row by row."""
    rows = []
    for o, s, live in zip(old, sampling, mask, strict=True):
        gap = torch.zeros_like(o)
        gap[live] = o[live] - s[live]
        if level == "sequence":
            gap = gap.sum()[None]
        elif level == "geometric":
            gap = gap[live].mean()[None] if live.any() else gap[:1]
        rows.append(gap.exp())
    return torch.stack(rows)


by_level = pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
BOUNDS = [(None, 1.2), (0.8, None), (0.8, 1.2), (0.0, 3.0)]


@by_level
@pytest.mark.parametrize("low, high", BOUNDS)
@pytest.mark.parametrize("mode", ["truncate", "mask", "gate"])
def test_importance_weights(mode, low, high, level, device):
    old, sampling, mask = tokens(device)
    options = {"level": level, "mode": mode, "low": low, "high": high}

    def formula(rho):
        inside = (rho >= (low or 0)) & (rho <= (high or torch.inf))
        if mode == "truncate":
            return rho.clamp(low, high)
        return torch.where(inside, rho if mode == "mask" else torch.ones_like(rho), 0)

    ours = weights.importance_weights(old, sampling, mask=mask, **options)
    assert ours.dtype == torch.float32
    assert ours.shape == ((6, 9) if level == "token" else (6, 1))
    truth = formula(ratio(old.double(), sampling.double(), mask, level))
    assert_as_accurate(ours, formula(ratio(old, sampling, mask, level)), truth)
    boundaries, live, o, s = packed(mask, old, sampling)
    flat = weights.importance_weights(o, s, mask=live, cu_seqlens=boundaries, **options)
    if level == "token":
        torch.testing.assert_close(flat[live], ours[mask], rtol=0, atol=0)
    else:
        torch.testing.assert_close(flat, ours[:, 0], rtol=0, atol=0)


def test_without_bounds_it_is_the_ratio(device):
    old, sampling, mask = tokens(device)
    ours = weights.importance_weights(old, sampling, mask=mask)
    torch.testing.assert_close(ours[mask], (old - sampling).exp()[mask])
    assert ours[~mask].eq(1).all()


def test_named_forms(device):
    old, sampling, mask = tokens(device)
    for level in ("token", "sequence"):
        torch.testing.assert_close(
            weights.truncated_importance(old, sampling, 1.1, mask=mask, level=level),
            weights.importance_weights(old, sampling, mask=mask, level=level, high=1.1),
        )
    torch.testing.assert_close(
        weights.icepop(old, sampling, 0.5, 1.5, mask=mask),
        weights.importance_weights(old, sampling, mask=mask, mode="mask", low=0.5, high=1.5),
    )


def test_packed_tokens_without_boundaries_are_one_sequence(device):
    old, sampling = -torch.rand(7, device=device), -torch.rand(7, device=device)
    ours = weights.importance_weights(old, sampling, level="sequence")
    torch.testing.assert_close(ours, (old - sampling).sum().exp()[None])


def test_bounds_are_kept_where_the_ratio_overflows(device):
    old, sampling = torch.zeros(2, 3, device=device), torch.full((2, 3), -80.0, device=device)
    sampling[1] = -torch.inf
    for level, missing in (("token", 0.0), ("sequence", 0.0), ("geometric", 0.0)):
        cut = weights.importance_weights(old, sampling, level=level, high=2.0)
        assert cut.eq(2).all()
        gone = weights.importance_weights(old, sampling, level=level, mode="mask", high=2.0)
        assert gone.eq(missing).all()


def test_what_has_no_ratio(device):
    """NaN, -inf from both policies, -inf from one: a ratio of 1 or 0, before the bounds."""
    inf = torch.inf
    old = torch.tensor([[torch.nan, 0.0], [-inf, 0.0], [0.0, 0.0], [0.0, 0.0]], device=device)
    sampling = torch.tensor([[0.0, -1.0], [-inf, 0.0], [-inf, -1.0], [-1.0, 0.0]], device=device)
    e = math.exp(1)

    def found(**options):
        return weights.importance_weights(old, sampling, **options)[:, 0].tolist()

    assert found() == pytest.approx([1, 1, inf, e])
    assert found(undefined="zero") == pytest.approx([0, 0, 0, e])
    assert found(undefined="zero", low=0.5, high=2.0) == [0.5, 0.5, 0.5, 2]
    assert found(undefined="zero", level="sequence") == pytest.approx([0, 0, 0, e])
    assert found(undefined="zero", level="sequence", mode="gate", low=0.1) == [0, 0, 0, 1]
    assert found(level="sequence") == pytest.approx([e, 1, inf, e])


def test_geometric_mean(device):
    log_w, _, mask = tokens(device)
    w = log_w.exp()

    def formula(w, eps):
        logs = torch.where(mask, (w + eps).log(), 0)
        return (logs.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp()

    for eps in (0.0, 0.5):
        ours = weights.geometric_mean(w, mask=mask, eps=eps)
        assert ours.shape == (6, 1)
        given = torch.where(mask, w, 1)
        assert_as_accurate(ours, formula(given, eps), formula(given.double(), eps))
        boundaries, live, flat = packed(mask, w)
        flat = weights.geometric_mean(flat, mask=live, cu_seqlens=boundaries, eps=eps)
        torch.testing.assert_close(flat, ours[:, 0], rtol=0, atol=0)
    one_of_none = torch.tensor([[0.0, 4.0]], device=device)
    assert weights.geometric_mean(one_of_none).item() == 0
    assert weights.geometric_mean(one_of_none, eps=1e-4).item() == pytest.approx(0.02, rel=1e-4)


@pytest.mark.filterwarnings("ignore")  # of TRL's imports
@pytest.mark.parametrize("low, high", [(None, 3.0), (0.7, 1.3), (0.5, None), (None, None)])
@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
def test_trl_modes(mode, low, high, device):
    """TRL's own statements, with log-probs that vLLM did not give."""
    if mode.endswith("truncate") and low is None and high is None:
        low = 0.0  # torch.clamp, and so TRL, refuses to have none
    old, sampling, mask = tokens(device, garbage=False)
    sampling[0, :2] = torch.nan
    trainer = SimpleNamespace(
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    scope = {
        "self": trainer,
        "completion_mask": mask.double(),
        "tool_mask": None,
        "old_per_token_logps": old.double(),
        "sampling_per_token_logps": sampling.double(),
    }
    start, end = "mask = completion_mask if tool_mask", "if self.vllm_importance_sampling_mode in"
    theirs = run_of_trl(start, end, scope)["vllm_importance_sampling_ratio"]
    level, action = mode.split("_")
    ours = weights.importance_weights(
        old, sampling, mask=mask, level=level, mode=action, low=low, high=high
    )
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def binary_kl(p, q):
    p, q = p.exp(), q.exp()
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def test_kpop(device):
    old, sampling, mask = tokens(device)
    o, s = old.double(), sampling.double().clamp(max=-0.01)
    divergence = torch.maximum(binary_kl(o, s), binary_kl(s, o))
    delta = divergence[mask].median().item() * 1.0001
    ours = weights.kpop(old, s.float(), delta, mask=mask)
    want = mask & (divergence <= delta)
    assert 0 < want.sum() < mask.sum()
    torch.testing.assert_close(ours, want.float(), rtol=0, atol=0)
    sure = torch.zeros(3, device=device)  # probability 1 under both; and a missing log-prob
    sampled = torch.tensor([0.0, torch.nan, -1.0], device=device)
    assert weights.kpop(sure, sampled, 0.1).tolist() == [1, 1, 0]


@pytest.mark.parametrize("floor", [0.0, 1e-2])
def test_binary_divergence(floor, device):
    x, y, mask = tokens(device)
    x, y = (z.clamp(max=-0.01) for z in (x, y))
    x[0, :2] = y[0, 1:3] = -1e-3  # above 1 - floor, in one or in both
    p, q = (z.double().exp().clamp(floor, 1 - floor) for z in (x, y))
    wants = {"tv": (p - q).abs(), "kl": binary_kl(p.log(), q.log())}
    for kind, want in wants.items():
        ours = weights.binary_divergence(x, y, kind=kind, mask=mask, floor=floor)
        torch.testing.assert_close(ours, torch.where(mask, want, 0).float(), rtol=1e-5, atol=1e-7)
    sure = torch.tensor([0.0, 0.0, -torch.inf, -1.0], device=device)  # log-probs of 1, 1, 0
    other = torch.tensor([0.0, -1.0, -1.0, 0.0], device=device)
    found = weights.binary_divergence(sure, other).tolist()
    assert found[0] == 0
    assert found[1:] == pytest.approx([1.0, -math.log1p(-math.exp(-1)), math.inf])


FUNCTIONS = {
    "binary_divergence": lambda x, y, A, m: weights.binary_divergence(x, y, mask=m, floor=1e-6),
    "geometric_mean": lambda x, y, A, m: weights.geometric_mean(x.exp(), mask=m),
    "importance_weights": lambda x, y, A, m: weights.importance_weights(x, y, mask=m, high=2.0),
    "sequence": lambda x, y, A, m: weights.importance_weights(x, y, mask=m, level="sequence"),
    "kpop": lambda x, y, A, m: weights.kpop(x, y, 0.1, mask=m),
    "m2po": lambda x, y, A, m: weights.m2po(x, y, 0.1, mask=m),
    "top_entropy": lambda x, y, A, m: weights.top_entropy(x, 0.2, mask=m),
    "clip_cov": lambda x, y, A, m: weights.clip_cov(x, y, A, mask=m),
    "kl_cov": lambda x, y, A, m: weights.kl_cov(x, A, mask=m),
}
by_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@by_function
def test_nothing_is_differentiated_and_garbage_is_not_read(function, device):
    x, y, mask = tokens(device)
    A = torch.randn(6, device=device)
    torch.manual_seed(1)
    first = function(x.requires_grad_(), y.requires_grad_(), A, mask)
    assert not first.requires_grad
    assert first.dtype in (torch.float32, torch.bool)
    assert not first.isnan().any()
    zeros = (torch.where(mask, z.detach(), 1e30) for z in (x, y))
    torch.manual_seed(1)
    torch.testing.assert_close(function(*zeros, A, mask), first, rtol=0, atol=0)


@by_function
def test_no_tokens(function, device):
    A = torch.zeros(3, device=device)
    for shape in ((3, 0), (3, 4)):
        nan = torch.full(shape, torch.nan, device=device)
        out = function(nan, nan, A, torch.zeros(shape, dtype=torch.bool, device=device))
        assert len(out) == 3
        assert not out.isnan().any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a host sync needs a GPU to show")
@by_function
def test_nothing_waits_for_the_gpu(function):
    # What PyTorch does for determinism looks at indices on the host.
    torch.use_deterministic_algorithms(False)
    x, y, mask = tokens("cuda")
    A = torch.randn(6, device="cuda")
    ends = torch.tensor([0, 4, 9], device="cuda")
    function(x, y, A, mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(x, y, A, mask)
        weights.varied_groups(A, group_ids=(A > 0).long())
        weights.importance_weights(x[0], y[0], cu_seqlens=ends, level="geometric")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@by_level
@pytest.mark.parametrize("surrogate", ["clip", "vespo"])
def test_as_importance_weights(surrogate, level, backend, device):
    """The results are valid `importance_weights`, padded and packed, with the meaning of the reference."""
    old, sampling, mask = tokens(device)
    logits = torch.randn(6, 9, 20, device=device)
    ids = torch.randint(20, (6, 9), device=device)
    A = torch.randn(6, device=device)
    objective = Objective(surrogate=surrogate, reduction="token_mean")
    w = weights.importance_weights(old, sampling, mask=mask, level=level, high=1.5)
    arguments = {"old_logps": old, "objective": objective}
    ours = grpo_loss(logits, ids, advantages=A, mask=mask, importance_weights=w, **arguments).loss
    truth = reference.grpo_loss(
        *(logits.double(), ids),
        advantages=A.double(),
        mask=mask,
        importance_weights=w.double(),
        **arguments,
    )
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)
    boundaries, live, o, s, z, i = packed(mask, old, sampling, logits, ids)
    w = weights.importance_weights(o, s, mask=live, cu_seqlens=boundaries, level=level, high=1.5)
    flat = grpo_loss(
        *(z, i),
        advantages=A,
        mask=live,
        importance_weights=w,
        cu_seqlens=boundaries,
        old_logps=o,
        objective=objective,
    )
    torch.testing.assert_close(flat.loss, ours, rtol=1e-5, atol=1e-6)


X = torch.zeros(2, 3)
ERRORS = {
    "level": ("importance_weights", (X, X), {"level": "batch"}, "level='batch' is unknown"),
    "mode": ("importance_weights", (X, X), {"mode": "clip"}, "mode='clip' is unknown"),
    "undefined": ("importance_weights", (X, X), {"undefined": "nan"}, "undefined='nan' is unknown"),
    "eps": ("geometric_mean", (X,), {"eps": -1.0}, "eps: want .*got -1.0"),
    "gate": ("importance_weights", (X, X), {"mode": "gate"}, "mode='gate' has no effect"),
    "order": ("importance_weights", (X, X), {"low": 2.0, "high": 1.0}, "high: want .*got 1.0"),
    "negative": ("importance_weights", (X, X), {"low": -1.0}, "low: want .*got -1.0"),
    "shape": ("importance_weights", (X, X[0]), {}, r"sampling_logps: want \(2, 3\), got \(3,\)"),
    "3-D": ("importance_weights", (X[None], X[None]), {}, r"old_logps: want \(B, T\).*\(1, 2, 3\)"),
    "mask": ("importance_weights", (X, X), {"mask": X[0]}, r"mask: want \(2, 3\), got \(3,\)"),
    "padded": (
        "importance_weights",
        (X, X),
        {"cu_seqlens": torch.tensor([0, 6])},
        "cu_seqlens describes packed",
    ),
    "no tensor": ("importance_weights", ([0.0], X), {}, "old_logps: want a tensor"),
    "a cap as text": ("truncated_importance", (X, X, "2"), {}, "cap: want a number, got '2'"),
    "delta": ("kpop", (X, X, -0.1), {}, "delta: want .*got -0.1"),
    "kind": (
        "binary_divergence",
        (X, X),
        {"kind": "js"},
        "kind='js' is unknown; choose from kl, tv",
    ),
    "floor": ("binary_divergence", (X, X), {"floor": 0.7}, "floor: want .*got 0.7"),
    "threshold": ("m2po", (X, X, float("nan")), {}, "threshold: .*nan"),
    "fraction": (
        "top_entropy",
        (X, 1.5),
        {},
        r"fraction: want a finite number in \[0.0, 1.0\], got 1.5",
    ),
    "advantages": (
        "clip_cov",
        (X, X, X[0]),
        {},
        r"advantages: want \(2,\), \(2, 1\) or \(2, 3\), got \(3,\)",
    ),
    "cov order": ("clip_cov", (X, X, X), {"low": 2.0, "high": 1.0}, "high: want .*got 1.0"),
    "cov fraction": ("kl_cov", (X, X), {"fraction": -1}, "fraction: want .*got -1"),
    "cov generator": ("clip_cov", (1.0, X, X), {"generator": torch.Generator()}, "logps: want"),
    "groups": ("varied_groups", (X[0],), {}, "either group_size or group_ids"),
    "rewards": ("varied_groups", (X[0] + torch.nan,), {"group_size": 3}, "rewards: nan at 0"),
    "nan": ("varied_groups", (X[0],), {"group_size": 3, "nan": "drop"}, "nan='drop' is unknown"),
}


@pytest.mark.parametrize(("name", "given", "options", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(name, given, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(weights, name)(*given, **options)


def test_every_function_is_public_and_keyword_only_where_it_has_options():
    for name in weights.__all__:
        parameters = inspect.signature(getattr(weights, name)).parameters.values()
        optional = [p for p in parameters if p.default is not p.empty]
        assert all(p.kind is p.KEYWORD_ONLY for p in optional), name
