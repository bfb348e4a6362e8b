"""`Objective`: the terms and options of a loss in one frozen, checked value."""

import dataclasses
import functools
import math
from typing import Any, Literal, get_args

from torch import Tensor

from grpo_fast.operands import LARGEST, NUMBERS, Modes, Terms, hint, operands
from grpo_fast.presets import ENTROPY_BY_TOKENS, PRESETS
from grpo_fast.spelling import (
    LOSS_ARGUMENTS,
    LOSSES_OWN,
    check_choice,
    check_preset,
    keywords_explained,
)
from grpo_fast.surrogates import OPTIONS as SURROGATE_OPTIONS
from grpo_fast.surrogates import SURROGATES, Surrogate, users_of

Ratio = Literal["token", "sequence", "sequence_token"]
DppoValue = Literal["logp", "ratio"]
KLGradient = Literal["own", "k2", "k2_clipped"]
KL = Literal["k1", "abs", "k2", "k3", "k3_unbiased"]
EntropyReduction = Literal["same", "token_mean"]
Reduction = Literal["sequence_mean", "token_mean", "sequence_sum", "fixed_length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """An objective of the GRPO family: a surrogate, a KL estimator, a reduction, and their numbers.

    The loss is the sum over all tokens t of

        w_t * (importance_t * surrogate(r, A) + beta * kl(q) - entropy_coef * H_t)

    where the reduction gives w_t, d = logp - old_logp, r = exp(d), A is the advantage, H the
    entropy, q = ref_logp - logp. [x] is 1 where x holds, else 0; sg() stops the gradient; pi and mu
    are the probabilities exp(logp) and exp(old_logp).

        >>> logps, old, A = -torch.rand(2, 3), -torch.rand(2, 3), torch.tensor([1.0, -1.0])
        >>> objective = Objective(surrogate="clip", reduction="token_mean", epsilon_high=0.28)
        >>> loss = policy_loss(logps, advantages=A, old_logps=old, objective=objective).loss
        >>> r, A = (logps - old).exp(), A[:, None]
        >>> want = -torch.minimum(r * A, r.clamp(0.8, 1.28) * A).mean()
        >>> torch.testing.assert_close(loss, want)
        >>> assert objective == Objective.preset("dapo")

    Attributes:
        surrogate: the loss of a token, with lo = epsilon_low, hi = epsilon_high:
            "clip" (PPO, GRPO, DAPO): -min(r A, clip(r, 1 - lo, 1 + hi) A)
            "cispo": -sg(clip(r, 1 - lo, 1 + hi)) A logp
            "sapo": -A (4 / tau) sigmoid(tau (r - 1)), tau = tau_pos where A > 0, else tau_neg
            "reinforce" (GPG): -A logp
            "dppo_tv": -A sg(min(r, ratio_cap) M) logp, M = [pi - mu <= hi] where A > 0, else
                [pi - mu >= -lo]
            "dppo_kl": as "dppo_tv", but M = [KL(mu, pi) <= hi or pi <= mu] where A > 0, else
                [KL(mu, pi) <= lo or pi >= mu]; KL of the two outcomes "this token" and "any other"
            "dppo_tv", "dppo_kl" with dppo_value="ratio": -A min(r, ratio_cap) M + quadratic_coef d^2,
                differentiated through the ratio
            "ipo": -A r [-lo <= pi - mu <= hi] + quadratic_coef d^2
            "dro": -A logp + quadratic_coef d^2 / 2
            "rollout_is": -A sg(r [1 - lo < r < 1 + hi]) logp
            "vespo": -A sg(phi) logp, phi = W^k e^(lambda (1 - W)). log W is the sum over the sequence
                of d (each within [-20, 20]) and of the log importance weights, within [log 1e-8, 20].
                (k, lambda) is (vespo_k_pos, vespo_lambda_pos) where A >= 0, else (vespo_k_neg,
                vespo_lambda_neg)
            "topr": -A sg(a) logp, a = topr_weight_pos where the score is positive, else
                topr_weight_neg min(r, 1). The score is `scores`, else the reward, else A
            "gmpo": -A exp(mean over the sequence of d'), d' = min(d, hi) where A > 0, max(d, -lo)
                where A < 0
        ratio: "token": r = exp(d). "sequence" (GSPO): r = exp(mean of d over the sequence),
            differentiated through the mean. "sequence_token" (GSPO-token): the value of "sequence"
            with the gradient of sg(r) exp(logp - sg(logp)). Where all advantages of a sequence are
            equal and its tokens weigh the same, the last two have the same gradient.
        reduction: the weight w_t of a token that counts. n_b is the number of tokens that count in
            sequence b, B the number of sequences. "sequence_mean": 1 / (n_b B) (GRPO).
            "token_mean": 1 / sum_b n_b, or 1 / `num_items` (DAPO). "sequence_sum": 1 / B.
            "fixed_length": 1 / (B max_length) (Dr. GRPO).
        max_length: tokens; "fixed_length" needs it, and no other reduction takes it.
        epsilon_low, epsilon_high: the bounds lo and hi above.
        delta: only for "clip", TRL's two-sided clamp: `min(r, delta) A` replaces r A in the
            unclipped branch.
        dual_clip: only for "clip", verl's c > 1: where A < 0 the loss of a token is at most -c A.
        tau_pos, tau_neg: temperatures of "sapo".
        ratio_cap: upper bound of the ratio in "dppo_tv" and "dppo_kl"; None for no bound.
        dppo_value: the loss of "dppo_tv" and "dppo_kl" is a "logp" times a detached factor, or the
            "ratio". The value differs; below the cap the gradient is the same.
        quadratic_coef: factor of d^2 in "ipo", "dro", and DPPO with dppo_value="ratio".
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: k and lambda of "vespo".
        topr_weight_pos, topr_weight_neg: factors of "topr".
        top_entropy_quantile: rho in [0, 1]. Only tokens whose entropy is at least the (1 - rho)
            quantile over the tokens of the batch that count keep their surrogate and entropy bonus
            (0: only the highest). All tokens keep their KL term.
        off_policy_threshold: tokens with A < 0 lose their surrogate in sequences whose mean of -d
            is above this (DeepSeek-V3.2).
        log_ratio_clip: clamp d, or with a sequence ratio its mean, to [-log_ratio_clip,
            log_ratio_clip] before the ratio is taken. No gradient passes through a clamped ratio.
        log_ratio_max: clamp d in the same way, but only from above.
        beta: weight of the KL penalty to the reference policy. 0 needs no `ref_logps`.
        kl: estimator of KL(policy || reference): "k1" -q, "abs" |q|, "k2" q^2/2, "k3" e^q - q - 1,
            "k3_unbiased" r (e^q - q - 1), differentiated through r.
        kl_gap_clip: only for "k3" and "k3_unbiased": clamp q to [-kl_gap_clip, kl_gap_clip] first.
        kl_value_clip: only for "k3" and "k3_unbiased": clamp e^q - q - 1 to at most this. No
            gradient passes through either clamp. With 10, a token more than 2.611 nats below the
            reference is not pulled back.
        kl_gradient: the gradient of the KL term: "own", that of the estimator; "k2", which is -q,
            whatever the estimator and its clamps (verl's "+" estimators); "k2_clipped", which is -q
            where no clamp holds, else 0.
        entropy_coef: weight of the entropy bonus; a positive weight rewards entropy.
        entropy_reduction: "same": the bonus is reduced as the rest. "token_mean": the bonus is a
            mean over the tokens of this call that count, whatever the reduction and `num_items`
            (TRL).

    Raises:
        ValueError, TypeError: an unknown choice, a value out of range, or an option that the other
            options leave without effect.

    Sources: GRPO arXiv 2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783, dual clip 1912.09729,
    CISPO 2506.13585, SAPO 2511.20347, GSPO 2507.18071, GMPO 2507.20673, VESPO 2602.10693, DPPO
    2602.04879, DRO 2501.12599, rollout_is 2602.15763, TOPR 2503.14286, top entropy 2506.01939. KL
    estimators: J. Schulman, "Approximating KL divergence" (2020). k3_unbiased and the off-policy
    mask: DeepSeek-V3.2.
    """

    surrogate: Surrogate = "clip"
    ratio: Ratio = "token"
    reduction: Reduction = "sequence_mean"
    max_length: int | None = None
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    dual_clip: float | None = None
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    ratio_cap: float | None = 20.0
    dppo_value: DppoValue = "logp"
    quadratic_coef: float = 0.0
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    topr_weight_pos: float = 1.0
    topr_weight_neg: float = 1.0
    top_entropy_quantile: float = 1.0
    off_policy_threshold: float | None = None
    log_ratio_clip: float | None = None
    log_ratio_max: float | None = None
    beta: float = 0.0
    kl: KL = "k3"
    kl_gap_clip: float | None = None
    kl_value_clip: float | None = None
    kl_gradient: KLGradient = "own"
    entropy_coef: float = 0.0
    entropy_reduction: EntropyReduction = "same"
    # The operators take these. This is no field: `dataclasses.asdict` then gives only numbers and
    # words.
    terms = Terms(Modes.of(" ".join(["none"] * len(Modes._fields))), operands(()))

    def __post_init__(self) -> None:
        check_choice("surrogate", self.surrogate, get_args(Surrogate))
        check_choice("ratio", self.ratio, get_args(Ratio))
        check_choice("reduction", self.reduction, get_args(Reduction))
        check_choice("kl", self.kl, get_args(KL))
        check_choice("kl_gradient", self.kl_gradient, get_args(KLGradient))
        check_choice("dppo_value", self.dppo_value, get_args(DppoValue))
        check_choice("entropy_reduction", self.entropy_reduction, get_args(EntropyReduction))
        for name in NOT_NEGATIVE:
            _check_number(name, getattr(self, name), low=0.0)
        # CISPO's upper bound may lie below 1: TRL's default is 0.2, an epsilon_high of -0.8.
        low = -1.0 if self.surrogate == "cispo" else 0.0
        _check_number("epsilon_high", self.epsilon_high, low=low, strict=low < 0)
        _check_number("entropy_coef", self.entropy_coef)
        _check_number("top_entropy_quantile", self.top_entropy_quantile, low=0.0)
        if self.top_entropy_quantile > 1:
            raise ValueError(f"top_entropy_quantile: want <= 1, got {self.top_entropy_quantile}")
        if self.off_policy_threshold is not None:
            _check_number("off_policy_threshold", self.off_policy_threshold)
        for name in SURROGATE_OPTIONS:
            if name not in NOT_FLOATS and getattr(self, name) is not None:
                _check_number(name, getattr(self, name))
        for name in (*POSITIVE, *POSITIVE_OR_NONE):
            if name in POSITIVE or getattr(self, name) is not None:
                low = 1.0 if name == "dual_clip" else 0.0
                _check_number(name, getattr(self, name), low=low, strict=True)
        if self.delta is not None and self.dual_clip is not None:
            raise ValueError(
                f"delta={self.delta} and dual_clip={self.dual_clip} bound the same thing (the ratio "
                "where the advantage is negative): give one"
            )
        self._check_effect()
        if self.reduction == "fixed_length":
            if self.max_length is None:
                raise ValueError("reduction='fixed_length' needs max_length, in tokens")
            if isinstance(self.max_length, bool) or not isinstance(self.max_length, int):
                raise TypeError(f"max_length: want an int, got {self.max_length!r}")
            if self.max_length <= 0:
                raise ValueError(f"max_length: want a positive int, got {self.max_length}")
        elif self.max_length is not None:
            raise ValueError(
                f"max_length={self.max_length} has no effect with reduction={self.reduction!r}; "
                "it belongs to 'fixed_length'"
            )
        for name in OPTIONS:  # Triton would compile another kernel for an int
            if name not in NOT_FLOATS and getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "terms", Terms(self._modes(), self._numbers()))

    def _modes(self) -> Modes:
        return Modes(
            self.surrogate,
            self.ratio,
            self.dppo_value,
            self.kl,
            self.kl_gradient,
            self.entropy_reduction,
            has_kl=self.beta != 0,
            has_bonus=self.entropy_coef != 0,
            has_penalty=self.quadratic_coef != 0,
            by_entropy=self.top_entropy_quantile < 1,
            drops_stale=self.off_policy_threshold is not None,
        )

    def _numbers(self) -> Tensor:
        given = [getattr(self, name) for name in NUMBERS]
        return operands([math.nan if x is None else x for x in given])

    def __reduce__(self) -> tuple:
        # `terms` is left out: a tensor that is sent to another process takes shared memory with it.
        return _rebuild, (type(self), {name: getattr(self, name) for name in OPTIONS})

    def _check_effect(self) -> None:
        """Refuse an option that has no effect with the others, unless it has its default."""
        for option, users in USED_BY.items():
            if self.surrogate not in users and getattr(self, option) != DEFAULTS[option]:
                raise ValueError(
                    f"{option}={getattr(self, option)} has no effect with surrogate="
                    f"{self.surrogate!r}; it belongs to {', '.join(users)}"
                )
        for option in ("kl_gap_clip", "kl_value_clip"):
            if getattr(self, option) is not None and not self.kl.startswith("k3"):
                raise ValueError(
                    f"{option}={getattr(self, option)} has no effect with kl={self.kl!r}; "
                    "it belongs to k3, k3_unbiased"
                )
        clamped = self.kl_gap_clip is not None or self.kl_value_clip is not None
        if self.kl_gradient != "own" and (
            self.kl in ("k2", "k3_unbiased") or (self.kl_gradient == "k2_clipped" and not clamped)
        ):
            reason = "without a clamp" if self.kl in ("k1", "abs", "k3") else f"with kl={self.kl!r}"
            raise ValueError(
                f"kl_gradient={self.kl_gradient!r} has no effect of its own {reason}; it belongs to "
                "k1, abs, k3, and 'k2_clipped' to a k3 with kl_gap_clip or kl_value_clip"
            )
        if self.surrogate.startswith("dppo") and self.dppo_value == "logp" and self.quadratic_coef:
            raise ValueError(
                f"quadratic_coef={self.quadratic_coef} has no effect with dppo_value='logp'; "
                "it belongs to 'ratio'"
            )
        if self.ratio != "token" and self.surrogate not in TAKES_RATIO and self.kl != "k3_unbiased":
            raise ValueError(
                f"ratio={self.ratio!r} has no effect with surrogate={self.surrogate!r}; it belongs to "
                f"{', '.join(TAKES_RATIO)}"
            )
        for option in ("log_ratio_clip", "log_ratio_max"):
            bound = getattr(self, option)
            if bound is not None and not SURROGATES[self.surrogate].uses_log_ratio:
                raise ValueError(
                    f"{option}={bound} has no effect with surrogate={self.surrogate!r}, "
                    "which does not use it"
                )
        if self.log_ratio_clip is not None and self.log_ratio_max is not None:
            raise ValueError(
                f"log_ratio_clip={self.log_ratio_clip} and log_ratio_max={self.log_ratio_max} "
                "bound the same thing from above: give one"
            )
        if self.entropy_reduction != "same" and not self.entropy_coef:
            raise ValueError(
                f"entropy_reduction={self.entropy_reduction!r} has no effect with entropy_coef=0"
            )

    @property
    def variant(self) -> str:
        """The name that the kernels have for the surrogate."""
        return self.terms.modes.variant

    @property
    def has_quadratic(self) -> bool:
        """Whether the surrogate has a term in d^2, which acts even where the advantage is 0."""
        return self.terms.modes.has_quadratic

    @property
    def needs_sequences(self) -> bool:
        """Whether the loss of a token depends on the log-probs of its whole sequence."""
        return self.terms.modes.needs_sequences

    @property
    def by_token(self) -> bool:
        """Whether a token's coefficient depends on that token alone: one launch is enough."""
        return self.terms.modes.by_token

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss depends on the entropy of the tokens."""
        return self.terms.modes.needs_entropy

    @property
    def log_ratio_bounds(self) -> tuple[float | None, float | None]:
        """The lower and the upper bound of d; None where there is none."""
        if self.log_ratio_clip is not None:
            return -self.log_ratio_clip, self.log_ratio_clip
        return None, self.log_ratio_max

    @staticmethod
    def preset(name: str, **overrides: Any) -> "Objective":
        """Return the objective that a paper or a trainer means by a name, with `overrides` on top.

            >>> Objective.preset("dapo", beta=0.01).epsilon_high
            0.28

        Papers: "grpo" (2402.03300: mean per sequence, beta 0.04), "dapo" (2503.14476: token mean,
        epsilon_high 0.28, no KL), "dr_grpo" (2503.20783: fixed length, no KL; needs `max_length`),
        "bnpo" (token mean over the batch of this call, no KL), "cispo" (2506.13585: ratio capped at
        5, no lower bound), "sapo" (2511.20347), "gspo" (2507.18071), "gmpo" (2507.20673), "vespo"
        (2602.10693), "gpg" (2504.02546), "dppo_tv", "dppo_kl" (2602.04879), "dro" (2501.12599),
        "topr" (2503.14286). Trainers: "trl/dapo", "trl/dapo/sequence", "verl/vanilla" and so on,
        with the defaults of that trainer. `grpo_fast.presets` is the table.

        Args:
            name: a key of `grpo_fast.presets.PRESETS`.
            overrides: options of `Objective`.

        Returns:
            `Objective`.

        Raises:
            ValueError: an unknown name, or a `surrogate` that is not the preset's.
        """
        check_preset(name)
        own = PRESETS[name].get("surrogate", DEFAULTS["surrogate"])
        asked = overrides.get("surrogate", own)
        if asked != own:
            raise ValueError(
                f"preset {name!r} is surrogate={own!r}, which surrogate={asked!r} contradicts; "
                f"choose another preset, or Objective(surrogate={asked!r}, ...)"
            )
        options = {**PRESETS[name], **overrides}
        if name.partition("/")[0] in ENTROPY_BY_TOKENS and options.get("entropy_coef"):
            options.setdefault("entropy_reduction", "token_mean")
        return Objective(**options)

    @staticmethod
    def from_terms(modes: Modes, numbers: Tensor) -> "Objective":
        """Return the objective of these terms, with the default reduction.

        Operators get the weight of each token in place of a reduction.
        """
        # None replaces NaN: NaN is not equal to itself, so the cache would never find it.
        return _from_numbers(modes, tuple([None if x != x else x for x in numbers.tolist()]))


@functools.lru_cache(maxsize=256)
def _from_numbers(modes: Modes, numbers: tuple[float | None, ...]) -> Objective:
    options: dict[str, Any] = dict(zip(NUMBERS, numbers, strict=True))
    unused = [name for name, users in USED_BY.items() if modes.surrogate not in users]
    absent = {
        "beta": not modes.has_kl,
        "entropy_coef": not modes.has_bonus,
        "quadratic_coef": not modes.has_penalty,
        "top_entropy_quantile": not modes.by_entropy,
        "off_policy_threshold": not modes.drops_stale,
        "log_ratio_clip": not SURROGATES[modes.surrogate].uses_log_ratio,
        "log_ratio_max": not SURROGATES[modes.surrogate].uses_log_ratio,
    }
    unused += [name for name, is_absent in absent.items() if is_absent]
    return Objective(
        surrogate=modes.surrogate,  # type: ignore[arg-type]
        ratio=modes.ratio,  # type: ignore[arg-type]
        dppo_value=modes.dppo_value,  # type: ignore[arg-type]
        kl=modes.kl,  # type: ignore[arg-type]
        kl_gradient=modes.kl_gradient,  # type: ignore[arg-type]
        **{name: x for name, x in options.items() if name not in unused},
    )


def _rebuild(cls: type[Objective], options: dict[str, Any]) -> Objective:
    return cls(**options)


# The ranges of the numbers; one that is in none of these tuples may be any finite number.
NOT_NEGATIVE = ("epsilon_low", "quadratic_coef", "beta", "topr_weight_pos", "topr_weight_neg")
POSITIVE = ("tau_pos", "tau_neg", "vespo_lambda_pos", "vespo_lambda_neg")
POSITIVE_OR_NONE = (
    "delta",
    "dual_clip",
    "ratio_cap",
    "log_ratio_clip",
    "log_ratio_max",
    "kl_gap_clip",
    "kl_value_clip",
)
NOT_FLOATS = (
    "max_length",
    "surrogate",
    "ratio",
    "reduction",
    "dppo_value",
    "kl",
    "kl_gradient",
    "entropy_reduction",
)
# Surrogates that take a sequence ratio: they are functions of the ratio alone.
TAKES_RATIO = tuple(name for name, row in SURROGATES.items() if row.takes_sequence_ratio)
# The surrogates that an option belongs to.
USED_BY = {option: users_of(option) for option in SURROGATE_OPTIONS}
Objective.__init__ = keywords_explained(  # type: ignore[method-assign]
    LOSS_ARGUMENTS, LOSSES_OWN, "Objective"
)(Objective.__init__)
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Objective)}
OPTIONS = tuple(field.name for field in dataclasses.fields(Objective) if field.init)


def _check_number(name: str, value: object, low: float | None = None, strict: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name}: want a number, got {value!r} ({type(value).__name__}){hint(name, value)}"
        )
    if not -math.inf < value < math.inf:  # `torch.compile` cannot trace `math.isfinite`
        raise ValueError(f"{name}: want a finite number, got {value}")
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name}: want a number that float32 can hold, got {value}")
    if low is not None and (value < low or (strict and value == low)):
        raise ValueError(f"{name}: want {'>' if strict else '>='} {low:g}, got {value}")
