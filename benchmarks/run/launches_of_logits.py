"""List launches of the kernels that read rows of logits, for `bounds.py`."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.inputs.shapes import device
from benchmarks.run.launch_inputs import FULL, HALF, Kernels, Launch, flags, new, tokens
from grpo_fast.kernels import grpo, logprob, on_chip, scaling
from grpo_fast.objective import Objective
from grpo_fast.records import Rewards, RowStatistics, SoftCap, Targets

# One entry; less than a unit of `edges`; a tile that is not full; full tiles and strips; and rows
# that programs share, of several segments each in float32. Rows of these start anywhere.
ONE, FEW, TILE, TILES, SPLIT = 1, 3, 1001, 9001, 33_003
# Divided by 8 and not by 16, and by 16: rows without edges.
UNITS, ALIGNED = (9000, 33_000), (9008, 33_008)
B, T = 1, 3  # of most launches; few rows, since the interpreter takes its time for each
# Outside the vocabulary, in 32 and in 64 bits.
OUTSIDE = (-100, -1, 2**31 - 1, 2**31, 2**32 + 1, -(2**32))
CAP = SoftCap(30.0, 0.5)


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


KERNELS: Kernels = {
    "_logprob_fwd_kernel": partial(of_logits, read),
    "_logprob_bwd_kernel": partial(of_logits, write, "in", "over"),
    "_grpo_kernel": lambda: (
        x for xs in (of_logits(both, "in", "over"), with_rewards()) for x in xs
    ),
    "_on_chip_kernel": kept_on_chip,
    "_scale_rows_kernel": scaled,
}
