"""`Objective`: what is optimised, as one frozen, validated value."""

import ast
import dataclasses
import functools
import math
from typing import Any, Literal, get_args

Surrogate = Literal["clip"]
KL = Literal["k1", "abs", "k2", "k3", "k3_unbiased"]
Reduction = Literal["sequence_mean", "token_mean", "sequence_sum", "fixed_length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A member of the GRPO family: surrogate, KL estimator, reduction, and their scalars.

    With d = logp - old_logp, r = exp(d), A the advantage and q = ref_logp - logp, token t contributes
    `w_t * (importance_t * surrogate(r, A) + beta * kl(q) - entropy_coef * H_t)`, where the reduction
    fixes w_t.

    Attributes:
        surrogate: "clip": `-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)` (PPO, GRPO).
        reduction: the weights w_t of live tokens, with n_b the live tokens of sequence b out of B:
            "sequence_mean" 1 / (n_b B) (GRPO); "token_mean" 1 / sum_b n_b, or 1 / `num_items`
            (DAPO); "sequence_sum" 1 / B; "fixed_length" 1 / (B max_length) (Dr. GRPO).
        max_length: tokens; needed by, and only legal with, "fixed_length".
        epsilon_low, epsilon_high: how far below and above 1 the ratio may go before it is clipped.
        delta: TRL's two-sided clamp: r A becomes `min(r, delta) A` in the unclipped branch.
        dual_clip: verl's c > 1: for A < 0 the token loss is at most -c A.
        beta: weight of the KL penalty to the reference policy. 0 needs no `ref_logps`.
        kl: estimator of KL(policy || reference): "k1" -q, "abs" |q|, "k2" q²/2, "k3" e^q - q - 1,
            "k3_unbiased" r (e^q - q - 1), differentiated through r.
        entropy_coef: weight of the entropy bonus; positive values reward entropy.

    Raises:
        ValueError, TypeError: an unknown choice, a value out of range, or an option that the other
            options leave without effect.

    Sources: GRPO arXiv 2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783, dual clip 1912.09729;
        estimators: J. Schulman, "Approximating KL divergence" (2020).
    """

    surrogate: Surrogate = "clip"
    reduction: Reduction = "sequence_mean"
    max_length: int | None = None
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    dual_clip: float | None = None
    beta: float = 0.0
    kl: KL = "k3"
    entropy_coef: float = 0.0
    # The same value as a string, so that it can cross into a custom operator's schema.
    key: str = dataclasses.field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        _check_choice("surrogate", self.surrogate, get_args(Surrogate))
        _check_choice("reduction", self.reduction, get_args(Reduction))
        _check_choice("kl", self.kl, get_args(KL))
        for name in ("epsilon_low", "epsilon_high", "beta"):
            _check_number(name, getattr(self, name), low=0.0)
        _check_number("entropy_coef", self.entropy_coef)
        if self.delta is not None:
            _check_number("delta", self.delta, low=0.0, strict=True)
        if self.dual_clip is not None:
            _check_number("dual_clip", self.dual_clip, low=1.0, strict=True)
        if self.delta is not None and self.dual_clip is not None:
            raise ValueError(
                f"delta={self.delta} and dual_clip={self.dual_clip} bound the same thing (the ratio "
                "where the advantage is negative): give one"
            )
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
        for name in ("epsilon_low", "epsilon_high", "delta", "dual_clip", "beta", "entropy_coef"):
            if getattr(self, name) is not None:  # an int would compile a kernel of its own
                object.__setattr__(self, name, float(getattr(self, name)))
        options = tuple(getattr(self, name) for name in OPTIONS)
        object.__setattr__(self, "key", repr(options))

    @staticmethod
    def preset(name: str, **overrides: Any) -> "Objective":
        """The objective a paper describes, with `overrides` on top.

        "grpo" (2402.03300: per-sequence means, beta 0.04), "dapo" (2503.14476: token mean, clip-higher
        0.28, no KL), "dr_grpo" (2503.20783: fixed length, no KL; needs `max_length`), "bnpo" (token
        mean over the batch at hand, no KL).

        Raises:
            ValueError: an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; there are {', '.join(sorted(PRESETS))}")
        return Objective(**{**PRESETS[name], **overrides})

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def from_key(key: str) -> "Objective":
        """The objective whose `key` this is."""
        return Objective(**dict(zip(OPTIONS, ast.literal_eval(key), strict=True)))


OPTIONS = tuple(field.name for field in dataclasses.fields(Objective) if field.init)

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"reduction": "sequence_mean", "beta": 0.04, "kl": "k3"},
    "dapo": {"reduction": "token_mean", "epsilon_high": 0.28},
    "dr_grpo": {"reduction": "fixed_length"},
    "bnpo": {"reduction": "token_mean"},
}


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose from {', '.join(choices)}")


def _check_number(name: str, value: object, low: float | None = None, strict: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: want a number, got {value!r} ({type(value).__name__})")
    if not math.isfinite(value):
        raise ValueError(f"{name}: want a finite number, got {value}")
    if low is not None and (value < low or (strict and value == low)):
        raise ValueError(f"{name}: want {'>' if strict else '>='} {low:g}, got {value}")
