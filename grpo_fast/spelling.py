"""Errors for unknown names: they say which name is meant, and know the names of TRL, verl and others."""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from grpo_fast.presets import PRESETS

F = TypeVar("F", bound=Callable)

# Other projects' names of an argument of the losses or an option of `Objective`. If several are
# listed, the one that the function has counts.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    name: ours
    for names, ours in (
        ("epsilon eps clip_ratio clip_range cliprange eps_clip clip_eps", ("epsilon_low", "epsilon_high")),
        ("clip_ratio_low cliprange_low eps_clip_low clip_eps_low", ("epsilon_low",)),
        ("clip_ratio_high cliprange_high eps_clip_high clip_eps_high", ("epsilon_high",)),
        ("clip_ratio_c eps_clip_c", ("dual_clip",)),
        ("kl_coef kl_beta kl_loss_coef kl_weight kl_penalty_coef init_kl_coef", ("beta",)),
        ("kl_loss_type kl_type kl_penalty kl_estimator", ("kl",)),
        ("entropy_coeff ent_coef entropy_weight entropy_loss_coef", ("entropy_coef",)),
        ("loss_type loss_mode policy_loss_type", ("surrogate", "reduction")),
        ("loss_agg_mode loss_reduction", ("reduction",)),
        ("importance_sampling_level", ("ratio",)),
        ("max_completion_length loss_scale_factor", ("max_length",)),
        ("sapo_temperature_pos", ("tau_pos",)),
        ("sapo_temperature_neg", ("tau_neg",)),
        ("off_policy_mask_threshold", ("off_policy_threshold",)),
        ("num_generations rollout_n n_samples_per_prompt n", ("group_size",)),
        ("scale_rewards norm_adv_by_std_in_grpo", ("scale",)),
        ("uid index", ("group_ids",)),
        ("reward scores", ("rewards",)),
        ("num_items_in_batch", ("num_items",)),
        ("old_per_token_logps old_log_prob old_log_probs old_logprobs", ("old_logps",)),
        ("ref_per_token_logps ref_log_prob ref_log_probs ref_logprobs", ("ref_logps",)),
        ("per_token_logps log_prob log_probs logprobs", ("logps",)),
        ("importance_sampling_ratio rollout_is_weights is_weights", ("importance_weights",)),
        ("attention_mask completion_mask response_mask loss_mask action_mask", ("mask",)),
        ("labels input_ids responses targets target_ids", ("completion_ids", "ids")),
        ("hidden_states last_hidden_state", ("hidden",)),
        ("lm_head lm_head_weight", ("weight",)),
    )
    for name in names.split()
}  # fmt: skip
# Other projects' names of a choice. A whole objective, such as "gspo", is a preset.
CHOICES: dict[str, str] = {
    "ppo": "clip",
    "vanilla": "clip",
    "regular": "clip",
    "geo_mean": "gmpo",
    "pg": "reinforce",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "fixed_length",
    "seq": "sequence",
    "low_var_kl": "k3",
    "mse": "k2",
    "rloo": "leave_one_out",
    "gdpo": "normalize_then_sum",
}
# What to say of an argument that another function takes.
OBJECTIVES_OWN = "; it belongs to the objective: objective=Objective({ours}=...)"
LOSSES_OWN = "; it belongs to the losses: grpo_loss(..., {ours}=...)"
LOSS_ARGUMENTS = (
    *("advantages", "rewards", "group_size", "mask", "old_logps", "ref_logps"),
    *("num_items", "loss_scale"),
    *("importance_weights", "token_weights", "scores", "cu_seqlens", "temperature"),
    *("return_entropy", "inplace", "entropy"),
)


def spelled(name: str) -> str:
    """Return a name without the differences of spelling: case, hyphens, underscores, slashes, spaces."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def closest(name: object, known: Iterable[str], others: dict[str, str] | None = None) -> list[str]:
    """Return up to four known names, the most likely first; one where the spelling leaves no doubt."""
    if not isinstance(name, str):
        return []
    by_spelling: dict[str, list[str]] = {}
    for x in known:
        by_spelling.setdefault(spelled(x), []).append(x)
    mine = spelled(name)
    for wanted in (mine, spelled((others or {}).get(name.lower(), ""))):
        if len(by_spelling.get(wanted, ())) == 1:
            return by_spelling[wanted]
    # "vanilla" is the end of two names; a short name is close to too many.
    ends = [x for x in known if "/" in x and mine and spelled(x.partition("/")[2]) == mine]
    near = difflib.get_close_matches(mine, by_spelling, n=4, cutoff=0.7)
    return list(dict.fromkeys([*ends, *(x for key in near for x in by_spelling[key])]))[:4]


def did_you_mean(names: Iterable[str]) -> str:
    """Return "; did you mean 'x' or 'y'?", or "" without any name."""
    quoted = [repr(name) for name in names]
    return f"; did you mean {' or '.join(quoted)}?" if quoted else ""


def check_preset(name: object) -> None:
    """Refuse a name that no preset has; the error says which names are close."""
    if not isinstance(name, str):
        raise TypeError(f"preset: want a name, such as 'grpo', got {name!r}")
    if name in PRESETS:
        return
    near = closest(name, PRESETS)
    hint = did_you_mean(near) or "."
    trainer = name.partition("/")[0]
    own = [x for x in PRESETS if x.startswith(f"{trainer}/") and not x.endswith("/sequence")]
    if own and len(near) != 1:
        hint = f"; there are {', '.join(own)}."
    raise ValueError(
        f"preset {name!r} is unknown{hint} The list is grpo_fast.presets.PRESETS; docs/objectives.md "
        "explains it."
    )


def check_choice(name: str, value: object, choices: tuple[str, ...], op: str = "") -> None:
    """Refuse a value that is not among the choices; the error says which one may be meant."""
    if isinstance(value, str) and value in choices:
        return
    hint = did_you_mean(closest(value, choices, CHOICES))
    whole = [x for x in PRESETS if isinstance(value, str) and spelled(x) == spelled(value)]
    if name == "surrogate" and whole:
        hint = f"; did you mean Objective.preset({whole[0]!r})?"
    before = f"{op}: " if op else ""
    raise ValueError(f"{before}{name}={value!r} is unknown; choose from {', '.join(choices)}{hint}")


def check_keywords(
    function: str, given: Iterable[str], known: Iterable[str], elsewhere: Iterable[str], note: str
) -> None:
    """Refuse a keyword argument that a function does not have; the error says its name here.

    Args:
        elsewhere: names that another function takes.
        note: the sentence that says so, with {ours} for the name.
    """
    for name in given:
        if name not in known:
            hint = _instead(name, tuple(known), tuple(elsewhere), note)
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def _instead(name: str, known: tuple[str, ...], elsewhere: tuple[str, ...], note: str) -> str:
    theirs = ARGUMENTS.get(name, (name,))
    ours = [x for x in theirs if x in known]
    if ours:
        return f"; did you mean {' and '.join(map(repr, ours))}?"
    ours = [x for x in theirs if x in elsewhere]
    if ours:
        return note.format(ours="=..., ".join(ours))
    return did_you_mean(closest(name, known)[:1])


def keywords_explained(
    elsewhere: Iterable[str] = (), note: str = OBJECTIVES_OWN, name: str | None = None
) -> Callable[[F], F]:
    """Return a decorator: an unknown keyword argument becomes an error that names the right one.

    Signature, docstring and type of the function stay as they are.

    Args:
        elsewhere, note: as in `check_keywords`.
        name: the name of the function in the error; default: its own.
    """

    def decorate(function: F) -> F:
        known = tuple(inspect.signature(function).parameters)

        @functools.wraps(function)
        def checked(*args, **kwargs):  # type: ignore[no-untyped-def]
            check_keywords(name or function.__name__, kwargs, known, elsewhere, note)
            return function(*args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate
