"""Plans, states and errors for the tests of what makes shared prompts wrong."""

import pytest
import torch
from torch import tensor

from grpo_fast.integrations.transformers import backbone_of
from grpo_fast.shared_prompt import forward
from grpo_fast.shared_prompt.grouping import plan
from grpo_fast.shared_prompt.routes import ROUTES, Backbone
from tests.support import shared as support

EXACT, WRONG = 1e-5, 1e-3


def states(model, shared, route):
    """The states of a route without any check of the model."""
    return ROUTES[route](Backbone(model, backbone_of(model)), shared)


def error(model, shared, route):
    """The largest difference of a state from the forward without sharing."""
    with torch.no_grad():
        found = states(model, shared, route) - states(model, shared, "unshared")
    return found.abs().max().item()


def group(P=30, G=4, T=6, **options):
    """A plan for which sharing pays: one prompt of P tokens with G completions of T."""
    draw = torch.Generator().manual_seed(1)
    ids = [
        torch.randint(3, support.VOCABULARY, (n, width), generator=draw)
        for n, width in ((1, P), (G, T))
    ]
    return plan(*ids, group_size=G, **options)


def refusal(model, shared, route):
    """The text of the error with which `forward` refuses a route."""
    with pytest.raises(ValueError) as found:
        forward(model, shared, route=route)
    message = str(found.value)
    assert message.startswith(f"shared_prompt: route={route!r}: ")
    return message


def most_memory(function):
    """The most bytes that a function has allocated at a time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    events = [x for x in found.profiler.kineto_results.events() if x.name() == "[memory]"]
    sizes = tensor([x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())])
    return sizes.cumsum(0).max().item()
