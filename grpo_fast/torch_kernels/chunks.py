"""Copies of rows of hidden states into and out of a chunk of the head: the twin of `kernels/chunks.py`."""

import torch

from grpo_fast.records import Incoming, Outgoing


def move_rows(outgoing: Outgoing | None, incoming: Incoming | None) -> None:
    """Write the waiting gradients to their place, and the hidden states of the next chunk into `h`."""
    if outgoing is not None:
        stage, dhidden, rows, n = outgoing
        if rows is None:
            dhidden[:n] = stage[:n]
        else:
            dhidden.index_copy_(0, rows[:n], stage[:n].to(dhidden.dtype))
    if incoming is not None:
        hidden, rows, live, n, h = incoming
        x = hidden[:n] if rows is None else hidden.index_select(0, rows[:n])
        h[:n] = x if live is None else torch.where(live[:n, None], x, 0)
        h[n:] = 0
