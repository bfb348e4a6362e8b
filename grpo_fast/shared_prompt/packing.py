"""One row without padding: each prompt once, its completions after it, and attention for each of them.

The row is `[prompt 1 | completions of prompt 1 | prompt 2 | completions of prompt 2 | ...]`. Attention alone
takes it apart: a prompt is causal, and a completion attends to its prompt and to itself. All other layers see
one sequence of tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo_fast.shared_prompt.plans import Plan

SDPA = "sdpa"  # the implementation of attention that can take a row apart
LAYOUT, TAKES_APART = "grpo_fast_layout", "grpo_fast_takes_apart"  # attributes


class Group(NamedTuple):
    """Segments of a row whose attention is computed together.

    Attributes:
        prompt: the segment of the prompt that they follow; None: the group is a prompt.
        members: the segments, all of one length.
    """

    prompt: int | None
    members: list[int]


class Row(NamedTuple):
    """A plan as one row of S tokens, without the last token of each completion.

    Attributes:
        ids, positions: (1, S).
        predictors: (N,), the token whose state predicts each target.
        sizes: the lengths of the segments, which are prompts and completions.
        groups: the segments whose attention is computed together.
    """

    ids: Tensor
    positions: Tensor
    predictors: Tensor
    sizes: list[int]
    groups: list[Group]


def row_of(plan: Plan) -> Row:
    """Lay a plan out as one row. Prompts without completions are left out."""
    device, (K, P), T = plan.prompt_of.device, plan.prompt_ids.shape, plan.longest[1]
    lengths, fed = plan.prompt_lengths.tolist(), plan.fed.tolist()
    members: dict[int, list[int]] = {}
    for b, k in enumerate(plan.prompt_of_here.tolist()):
        members.setdefault(k, []).append(b)
    sizes: list[int] = []
    groups: list[Group] = []
    pieces: list[Tensor] = []  # places in all prompts and then all completions, with their padding
    starts, ends = torch.zeros(2, len(fed), dtype=torch.int64)
    place = 0
    for k, rows in members.items():
        prompt = Group(None, [len(sizes)])
        followers: dict[int, Group] = {}
        sizes.append(lengths[k])
        pieces.append(torch.arange((k + 1) * P - lengths[k], (k + 1) * P))
        place += lengths[k]
        ends[rows] = place - 1
        for b in rows:
            starts[b] = place
            if fed[b]:
                followers.setdefault(fed[b], Group(prompt.members[0], [])).members.append(
                    len(sizes)
                )
                sizes.append(fed[b])
                pieces.append(torch.arange(K * P + b * T, K * P + b * T + fed[b]))
                place += fed[b]
        groups += [prompt, *followers.values()]
    taken = torch.cat(pieces).to(device)

    def lay(of_prompts: Tensor, of_completions: Tensor) -> Tensor:
        return torch.cat([of_prompts.flatten(), of_completions.flatten()])[taken][None]

    predictors = torch.cat([ends[:, None], starts[:, None] + torch.arange(T)], 1)[:, :T]
    return Row(
        ids=lay(plan.prompt_ids, plan.completion_ids),
        positions=lay(plan.prompt_positions, plan.completion_positions),
        predictors=predictors.to(device)[plan.completion_mask],
        sizes=sizes,
        groups=groups,
    )


class Layout:
    """The masks of a row's segments, for one kind of attention layer.

    Args:
        function: tells of two places in a sequence whether the first attends to the second, as the functions
            of `transformers.masking_utils` do.
    """

    def __init__(self, row: Row, function: Callable[..., Any]) -> None:
        self.row = row
        self.function = None if function is causal_mask_function else function
        self._made: dict[Any, Tensor] = {}
        prompts = [row.sizes[x.members[0]] for x in row.groups if x.prompt is None]
        completions = [row.sizes[x.members[0]] for x in row.groups if x.prompt is not None]
        self.longest = max(prompts, default=0), max(completions, default=0)

    def mask(self, before: int, length: int, query: Tensor) -> Tensor | None:
        """Return the mask of a segment behind `before` tokens of its prompt; None: causal, or one token.

        Args:
            query: of the segment; the mask is on its device, and in its dtype.
        """
        if self.function is not None:
            return self._kept((before, length), query, self._of_function)
        if before == 0 or length == 1:
            return None
        if query.is_cuda:
            return causal_lower_right(length, before + length)
        # One mask serves all: of shorter segments it is a part.
        prompt, longest = self.longest
        whole = self._kept((prompt, longest), query, self._causal)
        return whole[..., :length, prompt - before : prompt + length]

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
        assert self.function is not None
        seen = self.function(
            zero.view(1, 1, 1, 1), zero, places[None, None, before:, None], places[None, None, None]
        )
        return torch.as_tensor(seen).expand(1, 1, length, before + length)

    @staticmethod
    def _causal(before: int, length: int, device: torch.device) -> Tensor:
        return torch.ones(1, 1, length, before + length, dtype=torch.bool, device=device).tril(
            before
        )


def marked(row: Row, function: Callable[..., Any]) -> Tensor:
    """Return what stands for the mask of a row: no token sees another, and the layout is an attribute.

    It has the shape that models expect, and no memory.
    """
    take_apart()
    S = row.ids.shape[1]
    found = torch.zeros((), dtype=torch.bool, device=row.ids.device).expand(1, 1, S, S)
    setattr(found, LAYOUT, Layout(row, function))
    return found


def take_apart() -> None:
    """Let transformers' attention of kind sdpa take rows apart. Without such a row it does what it did."""
    whole = ALL_ATTENTION_FUNCTIONS[SDPA]
    if not hasattr(whole, TAKES_APART):
        function = functools.wraps(whole)(functools.partial(_attention, whole))
        setattr(function, TAKES_APART, True)
        AttentionInterface.register(SDPA, function)


def _attention(
    whole: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **options: Any,
) -> tuple[Tensor, Any]:
    """Compute the attention of a row, one group of segments after the other."""
    if torch.compiler.is_compiling() or not hasattr(attention_mask, LAYOUT):
        return whole(module, query, key, value, attention_mask, *args, **options)
    layout = getattr(attention_mask, LAYOUT)
    if options.get("position_bias") is not None:
        raise ValueError("shared_prompt: a bias for each pair of positions cannot be taken apart")
    row: Row = layout.row
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


def _with_mask(
    module: Any,
    inputs: list[Tensor],
    mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> Tensor:
    """Compute what transformers' function for sdpa does with a mask, without copies of keys and values.

    It repeats them for the heads that share them, which PyTorch's kernels on a CPU, and FlashAttention, do
    not need.
    """
    query, key, value = inputs
    shared = getattr(module, "num_key_value_groups", 1) > 1
    if softcap is not None or (query.is_cuda and query.dtype == torch.float32):
        options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "softcap": softcap}
        return sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    found = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=shared
    )
    return found.transpose(1, 2)
