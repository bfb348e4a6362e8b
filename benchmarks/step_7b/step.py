"""One GRPO update of a 7B model: its parts, its time and its peak memory.

An update is all of: log-probs of the old policy (the model itself) and of the reference without
gradients; hidden states with gradients, each layer checkpointed; the loss of the head; the backward
pass into every trainable parameter. It runs in bfloat16 on a GPU, with random weights. Sampling,
the optimiser and its state are not part of it. There are two ways to train:

    lora   the model is frozen, with adapters of rank 16 on every projection; the reference is the
           model without them
    full   every parameter is trained, its bfloat16 gradient kept; the reference is a second copy

Providers differ in the head alone (`linear_logprob` and `linear_grpo` of `providers`).
"""

import copy
import math
import statistics
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import providers
from benchmarks.measuring import machine, memory
from benchmarks.step_7b import decoder
from grpo_fast import Objective

PROVIDERS = ("eager", "trl", "grpo_fast", "grpo_fast-bf16")
MODES = ("lora", "full")
RANK = 16
OBJECTIVE = Objective.preset("grpo", beta=0.04)
CAPS = (24e9, 48e9, 80e9)  # bytes
ROUNDS = 3
AGREEMENT = {torch.bfloat16: 0.05, torch.float32: 1e-4}  # of loss and gradient norm with eager's
STEP_OF_LENGTH = 256


class Size(NamedTuple):
    B: int
    P: int  # of the prompt
    T: int  # of the completion


BATCH = {"cuda": Size(4, 256, 1024), "cpu": Size(2, 4, 12)}
SEARCHED = {"cuda": Size(1, 256, 512), "cpu": Size(1, 4, 8)}


class Trained(NamedTuple):
    model: decoder.Decoder
    reference: decoder.Decoder | None  # None: the model without its adapters


def build(config: decoder.Config, mode: str, device: torch.device, dtype: torch.dtype) -> Trained:
    model = decoder.make(config, device, dtype)
    if mode == "full":
        return Trained(model, copy.deepcopy(model).requires_grad_(False))
    decoder.add_lora(model, RANK)
    return Trained(model, None)


def batch(size: Size, V: int, device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(V, (size.B, size.P + size.T), device=device)
    sign = torch.ones(size.B, device=device)
    sign[1::2] = -1
    return {"ids": ids, "completion": ids[:, size.P :].contiguous(), "advantages": sign}


def update(trained: Trained, inputs: dict[str, Tensor], log_probs: Any, loss_of: Any) -> Tensor:
    """Compute the loss, and leave gradients in the parameters."""
    model, reference = trained
    ids, completion = inputs["ids"], inputs["completion"]
    T = completion.shape[1]
    weight = model.lm_head.weight

    def hidden(of: decoder.Decoder) -> Tensor:
        return of(ids)[:, -T - 1 : -1].contiguous()

    with torch.no_grad():
        old = log_probs(hidden(model), weight, completion)
        if reference is None:
            decoder.switch_adapters(model, on=False)
            try:
                ref = log_probs(hidden(model), weight, completion)
            finally:  # it may run out of memory here
                decoder.switch_adapters(model, on=True)
        else:
            ref = log_probs(hidden(reference), reference.lm_head.weight, completion)
    loss = loss_of(
        hidden(model),
        weight,
        completion,
        mask=None,
        advantages=inputs["advantages"],
        old_logps=old,
        ref_logps=ref,
        objective=OBJECTIVE,
    )
    loss.backward()
    return loss.detach()


def clear(model: decoder.Decoder) -> None:
    for x in model.parameters():
        x.grad = None


def gradient_norm(model: decoder.Decoder) -> float:
    squares = [x.grad.float().square().sum() for x in model.parameters() if x.grad is not None]
    return math.sqrt(torch.stack(squares).sum().item())


def heads_of(provider: str) -> tuple[providers.Function, providers.Function]:
    """Load a provider's log-probs and loss from hidden states."""
    return providers.load("linear_logprob", provider), providers.load("linear_grpo", provider)


def measure(trained: Trained, size: Size, provider: str) -> dict[str, Any]:
    """Measure time, peak and outcome of an update; the peak counts the weights."""
    memory.release()  # what another provider may have left when it ran out of memory
    model = trained.model
    device = model.lm_head.weight.device
    inputs = batch(size, model.c.V, device)
    heads = heads_of(provider)

    def run() -> Tensor:
        clear(model)
        return update(trained, inputs, *heads)

    run()  # warm: compiles, and allocates what stays
    loss = run()
    norm = gradient_norm(model)
    clear(model)
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    extra = memory.peak_extra_bytes(run)
    times = []
    for _ in range(ROUNDS):
        start = machine.synced_time()
        run()
        times.append(machine.synced_time() - start)
    clear(model)
    seconds = statistics.median(times)
    return {
        "loss": loss.item(),
        "gradient_norm": norm,
        "peak_bytes": None if extra is None else held + extra,
        "seconds": seconds,
        "spread": (max(times) - min(times)) / seconds,
        "tokens_per_second": size.B * (size.P + size.T) / seconds,
    }


def disagreement(row: dict[str, Any], eager: dict[str, Any], dtype: torch.dtype) -> str | None:
    """Say why a provider's update is not eager's; None if it is."""
    scale = {"loss": 1.0, "gradient_norm": abs(eager["gradient_norm"])}  # advantages are of size 1
    for name, unit in scale.items():
        error = abs(row[name] - eager[name]) / unit
        if not error <= AGREEMENT[dtype]:
            return f"wrong result: {name} {row[name]:.6g}, eager has {eager[name]:.6g}"
    return None


def peak_at(trained: Trained, size: Size, provider: str) -> int | None:
    """Return the bytes in use at once in one update, with the weights; None if out of memory."""
    memory.release()
    torch.cuda.reset_peak_memory_stats()
    heads = heads_of(provider)
    try:
        inputs = batch(size, trained.model.c.V, trained.model.lm_head.weight.device)
        update(trained, inputs, *heads)
    except torch.OutOfMemoryError:
        return None
    finally:
        clear(trained.model)
    # Not what was reserved: near a cap that is the cap, whatever the length.
    return torch.cuda.max_memory_allocated()
