"""Measure how long a call takes on the host: everything but the kernels, without a GPU.

    python -m benchmarks.host_time --out FILE

Kernels are compiled for sm_90 and launched through a driver that runs nothing (driver.c). What is
left is what the host does: checks, records, autograd, Triton's launcher. On a GPU that has nothing
else to do, a call takes this long besides the time of its kernels. The tensors are small and lie on
the CPU, so PyTorch's own operators compute here, where on a GPU they would be launched. PyTorch's
allocator for GPUs, its streams and the driver's own work are not in the times.

A row has the median of the rounds, and the time until the first kernel that reads the logits is
launched: until then an idle GPU waits. Libraries that are not installed are left out.
"""

import functools
import importlib.util
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["GRPO_FAST_COMPILE"] = "0"  # read by the library: the CPU's compiled code is not used

import torch
from torch import Tensor

from benchmarks import command_line
from benchmarks.host_time import pretend
from benchmarks.measuring import machine, recorder
from benchmarks.report.experiments import ON_HOST
from grpo_fast import Objective, grpo_loss, logprob, policy_loss

ROUNDS, WARMUP = 400, 40
B, T, V = 4, 2, 152_064
READERS = ("_grpo_kernel", "_logprob_fwd_kernel", "_grpo_loss_fwd_kernel")  # Liger's is the last


class Given:
    """The arguments of the calls."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.logits = torch.zeros(B, T, V, dtype=torch.bfloat16, requires_grad=True)
        self.longer = torch.zeros(B, T + 1, V, dtype=torch.bfloat16, requires_grad=True)
        self.ids = torch.randint(V, (B, T))
        self.logps = (-torch.rand(B, T)).requires_grad_()
        self.old, self.ref = -torch.rand(B, T), -torch.rand(B, T)
        self.mask, self.advantages = torch.ones(B, T, dtype=torch.bool), torch.randn(B)

    def of(self, objective: Objective) -> dict[str, Any]:
        """Return the arguments of a loss."""
        given: dict[str, Any] = {"advantages": self.advantages, "mask": self.mask}
        if objective.beta:
            given["ref_logps"] = self.ref
        return given | {"old_logps": self.old, "objective": objective}


GRPO, GSPO = Objective(beta=0.04), Objective.preset("gspo")


class Computed(torch.autograd.Function):
    """Stand in for the operation that computes logits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx


def overwritten(x: Given) -> None:
    """Call `grpo_loss` in place; a step of autograd comes on top, which makes the logits."""
    loss = grpo_loss(Computed.apply(x.logits), x.ids, inplace=True, **x.of(GRPO)).loss
    torch.autograd.grad(loss, x.logits)


def of_liger(x: Given) -> None:
    """Call Liger's loss on logits, without a mean of metrics by its caller."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    loss, _ = triton_grpo_loss(
        *(x.longer, x.old, x.ref, x.ids, x.advantages, x.mask),
        **{"temperature": 1.0, "beta": GRPO.beta, "loss_type": "bnpo", "reduce": True},
        importance_sampling_level="token",
    )
    torch.autograd.grad(loss, x.longer)


def gradient(value: Callable[[Given], Tensor], of: str) -> Callable[[Given], None]:
    """Return a call of a function and of its backward."""

    def call(x: Given) -> None:
        torch.autograd.grad(value(x), getattr(x, of))

    return call


# Each with its backward.
CASES: dict[tuple[str, str], Callable[[Given], None]] = {
    ("grpo_loss", "grpo_fast"): gradient(
        lambda x: grpo_loss(x.logits, x.ids, **x.of(GRPO)).loss, "logits"
    ),
    ("grpo_loss", "grpo_fast, in place"): overwritten,
    ("grpo_loss", "Liger, in place"): of_liger,
    ("grpo_loss, GSPO", "grpo_fast"): gradient(
        lambda x: grpo_loss(x.logits, x.ids, **x.of(GSPO)).loss, "logits"
    ),
    ("policy_loss", "grpo_fast"): gradient(
        lambda x: policy_loss(x.logps, **x.of(GRPO)).loss, "logps"
    ),
    ("policy_loss, GSPO", "grpo_fast"): gradient(
        lambda x: policy_loss(x.logps, **x.of(GSPO)).loss, "logps"
    ),
    ("logprob", "grpo_fast"): gradient(lambda x: logprob(x.logits, x.ids).sum(), "logits"),
}


def measured(
    driver: pretend.Driver, call: Callable[[], object], rounds: int = ROUNDS
) -> dict[str, Any]:
    """Return the row of a call."""
    for _ in range(WARMUP):
        call()
    found = [pretend.timed(driver, call) for _ in range(rounds)]
    seconds = [total for _, total in found]
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    row: dict[str, Any] = {"kernels": len(found[0][0])}
    row |= {"median": middle, "iqr": high - low, "min": min(seconds), "rounds": rounds}
    waits = [at for launches, _ in found for name, at in launches if name in READERS]
    return row | ({"until_logits_are_read": statistics.median(waits)} if waits else {})


def main() -> None:
    parser = command_line(__doc__, prog="python -m benchmarks.host_time")
    add = parser.add_argument
    add("--out", type=Path, help="JSON file, written anew after each row")
    add("--rounds", type=int, default=ROUNDS, help="calls that are timed; default: %(default)s")
    add("--only", action="append", help="calls whose name holds this")
    options = parser.parse_args()
    os.environ[machine.COMMAND_VARIABLE] = "python -m benchmarks.host_time"
    torch.set_num_threads(1)
    sheet = recorder.Sheet(options.out, "rows", experiment=ON_HOST)
    with tempfile.TemporaryDirectory() as folder:
        driver = pretend.start(Path(folder))
        x = Given()
        for (name, provider), call in CASES.items():
            if options.only and not any(word in name for word in options.only):
                continue
            if call is of_liger and importlib.util.find_spec("liger_kernel") is None:
                print("Liger is not installed")
                continue
            row = measured(driver, functools.partial(call, x), options.rounds)
            sheet.append({"call": name, "provider": provider, **row})


if __name__ == "__main__":
    main()
