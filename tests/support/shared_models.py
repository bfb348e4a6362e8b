"""Which routes of `grpo_fast.shared_prompt` are exact on the causal language models of transformers.

`tests.support.models` runs this for each model type on which `with_head` is exact, and writes the page
docs/shared_prompt_models.md.
"""

import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

PAGE = Path(__file__).resolve().parents[2] / "docs" / "shared_prompt_models.md"
TOLERANCE = 1e-5  # of the largest entry
ROUTES = ("packed", "mask", "fork", "bounded")
LISTED = ROUTES[:-1]  # "bounded" does what "fork" does
MASKS = ("prompt_mask", "completion_mask")
WINDOW = 4  # tokens; the prompts are longer
# What configurations call windows and chunks of attention, and how they are switched on.
WINDOWS = {
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "attention_window_size": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 0,
    "index_topk": WINDOW,  # sparse attention
    "index_block_size": 2,
    "index_topk_blocks": 2,
    "floor_scale": WINDOW,  # scales that grow with positions
    "keep_window_size": WINDOW,
}
# What the first two layers of these are by default is not what the models are known for.
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
UNROTATED = {"no_rope_layers": [1, 0]}
HYBRIDS: dict[str, dict[str, Any]] = {
    "laguna": SLIDING,
    "mellum": SLIDING,
    "qwen2": SLIDING,
    "qwen2_moe": SLIDING,
    "qwen3": SLIDING,
    "smollm3": SLIDING,
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"]},
    "llama4": UNROTATED,
    "llama4_text": UNROTATED,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
}


class Found(NamedTuple):
    """What a route does: "exact", "unpadded" (exact without padding), "refused", "raises" or "wrong"."""

    outcome: str
    why: str


def batch() -> dict[str, Any]:
    """Two ragged prompts, the first longer than the windows, with two completions each."""
    torch.manual_seed(1)
    prompts, completions = torch.randint(3, 64, (2, 9)), torch.randint(3, 64, (4, 6))
    return {
        "prompt_ids": prompts,
        "completion_ids": completions,
        "prompt_mask": (torch.arange(9) >= torch.tensor([[0], [2]])).long(),
        "completion_mask": (torch.arange(6) < torch.tensor([[6], [3], [1], [5]])).long(),
        "group_size": 2,
    }


def own_log_probs(model: Any, given: dict[str, Any], alone: bool) -> Tensor:
    """The log-probs of the completions from the model's own logits, (N,).

    Args:
        alone: each sequence without padding and without others beside it.
    """
    index = torch.arange(len(given["completion_ids"])) // given["group_size"]
    ids = torch.cat([given["prompt_ids"][index], given["completion_ids"]], 1)
    mask = torch.cat([given["prompt_mask"][index], given["completion_mask"]], 1)
    T = given["completion_ids"].shape[1]
    if alone:
        found = []
        for row, kept, length in zip(
            ids, mask.bool(), given["completion_mask"].sum(1), strict=True
        ):
            tokens = row[kept][None]
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
            found.append(_taken(logits, tokens, int(length))[0])
        return torch.cat(found)
    from grpo_fast.shared_prompt.routes import parameters_of

    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    options = positions if "position_ids" in parameters_of(model) else {}
    logits = model(input_ids=ids, attention_mask=mask, **options).logits
    return _taken(logits, ids, T)[given["completion_mask"].bool()]


def _taken(logits: Tensor, ids: Tensor, last: int) -> Tensor:
    scored = logits[:, -last - 1 : -1].log_softmax(-1)
    return scored.gather(-1, ids[:, -last:, None])[..., 0]


def graded(model: Any, log_probs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and the gradients of their sum with random weights."""
    model.zero_grad()
    weights = torch.randn(len(log_probs), generator=torch.Generator().manual_seed(2))
    (log_probs * weights).sum().backward()
    found = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return log_probs.detach(), {name: x.clone() for name, x in found.items()}


def difference(got: Any, want: Any) -> float:
    """The largest error of log-probs and gradients, relative to the largest entry."""
    (mine, found), (own, exact) = got, want
    names = found.keys() | exact.keys()
    top = max(x.abs().max().item() for x in exact.values())
    zero = torch.zeros(())
    errors = [(found.get(x, zero) - exact.get(x, zero)).abs().max().item() / top for x in names]
    return max((mine - own).abs().max().item() / own.abs().max().item(), *errors)


def routes_of(model: Any) -> dict[str, Found]:
    """What each route does on a model, and "auto" on a batch that it would share."""
    given = batch()
    truths = {
        name: graded(model, own_log_probs(model, given, alone))
        for name, alone in (("alone", True), ("padded", False))
    }
    found = {name: both_ways(model, given, name, truths) for name in ROUTES}
    if found["fork"].outcome == "refused":
        whole = given | {name: torch.ones_like(given[name]) for name in MASKS}
        exact = {"alone": graded(model, own_log_probs(model, whole, alone=True))}
        for name in ("fork", "bounded"):
            again = both_ways(model, whole, name, exact)
            if again.outcome == "exact":
                found[name] = Found("unpadded", again.why)
    return found | {"auto": auto_of(model)}


def scored(model: Any, plan: Any, route: str) -> Tensor:
    """The log-probs of a plan, (N,)."""
    from grpo_fast import linear_logprob
    from grpo_fast.shared_prompt import with_head

    def score(hidden: Tensor, head: Any) -> Tensor:
        return linear_logprob(hidden, head.weight, plan.targets, **head.options)

    return with_head(model, plan, score, route=route)


def both_ways(model: Any, given: dict[str, Any], route: str, truths: dict[str, Any]) -> Found:
    """What a route does with the completions of a prompt in a row each and in one row, if not the same."""
    from grpo_fast.shared_prompt import routes

    found = []
    for per_row in (1, 2) if route in ("fork", "bounded") else (1,):
        with mock.patch.object(routes, "least_work", lambda *_, per_row=per_row: per_row):
            found.append(route_of(model, given, route, truths))
    return next((x for x in found if x.outcome != "exact"), found[-1])


def route_of(model: Any, given: dict[str, Any], route: str, truths: dict[str, Any]) -> Found:
    """What one route does: exact if it agrees with one of the truths."""
    from grpo_fast.shared_prompt import plan

    shared = plan(**given)
    try:
        log_probs = scored(model, shared, route)
    except ValueError as refusal:
        return Found("refused", str(refusal).partition(f"route={route!r}: ")[2] or str(refusal))
    except Exception as error:
        return Found("raises", f"{type(error).__name__}: {error}"[:300])
    try:
        got = graded(model, log_probs)
    except Exception as error:
        return Found("raises", f"in the backward {type(error).__name__}: {error}"[:300])
    errors = {name: difference(got, want) for name, want in truths.items()}
    exact = min(errors.values()) <= TOLERANCE
    listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return Found("exact" if exact else "wrong", listed)


@torch.no_grad()
def auto_of(model: Any) -> Found:
    """What "auto" chooses for long prompts, and whether it is what the unshared forward gives."""
    from grpo_fast.shared_prompt import choose, plan

    torch.manual_seed(3)
    shared = plan(torch.randint(3, 64, (2, 40)), torch.randint(3, 64, (16, 4)), group_size=8)
    try:
        got, want = (scored(model, shared, route) for route in ("auto", "unshared"))
    except Exception as error:
        return Found("raises", f"{type(error).__name__}: {error}"[:300])
    error = ((got - want).abs().max() / want.abs().max()).item()
    return Found(
        "exact" if error <= TOLERANCE else "wrong", f"{choose(model, shared).route} {error:.1e}"
    )


def one(name: str) -> dict[str, Found]:
    """What each route does on the tiny model of a model type, with short windows where it has some."""
    from tests.support import models

    def built() -> Any:
        model = models.build(name, **WINDOWS | HYBRIDS.get(name, {}))
        model(input_ids=torch.randint(3, 64, (2, 8)), attention_mask=torch.ones(2, 8).long())
        return model

    found = routes_of(built())
    if any(x.outcome == "wrong" for x in found.values()):  # or only rounded
        model = built().double()
        model.set_experts_implementation("eager")  # the grouped product takes no float64
        again = routes_of(model)
        found = {
            route: Found("exact", f"{again[route].why} in float64")
            if x.outcome == "wrong" and again[route].outcome == "exact"
            else x
            for route, x in found.items()
        }
    return found


def section_of(found: dict[str, Found]) -> str:
    """The section of the page in which a model type is listed."""
    outcomes = {route: x.outcome for route, x in found.items()}
    forked = {outcomes["fork"], outcomes["bounded"]}
    if {"wrong", "raises"} & set(outcomes.values()) or len(forked) > 1:
        return "wrong"
    if "unpadded" in outcomes.values():
        return "unpadded"
    exact = [route for route in LISTED if outcomes[route] == "exact"]
    return " and ".join(exact) or "none"


HEADER = """\
# Which models can share prompts

This page lists the causal language models of transformers of which `grpo_fast.shared_prompt` can
forward a prompt once for all of its completions, and by which route.

`python -m tests.support.models --save` wrote it on commit {commit}, with transformers {transformers}
and torch {torch}, on a CPU in float32. The {total} model types on which
[`with_head` is exact](models.md) were built in a tiny size with random weights, with windows of
{window} tokens where the configuration has windows. The batch had two prompts with two completions
each, of different lengths; one prompt was longer than the windows. The log-probs and the gradients of
all parameters by the routes "packed", "mask", "fork" and "bounded" were compared with those of the
model's own logits. A route is listed if the largest error is at most {tolerance} of the largest
entry{rounded}. "bounded" does what "fork" does, and is exact for the same models. "flex" makes the
masks of "mask" in another form; it needs a GPU and was not tried.

`route="auto"` was run on all of them, and chose a route that is listed, or "unshared".
"""
SECTIONS = {
    "wrong": "Wrong\n\nThe results differ, or the route raises where it should have been refused.\n",
    "packed and mask and fork": "In a row without padding, by a mask, and from a cache\n\nRoutes: packed, "
    "mask, fork, bounded.\n",
    "mask and fork": "By a mask, and from a cache\n\nRoutes: mask, fork, bounded. Most of these models have "
    "no attention of kind sdpa in transformers; the others make masks of their own from what they are "
    "given.\n",
    "fork": "From a cache only\n\nRoutes: fork, bounded. Most of these models have recurrent layers. "
    "Llama 4 also takes a mask where\nthe rows have less than `floor_scale` tokens, 8192.\n",
    "packed and mask": "In a row without padding, and by a mask\n\nRoutes: packed, mask.\n",
    "mask": "By a mask only\n\nRoute: mask.\n",
    "unpadded": "From a cache, for prompts of one length\n\nRoutes: fork, bounded. The own code of these "
    "models counts padding on the left: it changes their results with and\nwithout shared prompts.\n",
    "none": "Not at all\n\n`choose` says why, and the prompts are not shared.\n",
}


def page(found: dict[str, dict[str, Found]], about: dict[str, Any]) -> str:
    """docs/shared_prompt_models.md.

    Args:
        found: of each model type, what `one` returned.
        about: commit and versions.
    """
    exact = [name for name, x in found.items() if any("float64" in y.why for y in x.values())]
    rounded = f"; for {_quoted(exact)} in float64" if exact else ""
    about = about | {"total": len(found), "window": WINDOW, "tolerance": TOLERANCE}
    parts = [_filled(HEADER.format(**about, rounded=rounded)) + "\n"]
    for section, text in SECTIONS.items():
        names = [name for name in found if section_of(found[name]) == section]
        if not names:
            continue
        listed = f"{len(names)} model types: {_quoted(names)}."
        if section in ("wrong", "none"):
            listed = _by_reason({name: found[name] for name in names}, section)
        parts.append(f"## {_filled(text)}\n\n{_filled(listed)}\n")
    return "\n".join(parts).rstrip() + "\n"


def _by_reason(found: dict[str, dict[str, Found]], section: str) -> str:
    """A list of reasons, with the model types that each is given for."""
    reasons: dict[str, list[str]] = {}
    for name, routes in found.items():
        shown = [(r, x) for r, x in routes.items() if section == "wrong" or r in LISTED]
        by_text: dict[str, list[str]] = {}
        for route, x in shown:
            by_text.setdefault(_general(x.why), []).append(route)
        why = "; ".join(f"{' and '.join(who)}: {text}" for text, who in by_text.items())
        reasons.setdefault(why, []).append(name)
    return "\n".join(f"- {_quoted(names)}: {why}." for why, names in sorted(reasons.items()))


def _general(why: str) -> str:
    """A reason without the class of the model and without measured numbers."""
    why = re.sub(r"\b\w+(ForCausalLM|LMHeadModel|Decoder)\b", "the model", why.split("\n")[0])
    return re.sub(r" by [\d.]+e[-+]\d+ of their norm", "", why).rstrip(".")


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _filled(text: str) -> str:
    """Wrap each paragraph and each item of a list; headings stay."""
    blocks = []
    for block in text.strip().split("\n\n"):
        lines = block.split("\n") if block.startswith("- ") else [block.replace("\n", " ")]
        options: dict[str, Any] = {"break_on_hyphens": False, "break_long_words": False}
        indents = ("  " if line.startswith("- ") else "" for line in lines)
        wrapped = (
            textwrap.fill(line, 100, subsequent_indent=indent, **options)
            for line, indent in zip(lines, indents, strict=True)
        )
        blocks.append("\n".join(wrapped))
    return "\n\n".join(blocks)
