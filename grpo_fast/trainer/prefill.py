"""The prompts of a batch that is sampled: each distinct one is forwarded once, for all its completions."""

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from grpo_fast.notices import fell_back
from grpo_fast.shared_prompt.caches import forked
from grpo_fast.shared_prompt.trial import precision

# Whether a model goes on from the cache of a prompt, and as it does from the prompt; found out once.
_EXACT: "weakref.WeakKeyDictionary[Any, bool]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def prefilled(model: Any, ids: Tensor, attention: Tensor) -> DynamicCache | None:
    """Return the cache of prompts without their last tokens; `generate` goes on from it.

    Args:
        ids, attention: (B, P), padded on the left.

    Returns:
        A cache with B rows. None if no prompt comes twice, if there is nothing before the last token, if the
        model has a cache of another kind, or if its logits after the cache are others, which a warning says.
    """
    first, of_row = _distinct(ids, attention)
    if len(first) == len(ids) or ids.shape[1] < 2 or not _EXACT.get(model, True):
        return None
    cache = _cache_of(model, ids[first], attention[first])
    if cache is None:
        _EXACT[model] = False  # the next batch need not try
        return None
    if model not in _EXACT:
        _EXACT[model] = _is_exact(model, ids[first], attention[first], cache)
        if not _EXACT[model]:
            reason = f"{type(model).__name__} samples from other logits after the cache of a prompt"
            fell_back("unshared", reason, cure="--share_prompts off asks for this")
            return None
    return forked(cache, of_row)


def _distinct(ids: Tensor, attention: Tensor) -> tuple[list[int], Tensor]:
    """Return the first row of each distinct prompt, and for each row the place of its prompt among them."""
    places: dict[tuple[int, ...], int] = {}
    first: list[int] = []
    of_row = []
    for b, row in enumerate(map(tuple, torch.where(attention.bool(), ids, -1).tolist())):
        if row not in places:
            places[row] = len(first)
            first.append(b)
        of_row.append(places[row])
    return first, torch.tensor(of_row, device=ids.device)


def _cache_of(model: Any, ids: Tensor, attention: Tensor) -> DynamicCache | None:
    """Return the cache of all tokens but the last column; None where it is of another kind."""
    cache = _next(model, ids[:, :-1], attention[:, :-1]).past_key_values
    if type(cache) is not DynamicCache:
        return None
    try:
        cache.get_seq_length()
    except ValueError:  # no layer keeps keys: `generate` cannot tell where to go on
        return None
    return cache


def _next(model: Any, ids: Tensor, attention: Tensor, **given: Any) -> Any:
    """Generate one token, greedily; return what `generate` returns, with the logits."""
    return model.generate(
        input_ids=ids,
        attention_mask=attention,
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **given,
    )


def _is_exact(model: Any, ids: Tensor, attention: Tensor, cache: DynamicCache) -> bool:
    """Compare the next logits of the shortest and the longest prompt, with the cache and without."""
    lengths = attention.sum(1)
    two = torch.stack([lengths.argmin(), lengths.argmax()])
    want = _next(model, ids[two], attention[two]).logits[0].double()
    got = _next(model, ids[two], attention[two], past_key_values=forked(cache, two)).logits[0]
    error = (got.double() - want).norm() / want.norm().clamp(min=1e-30)
    return bool(error <= max(1e-4, 16 * precision(model)))
