"""What the library's functions should return, from the formulas of the papers: the oracle of the fuzzer.

It imports nothing of the library and shares no code with its specification, so that it can disagree with
both. It goes through one sequence after another, takes masked tokens out before any arithmetic, and leaves
the gradients to autograd; `detach` stands where a paper stops the gradient. The dtype is the arguments' own:
float64 gives the truth, float32 what plain PyTorch makes of it. docs/objectives.md has formulas and papers.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DEFAULTS: dict[str, Any] = {
    **{"surrogate": "clip", "ratio": "token", "reduction": "sequence_mean", "max_length": None},
    **{"epsilon_low": 0.2, "epsilon_high": 0.2, "delta": None, "dual_clip": None},
    **{"tau_pos": 1.0, "tau_neg": 1.05, "ratio_cap": 20.0, "dppo_value": "logp"},
    **{"quadratic_coef": 0.0, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0},
    **{"vespo_lambda_neg": 2.0, "topr_weight_pos": 1.0, "topr_weight_neg": 1.0},
    **{"top_entropy_quantile": 1.0, "off_policy_threshold": None, "log_ratio_clip": None},
    **{"log_ratio_max": None, "beta": 0.0, "kl": "k3", "kl_gap_clip": None, "kl_value_clip": None},
    **{"kl_gradient": "own", "entropy_coef": 0.0, "entropy_reduction": "same"},
}


@dataclass
class Given:
    """The arguments of a loss, as one value per token, (N,), in one dtype; 0 where masked."""

    sequences: list[Tensor]  # the tokens of each sequence, masked ones too
    mask: Tensor  # the weight of each token, 0 where it is masked
    advantages: Tensor
    old: Tensor | None = None
    ref: Tensor | None = None
    importance: Tensor | None = None
    importance_by_sequence: bool = False
    token_weights: Tensor | None = None
    scores: Tensor | None = None
    num_items: float | None = None
    scale: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "Given":
        """Return the same in another dtype."""
        new = {k: v.to(dtype) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Given(**{**vars(self), **new})


@dataclass
class Found:
    """The loss, differentiable, and the values of its tokens, detached."""

    loss: Tensor
    size: float  # the sum of the absolute values that the loss is a sum of
    bonus: float  # the largest factor of an entropy in it
    metrics: dict[str, Tensor]
    tokens: dict[str, Tensor]  # values of `token_diagnostics`


def log_probs(
    logits: Tensor, ids: Tensor, live: Tensor, temperature: Tensor, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs of ids and entropies, (N,), of rows of logits (N, V); 0 where a token is masked.

    Args:
        exact: keep all digits of the log-prob of a confident token, and of its derivative 1 - p, which
            float64 rounds to 0 from a gap of 37 nats on.
    """
    graph = 0 * logits.nan_to_num(0, 0, 0).sum()  # without a live token, too
    logp, entropy = (graph + torch.zeros(len(logits), dtype=logits.dtype) for _ in range(2))
    place = live.nonzero().flatten()
    if not len(place):
        return logp, entropy
    x = logits[place] / temperature[place, None].to(logits.dtype)
    highest = x.detach().amax(1, keepdim=True)
    log_sum = (x - highest).exp().sum(1, keepdim=True).log()
    logs = x - highest - log_sum
    own_id = ids[place, None].long()
    taken = logs.gather(1, own_id).squeeze(1)
    if exact:
        x_y = x.gather(1, own_id)
        others = (x - x_y).clamp(max=0).exp().scatter(1, own_id, 0.0)
        taken = torch.where((x_y == highest).squeeze(1), -others.sum(1).log1p(), taken)
    banned = x == -math.inf
    logs = torch.where(banned, torch.zeros_like(logs), logs)
    own = -(torch.where(banned, torch.zeros_like(logs), logs.exp()) * logs).sum(1)
    return logp.index_put((place,), taken), entropy.index_put((place,), own)


def quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile with linear interpolation between neighbours."""
    ordered = values.sort().values
    rank = q * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p, q) of the outcomes "this token" and "any other token"."""
    other_p, other_q = -log_p.expm1(), -log_q.expm1()
    rest = torch.where(other_p > 0, other_p * (other_p / other_q).log(), torch.zeros_like(log_p))
    return log_p.exp() * (log_p - log_q) + rest


class OneSequence:
    """The terms of the live tokens of one sequence."""

    def __init__(self, place: Tensor, logp: Tensor, given: Given, o: dict[str, Any]) -> None:
        def at(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[place]

        self.o, self.logp, self.w, self.n = o, logp[place], given.mask[place], None
        self.n = self.w.sum()
        self.A, self.ref = given.advantages[place], at(given.ref)
        self.old = self.logp.detach() if given.old is None else given.old[place]
        self.scores, self.importance = at(given.scores), at(given.importance)
        self.importance_by_sequence = given.importance_by_sequence
        self.d = self.logp - self.old
        self.raw, self.x = self._log_ratio(self.logp)
        self.r = self.x.exp()

    def mean(self, x: Tensor) -> Tensor:
        return (self.w * x).sum() / self.n

    def _log_ratio(self, logp: Tensor) -> tuple[Tensor, Tensor]:
        o, d, A = self.o, logp - self.old, self.A
        if o["surrogate"] == "gmpo":
            up, down = d.clamp(max=o["epsilon_high"]), d.clamp(min=-o["epsilon_low"])
            bounded = torch.where(A > 0, up, torch.where(A < 0, down, 0 * d))
            x = self.mean(bounded).expand_as(d)
        elif o["ratio"] == "sequence":
            x = self.mean(d).expand_as(d)
        elif o["ratio"] == "sequence_token":
            x = self.mean(d).detach() + (logp - logp.detach())
        else:
            x = d
        raw = x
        if o["log_ratio_clip"] is not None:
            x = x.clamp(-o["log_ratio_clip"], o["log_ratio_clip"])
        if o["log_ratio_max"] is not None:
            x = x.clamp(max=o["log_ratio_max"])
        return raw, x

    def policy(self) -> Tensor:
        """The surrogate, before importance weights."""
        o, A, r, logp, d = self.o, self.A, self.r, self.logp, self.d
        name, low, high = o["surrogate"], o["epsilon_low"], o["epsilon_high"]
        if name == "clip":
            free = r if o["delta"] is None else r.clamp(max=o["delta"])
            loss = -torch.minimum(free * A, r.clamp(1 - low, 1 + high) * A)
            if o["dual_clip"] is not None:
                loss = torch.where(A < 0, torch.minimum(loss, -o["dual_clip"] * A), loss)
            return loss
        if name == "sapo":
            tau = torch.where(A > 0, o["tau_pos"] + 0 * A, o["tau_neg"] + 0 * A)
            return -A * 4 / tau * torch.sigmoid(tau * (r - 1))
        if name == "gmpo":
            return -A * r
        if name == "dro":
            return -A * logp + o["quadratic_coef"] * d**2 / 2
        if name == "ipo":
            moved = logp.exp() - self.old.exp()
            inside = ((moved >= -low) & (moved <= high)).to(r)
            return -A * r * inside + o["quadratic_coef"] * d**2
        if name.startswith("dppo"):
            kept = 1 - self.outside()[0].to(r)
            capped = r if o["ratio_cap"] is None else r.clamp(max=o["ratio_cap"])
            if o["dppo_value"] == "ratio":
                return -A * capped * kept + o["quadratic_coef"] * d**2
            return -A * (capped * kept).detach() * logp
        return -A * self._weight_of_logp(name).detach() * logp

    def _weight_of_logp(self, name: str) -> Tensor:
        o, A, r = self.o, self.A, self.r
        if name == "reinforce":
            return torch.ones_like(A)
        if name == "cispo":
            return r.clamp(1 - o["epsilon_low"], 1 + o["epsilon_high"])
        if name == "rollout_is":
            inside = (r > 1 - o["epsilon_low"]) & (r < 1 + o["epsilon_high"])
            return torch.where(inside, r, torch.zeros_like(r))
        if name == "topr":
            scores = A if self.scores is None else self.scores
            tapered = o["topr_weight_neg"] * r.clamp(max=1)
            return torch.where(scores > 0, o["topr_weight_pos"] + 0 * r, tapered)
        assert name == "vespo", name
        log_w = (self.w * self.d.clamp(-20, 20)).sum()
        if self.importance is not None:
            logs = self.importance.log().clamp(math.log(1e-8), 20)
            log_w = log_w + (logs[0] if self.importance_by_sequence else (self.w * logs).sum())
        log_w = log_w.clamp(math.log(1e-8), 20)
        up = self.A >= 0
        k = torch.where(up, o["vespo_k_pos"] + 0 * A, o["vespo_k_neg"] + 0 * A)
        rate = torch.where(up, o["vespo_lambda_pos"] + 0 * A, o["vespo_lambda_neg"] + 0 * A)
        return (k * log_w + rate * (1 - log_w.exp())).exp()

    def stale(self) -> Tensor:
        """Which tokens the off-policy mask of DeepSeek-V3.2 drops."""
        threshold = self.o["off_policy_threshold"]
        if threshold is None:
            return torch.zeros_like(self.A, dtype=torch.bool)
        return (self.A < 0) & (self.mean(-self.d.detach()) > threshold)

    def kl(self) -> Tensor:
        """The estimate of the divergence from the reference, before beta."""
        o, q = self.o, self.ref - self.logp
        name, most_gap, most = o["kl"], o["kl_gap_clip"], o["kl_value_clip"]
        if name == "k1":
            value = -q
        elif name == "abs":
            value = q.abs()
        elif name == "k2":
            value = q**2 / 2
        else:
            bounded = q if most_gap is None else q.clamp(-most_gap, most_gap)
            k3 = torch.expm1(bounded) - bounded
            value = k3 if most is None else k3.clamp(max=most)
            if name == "k3_unbiased":
                return self._unbiased(q, bounded, k3, value)
        if o["kl_gradient"] == "own":
            return value
        slope = -q.detach()
        if o["kl_gradient"] == "k2_clipped":
            free = torch.ones_like(slope, dtype=torch.bool)
            if most_gap is not None:
                free = free & (q.abs() <= most_gap)
            if most is not None:
                free = free & (torch.expm1(q) - q <= most)
            slope = torch.where(free, slope, torch.zeros_like(slope))
        return value.detach() + slope * (self.logp - self.logp.detach())

    def _unbiased(self, q: Tensor, bounded: Tensor, k3: Tensor, value: Tensor) -> Tensor:
        """r (e^q - q - 1), which is e^(x + q) - r (q + 1) with r = e^x.

        Autograd takes the second form. The derivatives of its first term through r and through q may be
        huge, with opposite signs: they meet in a node of their own, before anything is added.
        """
        free = (bounded == q) & (value == k3)
        alone = self.logp * 1
        gap = self._log_ratio(alone)[1] + (self.ref - alone)
        other = gap.exp() - self.r * (q + 1)
        other = torch.where(free, other, self.r * value.detach())
        return (self.r * value).detach() + (other - other.detach())

    def outside(self) -> tuple[Tensor, Tensor, Tensor]:
        """Which tokens are outside of the bounds of the surrogate, below, and above them."""
        o, name, A = self.o, self.o["surrogate"], self.A
        low, high = o["epsilon_low"], o["epsilon_high"]
        logp, old = self.logp.detach(), self.old.detach()
        moved = logp.exp() - old.exp()
        nothing = torch.zeros_like(A, dtype=torch.bool)
        if name in ("clip", "cispo"):
            below, above = self.r < 1 - low, self.r > 1 + high
        elif name == "rollout_is":
            below, above = self.r <= 1 - low, self.r >= 1 + high
        elif name == "gmpo":
            below, above = self.d < -low, self.d > high
        elif name == "ipo":
            below, above = moved < -low, moved > high
        elif name == "dppo_tv":
            above, below = (A > 0) & (moved > high), (A <= 0) & (moved < -low)
        elif name == "dppo_kl":
            far = divergence(old, logp)
            above, below = (A > 0) & (far > high) & (logp > old), (A <= 0) & (far > low)
            below = below & (logp < old)
        else:
            return nothing, nothing, nothing
        return below | above, below, above

    def beyond_dual(self) -> Tensor:
        bounds = [x for x in (self.o["delta"], self.o["dual_clip"]) if x is not None]
        if self.o["surrogate"] != "clip" or not bounds:
            return torch.zeros_like(self.A, dtype=torch.bool)
        return (self.A < 0) & (self.r > bounds[0])


def chosen_by_entropy(entropy: Tensor | None, live: Tensor, share: float) -> Tensor:
    """1 for the tokens whose entropy is at least the (1 - share) quantile, else 0."""
    if share == 1 or not live.any():
        return torch.ones(len(live))
    threshold = quantile(entropy[live], 1 - share)
    return (entropy >= threshold).float()


def loss(logp: Tensor, entropy: Tensor | None, given: Given) -> Found:
    """The loss of log-probs (N,), differentiable in them and in the entropies."""
    o, m, dtype = {**DEFAULTS, **given.options}, given.mask, logp.dtype
    live = m > 0
    tokens = {
        name: torch.zeros(len(m), dtype=dtype)
        for name in ("log_ratio", "loss", "kl", "outside", "low", "high", "dual", "dropped")
    }
    tokens["ratio"] = torch.ones(len(m), dtype=dtype)
    chosen = chosen_by_entropy(
        None if entropy is None else entropy.detach(), live, o["top_entropy_quantile"]
    ).to(dtype)
    extra = torch.full((len(m),), given.scale, dtype=dtype)
    if given.token_weights is not None:
        extra = extra * given.token_weights
    bonus_count = (m * chosen).sum()
    items = max(given.num_items, 1.0) if given.num_items is not None else m.sum()
    parts, sums = [0 * logp.sum()], Sums()
    for tokens_of in given.sequences:
        place = tokens_of[live[tokens_of]]
        if not len(place):
            continue
        one = OneSequence(place, logp, given, o)
        dropped, factor = one.stale(), chosen[place]
        if one.importance is not None and o["surrogate"] != "vespo":
            factor = factor * one.importance
        policy = one.policy()
        policy = torch.where(dropped, torch.zeros_like(policy), policy)
        unweighted = policy
        policy = torch.where(factor == 0, torch.zeros_like(policy), policy * factor)
        kl = torch.zeros_like(policy) if one.ref is None else one.kl()
        term = policy + o["beta"] * kl if o["beta"] else policy
        weight = (
            one.w
            / {
                "token_mean": items,
                "sequence_mean": one.n * len(given.sequences),
                "sequence_sum": len(given.sequences),
                "fixed_length": len(given.sequences) * (o["max_length"] or 1),
            }[o["reduction"]]
        )
        weight = weight * extra[place]
        parts.append(torch.where(weight == 0, torch.zeros_like(term), weight * term).sum())
        sums.size += float((weight * term).detach().nan_to_num(0, 0, 0).abs().sum())
        if o["entropy_coef"]:
            by_tokens = o["entropy_reduction"] == "token_mean"
            share = one.w * extra[place] / bonus_count if by_tokens else weight
            bonus = o["entropy_coef"] * share * chosen[place] * entropy[place]
            parts.append(-torch.where(share == 0, torch.zeros_like(bonus), bonus).sum())
            sums.size += float(bonus.detach().abs().sum())
            sums.bonus = max(sums.bonus, abs(o["entropy_coef"]) * float(share.abs().max()))
        outside, below, above = one.outside()
        values = {"log_ratio": one.raw, "ratio": one.r, "outside": outside, "dropped": dropped}
        values |= {"low": below & (one.A < 0), "high": above & (one.A > 0)}
        values |= {"dual": one.beyond_dual(), "kl": kl}
        values["loss"] = unweighted + o["beta"] * kl if o["beta"] else unweighted
        for name, x in values.items():
            tokens[name][place] = x.detach().to(dtype)
        sums.add(one, values, None if entropy is None else entropy[place])
    return Found(torch.stack(parts).sum(), sums.size, sums.bonus, sums.metrics(m, dtype), tokens)


class Sums:
    """The sums over live tokens of which the metrics are made."""

    def __init__(self) -> None:
        self.size, self.bonus, self.rows = 0.0, 0.0, []

    def add(self, one: OneSequence, values: dict[str, Tensor], entropy: Tensor | None) -> None:
        d = one.d.detach()
        # VESPO's weights are a part of the weight of the sequence, and no metric.
        none = one.importance is None or one.o["surrogate"] == "vespo"
        w = torch.ones_like(d) if none else one.importance
        found = {"m": one.w, "r": d.exp(), "d": d, "iw": w, "kl": values["kl"].detach()}
        found |= {name: values[name].to(d) for name in ("low", "high", "dual")}
        found["entropy"] = torch.zeros_like(d) if entropy is None else entropy.detach()
        self.rows.append(found)

    def metrics(self, m: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        if not self.rows:
            return {}
        x = {name: torch.cat([row[name] for row in self.rows]).to(dtype) for name in self.rows[0]}
        n = x["m"].sum()

        def mean(values: Tensor) -> Tensor:
            return (x["m"] * values).sum() / n

        rho = x["r"] * x["iw"]
        squares = (x["m"] * rho**2).sum()
        ess = squares if squares == 0 else (x["m"] * rho).sum() ** 2 / (n * squares)
        return {
            "tokens": n,
            "ratio_mean": mean(x["r"]),
            "ratio_min": x["r"].min(),
            "ratio_max": x["r"].max(),
            "clip_fraction_low": mean(x["low"]),
            "clip_fraction_high": mean(x["high"]),
            "clip_fraction_dual": mean(x["dual"]),
            "approx_kl_k1": mean(-x["d"]),
            "approx_kl_k3": mean(torch.expm1(x["d"]) - x["d"]),
            "kl": mean(x["kl"]),
            "entropy": mean(x["entropy"]),
            "importance_weight_mean": mean(x["iw"]),
            "importance_weight_out_of_range": mean(((x["iw"] < 0.5) | (x["iw"] > 2)).to(dtype)),
            "effective_sample_size": ess,
        }


def z_scores(rewards: list[float], size: int) -> list[float]:
    """(r - mean) / (std + 1e-4) within consecutive groups of this size."""
    groups = [list(range(i, i + size)) for i in range(0, len(rewards), size)]
    return advantages(rewards, groups)


def advantages(
    rewards: list[float],
    groups: list[list[int]],
    scale: str = "group",
    eps: float = 1e-4,
    unbiased: bool = True,
    baseline: str = "mean",
    singleton: str = "zero",
) -> list[float]:
    """The advantage of each reward in its group; NaN stands for a missing reward, whose advantage is 0."""
    present = [i for i, x in enumerate(rewards) if not math.isnan(x)]
    found = [0.0] * len(rewards)
    for group in groups:
        members = [i for i in group if i in present]
        own = [rewards[i] for i in members]
        if len(own) == 1 and singleton == "raw":
            found[members[0]] = own[0] if scale == "none" else own[0] / (1 + eps)
        if len(own) < 2 or max(own) == min(own):
            continue
        spread = {"group": own, "batch": [rewards[i] for i in present], "none": None}[scale]
        size = 1.0 if spread is None else std(spread, unbiased) + eps
        for i in members:
            rest = [rewards[j] for j in members if baseline == "mean" or j != i]
            found[i] = math.fsum([rewards[i] * len(rest), *(-x for x in rest)]) / len(rest) / size
    return found


def std(values: list[float], unbiased: bool) -> float:
    """The standard deviation; 0 of fewer than two values."""
    if len(values) < 2:
        return 0.0
    first, n = values[0], len(values)
    gaps = [x - first for x in values]  # a common offset costs no digits
    mean = math.fsum(gaps) / n
    return math.sqrt(math.fsum((x - mean) ** 2 for x in gaps) / (n - 1 if unbiased else n))


def several_advantages(
    rewards: list[list[float]],
    groups: list[list[int]],
    weights: list[float],
    normalize: bool,
    **options: Any,
) -> list[float]:
    """The advantages of several rewards per sequence: their weighted sum, or GDPO."""
    missing = [all(math.isnan(x) for x in row) for row in rewards]
    columns = [list(column) for column in zip(*rewards, strict=True)]
    scored = [advantages(column, groups, **options) for column in columns] if normalize else columns
    together = []
    for i, gone in enumerate(missing):
        terms = [
            w * column[i]
            for w, column, raw in zip(weights, scored, columns, strict=True)
            if not math.isnan(raw[i])
        ]
        together.append(math.nan if gone else math.fsum(terms))
    if not normalize:
        return advantages(together, groups, **options)
    whole = {name: options[name] for name in ("eps", "unbiased") if name in options}
    return advantages(together, [list(range(len(rewards)))], **whole)
