"""`plan`: check token ids and masks, and find the prompts that completions share."""

import torch
from torch import Tensor

from grpo_fast.checks import shape_of
from grpo_fast.shared_prompt.plans import Plan, boundaries, longest_of

OP = "shared_prompt.plan"


def plan(
    prompt_ids: Tensor,
    completion_ids: Tensor,
    *,
    prompt_mask: Tensor | None = None,
    completion_mask: Tensor | None = None,
    group_size: int | None = None,
    prompt_of: Tensor | None = None,
    prompt_positions: Tensor | None = None,
) -> Plan:
    """Return the plan of a forward that computes each different prompt once.

    The lengths and the prompts are compared on the CPU: on a GPU this waits for it once.

        >>> prompts, completions = torch.tensor([[5, 6], [5, 6]]), torch.tensor([[7, 8], [9, 3]])
        >>> plan = shared_prompt.plan(prompts, completions)
        >>> torch.testing.assert_close(plan.prompt_ids, torch.tensor([[5, 6]]))
        >>> torch.testing.assert_close(plan.targets, torch.tensor([7, 8, 9, 3]))

    Args:
        prompt_ids: (B, P), the prompt of each completion; prompts with the same tokens are computed once.
            Or (K, P), one row for each prompt, with `group_size` or `prompt_of`.
        completion_ids: (B, T).
        prompt_mask, completion_mask: 1 at tokens, 0 at padding, which may be on either side. Default: all 1.
            The completion mask says which tokens the model reads: a token without a loss is a token. Leave it
            out of the loss with the loss's own `mask`.
        group_size: each prompt has this number of consecutive completions.
        prompt_of: (B,), the row of `prompt_ids` before each completion. For groups of different sizes.
        prompt_positions: like `prompt_ids`, the position ids. Default: 0, 1, ... from the first token on. A
            completion goes on from the position of the last prompt token.

    Returns:
        A `Plan` on the device of `completion_ids`.

    Raises:
        ValueError: shapes or masks do not fit; the message names the argument and the row.
    """
    ids, completions = _matrix("prompt_ids", prompt_ids), _matrix("completion_ids", completion_ids)
    device = completion_ids.device
    B, T = completions.shape
    mask = _mask("prompt_mask", prompt_mask, ids)
    live = _mask("completion_mask", completion_mask, completions)
    lengths = mask.sum(1)
    if not lengths.all():
        raise ValueError(
            f"{OP}: prompt_mask: row {int((lengths == 0).nonzero()[0])} has no token: nothing predicts the "
            "first token of its completions"
        )
    if prompt_positions is None:
        positions = mask.cumsum(1) - 1
    else:
        positions = _matrix("prompt_positions", prompt_positions)
        if positions.shape != ids.shape:
            raise ValueError(
                f"{OP}: prompt_positions: want {shape_of(ids)}, as prompt_ids, got {shape_of(positions)}"
            )
        _largest("prompt_positions", positions, mask)
    largest = max(_largest("prompt_ids", ids, mask), _largest("completion_ids", completions, live))
    P = longest_of(lengths)
    ids, positions, mask = _aligned(mask, P, True, ids, positions)
    key = torch.cat([torch.where(mask, x, -1) for x in (ids, positions)], 1)
    row = _prompt_of(key, completions, group_size, prompt_of)
    chosen, row = _distinct(key, row)
    ids, positions, mask, lengths = (x[chosen] for x in (ids, positions, mask, lengths))
    sizes = live.sum(1)
    places = torch.arange(B * T).view(B, T)
    longest = longest_of(sizes)
    targets, where, kept = _aligned(live, longest, False, completions, places)
    after = (positions[row, -1:] + 1 + torch.arange(longest)) * kept
    ends = positions[:, -1:]
    return Plan(
        prompt_ids=ids.to(device),
        prompt_mask=mask.to(device),
        prompt_positions=positions.to(device),
        completion_ids=targets.to(device),
        completion_mask=kept.to(device),
        completion_positions=after.to(device),
        prompt_of=row.to(device),
        prompt_lengths=lengths,
        completion_lengths=sizes,
        targets=targets[kept].to(device),
        cu_seqlens=boundaries(sizes).to(device),
        where=where[kept].to(device),
        given=(B, T),
        tokens_given=B * (prompt_ids.shape[1] + T),
        largest_id=largest,
        last_positions=(-longest_of(-ends), max(map(longest_of, (positions, after)))),
    )


def _largest(name: str, ids: Tensor, mask: Tensor) -> int:
    """Return the largest value of a token; refuse negative ones, such as labels of tokens without a loss."""
    known = ids[mask]
    if known.numel() and int(known.min()) < 0:
        row = int(((ids < 0) & mask).any(1).nonzero()[0])
        raise ValueError(
            f"{OP}: {name}: row {row} has a negative value, {int(known.min())}: if it is padding, let the "
            "mask be 0 there"
        )
    return int(known.max()) if known.numel() else 0


def _matrix(name: str, x: Tensor) -> Tensor:
    """Return a matrix of integers as int64 on the CPU."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{OP}: {name}: want a tensor, got {type(x).__name__}")
    if x.ndim != 2:
        raise ValueError(f"{OP}: {name}: want two dimensions, got {shape_of(x)}")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{OP}: {name}: want int32 or int64, got {x.dtype}")
    return x.detach().long().cpu()


def _mask(name: str, mask: Tensor | None, ids: Tensor) -> Tensor:
    """Return a mask as booleans on the CPU, checked: in each row the tokens are consecutive."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, Tensor):
        raise TypeError(f"{OP}: {name}: want a tensor, got {type(mask).__name__}")
    if mask.shape != ids.shape:
        raise ValueError(f"{OP}: {name}: want {shape_of(ids)}, one per token, got {shape_of(mask)}")
    known = mask.detach().cpu()
    if not ((known == 0) | (known == 1)).all():
        raise ValueError(f"{OP}: {name}: want 0 and 1")
    known = known.bool()
    steps = known.int().diff(dim=1, prepend=torch.zeros(len(known), 1, dtype=torch.int32))
    broken = ((steps == 1).sum(1) > 1).nonzero()
    if len(broken):
        raise ValueError(
            f"{OP}: {name}: row {int(broken[0])} has a 0 between two tokens: padding may only be at its ends"
        )
    return known


def _aligned(mask: Tensor, width: int, right: bool, *values: Tensor) -> tuple[Tensor, ...]:
    """Move the tokens of each row to one side of `width` columns, with 0 elsewhere; return the mask, too."""
    lengths = mask.sum(1, keepdim=True)
    columns = torch.arange(width)
    kept = columns >= width - lengths if right else columns < lengths
    moved = [x.new_zeros(kept.shape).masked_scatter(kept, x[mask]) for x in values]
    return *moved, kept


def _prompt_of(
    key: Tensor, completions: Tensor, group_size: int | None, prompt_of: Tensor | None
) -> Tensor:
    """Return the row of `prompt_ids` before each completion, (B,) on the CPU.

    Args:
        key: (K, ...), equal for equal prompts.
    """
    K, B = len(key), len(completions)
    if prompt_of is not None:
        if group_size is not None:
            raise ValueError(f"{OP}: group_size={group_size} and prompt_of: want one of them")
        row = prompt_of.detach().cpu() if isinstance(prompt_of, Tensor) else torch.tensor(prompt_of)
        if row.shape != (B,) or row.is_floating_point() or row.dtype == torch.bool:
            raise ValueError(
                f"{OP}: prompt_of: want ({B},) integers, one per completion, got {shape_of(row)} {row.dtype}"
            )
        if B and (int(row.min()) < 0 or int(row.max()) >= K):
            raise ValueError(
                f"{OP}: prompt_of: want rows of prompt_ids, 0 to {K - 1}, got {int(row.min())} to "
                f"{int(row.max())}"
            )
        return row.long()
    number = isinstance(group_size, int) and not isinstance(group_size, bool)
    if group_size is not None and not (number and group_size >= 1):
        raise ValueError(f"{OP}: group_size: want a positive integer, got {group_size!r}")
    if group_size is not None and B % group_size:
        raise ValueError(f"{OP}: group_size={group_size} does not divide {B} completions")
    if K == B:
        if group_size is not None:
            groups = key.view(B // group_size, group_size, key.shape[1])
            other = (groups != groups[:, :1]).any(2).flatten().nonzero()
            if len(other):
                raise ValueError(
                    f"{OP}: group_size={group_size}, but prompt {int(other[0])} is another than the first of "
                    "its group"
                )
        return torch.arange(B)
    if group_size is not None and K * group_size == B:
        return torch.arange(K).repeat_interleave(group_size)
    raise ValueError(
        f"{OP}: prompt_ids has {K} rows and completion_ids {B}: want one prompt per completion, or "
        "group_size or prompt_of"
    )


def _distinct(key: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Find the prompts that are equal: the row of the first of each, in order, and which of these each is.

    Args:
        key: (K, ...), equal for prompts with the same tokens at the same positions.
        row: (B,), the prompt of each completion.
    """
    if not len(row):
        return row, row
    _, which = key[row].unique(dim=0, return_inverse=True)
    count = int(which.max()) + 1
    first = torch.full((count,), len(which)).scatter_reduce(
        0, which, torch.arange(len(which)), "amin"
    )
    order = first.argsort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(count)
    return row[first[order]], rank[which]
