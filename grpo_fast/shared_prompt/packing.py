"""One row without padding: each prompt once, its completions after it, and attention for each of them.

The row is `[prompt 1 | completions of prompt 1 | prompt 2 | completions of prompt 2 | ...]`. Attention alone
takes it apart: a prompt is causal, and a completion attends to its prompt and to itself. All other layers see
one sequence of tokens.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo_fast.shared_prompt.plans import Plan, Row

SDPA = "sdpa"  # the implementation of attention that can take a row apart
# What configurations call windows and chunks of attention, of which transformers makes masks.
WINDOWS = ("sliding_window", "attention_chunk_size")
# What code may ask of the mark that stands for a mask.
HARMLESS = {"__get__", "size", "dim", "numel", "stride", "is_floating_point", "is_complex"}


class Layout:
    """The masks of a row's segments, for one kind of attention layer.

    Args:
        function: tells of two places in a sequence whether the first attends to the second, as the functions
            of `transformers.masking_utils` for causal attention, windows and chunks do.
    """

    def __init__(self, row: Row, function: Callable[..., Any]) -> None:
        self.row, self.function = row, function
        self._made: dict[Any, Tensor] = {}
        self._seen: dict[int, bool] = {}
        prompts = [row.sizes[x.members[0]] for x in row.groups if x.prompt is None]
        completions = [row.sizes[x.members[0]] for x in row.groups if x.prompt is not None]
        self.longest = max(prompts, default=0), max(completions, default=0)

    def mask(self, before: int, length: int, query: Tensor) -> Tensor | None:
        """Return the mask of a segment behind `before` tokens of its prompt; None: causal, or one token.

        Args:
            query: of the segment; the mask is on its device, and in its dtype.
        """
        if not self.sees_all(before + length):
            return self._kept((before, length), query, self._of_function)
        if before == 0 or length == 1:
            return None
        if query.is_cuda:
            return lower_right(length, before + length)
        # One mask serves all: of shorter segments it is a part.
        prompt, longest = self.longest
        whole = self._kept((prompt, longest), query, self._causal)
        return whole[..., :length, prompt - before : prompt + length]

    def sees_all(self, length: int) -> bool:
        """Tell whether the last of so many tokens attends to the first: then no window is shorter."""
        if self.function is causal_mask_function:
            return True
        if length not in self._seen:
            zero, last = torch.zeros(1, dtype=torch.int64), torch.tensor([length - 1])
            self._seen[length] = bool(torch.as_tensor(self.function(zero, zero, last, zero)).all())
        return self._seen[length]

    def _kept(self, sizes: tuple[int, int], query: Tensor, make: Callable[..., Tensor]) -> Tensor:
        key = (*sizes, query.dtype, query.device)
        if key not in self._made:
            # A boolean mask would be turned into numbers in each layer, and kept for each backward.
            zero = torch.zeros((), dtype=query.dtype, device=query.device)
            self._made[key] = torch.where(make(*sizes, query.device), zero, -torch.inf)
        return self._made[key]

    def _of_function(self, before: int, length: int, device: torch.device) -> Tensor:
        zero = torch.zeros((), dtype=torch.int64, device=device)
        places = torch.arange(before + length, device=device)
        seen = self.function(
            zero.view(1, 1, 1, 1), zero, places[None, None, before:, None], places[None, None, None]
        )
        return torch.as_tensor(seen).expand(1, 1, length, before + length)

    @staticmethod
    def _causal(before: int, length: int, device: torch.device) -> Tensor:
        seen = torch.ones(1, 1, length, before + length, dtype=torch.bool, device=device)
        return seen.tril(before)


def lower_right(length: int, seen: int) -> CausalBias:
    """Return PyTorch's mask of the last `length` of `seen` tokens, for which FlashAttention runs.

    Its own constructor would take memory on the CPU for two numbers of each pair of tokens.
    """
    found = causal_lower_right(1, 2)
    found.seq_len_q, found.seq_len_kv = length, seen
    return found


def pairs_in_masks(plan: Plan, config: Any) -> int:
    """Return the number of pairs of tokens in the masks of a plan's row.

    Args:
        config: the configuration of the language model.
    """
    windows = [getattr(config, name, None) for name in WINDOWS]
    window = min((x for x in windows if isinstance(x, int)), default=None)
    prompts, fed = plan.prompt_lengths, plan.fed
    longest, most = int(prompts.max()), int(fed.max())
    whole = 0 if plan.prompt_ids.is_cuda else most * (longest + most)  # PyTorch's own needs none
    if window is None:
        return whole
    before = prompts[plan.prompt_of_here]
    apart = torch.stack([before, fed], 1)[before + fed > window].unique(dim=0)
    alone = prompts[prompts > window].unique()
    return whole + int((apart[:, 1] * apart.sum(1)).sum()) + int(alone.square().sum())


class Mark(Tensor):
    """Stands for the mask of a row: attention of kind sdpa finds the layout in it, and others an error.

    It has the shape that models expect of a mask, and no memory.
    """

    of_row: Layout | None = None  # of a copy that torch made: None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in HARMLESS:
            return super().__torch_function__(func, types, args, kwargs or {})
        if name == "to":
            with torch._C.DisableTorchFunctionSubclass():
                found = func(*args, **(kwargs or {}))
            if found is args[0]:
                return found
        raise _misused(repr(name))


def _misused(what: str) -> RuntimeError:
    return RuntimeError(
        f"shared_prompt: route 'packed': {what} was called with what stands for the mask of its row. Only "
        "transformers' attention of kind sdpa can use that, and not the model's own code, a hook, a "
        "compiled forward or reentrant checkpointing: take route 'mask' or 'fork'"
    )


def marked(row: Row, function: Callable[..., Any]) -> Mark:
    """Return what stands for the mask of a row in one kind of layer."""
    take_apart()
    S = row.ids.shape[1]
    found = torch.zeros((), dtype=torch.bool, device=row.ids.device).expand(1, 1, S, S)
    mark = found.as_subclass(Mark)
    mark.of_row = Layout(row, function)
    return mark


_MADE: "weakref.WeakSet[Callable[..., Any]]" = weakref.WeakSet()  # functions of `take_apart`


def take_apart() -> None:
    """Let transformers' attention of kind sdpa take rows apart. Without such a row it does what it did."""
    whole = ALL_ATTENTION_FUNCTIONS[SDPA]
    if whole in _MADE:
        return

    @functools.wraps(whole)
    def function(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **options: Any,
    ) -> Any:
        if isinstance(attention_mask, Mark):
            own = (query, key, value)
            return _attention(whole, attention_mask.of_row, module, own, *args, **options)
        return whole(module, query, key, value, attention_mask, *args, **options)

    _MADE.add(function)
    AttentionInterface.register(SDPA, function)
    if ALL_ATTENTION_FUNCTIONS[SDPA] is not function:  # somebody set another one for all models
        ALL_ATTENTION_FUNCTIONS[SDPA] = function


def _attention(
    whole: Callable[..., Any],
    layout: Layout | None,
    module: Any,
    given: tuple[Tensor, Tensor, Tensor],
    *args: Any,
    **options: Any,
) -> tuple[Tensor, Any]:
    """Compute the attention of a row, one group of segments after the other."""
    if layout is None or torch.compiler.is_compiling():
        raise _misused("attention on a copy of it, or a compiled one,")
    if options.get("position_bias") is not None:
        raise ValueError("shared_prompt: a bias for each pair of positions cannot be taken apart")
    row, kind, lower = layout.row, given[0].device.type, None
    if torch.is_autocast_enabled(
        kind
    ):  # rotations give float32, and PyTorch's masks want one dtype
        lower = torch.get_autocast_dtype(kind)
    query, key, value = (
        x if lower is None or x.dtype == torch.float64 else x.to(lower) for x in given
    )
    parts = [x.split(row.sizes, 2) for x in (query, key, value)]
    found = list(parts[0])
    for prompt, members in row.groups:
        own = [_together(x, members) for x in parts]
        before = 0
        if prompt is not None:
            before = row.sizes[prompt]
            shape = (len(members), -1, -1, -1)
            own[1:] = [
                torch.cat([x[prompt].expand(shape), y], 2)
                for x, y in zip(parts[1:], own[1:], strict=True)
            ]
        mask = layout.mask(before, row.sizes[members[0]], query)
        if mask is not None and whole is sdpa_attention_forward and not args:
            out = _with_mask(module, own, mask, **options)
        else:
            out, _ = whole(module, *own, mask, *args, **options)
        for i, one in zip(members, out.split(1), strict=True):
            found[i] = one
    return torch.cat(found, 1), None


def _together(parts: tuple[Tensor, ...], members: list[int]) -> Tensor:
    """Put segments of one length into a batch; one alone is not copied."""
    return parts[members[0]] if len(members) == 1 else torch.cat([parts[i] for i in members])


def _with_mask(module: Any, given: list[Tensor], mask: Tensor, **options: Any) -> Tensor:
    """Compute what transformers' function for sdpa does with a mask, without copies of keys and values.

    It repeats them for the heads that share them. PyTorch's kernels on a CPU, and FlashAttention, do not need
    that; others would compute all scores at once.
    """
    query, key, value = given
    dropout, scale = options.get("dropout", 0.0), options.get("scaling")
    shared = getattr(module, "num_key_value_groups", 1) > 1
    if options.get("softcap") is not None or not _shares_heads(query, key, value, mask, dropout):
        return sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    found = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=shared
    )
    return found.transpose(1, 2)


def _shares_heads(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float) -> bool:
    """Tell whether PyTorch's kernel for a mask takes fewer heads of keys than of queries."""
    if query.is_cuda and isinstance(mask, CausalBias):
        return can_use_flash_attention(SDPAParams(query, key, value, None, dropout, True, True))
    return query.device.type == "cpu"
