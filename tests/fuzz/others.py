"""Strategies for log-probs, advantages, weights and statistics: each draws a case and compares."""

import math
from typing import Any

import torch
from torch import Tensor

from grpo_fast import (
    Objective,
    fold_statistics,
    group_advantage,
    linear_logprob,
    logprob,
    metrics_from,
    reference,
)
from grpo_fast.diagnostics import kl_estimate
from tests.fuzz import oracle
from tests.fuzz.batches import batch, logits, strided, targets, temperature
from tests.fuzz.drawing import FLOOR, Draws, compare
from tests.fuzz.losses import UNIT, head, reach, scoring, unit_of, wide


def upstream_of(p: Draws, n: int) -> Tensor:
    """A gradient of a result per token, which differs from token to token."""
    return p.pick("upstream", 1.0, 1e-3, 1e3) * p.randn(n)


def logprob_case(p: Draws) -> None:
    b = batch(p)
    halves = (torch.float16,) if p.backend == "triton" else (torch.float16, torch.bfloat16)
    dtype = p.pick("dtype", torch.float32, torch.float32, *halves)
    leaf, view, ids = logits(p, b, dtype)
    given_ids, (heat, heats) = targets(p, b, ids), temperature(p, b)
    both = p.flag("return_entropy", often=True)
    up = [upstream_of(p, b.n) * b.live for _ in range(1 + both)]

    def at(dtype: torch.dtype) -> list[Tensor]:
        own = (leaf.double() if dtype == torch.float64 else leaf.clone()).requires_grad_()
        found = oracle.log_probs(
            view(own).flatten(0, -2).to(dtype), ids, b.live, heats, dtype == torch.float64
        )[: len(up)]
        total = sum((x * u).sum() for x, u in zip(found, up, strict=True))
        return [*found, *torch.autograd.grad(total, [own])]

    own = leaf.clone().requires_grad_()
    out = logprob(view(own), given_ids, temperature=heat, mask=b.mask, return_entropy=both)
    out = out if both else (out,)
    for x in out:
        assert bool(x[~b.live.view(b.shape)].isfinite().all()), "not finite where masked"
    total = sum((x.flatten() * u).sum() for x, u in zip(out, up, strict=True))
    got = [x.detach().flatten()[b.live] for x in out] + list(torch.autograd.grad(total, [own]))
    truth, plain = at(torch.float64), at(torch.float32)
    z = view(leaf).detach().double().flatten(0, -2) / heats[:, None]
    most = float(reach(z, b.live).amax()) if b.n else 0.0
    floor = FLOOR + 4 * UNIT * most
    # A uniform row has no gradient of its entropy: its terms cancel.
    steep = (
        float((1 / heats).amax()) * (1 + float(truth[1].detach().amax() if both else 0))
        if b.n
        else 1.0
    )
    size = steep * float(torch.stack(up).abs().amax()) if b.n else 0.0
    names = ("logp", "entropy")[: len(up)]
    for name, x, t, f in zip((*names, "gradient"), got, truth, plain, strict=True):
        values = name != "gradient"
        t, f = (t[b.live], f[b.live]) if values else (t, f)
        rounding = 0.0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
        compare(name, x, t, f, (), floor + rounding, 1.0 if values else size)


def linear_logprob_case(p: Draws) -> None:
    b = batch(p)
    h = head(p, b)
    leaves = list(h["leaves"].values())
    ids = p.integers(h["V"], b.n)
    given_ids, (heat, heats) = targets(p, b, ids), temperature(p, b)
    score = scoring(b, h, ids, heats)
    both = p.flag("return_entropy", often=True)
    up = [upstream_of(p, b.n) * b.live for _ in range(1 + both)]

    def at(dtype: torch.dtype) -> list[Tensor]:
        own = [x.detach().clone().requires_grad_() for x in leaves]
        if dtype == torch.float64:
            own = [x.detach().double().requires_grad_() for x in leaves]
        found = score(own, dtype)[: len(up)]
        total = sum((x * u).sum() for x, u in zip(found, up, strict=True))
        grads = torch.autograd.grad(total, own, allow_unused=True)
        return [
            *found,
            *(torch.zeros_like(x) if g is None else g for x, g in zip(own, grads, strict=True)),
        ]

    own = {k: x.detach().clone().requires_grad_() for k, x in h["leaves"].items()}
    words = {**h["words"], "temperature": heat, "mask": b.mask, "return_entropy": both}
    words |= {"bias": own.get("bias"), "compact": not p.flag("all rows")}
    if "A" in own:
        words["lora"] = (own["A"], own["B"], h["scaling"])
    out = linear_logprob(h["view"](own["hidden"]), own["weight"], given_ids, **words)
    out = out if both else (out,)
    total = sum((x.flatten() * u).sum() for x, u in zip(out, up, strict=True))
    grads = torch.autograd.grad(total, list(own.values()), allow_unused=True)
    truth = at(torch.float64)
    plain = truth if wide(leaves) else at(torch.float32)
    z = h["make"]([x.detach().double() for x in leaves]) / heats[:, None]
    most, unit = float(reach(z, b.live).amax()) if b.n else 0.0, unit_of(leaves)
    floor = 1e-9 if wide(leaves) else FLOOR + 4 * unit * most
    for name, x, t, f in zip(("logp", "entropy"), out, truth, plain, strict=False):
        got = x.detach().flatten()[b.live]
        compare(name, got, t[b.live], f[b.live], (), floor + 4 * unit * most, 1.0)
    steep = max([1.0, *(float(x.nan_to_num(0).abs().sum()) for x in leaves if x.numel())])
    steep *= float((1 / heats).amax() if b.n else 1) * max(h["words"].get("logit_scale", 1.0), 1.0)
    size = steep * float(torch.stack(up).abs().amax()) if b.n else 0.0
    for name, grad, t, f in zip(own, grads, truth[len(up) :], plain[len(up) :], strict=True):
        grad = torch.zeros_like(own[name]) if grad is None else grad
        rounding = torch.finfo(grad.dtype).eps
        compare(f"gradient of {name}", grad, t, f, (), floor + rounding, size)


def reference_logprob_case(p: Draws) -> None:
    b = batch(p, masks=False)
    leaf, view, ids = logits(p, b, torch.float32)
    heat, heats = temperature(p, b)
    z = view(leaf).double()
    truth, entropy = oracle.log_probs(z.flatten(0, -2), ids, b.live, heats)
    got = reference.logprob(z, ids.view(b.shape), heat).flatten()
    floor = 1e-9 + 1e-15 * float(reach(z.flatten(0, -2), b.live).amax() if b.n else 0)
    compare("logp", got, truth, truth, (), floor, 1.0)
    compare("entropy", reference.entropy(z, heat).flatten(), entropy, entropy, (), floor, 1.0)


def rewards_case(p: Draws, function: Any) -> None:
    """Compare a function of rewards, `group_advantage` or its specification, with the oracle."""
    number, K = p.pick("rewards", 4, 2, 6, 1, 12), p.pick("columns", 0, 0, 0, 1, 2, 3)
    shape = (number, K) if K else (number,)
    r = p.pick("values", "real", "0 or 1", "equal", "ints")
    x = {
        "real": p.randn(*shape).double(),
        "0 or 1": p.integers(2, *shape).double(),
        "equal": torch.full(shape, 0.1, dtype=torch.float64),
        "ints": p.integers(100, *shape).double(),
    }[r]
    x = x * p.pick("times", 1.0, 1e-3, 1e4) + p.pick("plus", 0.0, 1e4)
    dtype = p.pick(
        "dtype", torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64
    )
    x = x.clamp(-6e4, 6e4).to(dtype)
    o: dict[str, Any] = {}
    if dtype.is_floating_point and p.flag("missing"):
        x, o["nan"] = x.masked_fill(p.some(0.3, *shape), torch.nan), "skip"
    words = grouping(p, number, o)
    groups = words.pop("groups")
    o |= {
        k: p.pick(k, *v) for k, v in {"unbiased": (True, False), "eps": (1e-4, 1e-6, 1.0)}.items()
    }
    o["scale"] = p.pick("scale", "group", "batch", "none")
    normalize = bool(K) and p.flag("GDPO", often=True)
    if o["scale"] == "batch" and (o.get("singleton") == "raw" or normalize):
        o["scale"] = "group"
    if not normalize and p.flag("leave one out"):
        o["baseline"] = "leave_one_out"
    weights = [1.0] * K
    if K:
        if normalize:
            o["aggregation"] = "normalize_then_sum"
        if p.flag("weights", often=True):
            weights = p.randn(K).tolist()
            words["weights"] = torch.tensor(weights)
    rules = {k: v for k, v in o.items() if k not in ("nan", "aggregation")}
    if K:
        truth = oracle.several_advantages(x.double().tolist(), groups, weights, normalize, **rules)
    else:
        truth = oracle.advantages(x.double().tolist(), groups, **rules)
    got = function(strided(p, "rewards strides", x), **words, **o)
    t = torch.tensor(truth, dtype=torch.float64).reshape(number)
    sizes = x.double().nan_to_num(0).abs().amax() * (sum(map(abs, weights)) if K else 1)
    # The std of nearly equal rewards may be 0 plus rounding: what eps leaves of it.
    slack = 1e-15 * float(sizes) / o["eps"] if o["scale"] != "none" else 0.0
    # Sums of several rewards are rounded once per column, and equal sums may then differ.
    if K and function is group_advantage:
        slack += 2e-15 * float(sizes) / o["eps"]
    rounding = torch.finfo(got.dtype).eps
    compare("advantages", got, t, t, (), 1e-5 if rounding < 1e-5 else 2 * rounding, slack / 1e-5)


def grouping(p: Draws, number: int, o: dict[str, Any]) -> dict[str, Any]:
    """Draw groups: of equal size, or by labels; maybe groups of one."""
    sizes = [G for G in range(2, number + 1) if number % G == 0]
    if sizes and p.flag("group_size", often=True):
        G = p.pick("size", *sizes)
        return {
            "group_size": G,
            "groups": [list(range(i, i + G)) for i in range(0, number, G)],
        }
    o["singleton"] = p.pick("singleton", "zero", "raw")
    labels = p.integers(p.pick("labels", 2, 1, 4), number) * 7 - 3
    groups = [[i for i, x in enumerate(labels.tolist()) if x == y] for y in set(labels.tolist())]
    given = labels.to(p.pick("dtype of labels", torch.int64, torch.int32))
    return {"group_ids": p.pick("labels form", given, given[:, None]), "groups": groups}


def group_advantage_case(p: Draws) -> None:
    rewards_case(p, group_advantage)


def reference_group_advantage_case(p: Draws) -> None:
    def specification(rewards: Tensor, **words: Any) -> Tensor:
        words = {k: v.flatten() if k == "group_ids" else v for k, v in words.items()}
        return reference.group_advantage(rewards, **words)

    rewards_case(p, specification)


def kl_estimate_case(p: Draws) -> None:
    shape = p.pick("shape", (3,), (2, 3), (), (0,), (2, 1, 3))
    logps = -p.pick("size", 1.0, 30.0) * p.randn(*shape).abs()
    ref = logps + p.pick("gap", 0.3, 0.0, 5.0, 40.0) * p.randn(*shape)
    dtype = p.pick("dtype", torch.float32, torch.bfloat16, torch.float64)
    logps, ref = (
        strided(p, "logps strides", logps.to(dtype)),
        strided(p, "ref strides", ref.to(dtype)),
    )
    kl = p.pick("kl", "k3", "k1", "abs", "k2")
    o: dict[str, Any] = {"kl": kl}
    if kl == "k3":
        o |= p.pick("clamps", {}, {"kl_gap_clip": 1.0}, {"kl_value_clip": 0.1})
    n = logps.numel()

    def at(dtype: torch.dtype, off: float) -> Tensor:
        given = oracle.Given(
            [torch.arange(n)], torch.ones(n).to(dtype), torch.zeros(n).to(dtype), options=o
        )
        given.ref = ref.to(dtype).flatten()
        x = logps.to(dtype).flatten()
        return (
            oracle.loss(x + off * (x.abs() + given.ref.abs()), None, given).tokens["kl"].view(shape)
        )

    got = kl_estimate(logps, ref, Objective(**o))
    truth = at(torch.float64, 0.0)
    near = tuple(at(torch.float64, x * UNIT) for x in (1, -1))
    compare("kl", got, truth, at(torch.float32, 0.0), near, FLOOR)


def statistics_case(p: Draws) -> None:
    """`fold_statistics` of several calls, and `metrics_from` of the result."""
    parts, dtype = p.pick("calls", 2, 1, 3), p.pick("dtype", torch.float32, torch.float64)
    rows = []
    for _ in range(parts):
        n = p.pick("tokens", 5, 0, 1)
        d, w = 0.5 * p.randn(n).double(), torch.rand(n, generator=p.generator).double() * 3
        r = d.exp()
        kl, H = p.randn(n).double(), torch.rand(n, generator=p.generator).double()
        flags = [p.some(0.3, n).double() for _ in range(3)]
        sums = [torch.ones(n).double(), kl * H, r, -d, r - 1 - d, *flags, kl, H, w]
        sums += [((w < 0.5) | (w > 2)).double(), r * w, (r * w) ** 2]
        ends = [min(r.tolist(), default=math.inf), max(r.tolist(), default=-math.inf)]
        rows.append([*(float(x.sum()) for x in sums), *ends])
    gathered = torch.tensor(rows, dtype=torch.float64)
    folded = fold_statistics(gathered.to(dtype))
    s = [sum(column) for column in zip(*rows, strict=True)][:14]
    s += [min(x[14] for x in rows), max(x[15] for x in rows)]
    want = torch.tensor(s, dtype=torch.float64)
    compare("folded", folded, want, want, (), 1e-6)
    got, n = metrics_from(folded), s[0]
    by_hand = {"tokens": n, "ratio_mean": s[2] / n, "ratio_min": s[14]} if n else {"tokens": 0.0}
    if not n:
        by_hand |= {
            "ratio_mean": 1.0,
            "ratio_min": 1.0,
            "ratio_max": 1.0,
            "kl": 0.0,
            "entropy": 0.0,
        }
        by_hand |= {"effective_sample_size": 1.0, "importance_weight_mean": 1.0}
    else:
        by_hand |= {"ratio_max": s[15], "approx_kl_k1": s[3] / n, "approx_kl_k3": s[4] / n}
        by_hand |= {"kl": s[8] / n, "entropy": s[9] / n, "importance_weight_mean": s[10] / n}
        by_hand |= {"importance_weight_out_of_range": s[11] / n}
        for i, name in enumerate(("low", "high", "dual")):
            by_hand[f"clip_fraction_{name}"] = s[5 + i] / n
        by_hand["effective_sample_size"] = s[12] ** 2 / (n * s[13]) if s[13] else 0.0
    for name, x in by_hand.items():
        t = torch.tensor(x, dtype=torch.float64)
        compare(name, got[name], t, t, (), 1e-5, 1.0)
    assert all(bool(x.isfinite()) for x in got.values()), got


CASES = {
    "logprob": logprob_case,
    "linear_logprob": linear_logprob_case,
    "group_advantage": group_advantage_case,
    "fold_statistics": statistics_case,
    "metrics_from": statistics_case,
    "kl_estimate": kl_estimate_case,
    "reference.logprob": reference_logprob_case,
    "reference.group_advantage": reference_group_advantage_case,
}
