"""Sequences of tokens, padded or packed: the sequence of each token, and sums and values of sequences.

Padded tokens are (B, T), one sequence in each row. Packed tokens are (N,), sequences end to end;
`boundaries` or `cu_seqlens`, (num_sequences + 1,), hold the start of each sequence and the end of
the last one. Packed tokens without boundaries are one sequence.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_fast.checks import check_cu_seqlens, check_device, check_shape, check_tensor, shape_of


def sequence_of_token(cu_seqlens: Tensor, N: int) -> Tensor:
    """Return the index of the sequence that each of N packed tokens belongs to, (N,)."""
    position = torch.arange(N, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)


def sequence_sums(boundaries: Tensor | None, T_len: int, N: int) -> Callable[[Tensor], Tensor]:
    """Return a function that gives each of N tokens the sum of values (N,) over its sequence.

    Without boundaries every `T_len` tokens are a sequence. Values of masked tokens must be 0.
    """
    # The sums are float64: in float32, thousands of tokens added one by one lose digits that a sum
    # in pairs keeps.
    if boundaries is None:

        def total(x: Tensor) -> Tensor:
            rows = x.view(-1, max(T_len, 1))
            sums = rows.sum(-1, keepdim=True, dtype=torch.float64)
            return sums.to(x.dtype).expand(rows.shape).reshape(-1)

        return total
    sequence, number = sequence_of_token(boundaries, N), len(boundaries) - 1

    def total_of_packed(x: Tensor) -> Tensor:
        sums = x.new_zeros(number, dtype=torch.float64).index_add_(0, sequence, x.double())
        return sums.to(x.dtype)[sequence]

    return total_of_packed


def sum_over_sequence(x: Tensor, live: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return, at each token, the sum of x over the tokens of its sequence that count.

    x is (B, T) or (N,), and so is the result.
    """
    total = sequence_sums(cu_seqlens, x.shape[-1], x.numel())
    return total(torch.where(live, x, 0).reshape(-1)).view(x.shape)


def per_sequence(x: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return the sums of x (N,) over sequences in float64: (B, 1), or (num_sequences,) if packed."""
    x = x.double()
    if cu_seqlens is None:
        return x.view(like.shape).sum(-1, keepdim=True)
    index = sequence_of_token(cu_seqlens, len(x))
    return x.new_zeros(len(cu_seqlens) - 1).index_add(0, index, x)


def spread(x: Tensor, shape: torch.Size | tuple[int, ...], sequence: Tensor | None) -> Tensor:
    """Return values of sequences, (num_sequences,), as one per token, (N,), contiguous.

    Args:
        shape: the shape of the tokens, (B, T), where there is no `sequence`.
        sequence: (N,) the sequence of each token, or None.
    """
    if sequence is not None:
        return x[sequence]
    # `contiguous`, because with one sequence `reshape` returns a view of one element with stride 0.
    return x.unsqueeze(1).expand(shape).reshape(-1).contiguous()


def first_of_sequence(rows: Tensor, sequence: Tensor | None) -> Tensor:
    """Return whether a token is the first of its sequence, (N,) bool.

    Args:
        rows: (B, T) tokens, for their shape.
        sequence: (N,) the sequence of each packed token, or None.
    """
    if sequence is not None:
        before = torch.nn.functional.pad(sequence, (1, 0), value=-1)[:-1]
        return sequence != before
    position = torch.arange(rows.numel(), device=rows.device)
    return position % max(rows.shape[-1], 1) == 0


def per_token_advantages(
    op: str, advantages: Tensor, logps: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """Check the advantages that `op` got; return them per token, of the shape of `logps`."""
    check_tensor(op, "logps", logps)
    if logps.ndim not in (1, 2):
        raise ValueError(f"{op}: logps: want (B, T) or (N,), got {shape_of(logps)}")
    if cu_seqlens is not None:
        check_cu_seqlens(op, cu_seqlens, logps)
    return spread_argument(op, "advantages", advantages, logps, cu_seqlens)


def one_per_sequence(x: Any) -> Any:
    """Turn (B, 1) into (B,), since both mean one value per sequence; return anything else unchanged."""
    return x.reshape(-1) if isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] == 1 else x


def spread_argument(
    op: str,
    name: str,
    x: Tensor,
    like: Tensor,
    cu_seqlens: Tensor | None,
    sequence: Tensor | None = None,
) -> Tensor:
    """Check an argument as `check_spread` does; return it per token.

    Args:
        sequence: (N,) the sequence of each packed token, where it is known.
    """
    check_spread(op, name, x, like, cu_seqlens)
    if x.shape == like.shape:
        return x
    check_device(op, name, x, like)
    x = x.reshape(-1)
    if cu_seqlens is None:
        return (x.unsqueeze(1) if like.ndim == 2 else x).expand(like.shape)
    return x[sequence_of_token(cu_seqlens, len(like)) if sequence is None else sequence]


def check_spread(op: str, name: str, x: Tensor, like: Tensor, cu_seqlens: Tensor | None) -> None:
    """Check an argument with one value per sequence, (B,) or (B, 1), or per token.

    Args:
        like: one entry per token, (B, T) or packed (N,); packed without boundaries it is one
            sequence.
        cu_seqlens: checked boundaries.
    """
    check_tensor(op, name, x)
    if cu_seqlens is not None:
        num_sequences = len(cu_seqlens) - 1
    else:
        num_sequences = len(like) if like.ndim == 2 else 1
    check_shape(op, name, x, ((num_sequences,), (num_sequences, 1), tuple(like.shape)))
    check_told_apart(op, name, x, cu_seqlens, like)


def check_told_apart(
    op: str, name: str, x: Tensor, cu_seqlens: Tensor | None, like: Tensor
) -> None:
    """Refuse (N,) of N packed tokens in N sequences: it may be per token or per sequence.

    If each sequence has one token, both are the same, and it is taken. To find out, the lengths are
    read, which is a host sync on a GPU: nothing else tells.
    """
    if cu_seqlens is None or x.ndim != 1 or not len(x) == len(like) == len(cu_seqlens) - 1:
        return
    if not torch.compiler.is_compiling() and bool((cu_seqlens.diff() == 1).all()):
        return
    raise ValueError(
        f"{op}: {name}: ({len(x)},) may be one per token or one per sequence, since cu_seqlens has as many "
        f"sequences as there are tokens, and not one token in each; pass ({len(x)}, 1) for one per sequence, "
        "or leave empty sequences out of cu_seqlens"
    )
