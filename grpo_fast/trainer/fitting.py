"""The plan of a run as text: its parts, the longest completion that fits a GPU, and how to save memory."""

import dataclasses
import re
from typing import Any

import torch

from grpo_fast.trainer.sizing import GIB, START, Parts, predict
from grpo_fast.trainer.workload import UNPADDED, Workload

STEP = 128  # tokens: `longest` looks at multiples of this
EIGHT_BIT = "adamw_torch_8bit"
TWICE = ("fork", "bounded")  # routes that run the layers for the prompts, and for the completions
NEVER = 1 << 62  # bytes


def longest(config: Any, workload: Workload, budget_bytes: int) -> int:
    """Return the greatest number of completion tokens that fits, a multiple of 128; 0 if none does.

    It is at most what the positions of the model allow. Micro-batches have fewer completions as they become
    longer, so a length may fit by chance beyond one that does not; it is not looked for.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 17
    high = (positions - workload.prompt_tokens) // STEP + 1
    low, now = 0, workload.completion_tokens // STEP

    def fits(length: int) -> bool:
        one = dataclasses.replace(workload, completion_tokens=STEP * length)
        return predict(config, one, compared=False).peak <= budget_bytes

    if 0 < now < high:  # what was asked for is looked at first
        low, high = (now, high) if fits(now) else (0, now)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return STEP * low


def _changes(w: Workload) -> list[tuple[str, dict[str, Any]]]:
    """List what could save memory, what costs least first: the options, and the fields they change."""
    found: list[tuple[str, dict[str, Any]]] = []

    def offer(wanted: bool, text: str, **changed: Any) -> None:
        if wanted:
            found.append((text, changed))

    eight = bool(re.search("bit|adafactor|sgd", w.optim))
    half = w.base == torch.bfloat16 or w.fsdp
    most = w.micro_batch_tokens or w.completions * (w.prompt_tokens + w.completion_tokens)
    fewer = max(most // 4, w.prompt_tokens + w.completion_tokens)
    rows = w.sampled * (w.prompt_tokens + w.completion_tokens)
    offer(not w.gradient_checkpointing, "--gradient_checkpointing", gradient_checkpointing=True)
    offer(not w.share_prompts, "--share_prompts auto", share_prompts=True, route="auto")
    if w.share_prompts and not w.use_peft:  # these use each weight once
        if w.route not in UNPADDED:
            offer(True, "--share_prompts packed", route="packed")
        offer(w.route != "mask", "--share_prompts mask", route="mask")
        offer(True, "--share_prompts off", share_prompts=False)
    offer(w.sampled > 1, f"--sampling_tokens {rows // 4}", sampling_tokens=rows // 4)
    offer(fewer < most, f"--micro_batch_tokens {fewer}", micro_batch_tokens=fewer)
    offer(w.optim == "adamw_torch", "--optim adamw_torch_fused", optim="adamw_torch_fused")
    offer(not eight and not w.use_peft, f"--optim {EIGHT_BIT}", optim=EIGHT_BIT)
    offer(w.use_peft and not half, "--weights bfloat16", weights="bfloat16")
    offer(w.beta > 0 and not w.use_peft, "--beta 0", beta=0.0)
    offer(
        not w.use_peft and not w.fsdp and w.weights != "bfloat16_only" and w.dtype == "bfloat16",
        f"--weights bfloat16_only --optim {EIGHT_BIT}",
        weights="bfloat16_only",
        optim=EIGHT_BIT,
    )
    adapter: dict[str, Any] = {} if w.use_peft else {"use_peft": True, "weights": "auto"}
    text = "--quantize bnb-4bit" if w.use_peft else "--use_peft --quantize bnb-4bit"
    offer(not w.use_peft, "--use_peft", **adapter)
    offer(not w.quantize and not w.fsdp, text, quantize="bnb-4bit", **adapter)
    offer(w.world_size > 1 and not w.fsdp and not w.quantize, "--fsdp", fsdp=True)
    return found


def advice(config: Any, workload: Workload, budget_bytes: int) -> list[str]:
    """Return what saves memory, in the order in which to try it, each with what it saves alone.

    If none of these options fits alone, the last line names the first ones that fit together, if any do.
    """

    def peak_of(one: Workload) -> int:
        try:
            return predict(config, one, compared=False).peak
        except ValueError:
            if one == workload:
                raise
            return NEVER  # this model has no such route

    peak = peak_of(workload)
    lines, alone_fits = [], peak <= budget_bytes
    for option, changed in _changes(workload):
        alone = peak_of(dataclasses.replace(workload, **changed))
        if peak - alone >= 0.01 * peak:
            fits = alone <= budget_bytes
            verdict = "; fits" if fits and peak > budget_bytes else ""
            lines.append(f"{option}: saves {_gib(peak - alone)} GiB, peak {_gib(alone)}{verdict}")
            alone_fits |= fits
    if alone_fits:
        return lines
    together, chosen, best = workload, dict[str, dict[str, Any]](), peak
    for option, changed in _changes(workload):
        more = dataclasses.replace(together, **changed)
        found = peak_of(more)
        if found < 0.99 * best:
            kept = {o: c for o, c in chosen.items() if not c.keys() <= changed.keys()}
            together, chosen, best = more, kept | {option: changed}, found
        if best <= budget_bytes:
            lines.append(f"together {' '.join(chosen)}: peak {_gib(best)} GiB; fits")
            break
    return lines


def notes(parts: Parts, w: Workload) -> list[str]:
    """Return what is special about the peak of a run, a sentence each."""
    lines = []
    if w.fsdp and w.world_size == 1:
        lines += [
            "With one process --fsdp shares no weights: give the number of processes, as in --processes 8."
        ]
    if parts.phases.get(START) == parts.peak and w.fsdp and w.world_size > 1:
        lines += [
            "The peak is at the start: each process has all weights on its device before they are "
            "shared. Neither more processes nor shorter completions make it smaller."
        ]
    if parts.route in TWICE and not w.use_peft:
        lines += [
            f"Route {parts.route} uses each weight twice: its backward holds a second copy of the "
            "gradients of all layers. Routes packed and mask do not, nor does --share_prompts off."
        ]
    if parts.host > parts.weights:
        processes = f"{w.world_size} processes have" if w.world_size > 1 else "the process has"
        lines += [
            f"At the start {processes} all weights in the machine's memory, too: up to "
            f"{_gib(parts.host)} GiB."
        ]
    return lines


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f}"


def table(config: Any, workload: Workload, budget_bytes: int) -> str:
    """Return the plan as text: the parts and phases in GiB, the verdict, the longest completion, advice."""
    w, parts = workload, predict(config, workload)
    name = str(w.base).removeprefix("torch.")
    among = ", shared" if w.world_size > 1 else ""
    stored = w.quantize or (f"float32{among}" if w.fsdp else name)
    rows = [
        (f"weights ({parts.parameters:,}, {stored})", parts.weights),
        (f"gradients ({parts.trained:,} trained)", parts.gradients),
        (f"optimizer state ({w.optim})", parts.optimizer),
        ("float32 copies of the weights", parts.master),
        ("reference model", parts.reference),
        (
            f"activations ({parts.tokens:,} tokens, {parts.completions} completions)",
            parts.activations,
        ),
        ("work of the layers, for a moment", parts.working),
        ("loss and its gradients, for a moment", parts.loss),
        ("  (eager PyTorch, with all logits)", parts.eager_loss),
        (f"keys and values ({w.sampled} completions sampled together)", parts.kv_cache),
    ]
    shared = f"prompts shared, route {parts.route}"
    if parts.route == "unshared":
        shared = "prompts not shared"
    saved = parts.unshared - parts.activations - parts.working
    if parts.route != "unshared":
        rows.insert(7, ("  (saved by shared prompts; below 0: added)", saved))
    lines = [f"{'part':<58}{'GiB':>8}"]
    lines += [f"{text:<58}{_gib(nbytes):>8}" for text, nbytes in rows if nbytes]
    lines += ["", f"{'phase of a step, in all':<58}{'GiB':>8}"]
    lines += [f"{text:<58}{_gib(nbytes):>8}" for text, nbytes in parts.phases.items()]
    fits = parts.peak <= budget_bytes
    lines += [
        "",
        f"{'Fits' if fits else 'Does not fit'}: the predicted peak is {_gib(parts.peak)} GiB, "
        f"and {_gib(budget_bytes)} GiB can be used; {shared}.",
        *notes(parts, w),
    ]
    length = longest(config, w, budget_bytes)
    lines += [
        f"Longest completion that fits: {length:,} tokens."
        if length
        else "No completion fits with these options."
    ]
    suggestions = advice(config, w, budget_bytes)
    if suggestions:
        lines += [
            "To save memory:" if fits else "To make it fit:",
            *(f"  {x}" for x in suggestions),
        ]
    return "\n".join(lines)
