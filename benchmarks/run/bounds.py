"""Launch every kernel with sizes and layouts at which a wrong mask leaves a tensor.

    python -m benchmarks.run.bounds                # every launch, on this device
    python -m benchmarks.run.bounds grpo           # those whose name holds this

A sanitizer watches the program on a GPU (`sanitize`), and guard bands in Triton's interpreter
(`tests/kernels/test_bounds.py`). Results are not looked at. Every tensor ends where its memory
ends: what is read or written behind it belongs to nobody.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks import command_line
from benchmarks.inputs.shapes import device
from grpo_fast.kernels import (
    chunks,
    group_advantage,
    grpo,
    logprob,
    on_chip,
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
    Rewards,
    RowStatistics,
    Sequences,
    SoftCap,
    Standardization,
    Targets,
    Tokens,
    Weighing,
)

HALF, FULL = torch.float16, torch.float32
# One entry; less than a unit of `edges`; a tile that is not full; full tiles and strips; and rows
# that programs share, of several segments each in float32. Rows of these start anywhere.
ONE, FEW, TILE, TILES, SPLIT = 1, 3, 1001, 9001, 33_003
# Divided by 8 and not by 16, and by 16: rows without edges.
UNITS, ALIGNED = (9000, 33_000), (9008, 33_008)
B, T = 1, 3  # of most launches; few rows, since the interpreter takes its time for each
# Outside the vocabulary, in 32 and in 64 bits.
OUTSIDE = (-100, -1, 2**31 - 1, 2**31, 2**32 + 1, -(2**32))
CAP = SoftCap(30.0, 0.5)
Launch = Callable[[], object]
LAUNCHES = "launches"  # what the last line counts


def new(*shape: int, dtype: torch.dtype = FULL) -> Tensor:
    """Return random numbers in memory of their own."""
    return torch.randn(shape, device=device()).to(dtype)


def flags(n: int) -> Tensor:
    """Return n bools; every third is False."""
    return torch.arange(n, device=device()) % 3 != 2


def rows(V: int, layout: str, dtype: torch.dtype = HALF, shape: tuple[int, int] = (B, T)) -> Tensor:
    """Return logits (B, T, V) whose last row ends where their memory ends.

    Args:
        layout: "dense"; "odd", a slice of longer rows and more of them, which starts anywhere; or
            "units", rows that start at multiples of 8 entries, apart from each other.
    """
    if layout == "dense":
        return new(*shape, V, dtype=dtype)
    if layout == "odd":
        return new(shape[0], shape[1] + 1, V + 3, dtype=dtype)[:, 1:, 3:]
    step = triton.cdiv(V, 8) * 8 + 8
    found = new(8 + (shape[0] * shape[1] - 1) * step + V, dtype=dtype)
    return found.as_strided((*shape, V), (shape[1] * step, step, 1), 8)


def lying_over(x: Tensor) -> Tensor:
    """Return halves that lie over the rows of x, which are float32 (`schedules.overlaps`)."""
    return x.view(HALF)[..., : x.shape[-1]]


def gradient(x: Tensor, where: str) -> Tensor:
    """Return the tensor for the gradient of logits x: "apart", in place ("in"), or "over" them."""
    if where == "apart":
        return new(*x.shape, dtype=HALF)
    return x if where == "in" else lying_over(x)


def targets(n: int, V: int, extras: bool) -> Targets:
    """Return ids from end to end of [0, V); with `extras` ids outside, a mask and temperatures."""
    ids = torch.tensor([(V - 1) * i // max(n - 1, 1) for i in range(n)], device=device())
    if not extras:
        return Targets(ids)
    wild = torch.tensor([V, *OUTSIDE], device=device())
    at = torch.arange(n, device=device())
    # The first of a sequence of three is one too high; the third, which is masked, stays as it is.
    return Targets(
        torch.where(at % 3 == 0, V, torch.where(at % 3 == 1, wild[(at + V) % len(wild)], ids)),
        flags(n),
        new(n).abs() + 0.5,
    )


def tokens(n: int, extras: bool, advantages: bool = True) -> Tokens:
    """Return the numbers of n tokens: all of them, or the least that a loss needs."""
    given = Tokens._fields if extras else ("weight", "advantages")
    found = Tokens(**{name: new(n) for name in given})
    found.weight[n // 2] = 0.0  # a row without a gradient
    return found if advantages else found._replace(advantages=None)


def too_large(x: Tensor) -> Tensor:
    """Make the last row of logits one that is read again (`scoring.read_again`)."""
    x[-1, -1] = torch.finfo(x.dtype).min
    return x


def read(V: int, layout: str, dtype: torch.dtype = HALF, **options: Any) -> None:
    """Launch the forward of log-probs; `options` are extras, entropy, cap."""
    x = too_large(rows(V, layout, dtype))
    scored = targets(B * T, V, options.get("extras", False))
    if options.get("extras"):
        scored = scored._replace(temperature=torch.full((B * T,), 1e-30, device=device()))
    logprob.logprob_fwd(x, scored, options.get("entropy", False), options.get("cap"))


def write(
    V: int, layout: str, dtype: torch.dtype = HALF, where: str = "apart", **options: Any
) -> None:
    """Launch the backward of log-probs; `options` as of `read`."""
    x = rows(V, layout, dtype)
    N, entropy = B * T, options.get("entropy", False)
    statistics = RowStatistics(new(N), new(N) if entropy else None, new(N), new(N).abs())
    dlogp = new(N)
    dlogp[0] = 0.0
    logprob.logprob_bwd(
        dlogp,
        new(N) * flags(N) if entropy else None,
        x,
        targets(N, V, options.get("extras", False)),
        statistics,
        gradient(x, where),
        options.get("cap"),
    )


def both(
    V: int, layout: str, dtype: torch.dtype = HALF, where: str = "apart", **options: Any
) -> None:
    """Launch the loss and its gradient; `options` as of `read`, and rewards, packed or not."""
    shape = (2, 2) if "rewards" in options else (B, T)
    x = too_large(rows(V, layout, dtype, shape))
    N, extras = shape[0] * shape[1], options.get("extras", False)
    rewards = Rewards()
    if "rewards" in options:
        sequence = torch.arange(N, device=device()) // 2 if options["rewards"] == "packed" else None
        rewards = Rewards(new(2), 2, sequence)
    launcher = options.get("launcher", grpo.grpo_fwd_bwd)
    launcher(
        x,
        targets(N, V, extras),
        tokens(N, extras, rewards.values is None),
        rewards,
        return_entropy=options.get("entropy", False),
        objective=Objective(beta=0.1 * extras, entropy_coef=0.1 * options.get("entropy", False)),
        dlogits=gradient(x, where),
        **({"softcap": options["cap"]} if "cap" in options else {}),
    )


def of_logits(launch: Callable[..., None], *places: str) -> Iterator[tuple[str, Launch]]:
    """List launches of a kernel on logits: rows of every length, each in another layout and place."""
    plain = {"layout": "dense"}
    for V in (ONE, FEW, TILE, TILES, SPLIT):
        yield f"{V} dense", partial(launch, V, **plain)
        yield f"{V} odd, extras", partial(launch, V, "odd", extras=True)
    for i, dtype in enumerate((FULL, HALF)):
        yield f"{UNITS[i]} units", partial(launch, UNITS[i], "units", dtype)
        yield f"{ALIGNED[i]} aligned", partial(launch, ALIGNED[i], "dense", dtype)
        yield f"{UNITS[1]} units, extras", partial(launch, UNITS[1], "units", dtype, extras=True)
    yield "units, entropy, float32", partial(launch, TILES, "units", FULL, entropy=True)
    yield "split float32", partial(launch, SPLIT, "odd", FULL)
    yield "split float32, extras", partial(launch, SPLIT, "units", FULL, extras=True, entropy=True)
    yield "soft cap", partial(launch, TILE, "odd", extras=True, cap=CAP)
    yield "split, soft cap", partial(launch, SPLIT, "odd", entropy=True, cap=CAP)
    for where in places:
        dtype = FULL if where == "over" else HALF
        for V in (FEW, TILES, UNITS[0], SPLIT):
            layout = "units" if where == "over" else "odd"
            yield f"{where} {V}", partial(launch, V, layout, dtype, where)
            yield (
                f"{where} {V}, extras",
                partial(launch, V, layout, dtype, where, extras=True, entropy=V != SPLIT),
            )


def with_rewards() -> Iterator[tuple[str, Launch]]:
    for V in (TILE, SPLIT):
        yield f"rewards {V}", partial(both, V, "odd", rewards="padded")
        yield f"rewards {V}, packed", partial(both, V, "odd", rewards="packed", extras=True)


def kept_on_chip() -> Iterator[tuple[str, Launch]]:
    """List launches of the kernel that keeps a row: one strip, several, several thread blocks."""
    if on_chip.unavailable(device()):
        return
    launch = partial(both, launcher=on_chip.grpo_fwd_bwd)
    for V in (8, 1000, 4104, 20_488):
        yield f"{V}", partial(launch, V, "dense")
        yield f"{V}, entropy", partial(launch, V, "units", where="in", entropy=True, extras=True)
    yield "rewards", partial(launch, 1000, "dense", rewards="packed")


def scaled() -> Iterator[tuple[str, Launch]]:
    """List launches of `scale_rows`: factors that are expanded, strided, and 1."""

    def launch(V: int, layout: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        factor = new(2 * shape[0] * shape[1])[::2]
        factor[-1] = 1.0
        scaling.scale_rows(factor, rows(V, layout, dtype, shape))

    for V in (ONE, FEW, TILE, TILES, SPLIT):
        layout, dtype = ("odd", HALF) if V in (FEW, SPLIT) else ("units", FULL)
        yield f"{V} {layout}", partial(launch, V, layout, dtype, (B, T))
    for V in (*UNITS, *ALIGNED):
        yield f"{V}", partial(launch, V, "units" if V in UNITS else "dense", HALF, (B, T))
    yield "many rows", partial(launch, FEW, "odd", HALF, (2, scaling.MANY_ROWS // 2))
    factor = new(1).squeeze().expand(B * T)
    yield "one factor", lambda: scaling.scale_rows(factor, rows(TILE, "dense"))


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


KERNELS: dict[str, Callable[[], Iterator[tuple[str, Launch]]]] = {
    "_logprob_fwd_kernel": partial(of_logits, read),
    "_logprob_bwd_kernel": partial(of_logits, write, "in", "over"),
    "_grpo_kernel": lambda: (
        x for xs in (of_logits(both, "in", "over"), with_rewards()) for x in xs
    ),
    "_on_chip_kernel": kept_on_chip,
    "_scale_rows_kernel": scaled,
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


@triton.jit
def _control_kernel(x_ptr, n):  # type: ignore[no-untyped-def]
    """Write one entry behind a tensor: a sanitizer that says nothing of it sees nothing."""
    tl.store(x_ptr + n, 1.0)


def control() -> None:
    """Launch the one kernel that is wrong."""
    x = new(256)
    _control_kernel[(1,)](x, len(x))


def attempt(case: str, launch: Launch) -> bool:
    """Make a launch, wait for its end, and say what it raised; return whether all is well."""
    print(case, flush=True)  # the last line of a process that dies says where
    try:
        launch()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as reason:
        print(f"{case}: {type(reason).__name__}: {str(reason)[:500]}", flush=True)
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("name", nargs="?", default="", help="launch what holds this in its name")
    parser.add_argument("--control", action="store_true", help="then write outside a tensor")
    options = parser.parse_args(arguments)
    done = [
        attempt(f"{kernel}: {case}", launch)
        for kernel, launches in KERNELS.items()
        for case, launch in launches()
        if options.name in f"{kernel}: {case}"
    ]
    print(f"{len(done)} {LAUNCHES}", flush=True)
    if options.control:
        attempt(_control_kernel.__name__, control)
    return int(not all(done))


if __name__ == "__main__":
    sys.exit(main())
