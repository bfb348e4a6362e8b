"""`Plan`: completions, the prompts that they share, and where the state is that predicts each token."""

import dataclasses
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.checks import shape_of

PADDING = -1  # the branch of a position that holds no token
# Models have another code for one token after a cache, which works in place: there are always two.
LEAST_TAIL = 2


class Rows(NamedTuple):
    """A layout with one row for each prompt: `[prompt | completion 1 | completion 2 | ... | padding]`.

    The last token of a completion is left out: nothing is predicted from it. In `Plan.tails` the prompts,
    with their padding, are in a cache, and `ids` and `positions` begin after them; the labels do not.

    A token sees another if `first[seen] <= first[seeing] <= last[seen]`, up to its own place. So the
    labels describe a tree: those of a prompt span all of its completions, and each completion has one
    label of its own.
    """

    ids: Tensor  # (K, S), or (K, S - P) in tails
    positions: Tensor  # like ids: position ids for the model
    depth: Tensor  # (K, S): how many tokens come before this one in its own sequence
    first: Tensor  # (K, S): the interval of labels; PADDING where there is no token
    last: Tensor  # (K, S)
    # (N,): which state predicts each target. Of the rows, flattened; in tails after K last ones of prompts.
    predictors: Tensor


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


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """B completions, the K different prompts before them, and the N tokens that are predicted.

    All tensors are on the device of the completions, except for the lengths, which are on the CPU.

    Attributes:
        prompt_ids, prompt_mask, prompt_positions: (K, P), padded on the left with 0.
        completion_ids, completion_mask, completion_positions: (B, T), padded on the right with 0; T is
            the length of the longest completion.
        prompt_of: (B,), the prompt before each completion.
        prompt_lengths, completion_lengths: (K,) and (B,), on the CPU.
        targets: (N,), the completion tokens, one completion after the other.
        cu_seqlens: (B + 1,) int32, the first target of each completion, and N.
        where: (N,), the place of each target in the completions that were given, flattened.
        given: the shape of the completions that were given.
        tokens_given: the number of tokens of the padded batch, B * (P + T) as it was given.
        largest_id: the largest token id.
        last_positions: the smallest last position of a prompt, and the largest position.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    prompt_positions: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    completion_positions: Tensor
    prompt_of: Tensor
    prompt_lengths: Tensor
    completion_lengths: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    where: Tensor
    given: tuple[int, int]
    tokens_given: int
    largest_id: int
    last_positions: tuple[int, int]

    @property
    def longest(self) -> tuple[int, int]:
        """Return the numbers of tokens of the longest prompt and of the longest completion."""
        return self.prompt_ids.shape[1], self.completion_ids.shape[1]

    @functools.cached_property
    def prompt_of_here(self) -> Tensor:
        """`prompt_of` on the CPU; a GPU is waited for once, not for each estimate and layout."""
        return self.prompt_of.cpu()

    @functools.cached_property
    def fed(self) -> Tensor:
        """Return how many tokens of each completion the model reads: all but the last; (B,), on the CPU."""
        return (self.completion_lengths - 1).clamp(min=0)

    def padded(self, values: Tensor) -> Tensor:
        """Put values of the targets, (N, ...), at their places in the completions, (B, T, ...).

        The result has the shape of the completions that were given to `plan`, and zeros elsewhere.
        """
        B, T = self.given
        out = values.new_zeros(B * T, *values.shape[1:])
        return out.index_copy(0, self.where, values).view(B, T, *values.shape[1:])

    def packed(self, values: Tensor) -> Tensor:
        """Take the values of the targets, (N, ...), from values of the completions, (B, T, ...)."""
        if values.shape[:2] != self.given:
            raise ValueError(
                f"Plan.packed: values: want {self.given} first, the shape of the completions, got "
                f"{shape_of(values)}"
            )
        return values.flatten(0, 1).index_select(0, self.where)

    def prompt(self, k: int) -> tuple["Plan", Tensor]:
        """Return the plan of one prompt and its completions, and the indices of these on the CPU."""
        P, length = self.longest[0], int(self.prompt_lengths[k])
        chosen = (self.prompt_of_here == k).nonzero()[:, 0]
        part = self.completions(chosen)
        names = ("prompt_ids", "prompt_mask", "prompt_positions")
        prompt = {name: getattr(self, name)[k : k + 1, P - length :] for name in names}
        return dataclasses.replace(
            part,
            prompt_of=torch.zeros_like(part.prompt_of),
            prompt_lengths=self.prompt_lengths[k : k + 1],
            **prompt,
        ), chosen

    def completions(self, chosen: Tensor) -> "Plan":
        """Return the plan of some completions, with the same prompts.

        Args:
            chosen: (C,) int64 on the CPU, indices of completions.
        """
        device, lengths = self.prompt_of.device, self.completion_lengths[chosen]
        T, there = longest_of(lengths), chosen.to(device)
        mask = self.completion_mask[there, :T]
        starts = self.cu_seqlens[:-1][there]
        tokens = (starts[:, None] + torch.arange(T, device=device))[mask]
        return dataclasses.replace(
            self,
            completion_ids=self.completion_ids[there, :T],
            completion_mask=mask,
            completion_positions=self.completion_positions[there, :T],
            prompt_of=self.prompt_of[there],
            completion_lengths=lengths,
            targets=self.targets[tokens],
            cu_seqlens=boundaries(lengths).to(device),
            where=self.where[tokens],
            tokens_given=self.tokens_given // max(1, self.given[0]) * len(chosen),
        )

    @functools.cached_property
    def rows(self) -> Rows:
        """Lay the prompts and their completions out for a forward with a mask."""
        device, K = self.prompt_of.device, len(self.prompt_lengths)
        P, T = self.longest
        starts, sizes, labels, counts = _starts(self.prompt_of_here, self.prompt_lengths, self.fed)
        S = longest_of(sizes)
        row = torch.arange(K) * S
        length, label, count = (
            x.to(device)[:, None] for x in (self.prompt_lengths, labels, counts)
        )
        # Where the tokens of prompts and completions go.
        in_prompt = (row + self.prompt_lengths - P).to(device)[:, None] + torch.arange(
            P, device=device
        )
        steps = torch.arange(T, device=device)
        begin = row.to(device)[self.prompt_of] + starts.to(device)
        fed = steps < self.fed.to(device)[:, None]
        in_completion = begin[:, None] + steps
        places = torch.cat([in_prompt[self.prompt_mask], in_completion[fed]])

        def lay(of_prompts: Tensor, of_completions: Tensor, empty: Tensor) -> Tensor:
            values = (
                of_prompts.expand(K, P)[self.prompt_mask],
                of_completions.expand(fed.shape)[fed],
            )
            return empty.index_copy(0, places, torch.cat(values)).view(K, S)

        nothing = torch.zeros(K * S, dtype=torch.int64, device=device)
        last_of_prompt = in_prompt[:, -1:][self.prompt_of]
        predictors = torch.cat([last_of_prompt, in_completion], 1)[:, :T]
        return Rows(
            ids=lay(self.prompt_ids, self.completion_ids, nothing),
            positions=lay(self.prompt_positions, self.completion_positions, nothing),
            depth=lay(
                self.prompt_mask.cumsum(1) - 1,
                length[self.prompt_of] + steps,
                torch.arange(K * S, device=device),
            ),
            first=lay(torch.zeros_like(count), label, nothing + PADDING),
            last=lay(count, label, nothing + PADDING),
            predictors=predictors[self.completion_mask],
        )

    @functools.cached_property
    def tails(self) -> Rows:
        """Lay the completions of each prompt out in one row, behind a cache of the prompts."""
        device, (K, P) = self.prompt_of.device, self.prompt_mask.shape
        behind = torch.zeros_like(self.prompt_lengths)
        starts, sizes, labels, counts = _starts(self.prompt_of_here, behind, self.fed)
        C = max(longest_of(sizes), LEAST_TAIL)
        begin = self.prompt_of * C + starts.to(device)
        steps = torch.arange(self.longest[1], device=device)
        fed = steps < self.fed.to(device)[:, None]
        places = (begin[:, None] + steps)[fed]
        length, label, count = (
            x.to(device)[:, None] for x in (self.prompt_lengths, labels, counts)
        )

        def lay(of_completions: Tensor, empty: Tensor) -> Tensor:
            return empty.index_copy(0, places, of_completions.expand(fed.shape)[fed]).view(K, C)

        def labelled(of_prompts: Tensor) -> Tensor:
            own = torch.where(self.prompt_mask, of_prompts, PADDING)
            return torch.cat([own, lay(label, nothing + PADDING)], 1)

        nothing = torch.zeros(K * C, dtype=torch.int64, device=device)
        depth = lay(length[self.prompt_of] + steps, P + torch.arange(K * C, device=device))
        predictors = torch.cat([self.prompt_of[:, None], K + begin[:, None] + steps], 1)
        return Rows(
            ids=lay(self.completion_ids, nothing),
            positions=lay(self.completion_positions, nothing),
            depth=torch.cat([self.prompt_mask.cumsum(1) - 1, depth], 1),
            first=labelled(torch.zeros_like(count)),
            last=labelled(count),
            predictors=predictors[:, :-1][self.completion_mask],
        )

    @functools.cached_property
    def one_row(self) -> Row:
        """Lay the prompts and their completions out as one row without padding.

        Prompts without completions are left out.
        """
        device, (K, P), T = self.prompt_of.device, self.prompt_ids.shape, self.longest[1]
        lengths, fed = self.prompt_lengths.tolist(), self.fed.tolist()
        members: dict[int, list[int]] = {}
        for b, k in enumerate(self.prompt_of_here.tolist()):
            members.setdefault(k, []).append(b)
        sizes: list[int] = []
        groups: list[Group] = []
        pieces: list[Tensor] = []  # places in all prompts and then all completions, with padding
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
                    group = followers.setdefault(fed[b], Group(prompt.members[0], []))
                    group.members.append(len(sizes))
                    sizes.append(fed[b])
                    pieces.append(torch.arange(K * P + b * T, K * P + b * T + fed[b]))
                    place += fed[b]
            groups += [prompt, *followers.values()]
        taken = torch.cat(pieces).to(device)

        def lay(of_prompts: Tensor, of_completions: Tensor) -> Tensor:
            return torch.cat([of_prompts.flatten(), of_completions.flatten()])[taken][None]

        steps = torch.arange(T)
        predictors = torch.cat([ends[:, None], starts[:, None] + steps], 1)[:, :T]
        return Row(
            ids=lay(self.prompt_ids, self.completion_ids),
            positions=lay(self.prompt_positions, self.completion_positions),
            predictors=predictors[steps < self.completion_lengths[:, None]].to(device),
            sizes=sizes,
            groups=groups,
        )

    @functools.cached_property
    def row_length(self) -> int:
        """Return the number of tokens in the longest of `rows`."""
        return longest_of(self.prompt_lengths.index_add(0, self.prompt_of_here, self.fed))

    def split(self, per_row: int) -> tuple["Plan", Tensor]:
        """Return a plan that repeats each prompt, so that its `tails` have few completions in each row.

        Prompts without completions are left out.

        Args:
            per_row: the largest number of completions with more than one token in a row of `tails`.

        Returns:
            The plan, and the index of the prompt of each row, on the CPU.
        """
        if per_row not in self._splits:
            row, prompts = self._dealt(per_row)
            there = prompts.to(self.prompt_of.device)
            names = ("prompt_ids", "prompt_mask", "prompt_positions")
            repeated = dataclasses.replace(
                self,
                **{name: getattr(self, name)[there] for name in names},
                prompt_of=row.to(there.device),
                prompt_lengths=self.prompt_lengths[prompts],
            )
            self._splits[per_row] = repeated, prompts
        return self._splits[per_row]

    def split_size(self, per_row: int) -> tuple[int, int]:
        """Return the numbers of rows and of columns of the `tails` of `split(per_row)`."""
        row, prompts = self._dealt(per_row)
        sizes = _totals(self.fed, row, len(prompts))
        return len(prompts), max(longest_of(sizes), LEAST_TAIL)

    @functools.cached_property
    def _splits(self) -> dict[int, tuple["Plan", Tensor]]:
        return {}

    def _dealt(self, per_row: int) -> tuple[Tensor, Tensor]:
        """Deal the completions of each prompt out to rows of about the same length; all on the CPU.

        Returns:
            The row of each completion, (B,), and the prompt of each row.
        """
        prompt_of, lengths = self.prompt_of_here, self.completion_lengths
        alive = torch.bincount(prompt_of[lengths > 1], minlength=len(self.prompt_lengths))
        counts = (-(-alive // per_row)).clamp(min=1)[prompt_of]
        # The longest first, and back and forth: rows 0, 1, 2, 2, 1, 0, 0, ... of a prompt.
        order = lengths.argsort(descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = _before(torch.ones_like(order), prompt_of[order], len(self.prompt_lengths))
        turn, place = rank // counts, rank % counts
        place = torch.where(turn % 2 == 1, counts - 1 - place, place)
        most = len(prompt_of) + 1
        keys, row = (prompt_of * most + place).unique(return_inverse=True)
        return row, keys // most


def _starts(
    prompt_of: Tensor, lengths: Tensor, tails: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Place completions one after the other in the rows of their prompts.

    Args:
        prompt_of: (B,), the row of each completion.
        lengths: (K,), how many tokens the prompts have.
        tails: (B,), how many tokens of each completion are placed.

    Returns:
        Where each completion starts in its row, (B,); the size of each row, (K,); the number of each
        completion among those of its prompt, from 1 on, (B,); and how many each prompt has, (K,).
    """

    K, one = len(lengths), torch.ones_like(prompt_of)
    return (
        lengths[prompt_of] + _before(tails, prompt_of, K),
        lengths + _totals(tails, prompt_of, K),
        _before(one, prompt_of, K) + 1,
        _totals(one, prompt_of, K),
    )


def _totals(values: Tensor, prompt_of: Tensor, K: int) -> Tensor:
    """Return the sum of the values of the completions of each prompt, (K,)."""
    return torch.zeros(K, dtype=torch.int64).index_add(0, prompt_of, values)


def _before(values: Tensor, prompt_of: Tensor, K: int) -> Tensor:
    """Return, for each completion, the sum of the values of the earlier ones of the same prompt, (B,)."""
    order = prompt_of.argsort(stable=True)
    sums, whole = values[order].cumsum(0) - values[order], _totals(values, prompt_of, K)
    found = torch.empty_like(values)
    found[order] = sums - (whole.cumsum(0) - whole)[prompt_of[order]]
    return found


def longest_of(lengths: Tensor) -> int:
    """Return the largest of some numbers, 0 if there are none."""
    return int(lengths.max()) if lengths.numel() else 0


def boundaries(lengths: Tensor) -> Tensor:
    """Return where each of B sequences of these lengths begins, and the end of the last; (B + 1,) int32."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
