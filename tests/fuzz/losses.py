"""Strategies for the losses: each draws a case and compares the library with the oracle."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_fast import (
    grpo_loss,
    linear_grpo_loss,
    policy_loss,
    reference,
    token_diagnostics,
)
from tests.fuzz import oracle
from tests.fuzz.batches import (
    Batch,
    batch,
    garbage,
    laid_out,
    logits,
    options,
    per_sequence_or_token,
    per_token,
    strided,
    targets,
    temperature,
)
from tests.fuzz.drawing import FLOOR, Draws, UndecidedError, compare

UNIT = 2.0**-24  # the rounding of float32


@dataclass
class Arguments:
    """The arguments that all losses share, for the library and for the oracle."""

    keywords: dict[str, Any]
    given: oracle.Given
    old_is_own: bool = False  # `old_logps` are the log-probs themselves


def arguments(
    p: Draws, b: Batch, logp: Tensor, rewards: bool = True, large: bool = True
) -> Arguments:
    """Draw the arguments of a loss.

    Args:
        logp: (N,) float64, about the log-probs of the policy.
        rewards: whether the loss takes rewards.
        large: whether advantages and weights may be of the order of 1,000, and ratios larger.
    """
    with_old = p.flag("old_logps", often=True)
    objective, o = options(p, with_old)
    words: dict[str, Any] = {"objective": objective, "mask": b.mask, **b.layout()}
    given = oracle.Given(b.sequences, b.weight, torch.zeros(b.n), options=o)
    drift = p.pick("drift", 0.1, 0.5, 0.0, *((3.0, 60.0) if large else ()))
    if with_old:
        words["old_logps"], given.old = per_token(
            p, "old_logps", b, (logp.float() + drift * p.randn(b.n)).clamp(max=0)
        )
    if objective.beta or p.flag("ref_logps without beta"):
        gap = p.pick("gap", 0.3, 0.0, 5.0, 30.0) * p.randn(b.n)
        words["ref_logps"], given.ref = per_token(
            p, "ref_logps", b, (logp.float() + gap).clamp(max=0)
        )
    earned(p, b, words, given, rewards, large)
    size = p.pick("size of weights", 1.0, 1.0, 1e3 if large else 3.0)

    def positive(n: int) -> Tensor:
        return size * torch.rand(n, generator=p.generator) * ~p.some(0.2, n)

    if p.flag("importance_weights", often=True):
        words["importance_weights"], given.importance, given.importance_by_sequence = (
            per_sequence_or_token(p, "importance_weights", b, positive)
        )
    if p.flag("token_weights"):
        words["token_weights"], given.token_weights = per_token(
            p, "token_weights", b, positive(b.n) - p.pick("negative weights", 0.0, 0.5)
        )
    if objective.reduction == "token_mean" and p.flag("num_items", often=True):
        given.num_items = float(p.pick("number of items", 5, 0.25, 1e6))
        words["num_items"] = p.pick(
            "num_items is", given.num_items, torch.tensor(given.num_items), int(given.num_items)
        )
        given.num_items = float(words["num_items"])
    if p.flag("loss_scale"):
        given.scale = p.pick("loss_scale is", 2.0, -0.5, 1024, 0.0)
        words["loss_scale"] = p.pick("scale is a", given.scale, torch.tensor(given.scale))
    return Arguments(words, given)


def earned(
    p: Draws, b: Batch, words: dict[str, Any], given: oracle.Given, rewards: bool, large: bool
) -> None:
    """Draw advantages or rewards, and scores."""
    number = len(b.sequences)
    size = p.pick("size of advantages", 1.0, 1e-3, 1e3 if large else 3.0, 0.0)

    def signed(n: int) -> Tensor:
        return size * p.randn(n) * ~p.some(0.2, n)

    sizes = [G for G in range(2, number + 1) if number % G == 0]
    if rewards and sizes and p.flag("rewards"):
        G = p.pick("group_size", *sizes)
        r = p.randn(number) if p.flag("real rewards", often=True) else p.integers(2, number).float()
        r = p.pick("rewards times", 1.0, 100.0) * r + p.pick("rewards plus", 0.0, 1e3)
        words |= {"rewards": p.pick("rewards form", r, r[:, None]), "group_size": G}
        own = torch.tensor(oracle.z_scores(r.tolist(), G), dtype=torch.float64)
        given.advantages = torch.where(b.live, b.spread(own), 0.0)
        scores = torch.where(b.live, b.spread(r.double()), 0.0)
    else:
        words["advantages"], given.advantages, _ = per_sequence_or_token(p, "advantages", b, signed)
        scores = None
    if given.options["surrogate"] == "topr":
        given.scores = scores
        if p.flag("scores", often=True):
            words["scores"], given.scores, _ = per_sequence_or_token(p, "scores", b, signed)


class Evaluations:
    """The oracle in float64, in the dtype of plain PyTorch, and with log-probs off by a rounding.

    Args:
        leaves: the differentiable tensors, as the library gets them.
        score: turns leaves of a dtype into log-probs and entropies.
        off: (N,) the rounding of log-probs, times `signs` one after another.
        plain: None: there is no rounding.
    """

    def __init__(
        self,
        leaves: list[Tensor],
        score: Any,
        given: oracle.Given,
        off: Tensor,
        upstream: float,
        plain: torch.dtype | None = torch.float32,
        signs: tuple[Any, ...] = (1.0, -1.0),
    ) -> None:
        self.given, self.upstream, self.off = given, upstream, off
        self.truth = self.at(leaves, score, torch.float64, 0.0)
        self.near = [self.at(leaves, score, torch.float64, sign) for sign in signs]
        self.plain = self.truth
        if plain is not None:
            self.plain = self.at(leaves, score, plain, 0.0)

    def at(self, leaves: list[Tensor], score: Any, dtype: torch.dtype, sign: Any) -> dict[str, Any]:
        own = [x.detach().clone().requires_grad_() for x in leaves]
        if dtype == torch.float64:
            own = [x.detach().double().requires_grad_() for x in leaves]
        logp, entropy = score(own, dtype)
        found = oracle.loss(
            logp + (sign * self.off).to(logp.dtype), entropy, self.given.to(logp.dtype)
        )
        grads = torch.autograd.grad(self.upstream * found.loss, own, allow_unused=True)
        return {
            "loss": found.loss.detach(),
            "grads": [
                torch.zeros_like(x) if g is None else g for g, x in zip(grads, own, strict=True)
            ],
            "logps": logp.detach(),
            "entropy": None if entropy is None else entropy.detach(),
            "found": found,
        }

    def compare(self, name: str, got: Tensor, key: Any, floor: float, *sizes: Any) -> None:
        truth, plain, *near = (key(x) for x in (self.truth, self.plain, *self.near))
        compare(name, got, truth, plain, tuple(near), floor, *sizes)

    def check(
        self,
        out: Any,
        grads: dict[int, Tensor],
        names: list[str],
        floor: float,
        steep: float = 1.0,
        roundings: list[Tensor] | None = None,
    ) -> None:
        """Compare the loss of a result and its gradients, by the place of their leaf.

        Args:
            steep: the largest derivative of a scaled logit in a leaf.
            roundings: from `rounded_gradients`, for each leaf.
        """
        found = self.truth["found"]
        self.compare("loss", out.loss, lambda x: x["loss"], floor, found.size)
        scale = (
            abs(self.upstream) * found.bonus * steep
        )  # of a uniform row, whose own gradient is 0
        for i, grad in grads.items():
            unit = torch.finfo(grad.dtype).eps
            key, rows = lambda x, i=i: x["grads"][i], names[i] in ("logits", "logps", "entropy")
            own = floor + unit if not rows else 3 * floor + unit
            rounding = None if roundings is None else roundings[i]
            self.compare(f"gradient of {names[i]}", grad, key, own, scale, rows, rounding)

    def check_values(self, out: Any, live: Tensor, floor: float, computed: bool = True) -> None:
        """Compare log-probs, entropies and metrics, which are of all live tokens.

        Args:
            computed: the log-probs are computed, and not those that the caller gave.
        """
        for name in ("logps", "entropy"):
            got = getattr(out, name)
            if got is not None:
                got = got.flatten()
                if computed and not bool(got[~live].isfinite().all()):
                    raise AssertionError(f"{name}: not finite where masked")
                self.compare(name, got[live], lambda x, name=name: x[name][live], floor, 1.0)
        truth = self.truth["found"].metrics
        for name, got in out.metrics.items():
            if not truth:
                assert bool(got.isfinite()), f"metric {name}: {got} without a token"
            elif name in truth:
                self.compare(
                    f"metric {name}", got, lambda x, name=name: x["found"].metrics[name], floor, 1.0
                )


def refuse_near_choice(entropy: Tensor, live: Tensor, o: dict[str, Any]) -> None:
    """Draw another case if a rounding could choose other tokens by their entropy."""
    share = o.get("top_entropy_quantile", 1.0)
    if share == 1.0 or not live.any():
        return
    gap = (entropy[live] - oracle.quantile(entropy[live], 1 - share)).abs()
    # Where the quantile is one of the entropies, a rounding leaves it the same one.
    if int((gap < 1e-3).sum()) > (share in (0.0, 0.5)):
        raise UndecidedError


def reach(x: Tensor, live: Tensor) -> Tensor:
    """The largest finite magnitude in each live row of (N, V), else 0."""
    finite = torch.where(x.isfinite(), x, torch.zeros_like(x)).abs()
    return torch.where(live, finite.amax(1) if finite.shape[1] else finite.sum(1), 0.0)


def one_of_logits(p: Draws, exact: bool = True) -> dict[str, Any]:
    """Draw logits, ids, temperature, and the arguments of a loss.

    Args:
        exact: the log-probs in float64 are the exact ones of `oracle.log_probs`.
    """
    b = batch(p)
    halves = (torch.float16,) if p.backend == "triton" else (torch.float16, torch.bfloat16)
    dtype = p.pick("dtype", torch.float32, torch.float32, *halves)
    leaf, view, ids = logits(p, b, dtype)
    given_ids = targets(p, b, ids)
    heat, heats = temperature(p, b)
    live = b.live

    def score(leaves: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        z = view(leaves[0]).flatten(0, -2).to(dtype)
        return oracle.log_probs(z, ids, live, heats, exact and dtype == torch.float64)

    z = view(leaf).detach().double().flatten(0, -2)
    logp, entropy = oracle.log_probs(z, ids, live, heats)
    call = arguments(p, b, logp)
    refuse_near_choice(entropy, live, call.given.options)
    most = reach(z / heats[:, None], live)
    off = UNIT * (most + logp.abs() + 1) * live
    for other in (call.given.old, call.given.ref):
        off = off if other is None else off + UNIT * other.abs()
    floor = FLOOR + 4 * UNIT * float(most.amax() if b.n else 0.0)
    return {
        **{"b": b, "leaf": leaf, "view": view, "ids": given_ids, "heat": heat, "heats": heats},
        **{"score": score, "entropy": entropy, "call": call, "words": call.keywords},
        **{"off": off, "floor": floor},
    }


def grpo_loss_case(p: Draws) -> None:
    x = one_of_logits(p)
    leaf, words, b = x["leaf"], x["words"], x["b"]
    upstream = p.pick("upstream", 1.0, -0.5, 3.0)
    words |= {"temperature": x["heat"], "return_entropy": p.flag("return_entropy", often=True)}
    want = Evaluations([leaf], x["score"], x["call"].given, x["off"], upstream)
    truth = want.truth["grads"][0]
    # The forward has written the gradient for an upstream gradient of 1, which may overflow float16.
    if bool((truth.to(leaf.dtype).isinf() != (truth / upstream).to(leaf.dtype).isinf()).any()):
        raise UndecidedError
    own = leaf.detach().clone().requires_grad_(not p.flag("no gradient"))
    given = x["view"](own)
    overlaps = 0 in given.stride() and given.numel() > given.untyped_storage().nbytes() // (
        given.element_size()
    )
    if own.requires_grad and not overlaps and p.flag("inplace"):
        words["inplace"] = True
        given = x["view"](own * 1)
    out = grpo_loss(given, x["ids"], **words)
    grads = {}
    if own.requires_grad:
        (grads[0],) = torch.autograd.grad(upstream * out.loss, [own])
    steep = float((1 / x["heats"]).amax() if b.n else 1.0) * (
        1 + float(x["entropy"].amax()) if b.n else 1
    )
    want.check(out, grads, ["logits"], x["floor"], steep)
    want.check_values(out, b.live, x["floor"])


def reference_grpo_loss_case(p: Draws) -> None:
    """The specification, in float64, which is compared without the oracle's tolerance for float32."""
    x = one_of_logits(p, exact=False)
    leaf, words = x["leaf"].double(), x["words"] | {"temperature": x["heat"]}
    if isinstance(words["temperature"], Tensor):
        words["temperature"] = words["temperature"].double()
    if x["b"].n == 0:
        return
    words = {k: y.double() if exact(k, y) else y for k, y in words.items()}
    want = Evaluations([leaf], x["score"], x["call"].given, 1e-12 * (1 + x["off"]), 1.0, None)
    own = leaf.clone().requires_grad_()
    loss = reference.grpo_loss(x["view"](own), x["ids"].clamp(0), **words)
    (grad,) = torch.autograd.grad(loss, [own])
    found = want.truth["found"]
    want.compare("loss", loss, lambda x: x["loss"], 1e-9, found.size)
    want.compare("gradient", grad, lambda x: x["grads"][0], 1e-9, found.bonus)


def exact(name: str, x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def policy_loss_case(p: Draws) -> None:
    x = one_of_log_probs(p)
    b, words, leaves = x["b"], x["call"].keywords, x["leaves"]
    upstream = p.pick("upstream", 1.0, -0.5, 3.0)
    want = Evaluations(leaves, x["score"], x["call"].given, x["off"], upstream)
    own = [y.detach().clone().requires_grad_() for y in leaves]
    shaped = [strided_view(y, b) for y in own]
    if len(own) == 2:
        words["entropy"] = shaped[1]
    out = policy_loss(shaped[0], **words)
    grads = torch.autograd.grad(upstream * out.loss, own, allow_unused=True)
    found = {i: torch.zeros_like(own[i]) if g is None else g for i, g in enumerate(grads)}
    want.check(out, found, ["logps", "entropy"], FLOOR)
    want.check_values(out, b.live, FLOOR, computed=False)


def strided_view(x: Tensor, b: Batch) -> Tensor:
    return x[:, 0].view(b.shape) if x.shape[1] == 1 else x[:, 0].unflatten(0, b.shape)


def one_of_log_probs(p: Draws) -> dict[str, Any]:
    """Draw log-probs, and entropies where they are needed; as columns of (N, 1) or (N, 2) leaves."""
    b = batch(p)
    live = b.live
    scale = p.pick("log-probs", 1.0, 1e-3, 10.0, 100.0)
    raw = -scale * p.randn(b.n).abs()
    dtype = p.pick("dtype", torch.float32, torch.float32, torch.bfloat16, torch.float64)
    call = arguments(p, b, raw.to(dtype).double() * live, rewards=False)
    width = p.pick("logps strides", 1, 2)

    def leaf(values: Tensor, dtype: torch.dtype) -> Tensor:
        values = (
            torch.where(live, values, torch.nan) if p.flag("masked NaN", often=True) else values
        )
        return values.to(dtype)[:, None].repeat(1, width)

    leaves = [leaf(raw, dtype)]
    o = oracle.DEFAULTS | call.given.options
    if o["entropy_coef"] or o["top_entropy_quantile"] < 1 or p.flag("entropy without need"):
        leaves.append(leaf(3 * torch.rand(b.n, generator=p.generator), dtype))

    def score(leaves: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        found = [torch.where(live, x[:, 0].to(dtype), 0) for x in leaves]
        return found[0], found[1] if len(found) == 2 else None

    logp, entropy = score([x.double() for x in leaves], torch.float64)
    if entropy is not None:
        refuse_near_choice(entropy, live, o)
    off = UNIT * (logp.abs() * (dtype == torch.float64) + 1e-3)
    for other in (call.given.old, call.given.ref):
        off = off if other is None else off + UNIT * other.abs()
    return {"b": b, "leaves": leaves, "score": score, "call": call, "off": off}


def reference_policy_loss_case(p: Draws) -> None:
    x = one_of_log_probs(p)
    b, words = x["b"], x["call"].keywords
    if b.n == 0:
        return
    leaves = [y.double() for y in x["leaves"]]
    want = Evaluations(leaves, x["score"], x["call"].given, 1e-14 + 0 * x["off"], 1.0, None)
    own = [y.clone().requires_grad_() for y in leaves]
    shaped = [strided_view(y, b) for y in own]
    words = {k: y.double() if exact(k, y) else y for k, y in words.items()}
    if len(own) == 2:
        words["entropy"] = shaped[1]
    loss = reference.policy_loss(shaped[0], **words)
    grads = torch.autograd.grad(loss, own, allow_unused=True)
    want.compare("loss", loss, lambda x: x["loss"], 1e-9, want.truth["found"].size)
    want.compare("gradient", grads[0], lambda x: x["grads"][0], 1e-9)


def token_diagnostics_case(p: Draws) -> None:
    x = one_of_log_probs(p)
    b, call = x["b"], x["call"]
    words, given = call.keywords, call.given
    given.importance, given.scores = None, None  # it takes neither
    given.options = given.options | {"top_entropy_quantile": 1.0}
    want = Evaluations(x["leaves"], x["score"], given, x["off"], 1.0)
    kept = {k: words[k] for k in ("mask", "ref_logps", "cu_seqlens", "objective") if k in words}
    logps = strided_view(x["leaves"][0], b)
    found = token_diagnostics(logps, words.get("old_logps"), words["advantages"], **kept)
    names = {"log_ratio": "log_ratio", "ratio": "ratio", "loss": "loss", "kl": "kl"}
    names |= {"outside": "outside", "clipped_low": "low", "clipped_high": "high"}
    names |= {"clipped_dual": "dual", "dropped": "dropped"}
    for name, ours in names.items():
        got = getattr(found, name).flatten()
        want.compare(name, got.float(), lambda x, ours=ours: x["found"].tokens[ours], FLOOR, 1.0)


def head(p: Draws, b: Batch) -> dict[str, Any]:
    """Draw hidden states and a head: the leaves by name, the keywords, and the function of the logits."""
    D, V = p.pick("D", 4, 1, 8, 17), p.pick("V", 7, 1, 2, 16, 33, 64)
    extra = p.pick("padding rows", 0, 0, 3)
    halves = (torch.float16,) if p.backend == "triton" else (torch.float16, torch.bfloat16)
    dtype = p.pick("dtype", torch.float32, torch.float32, *halves, torch.float64)
    other = p.pick("dtype of the head", dtype, dtype, torch.float32)
    size = p.pick("size of hidden", 1.0, 1e-2, 30.0)
    hidden = size * p.randn(b.n, D)
    if p.flag("NaN in masked rows", often=True):
        hidden = garbage(b, hidden, torch.nan)
    leaf, view = laid_out(p, hidden.to(dtype).view(*b.shape, D))
    leaves = {
        "hidden": leaf,
        "weight": strided(p, "weight strides", p.randn(V + extra, D).to(other)),
    }
    words: dict[str, Any] = {}
    if extra:
        words["vocab_size"] = V
    if p.flag("bias"):
        leaves["bias"] = p.randn(V + extra).to(other)
    scaling = p.pick("lora scaling", 0.5, -2.0)
    if p.flag("lora"):
        leaves |= {"A": p.randn(2, D).to(other), "B": p.randn(V + extra, 2).to(other)}
    # Where a cap saturates, rounded logits have no digit of its derivative.
    if p.flag("softcap") and (size <= 1 or unit_of(list(leaves.values())) < 1e-6):
        words["softcap"] = p.pick("cap", 5.0, 30, 1e5)
    if p.flag("logit_scale"):
        words["logit_scale"] = p.pick("scale of logits", 0.5, 4)
    if p.flag("chunks", often=True):
        words["chunk_size"] = p.pick("chunk_size", 4, 1, 3, 100)
    if p.flag("bf16 logits"):
        words["logits_dtype"] = "bf16"

    def product(leaves: list[Tensor], scaling: float = scaling) -> Tensor:
        found = dict(zip(x, leaves, strict=True))
        h = view(found["hidden"]).reshape(b.n, D)
        h = torch.where(b.live[:, None], h, torch.zeros_like(h))
        rows = found["weight"].to(h.dtype)
        z = h @ rows.t()
        if "bias" in found:
            z = z + found["bias"].to(h.dtype)
        if "A" in found:
            z = z + scaling * (h @ found["A"].to(h.dtype).t()) @ found["B"].to(h.dtype).t()
        return z[:, :V]

    def finish(z: Tensor) -> Tensor:
        z, cap = words.get("logit_scale", 1.0) * z, words.get("softcap")
        return z if cap is None else cap * torch.tanh(z / cap)

    def make(leaves: list[Tensor]) -> Tensor:
        return finish(product(leaves))

    x = dict(leaves)
    found = {"leaves": x, "words": words, "make": make, "view": view, "V": V, "scaling": scaling}
    return found | {"product": product, "finish": finish}


def wide(leaves: list[Tensor]) -> bool:
    return any(x.dtype == torch.float64 for x in leaves)


def unit_of(leaves: list[Tensor]) -> float:
    """The rounding of logits that plain PyTorch computes from these operands."""
    if wide(leaves):
        return 1e-15
    return max(torch.finfo(x.dtype).eps / 2 for x in leaves)


def scoring(b: Batch, h: dict[str, Any], ids: Tensor, heats: Tensor) -> Any:
    """The function of log-probs and entropies of the leaves of a head."""

    def score(leaves: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        z = h["make"](leaves)
        z = z if z.dtype == torch.float64 else z.float()
        return oracle.log_probs(z, ids, b.live, heats, z.dtype == torch.float64)

    return score


def rounded_gradients(
    h: dict[str, Any], leaves: list[Tensor], ids: Tensor, heats: Tensor, of: Evaluations
) -> list[Tensor] | None:
    """Bounds of what roundings of dL/dlogits change in the gradients of a head's leaves; None for float32.

    Half-precision hidden states: dL/dlogits is rounded to their dtype (docs/linear.md). float64: the
    probabilities p are rounded, and dlogp/dlogits is computed as 1 - p, or -p. Whatever the signs of these
    errors, they change a gradient by at most the sum of their magnitudes, each times the magnitude of its
    factor.
    """
    dtype, x = leaves[0].dtype, [y.detach().double() for y in leaves]
    if not wide(leaves) and dtype == torch.float32:
        return None
    z = h["product"](x).requires_grad_()
    scaled = h["finish"](z) / heats[:, None]
    live = of.given.mask > 0
    logp, entropy = oracle.log_probs(h["finish"](z), ids, live, heats)
    loss = of.upstream * oracle.loss(logp, entropy, of.given.to(torch.float64)).loss
    if wide(leaves):
        (of_logp,) = torch.autograd.grad(loss, [logp], retain_graph=True)
        (slope,) = torch.autograd.grad(scaled.sum(), [z])
        off = (of_logp * of.off)[:, None] * scaled.detach().softmax(1) * slope
    else:
        off = torch.finfo(dtype).eps / 2 * torch.autograd.grad(loss, [z])[0]
    sizes = [y.nan_to_num(0).abs().requires_grad_() for y in x]
    product = h["product"](sizes, abs(h["scaling"]))
    return list(torch.autograd.grad(product, sizes, off.abs()))


def linear_grpo_loss_case(p: Draws) -> None:
    b = batch(p)
    h = head(p, b)
    leaves = list(h["leaves"].values())
    ids = p.integers(h["V"], b.n)
    given_ids, (heat, heats) = targets(p, b, ids), temperature(p, b)
    score = scoring(b, h, ids, heats)
    logp, entropy = score([x.detach().double() for x in leaves], torch.float64)
    # Of float16 operands the gradients have a range of their own (docs/linear.md).
    large = all(x.dtype != torch.float16 for x in leaves)
    call = arguments(p, b, logp, large=large)
    refuse_near_choice(entropy, b.live, call.given.options)
    z = h["make"]([x.detach().double() for x in leaves]) / heats[:, None]
    unit, most = unit_of(leaves), reach(z, b.live)
    off = unit * (4 * most + logp.abs() + 1) * b.live
    for other in (call.given.old, call.given.ref):
        off = off if other is None else off + (0 if wide(leaves) else UNIT) * other.abs()
    upstream = p.pick("upstream", 1.0, -0.5, 3.0)
    signs = (1.0, -1.0, *(2.0 * p.some(0.5, b.n) - 1 for _ in range(2)))
    plain = None if wide(leaves) else torch.float32
    want = Evaluations(leaves, score, call.given, off, upstream, plain, signs)
    names = [x for x in h["leaves"] if p.flag(f"gradient of {x}", often=True)]
    own = {k: x.detach().clone().requires_grad_(k in names) for k, x in h["leaves"].items()}
    words = {**call.keywords, **h["words"], "temperature": heat, "bias": own.get("bias")}
    if "A" in own:
        words["lora"] = (own["A"], own["B"], h["scaling"])
    words["compact"] = not p.flag("all rows")
    words["return_entropy"] = p.flag("return_entropy")
    added = None
    if "weight" in names and not wide(leaves) and p.flag("dw_out"):
        added = words["dw_out"] = torch.zeros(own["weight"].shape)
    out = linear_grpo_loss(h["view"](own["hidden"]), own["weight"], given_ids, **words)
    grads = {}
    if names:
        found = torch.autograd.grad(upstream * out.loss, [own[x] for x in names], allow_unused=True)
        for name, grad in zip(names, found, strict=True):
            place = list(own).index(name)
            grads[place] = torch.zeros_like(own[name]) if grad is None else grad
    if added is not None:
        grads[list(own).index("weight")] = added
    floor = 1e-9 if wide(leaves) else FLOOR + 4 * unit * float(most.amax() if b.n else 0.0)
    steep = float((1 / heats).amax() if b.n else 1.0) * max(h["words"].get("logit_scale", 1.0), 1.0)
    steep *= max([1.0, *(float(x.nan_to_num(0).abs().sum()) for x in leaves if x.numel())])
    roundings = rounded_gradients(h, leaves, ids, heats, want)
    want.check(out, grads, list(own), floor, steep, roundings)
    if not words["compact"] or words["return_entropy"]:
        if wide(leaves):  # their sums are float32, and may overflow where the mean does not
            sums = want.truth["found"].metrics
            for name in out.metrics.keys() & sums.keys():
                total = (sums[name] * sums["tokens"]).float()
                if name == "effective_sample_size" or total.isinf():
                    del out.metrics[name]
        rounding = 4 * UNIT * float(logp.abs().amax() if b.n else 0.0)  # metrics are float32
        want.check_values(out, b.live, max(floor, FLOOR + rounding))


CASES = {
    "grpo_loss": grpo_loss_case,
    "policy_loss": policy_loss_case,
    "linear_grpo_loss": linear_grpo_loss_case,
    "token_diagnostics": token_diagnostics_case,
    "reference.grpo_loss": reference_grpo_loss_case,
    "reference.policy_loss": reference_policy_loss_case,
}
