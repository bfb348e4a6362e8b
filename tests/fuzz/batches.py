"""Strategies for what the functions share: layouts, masks, logits, values per token, objectives."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_fast import Objective
from grpo_fast.presets import PRESETS
from tests.fuzz.drawing import Draws

# Surrogates that take a sequence ratio, that use a clamp of the log-ratio, that have a range.
OF_SEQUENCES = ("clip", "cispo", "sapo", "rollout_is")
UNCLAMPED = ("reinforce", "dro", "vespo", "gmpo")
RANGED = ("clip", "cispo", "dppo_tv", "dppo_kl", "ipo", "rollout_is", "gmpo")
VOCABULARIES = (7, 1, 2, 3, 16, 17, 33, 64, 130)
SURROGATES = ("clip", "cispo", "sapo", "reinforce", "dppo_tv", "dppo_kl", "ipo", "dro")
SURROGATES += ("rollout_is", "vespo", "gmpo", "topr")


@dataclass
class Batch:
    """The tokens of a batch: padded (B, T), packed (N,), or packed without boundaries."""

    shape: tuple[int, ...]
    boundaries: Tensor | None
    sequences: list[Tensor]  # the tokens of each sequence, by their place in (N,)
    mask: Tensor | None  # as the library gets it
    weight: Tensor  # (N,) float64, what the mask makes of a token

    @property
    def n(self) -> int:
        return len(self.weight)

    @property
    def live(self) -> Tensor:
        return self.weight > 0

    def spread(self, x: Tensor) -> Tensor:
        """One value per sequence, as one per token (N,)."""
        found = torch.zeros(self.n, dtype=x.dtype)
        for i, place in enumerate(self.sequences):
            found[place] = x.reshape(-1)[i]
        return found

    def layout(self) -> dict[str, Any]:
        return {} if self.boundaries is None else {"cu_seqlens": self.boundaries}


def batch(p: Draws, masks: bool = True) -> Batch:
    B, T = p.pick("B", 2, 1, 3, 4, 2, 3), p.pick("T", 3, 1, 2, 5, 6)
    if p.pick("empty", *[False] * 15, True):
        B, T = p.pick("sizes", (0, 3), (2, 0), (0, 0))
    layout = p.pick("layout", "padded", "packed", "one sequence", "padded")
    boundaries = None
    if layout == "padded":
        shape, sequences = (B, T), list(torch.arange(B * T).view(B, T).unbind())
    elif layout == "packed":
        lengths = p.integers(T + 1, B) if p.flag("ragged", often=True) else torch.full((B,), T)
        ends = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        shape, sequences = (
            (int(ends[-1]),),
            list(torch.arange(int(ends[-1])).split(lengths.tolist())),
        )
        boundaries = ends.to(p.pick("dtype of cu_seqlens", torch.int64, torch.int32))
    else:
        shape, sequences = (T,), [torch.arange(T)]
    n = torch.Size(shape).numel()
    mask, weight = None, torch.ones(n, dtype=torch.float64)
    if masks:
        mask, weight = draw_mask(p, shape, n)
    return Batch(shape, boundaries, sequences, mask, weight)


def draw_mask(p: Draws, shape: tuple[int, ...], n: int) -> tuple[Tensor | None, Tensor]:
    """A mask, and the weight (N,) that it gives each token."""
    kinds = (None, "bool", "int64", "uint8", "float", "fractions", "half", "dead", "float64")
    kind = p.pick("mask", *kinds)
    if kind is None:
        return None, torch.ones(n, dtype=torch.float64)
    kept = p.some(0.7, *shape)
    if p.pick("end of mask", "holes", "ragged") == "ragged" and len(shape) == 2:
        kept = torch.arange(shape[1]) < p.integers(shape[1] + 1, shape[0])[:, None]
    if kind == "dead":
        kept = torch.zeros(shape, dtype=torch.bool)
    mask = kept
    if kind in ("int64", "uint8"):
        mask = kept.to(getattr(torch, kind)) * p.pick("nonzero", 1, 3)
    elif kind == "float":
        mask = kept.float()
    elif kind in ("fractions", "half", "float64"):
        value = torch.rand(shape, generator=p.generator) * p.pick("most", 1.0, 3.0) + 0.01
        to = {"fractions": torch.float32, "half": torch.bfloat16, "float64": torch.float64}[kind]
        mask = (kept * value).to(to)
    weight = mask.double() if mask.is_floating_point() else (mask != 0).double()
    return strided(p, "mask strides", mask), weight.flatten()


def strided(p: Draws, name: str, x: Tensor) -> Tensor:
    """The same values with other strides."""
    kind = p.pick(name, "dense", "dense", "dense", "every second", "transposed", "offset")
    if kind == "every second":
        wide = x.new_zeros(*x.shape, 2)
        wide[..., 0] = x
        return wide[..., 0]
    if kind == "transposed" and x.ndim == 2:
        return x.t().contiguous().t()
    if kind == "offset":
        return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
    return x


def garbage(b: Batch, x: Tensor, what: float) -> Tensor:
    """Put something into the places of masked tokens, (N,) or (N, ...)."""
    keep = b.live.view(-1, *[1] * (x.ndim - 1))
    return torch.where(keep, x, torch.full_like(x, what))


def per_token(p: Draws, name: str, b: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
    """(the argument as the library gets it, its values (N,) in float64, 0 where masked) of values (N,)."""
    kind = p.pick(f"{name} dtype", "float32", "float32", "bfloat16", "float16", "float64")
    x = x.to(getattr(torch, kind))
    values = garbage(b, x.double(), 0.0)
    if p.flag(f"{name} garbage", often=True):
        x = garbage(b, x, p.pick(f"{name} holds", torch.nan, torch.inf))
    return strided(p, f"{name} strides", x.view(b.shape)), values


def per_sequence_or_token(p: Draws, name: str, b: Batch, make: Any) -> tuple[Tensor, Tensor, bool]:
    """As `per_token`, of an argument that may be one per sequence; and whether it is."""
    form = p.pick(f"{name} form", "column", "vector", "tokens")
    number = len(b.sequences)
    # (N,) of N sequences may be either, and is refused unless both are the same.
    alike = b.boundaries is not None and b.n == number
    if alike and any(len(x) != 1 for x in b.sequences):
        form = "column"
    if form == "tokens":
        x, values = per_token(p, name, b, make(b.n))
        return x, values, tuple(x.shape) in ((number, 1), (number,)) and x.shape != b.shape
    x = make(number)
    values = garbage(b, b.spread(x.double()), 0.0)
    if form == "column":
        x = x[:, None]
    return x, values, x.shape != torch.Size(b.shape)


def logits(p: Draws, b: Batch, dtype: torch.dtype) -> tuple[Tensor, Any, Tensor]:
    """A leaf, the function that makes the logits of it, and the ids (N,)."""
    V = p.pick("V", *VOCABULARIES)
    kinds = ("normal", "flat", "tiny", "huge", "offset", "peak", "banned", "normal", "normal")
    kind = p.pick("logits", *kinds)
    N = b.n
    ids = p.integers(V, N)
    x = 3 * p.randn(N, V)
    if kind == "flat":
        x = torch.full((N, V), 2.5)
    elif kind == "tiny":
        x = 1e-6 * x
    elif kind == "huge":
        x = 1e4 * x.sign()
    elif kind == "offset":
        x = x + p.pick("offset", 1e4, -1e4)
    elif kind == "peak":
        x = x.scatter(1, p.integers(V, N, 1), p.pick("height", 50.0, 1e4))
    elif kind == "banned" and V > 1:
        keep = torch.zeros(N, V, dtype=torch.bool).scatter(1, ids[:, None], True)
        x = x.masked_fill(p.some(0.4, N, V) & ~keep, -torch.inf)
    if p.flag("NaN in masked rows", often=True):
        x = garbage(b, x, torch.nan)
    leaf, view = laid_out(p, x.to(dtype).view(*b.shape, V))
    return leaf, view, ids


def laid_out(p: Draws, x: Tensor) -> tuple[Tensor, Any]:
    """A leaf, and the view of it that has the values of x, (..., V); the last dimension is contiguous."""
    kinds = ("dense", "dense", "rows of more", "part of columns", "transposed", "expanded")
    kind = p.pick("strides", *kinds)
    *lead, V = x.shape
    if kind == "rows of more":
        leaf = x.new_full((*lead[:-1], lead[-1] + 2, V), torch.nan)
        leaf[..., 1:-1, :] = x
        return leaf, lambda leaf: leaf[..., 1:-1, :]
    if kind == "part of columns":
        leaf = x.new_full((*lead, V + 3), torch.nan)
        leaf[..., 1 : V + 1] = x
        return leaf, lambda leaf: leaf[..., 1 : V + 1]
    if kind == "transposed" and len(lead) == 2:
        return x.transpose(0, 1).contiguous(), lambda leaf: leaf.transpose(0, 1)
    if kind == "expanded" and lead[0] and not x.isnan().any() and not x.isinf().any():
        return x[:1].clone(), lambda leaf: leaf.expand(*lead, V)
    return x.clone(), lambda leaf: leaf


def targets(p: Draws, b: Batch, ids: Tensor) -> Tensor:
    """The ids as the library gets them: any value where masked."""
    if p.flag("ids garbage", often=True):
        ids = garbage(b, ids, p.pick("masked ids", -100, 10**9))
    ids = ids.to(p.pick("dtype of ids", torch.int64, torch.int32)).view(b.shape)
    return strided(p, "ids strides", ids)


def temperature(p: Draws, b: Batch) -> tuple[Any, Tensor]:
    """A temperature as the library gets it, and that of each token, (N,) float64."""
    kind = p.pick("temperature", 1.0, 0.5, 2, "0-dim", "per token", 1.0)
    if kind == "0-dim":
        return torch.tensor(0.7), torch.full((b.n,), float(torch.tensor(0.7)), dtype=torch.float64)
    if kind == "per token":
        given, values = per_token(p, "temperature", b, 0.3 + torch.rand(b.n, generator=p.generator))
        return given, torch.where(b.live, values, 1.0)
    return kind, torch.full((b.n,), float(kind), dtype=torch.float64)


def options(p: Draws, with_old: bool) -> tuple[Objective, dict[str, Any]]:
    """An objective, and its options."""
    if p.flag("preset"):
        name = p.pick("preset name", *PRESETS)
        more = {"max_length": 9} if PRESETS[name].get("reduction") == "fixed_length" else {}
        if p.flag("with beta") and not (name.startswith("nemo_rl") or "cov" in name):
            more["beta"] = 0.2
        found = Objective.preset(name, **more)
        if with_old or not needs_old(vars(found)):
            return found, {x: y for x, y in vars(found).items() if x != "terms"}
    name = p.pick("surrogate", *(x for x in SURROGATES if with_old or x != "rollout_is"))
    o: dict[str, Any] = {"surrogate": name}
    o["reduction"] = p.pick(
        "reduction", "sequence_mean", "token_mean", "sequence_sum", "fixed_length"
    )
    if o["reduction"] == "fixed_length":
        o["max_length"] = p.pick("max_length", 10, 1, 1000)
    own_options(p, o, name, with_old)
    if p.flag("KL", often=True):
        kl_options(p, o)
    if (name in OF_SEQUENCES or o.get("kl") == "k3_unbiased") and p.flag(
        "of sequences", often=True
    ):
        o["ratio"] = p.pick("ratio", "sequence", "sequence_token")
    if name not in UNCLAMPED and p.flag("clamp"):
        o |= p.pick(
            "clamped", {"log_ratio_clip": 0.1}, {"log_ratio_max": 0.1}, {"log_ratio_clip": 20}
        )
    if with_old and p.flag("off-policy mask"):
        o["off_policy_threshold"] = p.pick("off_policy_threshold", 0.0, 0.1, -0.5)
    if p.flag("top entropy"):
        o["top_entropy_quantile"] = p.pick("top_entropy_quantile", 0.5, 0.2, 0.0)
    if p.flag("bonus"):
        o["entropy_coef"] = p.pick("entropy_coef", 0.1, -0.2)
        o["entropy_reduction"] = p.pick("entropy_reduction", "same", "token_mean")
    return Objective(**o), o


def needs_old(o: dict[str, Any]) -> bool:
    """Whether an objective measures the distance to the policy that sampled."""
    return o["surrogate"] == "rollout_is" or bool(o["quadratic_coef"])


def own_options(p: Draws, o: dict[str, Any], name: str, with_old: bool) -> None:
    """The options of a surrogate."""
    if name in RANGED and p.flag("range", often=True):
        o["epsilon_low"] = p.pick("epsilon_low", 0.1, 0.02, 0.5, 1.0, 0.0)
        o["epsilon_high"] = p.pick("epsilon_high", 0.1, 0.03, 4.0, 0.0, 1e30)
        if name == "cispo" and p.flag("bound below 1"):
            o |= {"epsilon_low": 1.0, "epsilon_high": -0.8}
    if name == "clip" and p.flag("two-sided", often=True):
        o |= p.pick("dual", {"dual_clip": 1.2}, {"delta": 1.5}, {"delta": 1.05}, {"dual_clip": 3})
    if name == "sapo" and p.flag("tau", often=True):
        o |= {"tau_pos": 0.5, "tau_neg": 2.0}
    if name.startswith("dppo"):
        o["ratio_cap"] = p.pick("ratio_cap", 20.0, 1.1, None)
        o["dppo_value"] = p.pick("dppo_value", "logp", "ratio")
    takes_penalty = name in ("ipo", "dro") or o.get("dppo_value") == "ratio"
    if takes_penalty and with_old and p.flag("penalty", often=True):
        o["quadratic_coef"] = p.pick("quadratic_coef", 0.1, 2.0)
    if name == "vespo" and p.flag("phi", often=True):
        o |= {"vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5}
        o |= {"vespo_k_neg": p.pick("vespo_k_neg", 2.0, -1.0), "vespo_lambda_neg": 1.5}
    if name == "topr" and p.flag("topr weights", often=True):
        o |= {"topr_weight_pos": 0.5, "topr_weight_neg": p.pick("topr_weight_neg", 2.0, 0.0)}


def kl_options(p: Draws, o: dict[str, Any]) -> None:
    o["beta"] = p.pick("beta", 0.1, 1.0, 1e-3)
    o["kl"] = p.pick("kl", "k3", "k1", "abs", "k2", "k3_unbiased")
    if o["kl"].startswith("k3") and p.flag("KL clamps", often=True):
        o |= p.pick(
            "KL clamp",
            {"kl_gap_clip": 0.3},
            {"kl_value_clip": 0.05},
            {"kl_gap_clip": 20, "kl_value_clip": 10},
        )
    clamped = "kl_gap_clip" in o or "kl_value_clip" in o
    if o["kl"] in ("k1", "abs", "k3") and p.flag("KL gradient", often=True):
        o["kl_gradient"] = p.pick("kl_gradient", "k2", "k2_clipped") if clamped else "k2"
