"""List launches of the kernels on tokens, sequences, rewards and rows of hidden states, for `bounds.py`."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks.inputs.shapes import device
from benchmarks.run.launch_inputs import FULL, HALF, Kernels, Launch, flags, new, tokens
from grpo_fast.kernels import (
    chunks,
    group_advantage,
    policy_loss,
    reduction_weights,
    scaling,
    sequence_loss,
)
from grpo_fast.objective import Objective
from grpo_fast.records import (
    Grouping,
    Incoming,
    Outgoing,
    Outputs,
    Sequences,
    Standardization,
    Weighing,
)


def tokens_of(N: int, extras: bool) -> None:
    """Launch the objective on log-probs of N tokens."""
    objective = Objective(beta=0.1 * extras)
    mask = flags(N) if extras else None
    policy_loss.policy_loss_fwd(new(N), mask, tokens(N, extras), objective)


def statistics_of(N: int, extras: bool) -> None:
    """Launch the statistics of N tokens; more than 64 programs are combined in two rounds."""
    more = [new(N) if extras else None for _ in range(5)]
    clip = torch.zeros(N, dtype=torch.int8, device=device())
    outputs = Outputs(new(N), new(N), more[0], more[1], clip)
    policy_loss.token_statistics_fwd(outputs, flags(N) if extras else None, *more[2:])


def sequences_of(
    N: int, objective: Objective, boundaries: Sequence[int] = (), extras: bool = True
) -> None:
    """Launch an objective of whole sequences on N tokens, packed where there are boundaries."""
    ends = torch.tensor(boundaries, device=device()) if boundaries else None
    mask = flags(N) if extras else None
    share, log_importance = (new(N).abs() if extras else None for _ in range(2))
    sequences = Sequences(ends, 0 if boundaries else N, share, log_importance)
    sequence_loss.sequence_loss_fwd(new(N), mask, tokens(N, extras), sequences, objective)


GSPO = Objective(ratio="sequence", beta=0.1, kl="k3_unbiased")
BY_SEQUENCE = {
    "gspo": GSPO,
    "gmpo": Objective(surrogate="gmpo", beta=0.1),
    "vespo": Objective(surrogate="vespo", beta=0.1),
}
# Beyond the tokens, before them, backwards: as nobody checks them on a GPU.
WILD = (0, 700, 300, 5000, -2000, 2**40, 1025)


def of_sequences() -> Iterator[tuple[str, Launch]]:
    for name, objective in BY_SEQUENCE.items():
        yield f"{name}, 1", partial(sequences_of, 1, objective)
        yield f"{name}, 513", partial(sequences_of, 513, objective)
        yield f"{name}, packed", partial(sequences_of, 1025, objective, (0, 0, 513, 514, 1025))
    yield "bare", partial(sequences_of, 513, Objective(ratio="sequence"), extras=False)
    yield "wild boundaries", partial(sequences_of, 1025, GSPO, WILD)


def weighed(
    shape: tuple[int, ...], reduction: str, boundaries: Sequence[int] = (), **options: bool
) -> None:
    """Launch the weights of a reduction; `options` are bare, and floating (by default the mask is)."""
    bare = options.get("bare", False)
    N = torch.Size(shape).numel()
    ends = torch.tensor(boundaries, device=device()) if boundaries else None
    weighing = Weighing(boundaries=ends)
    if not bare:
        number = new(1).abs().squeeze()
        floating = new(N, dtype=HALF).abs() if options.get("floating", True) else None
        items = number if floating is not None else None  # else the number of tokens counts
        weighing = Weighing(flags(N), floating, new(N), ends, items, number)
    reduction_weights.reduction_weights_fwd(new(*shape), weighing, reduction, 0, not bare)


def of_reductions() -> Iterator[tuple[str, Launch]]:
    for reduction in ("sequence_mean", "token_mean", "sequence_sum"):
        for shape in ((1, 1), (3, 2049), (5, 1)):
            yield f"{reduction} {shape}", partial(weighed, shape, reduction)
        yield f"{reduction} bare", partial(weighed, (3, 2049), reduction, bare=True)
        yield f"{reduction} of bools", partial(weighed, (3, 2049), reduction, floating=False)
        ends = (0, 0, 4099, 4100)
        yield f"{reduction} packed", partial(weighed, (4100,), reduction, ends)
        yield f"{reduction} wild boundaries", partial(weighed, (1025,), reduction, WILD)


def grouped() -> Iterator[tuple[str, Launch]]:
    """List launches of the advantages: one reward, a prime number, more than one block."""
    many = group_advantage.MAX_BLOCK + 5
    for n, size in ((1, 1), (7, 7), (many, many), (6, 3)):
        labels = torch.arange(n, device=device()) % 3
        for scale in ("group", "batch", "none"):
            given = Standardization(scale, 1e-4, leave_one_out=True, skip_nan=n > 1)
            for which in (None, labels):
                if n == many and (scale != "group" or which is not None):
                    continue  # many programs
                how = "" if which is None else ", labels"
                values = new(n, dtype=torch.float64 if n == 7 else FULL)
                grouping = Grouping(size, which)
                launch = partial(group_advantage.group_advantage_fwd, values, grouping, given)
                yield f"{n} {scale}{how}", launch


def combined() -> Iterator[tuple[str, Launch]]:
    scored = Standardization("group", 1e-4, skip_nan=True, raw_singletons=True)
    for n, size in ((1, 1), (7, 7), (6, 3)):
        for labels in (None, torch.arange(n, device=device()) % 3):
            for normalize in (False, True):
                yield (
                    f"{n}{'' if labels is None else ', labels'}{', scored' * normalize}",
                    partial(
                        group_advantage.combine_rewards_fwd,
                        *(new(n, 3), new(3, dtype=torch.float64)),
                        *(Grouping(size, labels), normalize, scored),
                    ),
                )


def scaled_numbers() -> Iterator[tuple[str, Launch]]:
    for n in (1, scaling.ELEMENTS + 1):
        x, factor = new(n), new(1).squeeze()
        yield f"{n} in place", partial(scaling.scale, x, factor, x)
        yield f"{n} to halves", partial(scaling.scale, x, factor, new(n, dtype=HALF))


def weighed_rows() -> Iterator[tuple[str, Launch]]:
    for D in (1, scaling.COLUMNS + 1):
        c = new(6)[::2]
        c[0] = 0.0
        yield f"{D}", partial(scaling.weigh_rows, new(3, D), c, new(3, D, dtype=HALF))


def moved(D: int, which: bool) -> None:
    """Launch a move of fewer rows than the workspace has, of `which` rows or of the first ones."""
    n, rows = 3, 4 if which else 3
    stage, h, hidden = new(5, D), new(5, D, dtype=HALF), new(D, rows, dtype=HALF).T
    at = torch.tensor([3, 0, 2], device=device()) if which else None
    live = flags(n) if which else None
    dhidden = new(rows, D, dtype=HALF)
    chunks.move_rows(Outgoing(stage, dhidden, at, n), Incoming(hidden, at, live, n, h))


KERNELS: Kernels = {
    "_scale_kernel": scaled_numbers,
    "_weigh_rows_kernel": weighed_rows,
    "_move_rows_kernel": lambda: (
        (f"{D}{', chosen' * which}", partial(moved, D, which))
        for D in (1, chunks.BLOCK + 1)
        for which in (False, True)
    ),
    "_policy_loss_kernel": lambda: (
        (f"{N}{', extras' * extras}", partial(tokens_of, N, extras))
        for N in (1, policy_loss.BLOCK + 1)
        for extras in (False, True)
    ),
    "_token_statistics_kernel": lambda: (
        (f"{N}{', extras' * extras}", partial(statistics_of, N, extras))
        for N, extras in ((1, False), (1025, True), (65 * policy_loss.BLOCK + 1, False))
    ),
    "_sequence_loss_kernel": of_sequences,
    "_reduction_weights_kernel": of_reductions,
    "_group_advantage_kernel": grouped,
    "_combine_rewards_kernel": combined,
}
