"""How much memory a run needs: `grpo-fast plan`, and the small models of a dry run.

Nothing is trained and no GPU is needed. Weights, gradients and optimizer state are counted from the
architecture; activations and the loss are rehearsed on tensors without contents (`rehearsal`). Sizes are in
bytes, and GiB are 2^30 bytes.

Assumed: two steps or more were taken, so the optimizer has its state and gradients stay until the next
update. All prompts and completions have their greatest length.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from grpo_fast.integrations.transformers import causal_lm, head_of
from grpo_fast.trainer import rehearsal
from grpo_fast.trainer.known_models import KNOWN
from grpo_fast.trainer.rehearsal import Batch, Setting

GIB = 1 << 30
UNITS = {"GB": GIB, "GIB": GIB, "MB": 1 << 20, "MIB": 1 << 20, "": 1}
RESERVED, SHARE_RESERVED = GIB, 0.04  # see `parse_size`
STEP = 64  # tokens: `longest` looks at multiples of this
# Bytes of optimizer state for each trained element: the first pattern that is found in the name counts.
# States of 8 and 4 bits have a float32 scale for each block of 256 and 128.
STATES = (
    ("lion.*8bit", 1 + 4 / 256),
    ("8bit|fp8", 2 * (1 + 4 / 256)),
    ("4bit", 2 * (0.5 + 4 / 128)),
    ("adafactor", 0.02),
    ("sgd", 0.0),
    ("lion|adagrad|rmsprop", 4.0),
    ("", 8.0),
)
# Bytes of a frozen element of a linear layer: nf4 in blocks of 64 whose scales are quantised, too.
QUANTISED = {"bnb-4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "bnb-8bit": 1.0, "torchao-int8": 1.0}
EIGHT_BIT = "adamw_torch_8bit"


@dataclass(frozen=True)
class Workload:
    """What decides the memory of a run; the names are those of `TrainConfig`, lengths are in tokens.

    Attributes:
        prompt_tokens, completion_tokens: the greatest lengths.
        group_size: completions of a prompt.
        micro_batch_tokens: most tokens of one forward, shared prompts counted once; None: no limit.
        weights: "float32", "bfloat16" (float32 copies in the optimizer) or "bfloat16_only"; "auto": `dtype`.
        dtype: of the activations, "float32" or "bfloat16".
        optim: the optimizer, by its name in transformers.
        lora_target_modules: names of layers; "all-linear" or none: all linear ones but the head.
        quantize: "bnb-4bit", "bnb-8bit", "torchao-int8" or None; of the weights under an adapter.
        beta: weight of the KL. Above 0 and without an adapter a copy of the weights is held.
        fsdp: whether `world_size` processes share weights, gradients and optimizer state.
        sampling_tokens: most tokens that are sampled together, prompts included; None: all; 0: a server
            samples.
        prompts_per_step: prompts of a process in a step; None: one where nothing else limits a batch.
        device: "cuda" or "cpu", which choose other attention and chunks.
    """

    prompt_tokens: int = 512
    completion_tokens: int = 1024
    group_size: int = 8
    micro_batch_tokens: int | None = 16_384
    gradient_checkpointing: bool = False
    share_prompts: bool = True
    weights: str = "auto"
    dtype: str = "bfloat16"
    optim: str = "adamw_torch"
    use_peft: bool = False
    lora_r: int = 16
    lora_target_modules: str | tuple[str, ...] = "all-linear"
    quantize: str | None = None
    beta: float = 0.0
    world_size: int = 1
    fsdp: bool = False
    sampling_tokens: int | None = 65_536
    prompts_per_step: int | None = None
    device: str = "cuda"

    @property
    def base(self) -> torch.dtype:
        """The dtype of the model's weights; FSDP gathers trained ones in the dtype of the activations."""
        name = self.dtype if self.weights == "auto" or self.fsdp else self.weights
        return torch.float32 if name == "float32" else torch.bfloat16

    @property
    def masters(self) -> bool:
        """Whether the optimizer has float32 copies of the trained weights."""
        half = self.base == torch.bfloat16 and self.weights != "bfloat16_only"
        return half and not self.use_peft and not self.fsdp

    @property
    def sharers(self) -> int:
        """Among how many processes weights, gradients and states are shared."""
        return self.world_size if self.fsdp else 1

    @property
    def completions(self) -> int:
        """How many completions pass through the model together; at least one."""
        P, R, most = self.prompt_tokens, self.completion_tokens, self.micro_batch_tokens
        count = self.group_size * (self.prompts_per_step or (1 if most is None else most))
        if most is None:
            return count
        if not self.share_prompts:
            return min(count, max(1, most // (P + R)))
        full, left = divmod(most, P + self.group_size * R)
        return min(count, max(1, full * self.group_size + max(0, (left - P) // R)))

    @property
    def sampled(self) -> int:
        """How many completions are sampled together."""
        tokens, rows = self.sampling_tokens, self.group_size * (self.prompts_per_step or 1)
        if tokens is None or tokens == 0:
            return 0 if tokens == 0 else rows
        fit = max(1, tokens // (self.prompt_tokens + self.completion_tokens))
        return min(fit, rows) if self.prompts_per_step else fit


@dataclass(frozen=True)
class Parts:
    """The predicted memory of a run, in bytes, on one device.

    Attributes:
        parameters, trained: numbers of weights.
        weights, gradients, optimizer, master, reference: held all the time; `master` are the float32 copies.
        completions, tokens: of one forward, and `route` says how its prompts are shared.
        activations: what the forward of a micro-batch leaves for its backward.
        working: what layers need beyond that for a moment, forward or backward.
        loss, eager_loss: for the loss and its gradient: this project's, and with all logits in eager PyTorch.
        unshared: activations and work if each of these completions had its own prompt.
        kv_cache: keys and values of all tokens that are sampled together.
        phases: the total in each phase of a step, by name.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    master: int
    reference: int
    completions: int
    tokens: int
    route: str
    activations: int
    working: int
    loss: int
    eager_loss: int
    unshared: int
    kv_cache: int
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """The greatest of the phases."""
        return max(self.phases.values())

    @property
    def held(self) -> int:
        """What is held all the time."""
        return self.weights + self.gradients + self.optimizer + self.master + self.reference


def parse_size(text: str) -> int:
    """Return the bytes that PyTorch can use on a GPU of a size like "24GB", "80GiB" or "24".

    GPUs are named in GB and have about so many GiB, so both are read as 2^30 bytes. One GiB is taken off for
    the CUDA context and libraries, and 4 % for holes between blocks, and because error correction takes a
    part of some GPUs (L4, A10G): "24GB" are 22.04 GiB.

    Raises:
        ValueError: it is no such size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM]i?B?)?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"gpu={text!r}: want a size like 24GB or 80GiB")
    unit = (found[2] or "GB").upper()
    size = float(found[1]) * UNITS[unit if unit.endswith("B") else unit + "B"]
    return max(0, int(size * (1 - SHARE_RESERVED)) - RESERVED)


def known_config(name: str) -> Any:
    """Return the configuration of a well-known model, by its hub id or the last part of it; else None."""
    short = re.sub(r"-(instruct|base)$", "", name.split("/")[-1], flags=re.IGNORECASE).lower()
    for known, sizes in KNOWN.items():
        if known.lower() == short:
            given = copy.deepcopy(sizes)
            return AutoConfig.for_model(given.pop("model_type"), **given)
    return None


def describe(model: str) -> Any:
    """Return the configuration of a model: a folder, its config.json, a well-known name, or a hub id.

    Raises:
        ValueError: there is none, or the hub cannot be reached; the message lists the known names.
    """
    path = Path(model).expanduser()
    if not path.exists() and (known := known_config(model)) is not None:
        return known
    try:
        return AutoConfig.from_pretrained(str(path) if path.exists() else model)
    except Exception as error:  # of whatever the hub's client raises
        why = "cannot be read" if path.exists() else "no such folder, and not found on the hub"
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
        names = ", ".join(KNOWN)
        raise ValueError(f"model={model!r}: {why} ({detail}); known without it: {names}") from error


def tiny(config: Any) -> Any:
    """Return the same architecture with two layers, a hidden size of 64 and 512 tokens, for dry runs."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    heads, kv = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    apart = (getattr(text, "head_dim", None) or text.hidden_size // heads) * heads
    sizes = {
        "head_dim": 16 if apart == text.hidden_size else 32,
        "num_key_value_heads": 4 if kv == heads else 2,
        "intermediate_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 2,
        "max_window_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "vocab_size": 512,
        "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    for name, value in sizes.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    for owner in (small, text):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(owner, name, None) is not None:
                setattr(owner, name, 1)
    return small


def predict(config: Any, workload: Workload, *, compared: bool = True) -> Parts:
    """Predict the memory of a run by part and by phase.

    Args:
        config: of transformers, as `describe` returns it.
        compared: whether `eager_loss` and `unshared` are wanted; else they are 0.

    Raises:
        ValueError: the model cannot be built or rehearsed; the message says why.
    """
    w = workload
    model = _model(json.dumps(config.to_dict(), default=str), _Config(config), w)
    autocast = torch.bfloat16 if w.dtype == "bfloat16" else None
    setting = Setting(
        w.device,
        autocast,
        w.gradient_checkpointing,
        w.share_prompts,
        accumulates=not w.masters and not w.fsdp,
        reference=w.beta > 0,
    )
    batch = Batch(w.prompt_tokens, w.completion_tokens, w.group_size, w.completions)
    held = _held(model, w)
    with _explained(config):
        found = rehearsal.update(model, batch, setting)
        sampling = None
        if w.sampled:
            sampling = rehearsal.sampling(model, w.prompt_tokens, w.sampled, setting)
        N = w.completions * w.completion_tokens
        loss, eager, unshared = found.loss - found.saved, 0, 0
        if compared:
            loss, eager = rehearsal.losses(model, N, setting)
            whole = rehearsal.update(model, batch, setting._replace(share=False))
            unshared = whole.saved + _working(whole)
    P, R, rows = w.prompt_tokens, w.completion_tokens, w.sampled
    prompts = -(-w.completions // w.group_size) if found.route != "unshared" else w.completions
    static, extra = sum(held.values()), _transient(model, w)
    kv = int(sampling.per_token * rows * (P + R)) if sampling else 0
    phases = {
        "forward": static + found.forward + extra,
        "loss": static + found.loss,
        "backward": static + found.backward + extra,
        "optimizer step": static + _in_step(model, w),
    }
    if sampling:
        phases["sampling"] = static + _in_sampling(model, config, w, sampling, kv) + extra
    return Parts(
        parameters=sum(p.numel() for p in causal_lm(model).parameters()) - _adapter(model, w),
        trained=sum(p.numel() for p in _trained(model)),
        **held,
        completions=w.completions,
        tokens=prompts * P + w.completions * R,
        route=found.route,
        activations=found.saved,
        working=_working(found) + extra,
        loss=loss,
        eager_loss=eager,
        unshared=unshared,
        kv_cache=kv,
        phases=phases,
    )
