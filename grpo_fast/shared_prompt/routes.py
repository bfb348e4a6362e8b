"""The routes: forwards of a bare causal LM that return the states of a plan's targets, (N, D).

| route | what runs |
|---|---|
| unshared | one padded row for each completion, with its prompt: what a trainer does without this module |
| packed | one row for all prompts and their completions, without padding; attention takes it apart |
| mask | one row for each prompt with all of its completions, and a mask; attention of kind sdpa or eager |
| flex | the same row with the block mask of FlexAttention |
| fork | the prompts; then the completions, which go on from the caches of their prompts |
| bounded | fork, with the completions recomputed a few at a time in the backward pass |
"""

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpo_fast.integrations.transformers import backbone_of, text_config
from grpo_fast.shared_prompt.caches import copied, forked, new_cache
from grpo_fast.shared_prompt.masks import masks_by, masks_for
from grpo_fast.shared_prompt.packing import marked
from grpo_fast.shared_prompt.plans import LEAST_TAIL, Plan
from grpo_fast.shared_prompt.recompute import (
    asks_for_recomputation,
    checkpointed_layers,
    layers_recomputed,
)

MICRO_BATCH = 4  # completions at a time in the bounded route
# What a copy of the keys and values of a prompt token, for one row, costs in tokens of a forward. Measured on
# a CPU with a model of 135M weights: 1/64 of the time, and as much again for pages of new memory. On a GPU
# a guess.
COPY = 1 / 32


class Backbone(NamedTuple):
    """The backbone of a bare causal LM, as the routes call it.

    Attributes:
        lm: the causal LM.
        call: its backbone, compiled or not.
        recompute: recompute the activations of each layer in the backward pass; None: as the model is
            set (`gradient_checkpointing_enable`).
        per_row: how many completions of a prompt a fork puts into one row at most. They share the keys and
            values of the prompt, by a mask; each row has a copy of these. None: what is the least work.
    """

    lm: Any
    call: Callable[..., Any]
    recompute: bool | None = None
    per_row: int | None = 1

    def states(self, positions: Tensor, **inputs: Any) -> Tensor:
        """Compute the last hidden states of some tokens, (rows, columns, D)."""
        if "position_ids" in parameters_of(self.lm):
            inputs["position_ids"] = positions
        inputs.setdefault("use_cache", False)
        if "past_key_values" in inputs:
            inputs[cache_argument(self.lm) or "past_key_values"] = inputs.pop("past_key_values")
        recompute = self.recompute
        if recompute is None and inputs["use_cache"]:  # transformers' own would drop the cache
            recompute = asks_for_recomputation(self.lm)
        with nullcontext() if recompute is None else layers_recomputed(self.lm, recompute):
            return self.call(**inputs).last_hidden_state

    @property
    def config(self) -> Any:
        """The configuration of the language model."""
        return text_config(self.lm)


def parameters_of(lm: Any) -> set[str]:
    """Return the names of the arguments of a causal LM's backbone."""
    return set(inspect.signature(backbone_of(lm).forward).parameters)


def cache_argument(lm: Any) -> str | None:
    """Return the name under which a causal LM's backbone takes a cache; None if it takes none.

    transformers 5.24 renamed `past_key_values` to `cache`.
    """
    names = parameters_of(lm)
    return next((name for name in ("past_key_values", "cache") if name in names), None)


def unshared(backbone: Backbone, plan: Plan) -> Tensor:
    """Compute the states from one padded row for each completion, with its prompt."""
    ids, mask, positions = (
        torch.cat([prompt[plan.prompt_of], completion], 1)
        for prompt, completion in (
            (plan.prompt_ids, plan.completion_ids),
            (plan.prompt_mask.long(), plan.completion_mask.long()),
            (plan.prompt_positions, plan.completion_positions),
        )
    )
    # The last tokens stay: rotary positions can depend on the number of tokens.
    states = backbone.states(positions, input_ids=ids, attention_mask=mask)
    P, T = plan.longest
    return states[:, P - 1 : P - 1 + T][plan.completion_mask]


def masked(backbone: Backbone, plan: Plan) -> Tensor:
    """Compute the states from one row for each prompt, with a mask; also the route flex."""
    rows = plan.rows
    masks = masks_for(backbone.config, rows, backbone.lm.get_input_embeddings().weight.dtype)
    states = backbone.states(rows.positions, input_ids=rows.ids, attention_mask=masks)
    return states.flatten(0, 1).index_select(0, rows.predictors)


def packed(backbone: Backbone, plan: Plan) -> Tensor:
    """Compute the states from one row for all prompts and completions, without padding."""
    row, dtype = plan.one_row, backbone.lm.get_input_embeddings().weight.dtype
    masks = masks_by(
        lambda function, **_: marked(row, function),
        backbone.config,
        row.ids,
        row.positions,
        dtype,
        row.ids.shape[1],
    )
    if backbone.recompute is None and checkpointed_layers(backbone.lm):
        # transformers' own checkpointing can be reentrant, which copies the masks of layers.
        backbone = backbone._replace(recompute=asks_for_recomputation(backbone.lm))
    states = backbone.states(row.positions, input_ids=row.ids, attention_mask=masks)
    return states[0].index_select(0, row.predictors)


def prompts(backbone: Backbone, plan: Plan) -> tuple[Tensor, Any]:
    """Run the prompts: the last state of each, (K, D), and their cache."""
    cache = new_cache(backbone.config)
    states = backbone.states(
        plan.prompt_positions,
        input_ids=plan.prompt_ids,
        attention_mask=plan.prompt_mask.long(),
        past_key_values=cache,
        use_cache=True,
    )
    return states[:, -1], cache


def fork(backbone: Backbone, plan: Plan, always: bool = False) -> Tensor:
    """Compute the states of the prompts, and from their caches those of the completions.

    Args:
        always: run the layers twice also where no completion has a second token. Processes that share the
            weights have to run the same layers.
    """
    last, cache = prompts(backbone, plan)
    return completions(backbone, plan, last, cache, always)


def completions(
    backbone: Backbone, plan: Plan, last: Tensor, cache: Any, always: bool = False
) -> Tensor:
    """Compute the states of a plan's targets from the last states and the cache of its prompts."""
    alive = (plan.completion_lengths > 1).nonzero()[:, 0].to(last.device)
    first = last.index_select(0, plan.prompt_of)
    if not len(alive):
        found = first[plan.completion_mask.any(1)]
        if always and len(first):
            found = found + 0 * _continued(backbone, plan, cache, alive.new_zeros(1)).sum()
        return found
    per_row = backbone.per_row or least_work(plan, backbone.config.hidden_size)
    if per_row > 1:
        return _several(backbone, plan, last, cache, per_row)
    B, T = plan.completion_mask.shape
    states = _continued(backbone, plan, cache, alive)
    slot = torch.zeros(B, dtype=torch.int64, device=last.device)
    slot[alive] = torch.arange(len(alive), device=last.device)
    # The state before the first token is the prompt's, those before the others are the completion's.
    steps = torch.arange(T - 1, device=last.device)
    place = torch.cat(
        [torch.arange(B, device=last.device)[:, None], B + slot[:, None] * states.shape[1] + steps],
        1,
    )
    found = torch.cat([first, states.flatten(0, 1)])
    return found.index_select(0, place[plan.completion_mask])


def least_work(plan: Plan, hidden_size: int) -> int:
    """Return how many completions of a prompt in a row are the least work in a fork."""
    largest = int(plan.prompt_of_here.bincount().max())
    powers = (2**k for k in range(largest.bit_length()))
    return min([*powers, largest], key=lambda n: second_pass(plan, hidden_size, n))


def second_pass(plan: Plan, hidden_size: int, per_row: int) -> float:
    """Estimate the work of the completions in a fork.

    The unit is a token that passes through the model. A pair of tokens in attention costs 4 D multiplications
    in a layer, and a token about 24 D^2.
    """
    P, T = plan.longest
    apart = int((plan.completion_lengths > 1).sum()), T - 1
    rows, C = apart if per_row == 1 else plan.split_size(per_row)
    return rows * (C * (1 + (P + C) / (6 * hidden_size)) + P * COPY)


def _several(backbone: Backbone, plan: Plan, last: Tensor, cache: Any, per_row: int) -> Tensor:
    """Run the completions in rows of a few of one prompt, from the cache of the prompts."""
    plan, prompts = plan.split(per_row)
    if prompts.tolist() != list(range(len(last))):
        there = prompts.to(last.device)
        last, cache = last.index_select(0, there), forked(cache, there)
    rows = plan.tails
    dtype = backbone.lm.get_input_embeddings().weight.dtype
    states = backbone.states(
        rows.positions,
        input_ids=rows.ids,
        attention_mask=masks_for(backbone.config, rows, dtype, cache),
        past_key_values=copied(cache),
        use_cache=True,
    )
    return torch.cat([last, states.flatten(0, 1)]).index_select(0, rows.predictors)


def _continued(backbone: Backbone, plan: Plan, cache: Any, chosen: Tensor) -> Tensor:
    """Run some completions from the cache of their prompts, without their last tokens."""
    T, row = plan.longest[1], plan.prompt_of[chosen]
    width = max(T - 1, LEAST_TAIL)
    ids, mask, positions = (
        _wide(x[chosen, : max(T - 1, 0)], width)
        for x in (plan.completion_ids, plan.completion_mask, plan.completion_positions)
    )
    return backbone.states(
        positions,
        input_ids=ids,
        attention_mask=torch.cat([plan.prompt_mask[row], mask], 1).long(),
        past_key_values=forked(cache, row),
        use_cache=True,
    )


def _wide(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))


def bounded(
    backbone: Backbone, plan: Plan, micro_batch: int = MICRO_BATCH, least_parts: int = 0
) -> Tensor:
    """Compute the states as `fork` does, with the completions recomputed a few at a time in the backward.

    Args:
        least_parts: run the layers for this number of parts, even if there are not so many.
    """
    last, cache = prompts(backbone, plan)
    inner = backbone._replace(recompute=False)  # the whole completion is recomputed
    found = []
    for chosen in parts(plan, micro_batch):
        part = plan.completions(chosen)
        found.append(_checkpointed(inner, part, last, cache, bool(least_parts)))
    states = torch.cat(found) if found else last[:0]
    for _ in range(least_parts - len(found) if len(plan.prompt_of) else 0):
        part = plan.completions(torch.zeros(1, dtype=torch.int64))
        states = states + 0 * _checkpointed(inner, part, last, cache, True).sum()
    return states


def _checkpointed(backbone: Backbone, part: Plan, last: Tensor, cache: Any, always: bool) -> Tensor:
    run = functools.partial(completions, backbone, part, always=always)
    if torch.is_grad_enabled():
        return checkpoint(run, last, cache, use_reentrant=False)
    return run(last, cache)


def parts(plan: Plan, micro_batch: int) -> list[Tensor]:
    """Cut the completions of a plan into consecutive parts of at most `micro_batch`: indices on the CPU."""
    if isinstance(micro_batch, bool) or not isinstance(micro_batch, int) or micro_batch < 1:
        raise ValueError(
            f"shared_prompt: micro_batch: want a positive integer, got {micro_batch!r}"
        )
    return list(torch.arange(len(plan.completion_lengths)).split(micro_batch))


ROUTES: dict[str, Callable[..., Tensor]] = {
    "unshared": unshared,
    "packed": packed,
    "mask": masked,
    "flex": masked,
    "fork": fork,
    "bounded": bounded,
}
