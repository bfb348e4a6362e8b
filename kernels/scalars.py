"""The numbers and modes of an objective, as the kernels take them: a named tuple for each surrogate.

A number is an argument of a launch: a new value compiles nothing. A mode is a compile-time constant. A bound
that is not set is infinite.
"""

import collections
import functools
from typing import Any, NamedTuple

from grpo_fast.surrogates import SURROGATES


class ClipScalars(NamedTuple):
    """Numbers of "clip"."""

    ratio_min: float
    ratio_max: float
    delta: float
    dual_clip: float


class RatioRange(NamedTuple):
    """Numbers of "cispo" and "rollout_is": the range of the ratio.

    The last two are not used. Which registers the assembler chooses depends on the layout of the arguments:
    without them the kernel of "rollout_is" takes 106 in the place of 92 (sm_90, Triton 3.7.1).
    """

    ratio_min: float
    ratio_max: float
    unused: float = float("inf")
    unused_too: float = 0.0


class SapoScalars(NamedTuple):
    """Numbers of "sapo"."""

    tau_pos: float
    tau_neg: float


class DistanceScalars(NamedTuple):
    """Numbers of "dppo_tv", "dppo_kl", "ipo" and "dro": how far a token may move, and what it costs.

    "ipo" has no cap of the ratio: it is infinite. "dro" uses the coefficient alone.
    """

    low: float  # bound of a move down
    high: float  # bound of a move up
    ratio_cap: float
    quadratic_coef: float  # of d^2


class VespoScalars(NamedTuple):
    """Numbers of "vespo": exponent and rate, by the sign of the advantage."""

    k_pos: float
    k_neg: float
    lambda_pos: float
    lambda_neg: float


class GmpoScalars(NamedTuple):
    """Numbers of "gmpo": bounds of the log-ratio d are -low and high."""

    low: float
    high: float


class ToprScalars(NamedTuple):
    """Numbers of "topr": weights by the sign of the score."""

    weight_pos: float
    weight_neg: float


class LogRatioRange(NamedTuple):
    """Where a log-ratio is clamped before anything else."""

    lowest: float
    highest: float


class KLScalars(NamedTuple):
    """Numbers of the KL term: its coefficient, and clamps of ref_logp - logp and of the estimate."""

    beta: float
    gap_clip: float
    value_clip: float


class Scalars(NamedTuple):
    """All numbers of an objective that act on a token's log-prob."""

    surrogate: Any  # one of the tuples above, or None: "reinforce" has no numbers
    log_ratio: LogRatioRange
    kl: KLScalars


class Modes(NamedTuple):
    """The parts of an objective that select code, at compile time."""

    SURROGATE: str
    KL: str
    KL_GRADIENT: str
    QUADRATIC: bool  # the surrogate has a term in d^2


@functools.lru_cache(maxsize=256)
def scalars_of(objective) -> Scalars:
    """The numbers of a `grpo_fast.Objective`."""
    lowest, highest = objective.log_ratio_bounds
    return Scalars(
        _surrogate_scalars(objective),
        LogRatioRange(float("-inf") if lowest is None else lowest, _or_infinite(highest)),
        KLScalars(
            objective.beta,
            _or_infinite(objective.kl_gap_clip),
            _or_infinite(objective.kl_value_clip),
        ),
    )


@functools.lru_cache(maxsize=256)
def modes_of(objective) -> Modes:
    """The modes of a `grpo_fast.Objective`."""
    return Modes(
        objective.variant, objective.kl, objective.kl_gradient, bool(objective.has_quadratic)
    )


def _surrogate_scalars(o):
    low, high = o.epsilon_low, o.epsilon_high
    match o.surrogate:
        case "clip":
            bounds = _or_infinite(o.delta), _or_infinite(o.dual_clip)
            return ClipScalars(1.0 - low, 1.0 + high, *bounds)
        case "cispo" | "rollout_is":
            return RatioRange(1.0 - low, 1.0 + high)
        case "sapo":
            return SapoScalars(o.tau_pos, o.tau_neg)
        case "dppo_tv" | "dppo_kl" | "ipo" | "dro":
            return DistanceScalars(low, high, _or_infinite(o.ratio_cap), o.quadratic_coef)
        case "vespo":
            rates = o.vespo_lambda_pos, o.vespo_lambda_neg
            return VespoScalars(o.vespo_k_pos, o.vespo_k_neg, *rates)
        case "gmpo":
            return GmpoScalars(low, high)
        case "topr":
            return ToprScalars(o.topr_weight_pos, o.topr_weight_neg)
    options = SURROGATES[o.surrogate].options
    values = (_or_infinite(getattr(o, name)) for name in options)
    return _named(options)(*values) if options else None  # None: "reinforce" has no numbers


@functools.cache
def _named(options):
    """A named tuple for a surrogate without one above; its fields have the names of the options."""
    return collections.namedtuple("SurrogateScalars", options)


def _or_infinite(bound: float | None) -> float:
    return float("inf") if bound is None else bound
