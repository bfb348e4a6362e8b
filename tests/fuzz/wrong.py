"""Strategies for wrong calls: one argument of a valid call is replaced by a wrong one.

The call must raise ValueError or TypeError, with the name of the argument in the message.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import grpo_fast
from grpo_fast import Objective, diagnostics, weights
from grpo_fast.objective import OPTIONS
from tests.fuzz.drawing import Draws, refused

B, T, V, D = 2, 3, 5, 4
LOSS = ("mask", "old_logps", "ref_logps", "importance_weights", "token_weights")
# The arguments that must not require a gradient.
CONSTANT = ("advantages", "rewards", "importance_weights", "token_weights", "scores", "temperature")
NUMBERS = (
    "num_items",
    "loss_scale",
    "softcap",
    "logit_scale",
    "eps",
    "cap",
    "low",
    "high",
    "delta",
)
NUMBERS += ("threshold", "fraction", "floor", "epsilon_low", "epsilon_high")
WHOLE = ("group_size", "vocab_size", "chunk_size")
WORDS = ("logits_dtype", "scale", "baseline", "aggregation", "nan", "singleton", "level", "mode")
WORDS += ("undefined", "kind")
IDS = ("completion_ids", "ids")
ALONE = ("statistics", "gathered")
# Functions whose main argument gets a gradient.
TRAINED = ("grpo_loss", "policy_loss", "linear_", "logprob")
MAIN = ("logits", "logps", "hidden", "weight", "entropy", "old_logps", "weights")
# The main argument of a call gives the others their shape: the error may name one of these.
OTHERS = (*IDS, "mask", "old_logps", "other_logps", "sampling_logps", "advantages", "ref_logps")
OTHERS += ("weight", "bias", "cu_seqlens", "statistics", "gathered")


def calls(p: Draws) -> dict[str, tuple[Callable, dict[str, Any]]]:
    """A valid call of each function, with the values of its arguments by name."""
    tokens = {name: -p.randn(B, T).abs() for name in ("old_logps", "ref_logps")}
    tokens |= {name: p.randn(B, T).abs() for name in ("importance_weights", "token_weights")}
    tokens["mask"] = torch.ones(B, T)
    loss = {**tokens, "advantages": p.randn(B), "loss_scale": 2.0, "num_items": 5.0}
    loss["objective"] = Objective(beta=0.1, reduction="token_mean")
    ids, heat = p.integers(V, B, T), torch.ones(B, T)
    logits, hidden, weight = p.randn(B, T, V), p.randn(B, T, D), p.randn(V, D)
    packed = {k: x.flatten() if isinstance(x, Tensor) else x for k, x in loss.items()}
    packed["cu_seqlens"] = torch.tensor([0, 3, 6])
    topr = {"rewards": p.randn(B), "group_size": 2, "scores": p.randn(B), "mask": tokens["mask"]}
    topr |= {"objective": Objective(surrogate="topr"), "temperature": heat}
    head = {"bias": p.randn(V), "softcap": 5.0, "logit_scale": 0.5, "logits_dtype": "fp32"}
    head |= {"vocab_size": V, "chunk_size": 4, "temperature": heat}
    g = grpo_fast
    found = {
        "grpo_loss": (g.grpo_loss, {"logits": logits, "completion_ids": ids, **loss}),
        "grpo_loss, packed": (
            g.grpo_loss,
            {"logits": logits.flatten(0, 1), "completion_ids": ids.flatten(), **packed},
        ),
        "grpo_loss, rewards": (g.grpo_loss, {"logits": logits, "completion_ids": ids, **topr}),
        "policy_loss": (g.policy_loss, {"logps": -p.randn(B, T).abs(), **loss}),
        "policy_loss, packed": (g.policy_loss, {"logps": -p.randn(B * T).abs(), **packed}),
        "linear_grpo_loss": (
            g.linear_grpo_loss,
            {"hidden": hidden, "weight": weight, "completion_ids": ids, **head, **loss},
        ),
        "linear_logprob": (
            g.linear_logprob,
            {"hidden": hidden, "weight": weight, "ids": ids, **head, "mask": tokens["mask"]},
        ),
        "logprob": (
            g.logprob,
            {"logits": logits, "ids": ids, "temperature": heat, "mask": tokens["mask"]},
        ),
        "token_diagnostics": (
            g.token_diagnostics,
            {
                "logps": -p.randn(B, T).abs(),
                **{k: loss[k] for k in (*LOSS[:3], "advantages", "objective")},
            },
        ),
        "kl_estimate": (
            diagnostics.kl_estimate,
            {"logps": -p.randn(B, T).abs(), "ref_logps": tokens["ref_logps"]},
        ),
        "fold_statistics": (g.fold_statistics, {"gathered": p.randn(2, 16)}),
        "metrics_from": (g.metrics_from, {"statistics": p.randn(16)}),
    }
    return found | of_rewards(p) | of_weights(p, tokens)


def of_rewards(p: Draws) -> dict[str, tuple[Callable, dict[str, Any]]]:
    words: dict[str, Any] = {"scale": "group", "eps": 1e-4, "baseline": "mean"}
    words |= {"nan": "error", "singleton": "zero"}
    function = grpo_fast.group_advantage
    columns = {"rewards": p.randn(4, 2), "weights": p.randn(2), "aggregation": "sum_then_normalize"}
    labels = {"rewards": p.randn(4), "group_ids": torch.tensor([0, 1, 0, 1])}
    return {
        "group_advantage": (function, {"rewards": p.randn(4), "group_size": 2, **words}),
        "group_advantage, columns": (function, {**columns, "group_size": 2}),
        "group_advantage, labels": (function, labels),
        "weights.varied_groups": (weights.varied_groups, {**labels, "nan": "error"}),
    }


def of_weights(p: Draws, tokens: dict[str, Tensor]) -> dict[str, tuple[Callable, dict[str, Any]]]:
    mask, old = {"mask": tokens["mask"]}, tokens["old_logps"]
    pair = {"old_logps": old, "sampling_logps": tokens["ref_logps"], **mask}
    cov = {"logps": old, "advantages": p.randn(B), **mask, "fraction": 0.5}
    bounds = {"low": 0.5, "high": 2.0}
    found = {
        "importance_weights": {
            **pair,
            **bounds,
            "level": "token",
            "mode": "mask",
            "undefined": "one",
        },
        "truncated_importance": {**pair, "cap": 2.0, "level": "sequence"},
        "icepop": {**pair, **bounds},
        "geometric_mean": {"weights": tokens["importance_weights"], **mask, "eps": 0.1},
        "kpop": {**pair, "delta": 0.1},
        "binary_divergence": {
            **{"logps": old, "other_logps": tokens["ref_logps"], **mask},
            **{"kind": "kl", "floor": 0.1},
        },
        "m2po": {**pair, "threshold": 0.1},
        "top_entropy": {"entropy": tokens["importance_weights"], "fraction": 0.5, **mask},
        "clip_cov": {**cov, "old_logps": old, **bounds, "epsilon_low": 0.2, "epsilon_high": 0.2},
        "kl_cov": cov,
    }
    return {f"weights.{name}": (getattr(weights, name), words) for name, words in found.items()}


def wrong_tensors(name: str, x: Tensor, differentiable: bool) -> dict[str, Any]:
    """Wrong values in place of a tensor, by what is wrong.

    Args:
        differentiable: the function is; others take a tensor that requires a gradient.
    """
    found = {
        "text": "nonsense",
        "a list": x.tolist(),
        "one more": torch.cat([x, x[:1]]),
        "another dimension": x[None, None],
        "sparse": x.to_sparse(),
    }
    if name not in ALONE:  # it alone decides where to compute
        found["meta"] = x.to("meta")
    if x.is_floating_point() or name == "mask":
        found["complex"] = x.to(torch.complex64)
    if name in CONSTANT and differentiable:
        found["requires grad"] = x.clone().requires_grad_()
    if name in (*IDS, "cu_seqlens", "group_ids"):
        found |= {"float": x.float()}
    if name == "cu_seqlens":
        found |= {"decreasing": torch.tensor([0, 9, 6]), "short": x - 1, "empty": x[:0]}
        found["bool"] = x.bool()
    if name in IDS:
        found |= {"negative": x - 99, "too large": x + 99, "uint8": x.to(torch.uint8)}
    if name == "mask":
        found |= {"additive": -math.inf * x, "negative": -x, "nan": x * math.nan}
    if name == "temperature":
        found |= {"zero": 0 * x, "negative": -x, "nan": math.nan * x, "inf": x * math.inf}
    if name == "rewards" or (name == "weights" and x.ndim == 1):
        found |= {"nan": x * math.nan, "inf": x + math.inf}
    if name in ("logits", "hidden", "weight", "logps") and x.is_floating_point():
        found["integers"] = x.long()
    if name == "logits":
        found |= {
            "float64": x.double(),
            "columns": x.transpose(-1, -2).contiguous().transpose(-1, -2),
        }
        found["no vocabulary"] = x[..., :0]
    return found


def wrong_values(name: str, x: Any, differentiable: bool) -> dict[str, Any]:
    """Wrong values in place of an argument, by what is wrong; none if it may be anything."""
    if isinstance(x, Tensor):
        found = wrong_tensors(name, x, differentiable)
        if name == "rewards" and not differentiable:  # it alone decides where to compute
            del found["meta"]
        return found
    if name in NUMBERS or (name == "temperature"):
        found = {"text": "1.0", "nan": math.nan, "inf": math.inf, "complex": 1j, "a list": [1.0]}
        found["bool"] = True
        if name not in ("loss_scale", "low", "high", "epsilon_high"):
            found["negative"] = -1.0
        return found
    if name in WHOLE:
        return {"text": "2", "zero": 0, "negative": -2, "float": 2.0, "bool": True, "nan": math.nan}
    if name in WORDS:
        return {"unknown": "nonsense", "number": 3, "None": None}
    if name == "objective":
        return {"text": "grpo", "None": None, "a dict": {"beta": 0.1}}
    return {}


def wrong_argument_case(p: Draws) -> None:
    """One wrong argument in a call of a function."""
    every = calls(p)
    which = p.pick("function", *every)
    function, words = every[which]
    name = p.pick("argument", *words)
    wrong = wrong_values(name, words[name], which.startswith(TRAINED))
    if which.startswith("fold"):
        del wrong["one more"]
    if not which.startswith(TRAINED):  # the others take any real dtype
        wrong.pop("integers", None)
    what = p.pick("wrong", *wrong)
    known = (name, *OTHERS) if name in MAIN else (name,)
    if name == "rewards":
        known += ("group_ids", "group_size", "scores")
    refused(lambda: function(**{**words, name: wrong[what]}), *known)


def unknown_keyword_case(p: Draws) -> None:
    every = calls(p)
    function, words = every[p.pick("function", *every)]
    word = p.pick("keyword", "labels_", "clip_range", "nonsense", "Mask", "kl_coef")
    refused(lambda: function(**words, **{word: 1}), word)


def combination_case(p: Draws) -> None:
    """Arguments that do not go together, or one that is missing, in a call of a loss."""
    every = calls(p)
    which = p.pick("function", "grpo_loss", "policy_loss", "linear_grpo_loss")
    function, words = every[which]
    plain = Objective(reduction=p.pick("reduction", "token_mean", "sequence_mean"))
    mixed: tuple[tuple[str, dict[str, Any]], ...] = (
        ("advantages", {"advantages": None}),
        ("ref_logps", {"ref_logps": None}),
        ("scores", {"scores": p.randn(B)}),
        ("num_items", {"objective": Objective()}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 3, 6])}),
        ("old_logps", {"objective": Objective(surrogate="rollout_is"), "old_logps": None}),
        ("old_logps", {"objective": Objective(off_policy_threshold=0.1), "old_logps": None}),
    )
    if which == "policy_loss":
        mixed += (("entropy", {"objective": Objective(entropy_coef=0.1)}),)
        mixed += (("rewards", {"rewards": p.randn(B), "group_size": 2}),)
    else:
        mixed += (
            ("rewards", {"rewards": p.randn(B), "group_size": 2}),
            ("group_size", {"group_size": 2}),
            ("group_size", {"rewards": p.randn(B), "advantages": None}),
            ("group_size", {"rewards": p.randn(B), "advantages": None, "group_size": 1}),
            ("group_size", {"rewards": p.randn(B), "advantages": None, "group_size": 3}),
        )
    name, changed = p.pick("mixed", *mixed)
    given = {**words, "objective": plain} if name not in ("ref_logps", "num_items") else dict(words)
    if "objective" in changed or plain.reduction != "token_mean":
        given.pop("num_items")
    given |= changed
    if name == "num_items":
        given["num_items"] = 5.0
    if name == "advantages" and which == "policy_loss":
        del given["advantages"]
    refused(lambda: function(**given), name)


OPTION_WORDS = ("surrogate", "ratio", "reduction", "kl", "kl_gradient", "dppo_value")
OPTION_WORDS += ("entropy_reduction",)


NO_NUMBERS = (math.nan, "1.0", math.inf, -math.inf, True, 1e300, 1j, [1.0])
USELESS: tuple[dict[str, Any], ...] = (
    {"tau_pos": 2.0},
    {"max_length": 5},
    {"vespo_k_pos": 1.0},
    {"ratio": "sequence", "surrogate": "reinforce"},
    {"kl_gap_clip": 1.0, "kl": "k1"},
    {"delta": 1.5, "dual_clip": 2.0},
    {"log_ratio_clip": 1.0, "log_ratio_max": 1.0},
    {"quadratic_coef": 1.0},
    {"entropy_reduction": "token_mean"},
    {"epsilon_low": 0.3, "surrogate": "sapo"},
    {"kl_gradient": "k2", "kl": "k2"},
    {"ratio_cap": 3.0},
)


def wrong_option_case(p: Draws) -> None:
    """A wrong value of an option, or an option without effect."""
    name = p.pick("option", *OPTIONS)
    if name in OPTION_WORDS:
        value = p.pick("value", "nonsense", 3, None, b"clip")
    else:
        value = p.pick("value", *NO_NUMBERS)
        if name == "max_length" and value in (math.nan, True):
            value = 0
    refused(lambda: Objective(**{name: value}), name)
    useless = p.pick("useless", *USELESS)
    refused(lambda: Objective(**useless), next(iter(useless)))


def preset_case(p: Draws) -> None:
    """A preset is built from the table with overrides on top; an unknown name is refused."""
    name = p.pick("preset", *grpo_fast.presets.PRESETS)
    rows = grpo_fast.presets.PRESETS[name]
    more = {"max_length": 7} if rows.get("reduction") == "fixed_length" else {}
    more |= p.pick("more", {}, {"entropy_coef": 0.5})
    found = Objective.preset(name, **more)
    for option, value in {**rows, **more}.items():
        assert getattr(found, option) == value, (option, getattr(found, option), value)
    by_tokens = name.startswith("trl/") and "entropy_coef" in more
    assert (found.entropy_reduction == "token_mean") == by_tokens, found.entropy_reduction
    bad = p.pick("bad", name + "x", name.upper() + "?", 3, None)
    refused(lambda: Objective.preset(bad), "preset")
    other = "sapo" if found.surrogate != "sapo" else "clip"
    refused(lambda: Objective.preset(name, surrogate=other), "surrogate")


CASES = {
    "wrong arguments": wrong_argument_case,
    "unknown keywords": unknown_keyword_case,
    "wrong combinations": combination_case,
    "Objective": wrong_option_case,
    "Objective.preset": preset_case,
}
