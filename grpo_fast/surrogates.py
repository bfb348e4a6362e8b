"""The table of surrogates: one row each, from which everything that asks about a surrogate is derived.

A formula has three homes: `surrogate_loss` in `grpo_fast.reference`, and `surrogate_terms` in
`grpo_fast/torch_kernels/terms.py` and `kernels/terms.py`. CONTRIBUTING.md says how to add one.
"""

from typing import Literal, NamedTuple

Surrogate = Literal[
    "clip",
    "cispo",
    "sapo",
    "reinforce",
    "dppo_tv",
    "dppo_kl",
    "ipo",
    "dro",
    "rollout_is",
    "vespo",
    "gmpo",
    "topr",
]


class Row(NamedTuple):
    """The properties of a surrogate."""

    options: tuple[str, ...] = ()  # the options of `Objective` that belong to it
    takes_sequence_ratio: bool = False  # the ratio may be that of the sequence (GSPO)
    uses_log_ratio: bool = True  # `log_ratio_clip` and `log_ratio_max` act on it
    by_sequence: bool = False  # a token's loss depends on its whole sequence
    has_quadratic: bool = False  # it has a term in d^2, which acts where the advantage is 0
    takes_scores: bool = False  # it takes the argument `scores`
    needs_old_logps: bool = False  # it makes no sense on policy


RANGE = ("epsilon_low", "epsilon_high")
DPPO = (*RANGE, "ratio_cap", "dppo_value", "quadratic_coef")
VESPO = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
SURROGATES: dict[str, Row] = {
    "clip": Row((*RANGE, "delta", "dual_clip"), takes_sequence_ratio=True),
    "cispo": Row(RANGE, takes_sequence_ratio=True),
    "sapo": Row(("tau_pos", "tau_neg"), takes_sequence_ratio=True),
    "reinforce": Row(uses_log_ratio=False),
    "dppo_tv": Row(DPPO),
    "dppo_kl": Row(DPPO),
    "ipo": Row((*RANGE, "quadratic_coef"), has_quadratic=True),
    "dro": Row(("quadratic_coef",), uses_log_ratio=False, has_quadratic=True),
    "rollout_is": Row(RANGE, takes_sequence_ratio=True, needs_old_logps=True),
    "vespo": Row(VESPO, uses_log_ratio=False, by_sequence=True),
    "gmpo": Row(RANGE, uses_log_ratio=False, by_sequence=True),
    "topr": Row(("topr_weight_pos", "topr_weight_neg"), takes_scores=True),
}


def users_of(option: str) -> tuple[str, ...]:
    """The surrogates that an option belongs to."""
    return tuple(name for name, row in SURROGATES.items() if option in row.options)


OPTIONS = tuple(dict.fromkeys(option for row in SURROGATES.values() for option in row.options))
