"""Strategies for `grpo_fast.weights`: each draws a case and compares it with loops over the tokens."""

import math
from typing import Any

import torch
from torch import Tensor

from grpo_fast import weights
from tests.fuzz.batches import Batch, batch, per_sequence_or_token, per_token
from tests.fuzz.drawing import Draws, UndecidedError, compare, refused
from tests.fuzz.oracle import quantile

Values = list[float]


def pair(p: Draws, missing: bool = True) -> dict[str, Any]:
    """Draw log-probs of the trainer and of the sampler."""
    b = batch(p)
    size = p.pick("log-probs", 1.0, 1e-2, 20.0)
    old = -size * p.randn(b.n).abs() - 1e-3
    sampling = old + p.pick("drift", 0.3, 0.0, 3.0, 60.0) * p.randn(b.n)
    sampling = sampling.clamp(max=-1e-3)  # at 0 the divergence from any other policy is infinite
    if missing and p.flag("missing"):
        sampling = sampling.masked_fill(p.some(0.3, b.n), torch.nan)
    given = [per_token(p, x, b, y) for x, y in (("old", old), ("sampling", sampling))]
    floats = [[float(v) for v in values.float()] for _, values in given]
    return {"b": b, "words": [x for x, _ in given], "old": floats[0], "sampling": floats[1]}


def exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def shaped(b: Batch, values: Values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(b.shape)


def per_sequence_shape(b: Batch, values: Values) -> Tensor:
    found = torch.tensor(values, dtype=torch.float64)
    return found if b.boundaries is not None or len(b.shape) == 1 else found[:, None]


def apart(values: Values, bounds: list[float | None], gap: float = 1e-4) -> None:
    """Draw another case if a value is so near to a bound, without being equal, that a rounding decides."""
    near = (0 < abs(x - y) < gap * (1 + abs(x)) for y in bounds if y is not None for x in values)
    if any(near):
        raise UndecidedError


def check(name: str, got: Tensor, want: Tensor, floor: float = 1e-5) -> None:
    plain = want.float()
    compare(name, got.float(), want, plain, (), floor)


def importance(p: Draws, which: str) -> None:
    x = pair(p)
    b, m = x["b"], x["b"].weight.tolist()
    level, mode, undefined, low, high = "token", "truncate", "one", None, None
    if which == "importance_weights":
        level = p.pick("level", "token", "sequence", "geometric")
        mode = p.pick("mode", "truncate", "mask", "gate")
        undefined = p.pick("undefined", "one", "zero")
        low, high = p.pick("bounds", (0.5, 2.0), (None, 3.0), (0.1, None), (None, None), (1.0, 1.0))
        if mode == "gate" and low is None and high is None:
            low = 0.0
    elif which == "truncated_importance":
        level, high = (
            p.pick("level", "token", "sequence", "geometric"),
            p.pick("cap", 2.0, 0.5, 0.0),
        )
    else:
        mode, (low, high) = "mask", p.pick("bounds", (0.5, 2.0), (0.9, 1.1))
    gaps = [a - c if w else 0.0 for a, c, w in zip(x["old"], x["sampling"], m, strict=True)]
    if undefined == "one":
        gaps = [0.0 if math.isnan(g) else g for g in gaps]
    if level == "token":
        logs = gaps
    else:
        logs = []
        for place in b.sequences:
            own = [(m[i], gaps[i]) for i in place.tolist() if m[i]]
            total, count = math.fsum(w * g for w, g in own), math.fsum(w for w, _ in own)
            logs.append(total if level == "sequence" else total / (count or 1.0))
    rho = [math.nan if math.isnan(g) else exp(g) for g in logs]
    rho = [math.inf if r > 3.4e38 else r for r in rho]
    if undefined == "zero":
        rho = [r if math.isfinite(r) else 0.0 for r in rho]
    apart(rho, [low, high])
    if mode == "truncate":
        want = [min(max(r, low or 0.0), math.inf if high is None else high) for r in rho]
    else:
        inside = [(low is None or r >= low) and (high is None or r <= high) for r in rho]
        want = [
            (r if mode == "mask" else 1.0) if i else 0.0 for r, i in zip(rho, inside, strict=True)
        ]
    words: dict[str, Any] = {"mask": b.mask}
    if which != "icepop":
        words |= {"level": level, **b.layout()}
    if which == "importance_weights":
        words |= {"mode": mode, "undefined": undefined, "low": low, "high": high}
        got = weights.importance_weights(*x["words"], **words)
    elif which == "truncated_importance":
        got = weights.truncated_importance(*x["words"], high, **words)
    else:
        got = weights.icepop(*x["words"], low, high, **words)
    if level == "token":  # a masked token may have any weight
        got, kept = got.flatten(), torch.tensor(m) > 0
        check(which, got[kept], torch.tensor(want, dtype=torch.float64)[kept], 1e-5)
    else:
        check(which, got, per_sequence_shape(b, want), 1e-4)


def geometric_mean_case(p: Draws) -> None:
    b = batch(p)
    values = torch.rand(b.n, generator=p.generator) * p.pick("size", 2.0, 1e4) * ~p.some(0.1, b.n)
    given, values = per_token(p, "weights", b, values)
    eps = p.pick("eps", 0.0, 1e-8, 0.5)
    m, want = b.weight.tolist(), []
    for place in b.sequences:
        own = [(m[i], float(values[i]) + eps) for i in place.tolist() if m[i]]
        if any(v == 0 for _, v in own):
            want.append(0.0)
            continue
        count = math.fsum(w for w, _ in own) or 1.0
        want.append(math.exp(math.fsum(w * math.log(v) for w, v in own) / count))
    got = weights.geometric_mean(given, mask=b.mask, eps=eps, **b.layout())
    check("geometric_mean", got, per_sequence_shape(b, want), 2e-5)


def binary_kl(a: float, c: float) -> float:
    """KL of the outcomes "this token" and "any other", of log-probs."""
    total = math.exp(a) * (a - c)
    other, their = -math.expm1(a), -math.expm1(c)
    if other > 0:
        total += other * math.log(other / their) if their > 0 else math.inf
    return total


def kpop_case(p: Draws) -> None:
    x = pair(p)
    b, delta = x["b"], p.pick("delta", 0.05, 0.0, 1.0)
    far, want = [], []
    for a, c, w in zip(x["old"], x["sampling"], b.weight.tolist(), strict=True):
        a, c = min(a, 0.0), min(c, 0.0) if not math.isnan(c) else c
        worst = 0.0 if math.isnan(c) or a == c else max(binary_kl(a, c), binary_kl(c, a))
        far.append(worst if w else delta)
        want.append(float(bool(w) and worst <= delta))
    apart(far, [delta], 1e-3)
    got = weights.kpop(*x["words"], delta, mask=b.mask)
    check("kpop", got, shaped(b, want), 0.0)


def binary_divergence_case(p: Draws) -> None:
    x = pair(p)
    b, kind, floor = x["b"], p.pick("kind", "kl", "tv"), p.pick("floor", 1e-6, 1e-3, 0.5)
    want = []
    for a, c, w in zip(x["old"], x["sampling"], b.weight.tolist(), strict=True):
        if not w or math.isnan(c):
            want.append(math.nan if w else 0.0)
            continue
        pq = [min(max(exp(y), floor), 1 - floor) for y in (a, c)]
        others = [min(max(-math.expm1(min(y, 50.0)), floor), 1 - floor) for y in (a, c)]
        if kind == "tv":
            want.append(abs(pq[0] - pq[1]))
        else:
            want.append(
                sum(u * math.log(u / v) for u, v in ((pq[0], pq[1]), (others[0], others[1])))
            )
    got = weights.binary_divergence(*x["words"], kind=kind, mask=b.mask, floor=floor)
    truth, known = shaped(b, want), ~shaped(b, want).isnan()
    assert bool((got.isnan() == ~known).all()), f"NaN at other places: {got}, want {truth}"
    check("divergence", got[known], truth[known], 1e-5)


def m2po_case(p: Draws) -> None:
    x = pair(p)
    b, threshold = x["b"], p.pick("threshold", 0.04, 0.0, 1.0, 1e-4)
    live = [i for i, w in enumerate(b.weight.tolist()) if w]
    square = {i: (x["old"][i] - x["sampling"][i]) ** 2 for i in live}
    square = {i: 0.0 if math.isnan(s) else s for i, s in square.items()}
    order, kept, total = sorted(live, key=lambda i: square[i]), 1, 0.0
    for n, i in enumerate(order, 1):
        total += square[i]
        apart([total / n], [threshold])
        kept = n if total / n < threshold else kept
    want = [0.0] * b.n
    for i in order[:kept]:
        want[i] = 1.0
    got = weights.m2po(*x["words"], threshold, mask=b.mask)
    ties = len(set(square.values())) < len(live)
    if ties:  # which of two equal ones stays is not said
        got, want = got.flatten().sort().values, sorted(want)
        check("m2po", got, torch.tensor(want, dtype=torch.float64), 0.0)
    else:
        check("m2po", got, shaped(b, want), 0.0)


def top_entropy_case(p: Draws) -> None:
    b = batch(p)
    given, H = per_token(p, "entropy", b, 3 * torch.rand(b.n, generator=p.generator))
    share = p.pick("fraction", 0.2, 0.0, 1.0, 0.5)
    want = torch.zeros(b.n, dtype=torch.float64)
    if b.live.any():
        bound = quantile(H[b.live], 1 - share)
        gap = (H[b.live] - bound).abs()
        if bool(((gap > 0) & (gap < 1e-5)).any()):
            raise UndecidedError
        want = ((bound - 1e-7 <= H) & b.live).double()
    got = weights.top_entropy(given, share, mask=b.mask)
    check("top_entropy", got, want.view(b.shape), 0.0)


def covariance(b: Batch, A: Tensor, logp: Tensor, weighed: bool) -> Tensor:
    w = b.weight if weighed else b.live.double()
    n = w.sum() or 1.0
    return (A - (A * w).sum() / n) * (logp - (logp * w).sum() / n)


def clip_cov_case(p: Draws) -> None:
    b = batch(p)
    logp = -p.randn(b.n).abs()
    words, logp = per_token(p, "logps", b, logp)
    olds, old = per_token(p, "old", b, logp.float() + 0.2 * p.randn(b.n))
    A, advantages, _ = per_sequence_or_token(p, "advantages", b, lambda n: 2 * p.randn(n))
    low, high = p.pick("bounds", (0.0, 5.0), (-1.0, 1.0), (0.5, 0.5))
    fraction = p.pick("fraction", 2e-4, 0.5, 1.0)
    cov = covariance(b, advantages, logp, True)
    r = (logp - old).exp()
    clipped = ((advantages > 0) & (r > 1.2)) | ((advantages < 0) & (r < 0.8))
    for x, bounds in ((cov, (low, high)), (r, (0.8, 1.2))):
        apart(x[b.live].tolist(), list(bounds))
    candidate = b.live & ~clipped & (cov > low) & (cov < high)
    number = min(max(int(float(b.weight.sum()) * fraction), 1), int(candidate.sum()))
    got = weights.clip_cov(
        *(words, olds, A),
        **{"mask": b.mask, "fraction": fraction, "low": low, "high": high, **b.layout()},
        generator=torch.Generator().manual_seed(0),
    ).flatten()
    drawn = b.live & (got == 0)
    assert bool((got[~b.live] == 0).all()), "a masked token has a weight"
    assert not bool((drawn & ~candidate).any()), f"drawn: {got}, candidates: {candidate}"
    if abs(float(b.weight.sum()) * fraction % 1 - 0.5) < 0.499:  # a rounding decides otherwise
        assert int(drawn.sum()) == number, f"{int(drawn.sum())} drawn, want {number}"


def kl_cov_case(p: Draws) -> None:
    b = batch(p)
    words, logp = per_token(p, "logps", b, -p.randn(b.n).abs())
    A, advantages, _ = per_sequence_or_token(p, "advantages", b, lambda n: 2 * p.randn(n))
    fraction = p.pick("fraction", 2e-4, 0.5, 1.0)
    cov = covariance(b, advantages, logp, False)
    number = min(max(int(int(b.live.sum()) * fraction), 1), int(b.live.sum()))
    got = weights.kl_cov(words, A, mask=b.mask, fraction=fraction, **b.layout()).flatten()
    assert got.dtype == torch.bool, got.dtype
    assert not bool((got & ~b.live).any()), "a masked token is chosen"
    assert int(got.sum()) == number, f"{int(got.sum())} chosen, want {number}"
    if 0 < number < int(b.live.sum()):
        least, most = float(cov[got].min()), float(cov[b.live & ~got].max())
        assert least >= most - 1e-5 * (1 + abs(most)), f"chosen {least}, left out {most}"


def varied_groups_case(p: Draws) -> None:
    number = p.pick("rewards", 4, 2, 6, 1)
    r = p.integers(2, number).float() * p.pick("times", 1.0, 1e-6) + p.pick("plus", 0.0, 10.0)
    o: dict[str, Any] = {}
    if p.flag("missing"):
        r, o["nan"] = r.masked_fill(p.some(0.3, number), torch.nan), "skip"
    if p.flag("labels", often=True):
        labels = p.integers(3, number)
        o["group_ids"] = labels
    else:
        G = p.pick("size", *[G for G in range(2, number + 1) if number % G == 0] or [0])
        if not G:
            refused(lambda: weights.varied_groups(r, group_size=1, **o), "group_size")
            return
        labels = torch.arange(number) // G
        o["group_size"] = G
    want = []
    for label in labels.tolist():
        own = {x for x, y in zip(r.tolist(), labels.tolist(), strict=True) if y == label}
        want.append(float(len({x for x in own if not math.isnan(x)}) > 1))
    got = weights.varied_groups(r.to(p.pick("dtype", torch.float32, torch.float64)), **o)
    check("varied_groups", got, torch.tensor(want, dtype=torch.float64), 0.0)


CASES = {
    "weights.importance_weights": lambda p: importance(p, "importance_weights"),
    "weights.truncated_importance": lambda p: importance(p, "truncated_importance"),
    "weights.icepop": lambda p: importance(p, "icepop"),
    "weights.geometric_mean": geometric_mean_case,
    "weights.kpop": kpop_case,
    "weights.binary_divergence": binary_divergence_case,
    "weights.m2po": m2po_case,
    "weights.top_entropy": top_entropy_case,
    "weights.clip_cov": clip_cov_case,
    "weights.kl_cov": kl_cov_case,
    "weights.varied_groups": varied_groups_case,
}
