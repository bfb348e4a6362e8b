"""`choose`: which route a forward takes, and why; and what each route cannot compute exactly."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import cache_utils

from grpo_fast.integrations.transformers import COMPILED, causal_lm, text_config, wrappers
from grpo_fast.shared_prompt.caches import is_recurrent, new_cache
from grpo_fast.shared_prompt.masks import BLOCKS, BOOLEAN, FLOAT
from grpo_fast.shared_prompt.packing import SDPA, pairs_in_masks
from grpo_fast.shared_prompt.plans import Plan
from grpo_fast.shared_prompt.recompute import asks_for_recomputation, checkpointed_layers
from grpo_fast.shared_prompt.routes import (
    COPY,
    ROUTES,
    cache_argument,
    least_work,
    parameters_of,
    second_pass,
)

SHARING = ("packed", "mask", "flex", "fork")  # what "auto" chooses from
SEVERAL = "several in a row"  # a fork with several completions in a row, in `INEXACT`
# Below, sharing does not pay for its additional work. That of `packed` is in its estimate.
LEAST_GAIN = {"packed": 1.05, "mask": 1.3, "flex": 1.3, "fork": 1.3}
LARGEST_MASK = 2**28  # pairs of tokens; a dense mask has a byte or more for each
# FlexAttention is slower than rows without sharing up to about this length (KempnerForge#207).
SHORTEST_FLEX = 1024
# What the second pass of a fork costs besides its tokens, in tokens of a forward: launches, and smaller
# products. Measured on a CPU with a model of 135M weights; on a GPU a guess.
SECOND_PASS = {"cpu": 16, "cuda": 512}
# What an attention of its own costs a prompt or a completion besides its tokens, in tokens of a forward: its
# launches. Measured on a CPU with a model of 135M weights; on a GPU a guess.
OWN_ATTENTION = {"cpu": 0.5, "cuda": 32}


# Of each model, the routes that a comparison has shown to be wrong, with their attention, and how.
INEXACT: "weakref.WeakKeyDictionary[Any, dict[tuple[str, str], str]]" = weakref.WeakKeyDictionary()


class Choice(NamedTuple):
    """A route and the reason for it, one sentence."""

    route: str
    reason: str

    @property
    def line(self) -> str:
        """Return the line that trainers print."""
        shared = "not shared" if self.route == "unshared" else f"shared, route {self.route}"
        return f"prompts {shared}: {self.reason}"


class Impossible(Choice):
    """The choice not to share prompts that several completions have, because no route is exact."""

    __slots__ = ()


def choose(model: nn.Module, plan: Plan, route: str = "auto") -> Choice:
    """Return the route that a forward takes.

    "auto" estimates the work of each route that is exact for this model: its tokens, padding included, and
    its pairs of tokens in attention. It shares prompts if the work of the padded batch is at least 1.05
    times that of `packed`, or 1.3 times that of another route.

        >>> lm = tiny_causal_lm()
        >>> plan = shared_prompt.plan(torch.full((4, 30), 5), torch.full((4, 3), 6))
        >>> assert shared_prompt.choose(lm, plan).route in ("packed", "mask")

    Args:
        model: a causal LM of transformers, wrapped (PEFT, DDP, ...) or not.
        plan: what is to be forwarded.
        route: "auto", or a route that must be possible.

    Returns:
        The route, and the reason for it in one sentence.

    Raises:
        ValueError: there is no such route, or the route that was asked for is not exact for this model and
            plan; or the model has an adapter that no route runs (aLoRA). The message says why.
    """
    _check_adapter(model)
    if route != "auto":
        if route not in ROUTES:
            raise ValueError(f"shared_prompt: route: want auto, {', '.join(ROUTES)}, got {route!r}")
        why_not = obstacle(model, plan, route)
        if why_not:
            raise ValueError(f"shared_prompt: route={route!r}: {why_not}")
        return Choice(route, "it was asked for")
    why_not = shared_obstacle(model, plan)
    several = len(plan.prompt_of) > len(plan.prompt_lengths)
    if not len(plan.prompt_of):
        why_not = "there are no completions"
    if why_not:
        return (Impossible if several else Choice)("unshared", why_not)
    lm = causal_lm(model)
    D, packs = text_config(lm).hidden_size, can_pack(lm)
    padded = work(plan, "unshared", D)
    costs = {name: work(plan, name, D, packs) for name in SHARING}
    gains = {name: padded / costs[name] for name in SHARING}
    paying = [name for name in SHARING if gains[name] >= LEAST_GAIN[name]]
    if not paying:
        return Choice("unshared", _gain(plan, max(gains.values())))
    obstacles = {name: obstacle(model, plan, name) for name in SHARING}
    if not obstacles["mask"] and len(plan.prompt_lengths) * plan.row_length**2 > LARGEST_MASK:
        obstacles["mask"] = "its dense mask would be too large"
    if not obstacles["packed"] and pairs_in_masks(plan, text_config(lm)) > LARGEST_MASK:
        obstacles["packed"] = "the masks of its completions would be too large"
    if not obstacles["flex"] and plan.row_length < SHORTEST_FLEX:
        obstacles["flex"] = f"FlexAttention is slow below {SHORTEST_FLEX} tokens in a row"
    possible = [name for name in SHARING if not obstacles[name]]
    if not possible:
        reasons = dict.fromkeys(str(why) for why in obstacles.values())
        return Impossible("unshared", "; ".join(reasons))
    best = min((x for x in possible if x in paying), key=lambda name: costs[name], default=None)
    if best is None:
        return Choice("unshared", _gain(plan, max(gains[name] for name in possible)))
    # On a CPU there is no use for FlexAttention, which has no backward there.
    usual = [name for name in SHARING if name != "flex" or plan.prompt_ids.is_cuda]
    others = [f"not {name}: {obstacles[name]}" for name in usual if obstacles[name]]
    return Choice(best, "; ".join([_gain(plan, gains[best]), *others]))


def _check_adapter(model: nn.Module) -> None:
    """Refuse adapters that look for tokens of their own in each row that the model is given."""
    for module in wrappers(model):
        peft = getattr(module, "active_peft_config", None)
        if getattr(peft, "alora_invocation_tokens", None):
            raise ValueError(
                "shared_prompt: model: aLoRA (PEFT) looks for its invocation tokens in each sequence, and "
                "here prompts are apart: use with_head of grpo_fast.integrations.transformers"
            )


def _gain(plan: Plan, gain: float) -> str:
    return (
        f"{plan.tokens_given} tokens padded, {tokens(plan)} different ones; the padded batch is estimated at "
        f"{gain:.2f} times the work"
    )


def tokens(plan: Plan) -> int:
    """Return how many different tokens a plan has: of each prompt once, and of all completions."""
    return int(plan.prompt_lengths.sum() + plan.completion_lengths.sum())


def work(plan: Plan, route: str, hidden_size: int, packs: bool = False) -> float:
    """Estimate the work of a route, in tokens that pass through the model, as `second_pass` does.

    Args:
        packs: the model takes several completions of a prompt in one row behind its cache.
    """
    pair = 1 / (6 * hidden_size)
    K, (P, T) = len(plan.prompt_lengths), plan.longest
    if route == "unshared":
        S = P + T
        return len(plan.completion_lengths) * S * (1 + S * pair)
    if route in ("mask", "flex"):
        S = plan.row_length
        # FlexAttention skips blocks of pairs that do not see each other.
        pairs = K * S * S if route == "mask" else len(plan.completion_lengths) * T * (P + T)
        return K * S + pairs * pair
    device = "cuda" if plan.prompt_ids.is_cuda else "cpu"
    if route == "packed":
        prompts, fed = plan.prompt_lengths, plan.fed
        own = fed * (prompts[plan.prompt_of_here] + fed)
        # Of prompts without the pairs that are masked.
        seen = int(prompts.square().sum()) / 2 + int(own.sum())
        copies = int(prompts[plan.prompt_of_here][fed > 0].sum())  # of keys and values of prompts
        own_calls = (K + len(fed)) * OWN_ATTENTION[device]
        return tokens(plan) + seen * pair + copies * COPY + own_calls
    second = second_pass(plan, hidden_size, least_work(plan, hidden_size) if packs else 1)
    return K * P * (1 + P * pair) + second + SECOND_PASS[device]


def can_pack(lm: Any) -> bool:
    """Tell whether a model takes several completions of a prompt in one row behind its cache."""
    config = text_config(lm)
    attention = config._attn_implementation
    return (
        attention in BOOLEAN + FLOAT
        and {"attention_mask", "position_ids"} <= parameters_of(lm)
        and cache_argument(lm) is not None
        and not getattr(config, "attn_temperature_tuning", False)  # by the place in a row (Llama 4)
        and not recurrent(lm)
        and not own_states(lm)
        and (SEVERAL, attention) not in INEXACT.get(lm, {})
    )


def obstacle(model: nn.Module, plan: Plan, route: str) -> str | None:
    """Say why a route is not exact for a model and a plan, and what to change; None if it is exact."""
    if route == "unshared":
        return None
    shared = shared_obstacle(model, plan)
    if shared:
        return shared
    lm = causal_lm(model)
    attention = text_config(lm)._attn_implementation
    known = INEXACT.get(lm, {}).get(("fork" if route == "bounded" else route, attention))
    if known:
        return known
    if route == "packed" and compiled(model):
        return "the model is compiled: each batch would have other segments, and a graph of its own"
    if route == "packed" and checkpoints_reentrantly(model):
        return "reentrant checkpointing copies the arguments of layers: use checkpoint_impl=NO_REENTRANT"
    return (_fork_obstacle if route in ("fork", "bounded") else _mask_obstacle)(lm, plan, route)


def shared_obstacle(model: nn.Module, plan: Plan) -> str | None:
    """Say why no route can share the prompts."""
    lm = causal_lm(model)
    config = text_config(lm)
    dropout = active_dropout(model)
    if dropout:
        return (
            f"{dropout}: completions of one prompt would have the same dropout of it; set it to 0, or use "
            "model.eval()"
        )
    if getattr(config, "output_router_logits", False):
        return (
            "config.output_router_logits=True: the auxiliary loss of the experts would count each prompt "
            "once; set it to False"
        )
    if lm.config.is_encoder_decoder:
        return f"{type(lm).__name__} is an encoder-decoder"
    for module in wrappers(model):
        peft = getattr(module, "active_peft_config", None)
        if hasattr(type(module), "get_base_model") and getattr(peft, "is_prompt_learning", False):
            return f"{type(peft).__name__} puts virtual tokens before the prompt; LoRA does not"
    limit = getattr(config, "max_position_embeddings", None)
    most = max(plan.last_positions)
    if limit is not None and 0 <= limit <= most and not has_rotary(config):
        return f"position {most} is not among the model's {limit} (max_position_embeddings)"
    return None


def has_rotary(config: Any) -> bool:
    """Tell whether positions are rotations, and not rows of a table."""
    return getattr(config, "rope_parameters", None) is not None


def active_dropout(model: nn.Module) -> str | None:
    """Name the first module whose dropout, or other noise, is active."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if module.p > 0:
                return f"dropout {module.p} in {name}"
            continue
        for key, value in vars(module).items():
            noise = "dropout" in key or "jitter" in key
            if noise and isinstance(value, float) and value > 0:
                return f"{key} {value} in {name or type(module).__name__}"
    return None


def _mask_obstacle(lm: Any, plan: Plan, route: str) -> str | None:
    config, name = text_config(lm), type(lm).__name__
    attention = config._attn_implementation
    missing = {"attention_mask", "position_ids"} - parameters_of(lm)
    if missing:
        return f"the backbone of {name} has no argument {' and '.join(sorted(missing))}"
    if recurrent(lm):
        return f"{name} has layers with a state (convolutions, recurrences), which a mask cannot separate"
    own = own_states(lm)
    if own:
        return f"{name} has a cache of its own kind ({own}), which may count places in a row"
    scale = getattr(config, "floor_scale", 0)  # Llama 4
    length = int(plan.prompt_lengths.sum() + plan.fed.sum())
    length = length if route == "packed" else plan.row_length
    if getattr(config, "attn_temperature_tuning", False) and length >= scale:
        return f"{name} scales attention by the place in a row from {scale} tokens on (floor_scale)"
    if route == "flex":
        if attention not in BLOCKS:
            return f"it needs attn_implementation='flex_attention', and the model has {attention!r}"
        if not plan.prompt_ids.is_cuda and torch.is_grad_enabled():
            return f"FlexAttention has no backward on {plan.prompt_ids.device.type}"
    elif route == "packed":
        if attention != SDPA:
            return f"it needs attn_implementation={SDPA!r}, and the model has {attention!r}"
    elif attention not in BOOLEAN + FLOAT:
        return (
            f"the model has attn_implementation={attention!r}, which does not take a mask with a row for "
            "each token; 'sdpa' and 'eager' do"
        )
    return _rotary_obstacle(config, plan, route)


def compiled(model: nn.Module) -> bool:
    """Tell whether a model, or a part of it, is compiled by `torch.compile`."""
    return torch.compiler.is_compiling() or any(
        vars(x).get("_compiled_call_impl") is not None
        or COMPILED in x._modules
        or hasattr(x.forward, "_torchdynamo_orig_callable")
        for x in model.modules()
    )


def checkpoints_reentrantly(model: nn.Module) -> bool:
    """Tell whether PyTorch's own wrapper recomputes a part of a model by reentrant checkpointing."""
    kinds = (getattr(x, "checkpoint_impl", None) for x in model.modules())
    return any(getattr(x, "name", None) == "REENTRANT" for x in kinds)


def recurrent(lm: Any) -> bool:
    """Tell whether layers of a model keep a state, so that each token depends on the one before it."""
    return bool(getattr(lm, "_is_stateful", False)) or is_recurrent(new_cache(text_config(lm)))


def own_states(lm: Any) -> str | None:
    """Name a class of cache layers that is the model's own, as those of sparse attention can be."""
    kinds = (type(layer) for layer in new_cache(text_config(lm)).layers)
    return next((x.__name__ for x in kinds if x.__module__ != cache_utils.__name__), None)


def _fork_obstacle(lm: Any, plan: Plan, route: str) -> str | None:
    config, name = text_config(lm), type(lm).__name__
    if cache_argument(lm) is None:
        return f"the backbone of {name} takes no cache (past_key_values)"
    own = own_states(lm)
    if own and (plan.prompt_lengths != plan.longest[0]).any():
        return (
            f"{name} has a cache of its own kind ({own}), which may count padding: the prompts must have one "
            "length"
        )
    if asks_for_recomputation(lm) and not checkpointed_layers(lm):
        return f"{name} has no layers whose checkpointing works with a cache"
    return _rotary_obstacle(config, plan, route)


def _rotary_obstacle(config: Any, plan: Plan, route: str) -> str | None:
    """Say why a route would have other rotations than the padded batch."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [x for x in parameters.values() if isinstance(x, dict)]
    for found in nested or [parameters]:
        kind = found.get("rope_type")
        if kind not in ("dynamic", "longrope"):
            continue
        limit = (
            found.get("original_max_position_embeddings")
            or getattr(config, "original_max_position_embeddings", None)
            or config.max_position_embeddings
        )
        P, most = (x + 1 for x in plan.last_positions)
        # A mask needs no last tokens; the other routes run prompts and completions apart.
        masked = route in ("packed", "mask", "flex")
        fewer = (masked and most == limit + 1) or (not masked and limit >= P)
        if most > limit and (kind == "dynamic" or fewer):
            return (
                f"rotary positions of type {kind!r} depend on the number of tokens beyond {limit}: the "
                f"longest sequence has {most}, and this route does not run it as a whole"
            )
    return None
