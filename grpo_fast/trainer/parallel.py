"""Several processes: which one this is, what they agree on, and how they share the weights.

`torchrun` or `accelerate launch` starts the processes. Each samples its own part of the prompts. Either each
has all the weights, and the gradients are summed before an optimiser step, or the weights are shared (FSDP2).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from grpo_fast.integrations.transformers import causal_lm

T = TypeVar("T")
ELSEWHERE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class Team:
    """The processes of a run; usually there is one.

    Attributes:
        rank, size: the number of this process, from 0, and how many there are.
        device: where its tensors are.
        agreed: the last error that all of them raised together.
    """

    def __init__(self, device: torch.device) -> None:
        """Join the other processes.

        Raises:
            ValueError: there are several processes, but not as torchrun starts them.
        """
        self.rank, self.size, self.device = 0, 1, device
        self.agreed: BaseException | None = None
        if int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ:
            # Others may have to wait for slow rewards, or for weights that are written.
            state = PartialState(cpu=device.type == "cpu", timeout=timedelta(hours=3))
            self.rank, self.size, self.device = (
                state.process_index,
                state.num_processes,
                state.device,
            )
            return
        for name in ELSEWHERE:
            if os.environ.get(name, "1") not in ("", "0", "1"):
                raise ValueError(
                    f"{name}={os.environ[name]}: start several processes with torchrun or accelerate launch"
                )

    @property
    def main(self) -> bool:
        """Tell whether this process writes the files of the run."""
        return self.rank == 0

    def objects(self, x: T) -> list[T]:
        """Return the x of all processes, in the order of their ranks."""
        if self.size == 1:
            return [x]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, x)
        return found

    def together(self, function: Callable[[], T]) -> T:
        """Call a function in each process; if it raises in one, all of them raise.

        Raises:
            Exception: that of this process, or else of the first one that raised.
        """
        mine: Exception | None = None
        try:
            result = function()
        except Exception as error:
            if self.size == 1:
                raise
            mine = error
        raised = [e for e in self.objects(_portable(mine)) if e is not None]
        if raised:
            self.agreed = mine or raised[0]
            raise self.agreed
        return result

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function in the main process, and return its result in all."""
        result = self.together(lambda: function() if self.main else None)
        return self.objects(result)[0]  # type: ignore[return-value]

    def gathered(self, x: Tensor) -> Tensor:
        """Return the rows of all processes, (size * n, ...) of (n, ...), on the CPU."""
        if self.size == 1:
            return x.cpu()
        return torch.cat(self.objects(x.cpu()))

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def most(self, number: int) -> int:
        """Return the largest of the numbers of all processes."""
        return max(self.objects(number))

    def alike(self, parameters: list[nn.Parameter]) -> None:
        """Give all processes the weights of the first one."""
        if self.size > 1:
            for p in parameters:
                dist.broadcast(p.detach(), 0)

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Sum gradients over the processes, many of them in one message."""
        if self.size == 1:
            return
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in parameters if p.grad is not None]
        bucket: list[Tensor] = []
        for i, gradient in enumerate(gradients):
            bucket.append(gradient)
            if sum(x.numel() for x in bucket) >= BUCKET or i == len(gradients) - 1:
                flat = torch.cat([x.flatten() for x in bucket])
                dist.all_reduce(flat)
                for x, y in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
                    x.copy_(y.view_as(x))
                bucket = []


BUCKET = 2**26  # weights


def _portable(error: Exception | None) -> Exception | None:
    """Return an error that other processes can read: of the same kind, with its text alone."""
    if error is None:
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename)
    known = (FloatingPointError, FileExistsError, OSError, ValueError)
    kind = next((k for k in known if isinstance(error, k)), RuntimeError)
    return kind(str(error))


def shard(model: Any, dtype: torch.dtype) -> Any:
    """Share the weights of a model between the processes, in place: FSDP2, one unit per decoder layer.

    accelerate does the same on GPUs, but not on CPUs, where this project tests it.

    Args:
        model: its trained weights are float32, and so are their gradients.
        dtype: of the activations, and of the messages with weights.
    """
    halves = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=halves, reduce_dtype=torch.float32)
    names = set(causal_lm(model)._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in names:
            fully_shard(module, mp_policy=policy)
    # Outside a forward all parameters are shards, those of the outermost unit, too.
    return fully_shard(model, mp_policy=policy, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    """Tell whether the weights of a model are shared between the processes."""
    return isinstance(model, FSDPModule)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Keep all weights in each process, so that processes can sample different numbers of tokens."""
    if not is_sharded(model):
        yield
        return
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    with torch.no_grad():  # a forward gathers the weights, in the same order in all processes
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=causal_lm(model).device))
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()
