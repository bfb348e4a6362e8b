"""The checks of `run_all --smoke`, in groups: each returns its errors against float64, or raises.

A result may be twice as far from float64 as plain PyTorch's in the same dtype.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args
from unittest import mock

import torch
from torch import Tensor

from grpo_fast import Objective, reference
from grpo_fast.loss import grpo_loss, linear_grpo_loss, metrics_from, policy_loss
from grpo_fast.objective import KL, Surrogate
from grpo_fast.ops import group_advantage, linear_logprob, logprob
from grpo_fast.testing import assert_as_accurate

# Every schedule, with rows that start aligned and rows that do not: one tile, one program, many programs.
VOCABULARIES = (100, 1000, 1024, 9001, 32_768, 40_000, 50_257, 128_264, 151_665, 152_064)
INTERPRETED = (100, 9001, 40_000)  # where no GPU is
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OUTSIDE = (-100, -1, 2**32)
BY_SEQUENCE = ("gmpo", "vespo")
LARGE = (16_384, 152_064)  # more than 2**31 elements
Check = Callable[[], dict[str, float]]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def vocabularies() -> tuple[int, ...]:
    return VOCABULARIES if torch.cuda.is_available() else INTERPRETED


class Batch:
    """Three sequences of four tokens, some masked with NaN in their logits; old and reference policies."""

    def __init__(self, V: int, dtype: torch.dtype, B: int = 3, T: int = 4) -> None:
        torch.manual_seed(V)
        new = partial(torch.randn, device=device())
        self.logits = (3 * new(B, T, V)).to(dtype)
        self.ids = torch.randint(V, (B, T), device=device())
        self.mask = torch.arange(T, device=device()) < torch.tensor(
            [T, 1, T - 1], device=device()
        ).unsqueeze(1)
        self.logits = torch.where(self.mask[..., None], self.logits, torch.nan)
        logp = reference.logprob(self.logits.nan_to_num().float(), self.ids)
        self.arguments: dict[str, Any] = {
            "mask": self.mask,
            "advantages": new(B),
            "old_logps": logp + 0.3 * new(B, T),
            "ref_logps": logp + 0.3 * new(B, T),
        }

    def in_double(self) -> dict[str, Any]:
        return {
            k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
            for k, x in self.arguments.items()
        }


def error(actual: Tensor, truth: Tensor) -> float:
    a, t = actual.detach().double(), truth.detach().double()
    return ((a - t).abs().max() / t.abs().max().clamp(min=1e-300)).item()


def accurate(
    actual: tuple[Tensor, ...], plain: tuple[Tensor, ...], truth: tuple[Tensor, ...], names: str
) -> dict[str, float]:
    """The errors against float64; an error where one is above twice plain PyTorch's."""
    errors = {}
    for name, a, p, t in zip(names.split(), actual, plain, truth, strict=True):
        assert_as_accurate(a, p, t, scale=0.02 * (name == "entropy"), name=name)
        errors[name] = error(a, t)
    return errors


def graded(fn: Callable[..., Any], x: Tensor, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    out = fn(x)
    loss = getattr(out, "loss", out)
    return loss.detach(), torch.autograd.grad(upstream * loss, x)[0]


def check_logprob(V: int, dtype: torch.dtype) -> dict[str, float]:
    b = Batch(V, dtype)
    live = b.mask

    def values(fn: Callable[..., tuple[Tensor, Tensor]], logits: Tensor) -> tuple[Tensor, ...]:
        x = logits.detach().clone().requires_grad_()
        logp, entropy = (o[live] for o in fn(x))
        ramp = torch.linspace(-1, 2, len(logp), device=x.device).to(logp)
        (grad,) = torch.autograd.grad((logp, entropy), x, (ramp, 0.5 - ramp))
        return logp.detach(), entropy.detach(), grad[live]

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.logprob(x, b.ids, 0.7), reference.entropy(x, 0.7)

    ours = values(
        lambda x: logprob(x, b.ids, temperature=0.7, mask=live, return_entropy=True), b.logits
    )
    baseline, truth = values(plain, b.logits), values(plain, b.logits.double())
    return accurate(ours, baseline, truth, "logp entropy dlogits")


def check_grpo(
    V: int,
    dtype: torch.dtype,
    objective: Objective = Objective(beta=0.1, entropy_coef=0.02),
    **changes: Any,
) -> dict[str, float]:
    """Loss and gradient under an upstream gradient of 3; in place, and run again, the same bits."""
    b = Batch(V, dtype)
    b.arguments |= {"objective": objective, **changes}

    def ours(x: Tensor, **options: Any) -> Any:
        return grpo_loss(x, b.ids, **b.arguments, **options)

    def spec(x: Tensor, arguments: dict[str, Any]) -> Tensor:
        return reference.grpo_loss(x, b.ids, **arguments)

    actual = graded(ours, b.logits, 3.0)
    plain = graded(lambda x: spec(x, b.arguments), b.logits, 3.0)
    truth = graded(lambda x: spec(x, b.in_double()), b.logits.double(), 3.0)
    live = b.mask
    inplace = graded(lambda x: ours(x.clone(), inplace=True), b.logits, 3.0)
    for loss, grad in (inplace, actual):
        assert grad[~live].eq(0).all(), "a masked token has a gradient"
        errors = accurate(
            (loss, grad[live]),
            (plain[0], plain[1][live]),
            (truth[0], truth[1][live]),
            "loss dlogits",
        )
    others = [graded(ours, b.logits, 3.0)]
    if objective.ratio == "token" and objective.surrogate not in BY_SEQUENCE:
        others.append(inplace)  # the others take their factor at another place
    for other in others:
        for one, two in zip(actual, other, strict=True):
            same = (one.nan_to_num() == two.nan_to_num()).all()
            assert same, "other bits in place" if other is inplace else "other bits again"
    return errors


def check_same_bits(V: int, dtype: torch.dtype) -> dict[str, float]:
    """`logprob` and `grpo_loss` give the same log-probs to the bit, and one row alone if 8 divides V."""
    b = Batch(V, dtype)
    one = logprob(b.logits, b.ids, mask=b.mask)[b.mask]
    two = grpo_loss(b.logits.clone(), b.ids, **b.arguments).logps[b.mask]
    single = logprob(b.logits[2, :1], b.ids[2, :1])
    assert (one == two).all(), f"{int((one != two).sum())} log-probs differ"
    row = one[int(b.mask[:2].sum())]
    nearly = (single - row).abs() <= 1e-6 * row.abs()
    assert (nearly if V % 8 else single == row).all(), "depends on the batch"
    return {}


def check_outside(V: int, dtype: torch.dtype) -> dict[str, float]:
    """A live id outside the vocabulary: NaN there, the other tokens as they were."""
    if not torch.cuda.is_available():
        return {}  # an error instead: values are looked at there
    b = Batch(V, dtype)
    want = logprob(b.logits, b.ids, mask=b.mask)
    for bad in (*OUTSIDE, V):
        ids = b.ids.clone()
        ids[2, 2] = bad
        logp = logprob(b.logits, ids, mask=b.mask)
        assert logp[2, 2].isnan(), f"id {bad} gave {logp[2, 2].item()}"
        assert (logp[:2] == want[:2]).all()
        assert grpo_loss(b.logits.clone(), ids, **b.arguments).loss.isnan(), f"id {bad}"
    return {}


def check_strided(V: int, dtype: torch.dtype) -> dict[str, float]:
    """The view that a model's logits are sliced to is read where it is, wherever its rows start."""
    b = Batch(V, dtype)
    wide = torch.nn.functional.pad(b.logits, (0, 16, 1, 1), value=torch.nan)
    view = wide[:, 1:-1, :V]
    one = graded(lambda x: grpo_loss(x, b.ids, **b.arguments), b.logits)
    two = graded(lambda x: grpo_loss(x[:, 1:-1, :V], b.ids, **b.arguments), wide)
    assert (view.nan_to_num() == b.logits.nan_to_num()).all()
    for x, y in zip(one, (two[0], two[1][:, 1:-1, :V]), strict=True):
        if V % 8:  # the sums run in another order
            rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
            assert ((x - y).abs() <= rounding * x.abs() + 1e-6 * x.abs().max()).all()
        else:
            assert (x == y).all()
    return {}


def check_metrics(V: int) -> dict[str, float]:
    """What the kernel of the statistics makes of them."""
    b = Batch(V, torch.float32)
    out = grpo_loss(b.logits, b.ids, return_entropy=True, **b.arguments)
    want = metrics_from(out.statistics)
    for name, x in out.metrics.items():
        assert torch.isclose(x, want[name], rtol=1e-6), f"{name}: {x.item()}, {want[name].item()}"
    return {"kl": error(out.metrics["kl"], want["kl"])}


def check_on_chip(V: int, dtype: torch.dtype) -> dict[str, float]:
    """The other kernel, where there is one for this GPU and this Triton."""
    from grpo_fast.kernels import on_chip

    if on_chip.unavailable(device()):
        return {}
    with mock.patch.dict(os.environ, {"GRPO_FAST_ON_CHIP": "1"}):
        return check_grpo(V, dtype)


def head_batch(V: int, dtype: torch.dtype) -> tuple[Batch, Tensor, Tensor]:
    b = Batch(V, dtype)
    D = 64
    hidden = torch.randn(*b.ids.shape, D, device=device()).to(dtype)
    weight = (torch.randn(V, D, device=device()) * 3 * D**-0.5).to(dtype)
    return b, hidden, weight


def check_head(V: int, dtype: torch.dtype, **options: Any) -> dict[str, float]:
    """From hidden states: loss, dhidden and dweight."""
    b, hidden, weight = head_batch(V, dtype)
    b.arguments["objective"] = Objective(beta=0.1)

    def run(fn: Callable[..., Any], cast: torch.dtype, arguments: dict[str, Any]) -> Any:
        h, w = (x.detach().to(cast).requires_grad_() for x in (hidden, weight))
        out = fn(h, w, b.ids, **arguments)
        loss = getattr(out, "loss", out)
        return (loss.detach(), *torch.autograd.grad(3 * loss, (h, w)))

    ours = run(partial(linear_grpo_loss, **options), dtype, b.arguments)
    known = {k: x for k, x in options.items() if k in ("softcap", "logit_scale")}
    spec = partial(reference.linear_grpo, **known)
    plain = run(spec, dtype, b.arguments)
    truth = run(spec, torch.float64, b.in_double())
    return accurate(ours, plain, truth, "loss dhidden dweight")


def check_linear_logprob(V: int, dtype: torch.dtype, **options: Any) -> dict[str, float]:
    b, hidden, weight = head_batch(V, dtype)

    def run(fn: Callable[..., Any], cast: torch.dtype) -> tuple[Tensor, ...]:
        h, w = (x.detach().to(cast).requires_grad_() for x in (hidden, weight))
        logp = fn(h, w, b.ids)
        ramp = torch.linspace(-1, 2, logp.numel(), device=h.device).view_as(logp)
        return (logp.detach(), *torch.autograd.grad(logp, (h, w), ramp.to(logp)))

    return accurate(
        run(partial(linear_logprob, **options), dtype),
        run(reference.linear_logprob, dtype),
        run(reference.linear_logprob, torch.float64),
        "logp dhidden dweight",
    )


def check_policy(objective: Objective, **changes: Any) -> dict[str, float]:
    b = Batch(100, torch.float32)
    logps = reference.logprob(b.logits.nan_to_num(), b.ids)
    b.arguments |= {"objective": objective, **changes}
    ours = graded(lambda x: policy_loss(x, **b.arguments), logps, 3.0)
    plain = graded(lambda x: reference.policy_loss(x, **b.arguments), logps, 3.0)
    truth = graded(lambda x: reference.policy_loss(x, **b.in_double()), logps.double(), 3.0)
    return accurate(ours, plain, truth, "loss dlogps")


def check_group_advantage(scale: Any) -> dict[str, float]:
    rewards = torch.randn(64, device=device())
    rewards[8:16] = 1.0
    given = {"group_size": 8, "scale": scale}
    want = reference.group_advantage(rewards.cpu(), **given)
    truth = reference.group_advantage(rewards.cpu().double(), **given)
    actual = group_advantage(rewards, **given).cpu()
    return accurate((actual,), (want,), (truth,), "advantages")


def check_large(inplace: bool) -> dict[str, float]:
    """Offsets beyond 2**31: the first and the last rows of logits of the size of a 7B model's."""
    if not torch.cuda.is_available():
        return {}
    N, V = LARGE
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.empty(N, V, device="cuda", dtype=torch.bfloat16)
    logits.normal_(0, 2, generator=generator)
    ids = torch.randint(V, (N,), device="cuda", generator=generator)
    rows = torch.tensor([0, 1, 7062, 14_122, 14_123, N - 2, N - 1], device="cuda")
    sample = logits[rows].clone()
    old = torch.full((N,), -14.0, device="cuda")
    given: dict[str, Any] = {"advantages": torch.ones(N, device="cuda"), "old_logps": old}
    given["objective"] = Objective(reduction="sequence_sum", epsilon_high=1e9)
    given["cu_seqlens"] = torch.arange(0, N + 1, 1024, device="cuda")
    out, grad = None, None
    leaf = logits.requires_grad_()
    out = grpo_loss(leaf if not inplace else leaf * 1.0, ids, inplace=inplace, **given)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    truth = reference.logprob(sample.double(), ids[rows])
    plain = reference.logprob(sample.float(), ids[rows])
    scale = -(truth - old[rows]).exp() / (N // 1024)
    x = sample.double().requires_grad_()
    (want,) = torch.autograd.grad(reference.logprob(x, ids[rows]), x, scale)
    x32 = sample.float().requires_grad_()
    (near,) = torch.autograd.grad(reference.logprob(x32, ids[rows]), x32, scale.float())
    return accurate(
        (out.logps[rows], grad[rows]), (plain, near.to(grad.dtype)), (truth, want), "logp dlogits"
    )


def by_dtype(dtype: torch.dtype) -> Iterator[tuple[str, Check]]:
    for V in reversed(vocabularies()):
        yield f"grpo {V}", partial(check_grpo, V, dtype)
        yield f"same bits {V}", partial(check_same_bits, V, dtype)
        yield f"logprob {V}", partial(check_logprob, V, dtype)
    for V in (vocabularies()[0], 40_000):
        yield f"ids outside {V}", partial(check_outside, V, dtype)
    for V in (vocabularies()[0], 40_000, *((50_257,) if torch.cuda.is_available() else ())):
        yield f"strided {V}", partial(check_strided, V, dtype)
    if dtype != torch.float32:
        for V in (1000, 152_064) if torch.cuda.is_available() else (1000,):
            yield f"on chip {V}", partial(check_on_chip, V, dtype)


def heads() -> Iterator[tuple[str, Check]]:
    for V in (40_000, 50_257) if torch.cuda.is_available() else (1003,):
        for name, dtype in DTYPES.items():
            if dtype != torch.float32 and not torch.cuda.is_available():
                continue
            yield f"linear_grpo {V} {name}", partial(check_head, V, dtype)
            yield f"linear_logprob {V} {name}", partial(check_linear_logprob, V, dtype)
        yield (
            f"linear_grpo {V} bf16 logits",
            partial(check_head, V, torch.bfloat16, logits_dtype="bf16"),
        )
        yield (
            f"linear_grpo {V} soft cap",
            partial(check_head, V, torch.float32, softcap=30.0, logit_scale=0.5, chunk_size=5),
        )
        yield f"linear_grpo {V} all rows", partial(check_head, V, torch.float32, compact=False)


def objectives() -> Iterator[tuple[str, Check]]:
    quadratic = {"ipo", "dro"}
    for surrogate in get_args(Surrogate):
        if surrogate in (*BY_SEQUENCE, "topr"):
            continue
        options: dict[str, Any] = {"quadratic_coef": 0.3} if surrogate in quadratic else {}
        objective = Objective(surrogate=surrogate, beta=0.1, **options)
        yield f"surrogate {surrogate}", partial(check_grpo, 1024, torch.float32, objective)
    for kl in get_args(KL):
        objective = Objective(beta=0.3, kl=kl)
        yield f"kl {kl}", partial(check_grpo, 1024, torch.float32, objective)
    for name in ("gspo", "gmpo", "vespo"):
        objective = Objective.preset(name)
        yield f"sequence {name}", partial(check_policy, objective)
        yield f"from logits {name}", partial(check_grpo, 1024, torch.float32, objective)
    yield "policy_loss", partial(check_policy, Objective(beta=0.1, delta=1.5))
    yield "metrics", partial(check_metrics, 1024)
    scaled = {"loss_scale": torch.tensor(0.3, device=device())}
    yield "loss scale", partial(check_grpo, 1024, torch.float32, Objective(beta=0.1), **scaled)
    yield "on policy", partial(check_grpo, 1024, torch.float32, Objective(), old_logps=None)
    for scale in ("group", "batch", "none"):
        yield f"group_advantage {scale}", partial(check_group_advantage, scale)


def large() -> Iterator[tuple[str, Check]]:
    yield "large, not in place", partial(check_large, False)
    yield "large, in place", partial(check_large, True)


GROUPS: dict[str, Callable[[], Iterator[tuple[str, Check]]]] = {
    **{name: partial(by_dtype, dtype) for name, dtype in DTYPES.items()},
    "heads": heads,
    "objectives": objectives,
    "large": large,
}
