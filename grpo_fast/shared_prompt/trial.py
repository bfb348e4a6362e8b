"""`try_out`: a route against the unshared forward, once for each model, on a few tokens."""

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from grpo_fast.integrations.transformers import backbone_of
from grpo_fast.shared_prompt.choice import INEXACT, SEVERAL, own_states
from grpo_fast.shared_prompt.grouping import plan
from grpo_fast.shared_prompt.masks import BLOCKS, BOOLEAN, FLOAT
from grpo_fast.shared_prompt.packing import WINDOWS
from grpo_fast.shared_prompt.plans import Plan
from grpo_fast.shared_prompt.routes import ROUTES, Backbone, completions, prompts

SHORT = 3  # a window that a few tokens exceed
# The routes that were compared with the unshared forward, for each model.
_TRIED: "weakref.WeakKeyDictionary[Any, set[Any]]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def try_out(backbone: Backbone, route: str) -> str | None:
    """Compare a route with the unshared forward on a few tokens, once for each model; say what is wrong.

    `choose` knows what transformers' own models need. This finds models that do it otherwise.
    """
    lm = backbone.lm
    route = "fork" if route == "bounded" else route
    per_row = backbone.per_row or 1
    name = SEVERAL if per_row > 1 else route
    kind = (name, backbone.config._attn_implementation, lm.training, lm.dtype)
    tried = _TRIED.setdefault(lm, set())
    if route == "unshared" or kind in tried or torch.compiler.is_compiling():
        return None
    tried.add(kind)
    recompute = False if backbone.recompute is None else backbone.recompute
    plain = Backbone(lm, backbone_of(lm), recompute, per_row)
    try:
        eager = torch.compiler.set_stance("force_eager")
        with eager, _short_windows(backbone.config), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            small = small_plan(lm)
            want, got = (ROUTES[name](plain, small).double() for name in ("unshared", route))
            ignored = route == "fork" and _ignores_states(plain, small)
    except torch.OutOfMemoryError:
        tried.discard(kind)
        raise
    except Exception as raised:  # by the code of a model that does not expect these inputs
        wrong = f"{type(lm).__name__} raises {type(raised).__name__}: {raised}"
    else:
        error = float((got - want).norm() / want.norm().clamp(min=1e-30))
        if ignored:
            wrong = (
                f"recurrent layers of {type(lm).__name__} ignore the state of the prompt if more than one "
                "token follows"
            )
        elif error <= max(1e-4, 16 * precision(lm)):
            return None
        else:
            wrong = (
                f"the states of {type(lm).__name__} differ from those of its unshared forward by "
                f"{error:.1e} of their norm: this route is not exact for it"
            )
    INEXACT.setdefault(lm, {})[name, backbone.config._attn_implementation] = wrong
    return wrong


@contextlib.contextmanager
def _short_windows(config: Any) -> Iterator[None]:
    """Make the windows of attention so short that a few tokens reach beyond them.

    A model whose own code does not use the windows of its configuration then shows it. FlashAttention takes
    the windows from the layers, and they stay.
    """
    changed = {}
    if config._attn_implementation in BOOLEAN + FLOAT + BLOCKS:
        sizes = {name: getattr(config, name, None) for name in WINDOWS}
        changed = {
            name: size for name, size in sizes.items() if isinstance(size, int) and size > SHORT
        }
    try:
        for name in changed:
            setattr(config, name, SHORT)
        yield
    finally:
        for name, size in changed.items():
            setattr(config, name, size)


def _ignores_states(backbone: Backbone, plan: Plan) -> bool:
    """Tell whether completions do not depend on the recurrent states of their prompts.

    Their share of the states may be too small for a comparison with the unshared forward.
    """
    last, cache = prompts(backbone, plan)
    found = [getattr(layer, "recurrent_states", None) for layer in cache.layers]
    recurrent = [values for values in found if isinstance(values, dict)]
    if not any(isinstance(x, Tensor) for values in recurrent for x in values.values()):
        return False
    before, again = (completions(backbone, plan, last, cache).double() for _ in range(2))
    for values in recurrent:
        values.update({key: x + 100 if isinstance(x, Tensor) else x for key, x in values.items()})
    after = completions(backbone, plan, last, cache).double()
    return bool((after - before).norm() <= 10 * (again - before).norm())


def precision(lm: Any) -> float:
    """Return the rounding of a model's activations."""
    kind = lm.get_input_embeddings().weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else lm.dtype
    return torch.finfo(dtype).eps


def small_plan(lm: Any) -> Plan:
    """Return a plan of two ragged prompts and four completions, of tokens that a model has."""
    embeddings = lm.get_input_embeddings()
    ids = (torch.arange(42).view(6, 7) * 7 + 3) % embeddings.num_embeddings
    device, hook = embeddings.weight.device, getattr(embeddings, "_hf_hook", None)
    if hook is not None and device.type == "meta":  # Accelerate has the weights elsewhere
        device = hook.execution_device
    ids = ids.to(device)
    return plan(
        ids[:2, :5],
        ids[2:],
        prompt_mask=torch.arange(5) >= torch.tensor([[0 if own_states(lm) else 2], [0]]),
        completion_mask=torch.arange(7) < torch.tensor([[7], [3], [0], [2]]),
        group_size=2,
    )
