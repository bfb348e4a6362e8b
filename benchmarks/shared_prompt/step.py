"""One update of a policy on a group of completions: forward, loss and backward, by several providers.

| provider | what runs |
|---|---|
| unshared | one padded row for each completion |
| auto, packed, mask, flex, fork, bounded | the routes of `grpo_fast.shared_prompt` |
| backward | `grpo_fast.shared_prompt.backward` |
| prefix-grouper | PrefixGrouper (verl's option): two attention calls in each layer |

All of them compute the loss by `linear_grpo_loss`, so they differ in the model's forward alone.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import providers
from benchmarks.inputs import shapes
from grpo_fast import Objective, linear_grpo_loss, shared_prompt
from grpo_fast.integrations.transformers import Head, causal_lm, text_config
from grpo_fast.integrations.transformers import with_head as unshared_with_head
from grpo_fast.shared_prompt import Part, Plan

ROUTES = ("auto", "packed", "mask", "flex", "fork", "bounded")
PROVIDERS = ("unshared", *ROUTES, "backward", "prefix-grouper")
OBJECTIVE = Objective.preset("dapo")


class Size(NamedTuple):
    """The number of tokens of the prompt, of completions, and of tokens of each completion."""

    P: int
    G: int
    R: int

    @property
    def tokens(self) -> tuple[int, int]:
        """The tokens of the unshared and of the shared forward."""
        return self.G * (self.P + self.R), self.P + self.G * self.R


class Inputs(NamedTuple):
    prompt: Tensor  # (1, P)
    completions: Tensor  # (G, R)
    advantages: Tensor  # (G,)
    plan: Plan


def inputs(size: Size, V: int) -> Inputs:
    """Make one group. All completions have the same length: padding would favour sharing."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(5, V, (1, size.P), generator=generator)
    completions = torch.randint(5, V, (size.G, size.R), generator=generator)
    advantages = torch.randn(size.G, generator=generator)
    prompt, completions, advantages = (
        x.to(shapes.device()) for x in (prompt, completions, advantages)
    )
    return _planned(prompt, completions, advantages)


def first(given: Inputs, count: int) -> Inputs:
    """Return the same prompt with its first completions."""
    return _planned(given.prompt, given.completions[:count], given.advantages[:count])


def _planned(prompt: Tensor, completions: Tensor, advantages: Tensor) -> Inputs:
    plan = shared_prompt.plan(prompt, completions, group_size=len(completions))
    return Inputs(prompt, completions, advantages, plan)


def flops(model: Any, size: Size, shared: bool) -> float:
    """Count the operations of an update: of weights, of pairs of tokens in attention, and of the head."""
    lm = causal_lm(model)
    config = text_config(lm)
    head = lm.get_output_embeddings().weight
    tied = lm.get_input_embeddings().weight is head
    weights = sum(x.numel() for x in lm.parameters()) - head.numel() * (1 if tied else 2)
    P, G, R = size
    own = G * R * (P + R / 2)
    pairs = own + P * P / 2 * (1 if shared else G)
    width = config.num_attention_heads * getattr(
        config, "head_dim", config.hidden_size // config.num_attention_heads
    )
    attention = 12 * pairs * width * config.num_hidden_layers
    return 6 * weights * size.tokens[shared] + attention + 6 * head.numel() * G * R


def update(model: Any, given: Inputs, provider: str, rows: int) -> float:
    """Leave the gradients of one update in the parameters, and return its loss.

    Args:
        rows: the largest number of completions in one forward, where each has its own row.
    """
    if provider not in PROVIDERS:
        raise ValueError(f"provider {provider!r}: want one of {', '.join(PROVIDERS)}")
    plan, count = given.plan, given.completions.numel()

    def loss(hidden: Tensor, head: Head, part: Plan, advantages: Tensor) -> Tensor:
        return linear_grpo_loss(
            hidden,
            head.weight,
            part.targets,
            advantages=advantages,
            cu_seqlens=part.cu_seqlens,
            num_items=count,
            objective=OBJECTIVE,
            **head.options,
        ).loss

    def of_part(hidden: Tensor, head: Head, part: Part) -> Tensor:
        chosen = part.completions.to(given.advantages.device)
        return loss(hidden, head, part.plan, given.advantages[chosen])

    if provider == "backward":
        return sum(float(x) for x in shared_prompt.backward(model, plan, of_part))
    if provider == "unshared":
        total = 0.0
        for chosen in torch.arange(len(given.completions)).split(rows):
            value = _padded(model, given, chosen, loss)
            value.backward()
            total += float(value.detach())
        return total
    if provider == "prefix-grouper":
        return _prefix_grouper(model, given, loss)
    value = shared_prompt.with_head(
        model,
        plan,
        lambda hidden, head: loss(hidden, head, plan, given.advantages),
        route=provider,
    )
    value.backward()
    return float(value.detach())


def _padded(model: Any, given: Inputs, chosen: Tensor, loss: Callable[..., Tensor]) -> Tensor:
    """Compute the loss of some completions, each in a row of its own with the prompt."""
    part = given.plan.completions(chosen)
    here = chosen.to(given.prompt.device)
    completions = given.completions[here]
    ids = torch.cat([given.prompt.expand(len(here), -1), completions], 1)

    def of_rows(hidden: Tensor, head: Head) -> Tensor:
        return loss(hidden.flatten(0, 1), head, part, given.advantages[here])

    return unshared_with_head(model, of_rows, ids, torch.ones_like(ids), last=completions.shape[1])


def _prefix_grouper(model: Any, given: Inputs, loss: Callable[..., Tensor]) -> float:
    """Compute the loss with PrefixGrouper, its two calls of attention by PyTorch's, and its gradients."""
    try:
        from prefix_grouper import PrefixGrouper
        from prefix_grouper.utils.register_transformers import register_attention
    except ImportError as error:
        raise providers.UnavailableError(f"not installed: {error.name}") from error
    from transformers import AttentionInterface

    register_attention()
    AttentionInterface.register("causal_to_the_end", _causal_to_the_end)
    P, (G, R) = given.prompt.shape[1], given.completions.shape
    grouper = PrefixGrouper([[P] + [R] * G], given.prompt.device, "right")
    ids = torch.cat([given.prompt, given.completions.reshape(1, -1)], 1)
    steps = torch.arange(R, device=ids.device).repeat(G) + P
    positions = torch.cat([torch.arange(P, device=ids.device), steps])[None]
    config = text_config(causal_lm(model))

    def of_states(hidden: Tensor, head: Head) -> Tensor:
        _, _, suffix, mask = grouper.split_output(hidden, include_prefix_last=1)
        states = suffix[:, :-1][mask[:, 1:].bool()]
        return loss(states, head, given.plan, given.advantages)

    before = config._attn_implementation
    config._attn_implementation_internal = "prefix_grouper_attention"
    try:  # with checkpointing the backward runs the layers, too
        value = unshared_with_head(
            model,
            of_states,
            ids,
            None,
            position_ids=positions,
            prefix_grouper=grouper,
            prefix_grouper_attn_func="causal_to_the_end",
        )
        value.backward()
    finally:
        config._attn_implementation_internal = before
    return float(value.detach())


def _causal_to_the_end(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """Compute attention in which the last query sees all keys; no sequence has padding here."""
    from torch.nn.attention.bias import causal_lower_right

    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    bias: Any = causal_lower_right(query.shape[2], key.shape[2])
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return out.transpose(1, 2), None


def gradient_norm(model: Any) -> float:
    """Return the norm of the gradients of all parameters."""
    squares = [
        float(x.grad.float().square().sum()) for x in model.parameters() if x.grad is not None
    ]
    return math.sqrt(sum(squares))
