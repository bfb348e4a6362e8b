"""How much memory a run needs, by part and by phase; `fitting` says what fits.

Nothing is trained and no GPU is needed. Weights, gradients and optimizer state are counted from the
architecture; activations and the loss are rehearsed on tensors without contents (`rehearsal`). Sizes are in
bytes, and GiB are 2^30 bytes.

Assumed: two steps or more were taken, so the optimizer has its state, and the gradients of a step stay until
the next update begins. All prompts and completions have their greatest length.
"""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from grpo_fast.integrations.transformers import causal_lm, head_of
from grpo_fast.trainer import rehearsal
from grpo_fast.trainer.known_models import describe, known_config, tiny
from grpo_fast.trainer.rehearsal import Batch, Sampling, Setting, Update
from grpo_fast.trainer.workload import UNPADDED, Workload

__all__ = [
    "Parts", "Workload", "describe", "known_config", "parse_size", "predict", "tiny",
]  # fmt: skip
GIB = 1 << 30
UNITS = {"GB": GIB, "GIB": GIB, "MB": 1 << 20, "MIB": 1 << 20, "": 1}
RESERVED, SHARE_RESERVED = GIB, 0.04  # see `parse_size`
LAYERS = (4, 6)  # of the models that are rehearsed
START = "start: all weights"  # a phase; with FSDP, before they are shared
T = TypeVar("T", Update, Sampling)
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
        phases: the total at the start and in each phase of a step, by name.
        host: in the memory of the machine at the start: all weights in each process, before they go to its
            GPU; 0 where no GPU is used, or weights are quantised as they are read.
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
    host: int = 0

    @property
    def peak(self) -> int:
        """The greatest of the phases."""
        return max(self.phases.values())

    @property
    def held(self) -> int:
        """The bytes that are held all the time."""
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


def predict(config: Any, workload: Workload, *, compared: bool = True) -> Parts:
    """Predict the memory of a run by part and by phase.

    Args:
        config: of transformers, as `describe` returns it.
        compared: whether `eager_loss` and `unshared` are wanted; else they are 0.

    Raises:
        ValueError: the model cannot be built or rehearsed; the message says why.
    """
    w = workload
    spec = _spec(config, w)
    model = _model(spec)
    setting = Setting(
        w.device,
        torch.bfloat16 if w.dtype == "bfloat16" else None,
        w.gradient_checkpointing,
        w.route if w.share_prompts else "unshared",
        accumulates=not w.masters and not w.fsdp,
        reference=w.beta > 0,
        fresh=4 / w.sharers if w.at_once else None,
    )
    batch = Batch(w.prompt_tokens, w.completion_tokens, w.group_size, w.completions)
    sampling, loss, eager, unshared = Sampling(0, 0, 0), 0, 0, 0
    with _explained(config):
        found = _update(spec, batch, setting)
        padded = _padded(w, found.route)
        if padded.completions < w.completions:
            return predict(config, padded, compared=compared)
        if w.sampled:
            sampling = _sampling(spec, w.prompt_tokens, w.sampled, setting)
        if compared:
            loss, eager = rehearsal.losses(model, batch.completions * batch.R, setting)
            alone = _update(spec, batch, setting._replace(route="unshared"))
            unshared = _layers(alone, w, model)
    held, extra = _held(model, w), _gathered(model, w)
    static, kv = sum(held.values()), int(sampling.per_token * w.sampled * (batch.P + batch.R))
    fresh = held["gradients"] if w.at_once else 0  # they come with the backward
    phases = {
        START: _at_start(model, w),
        "sampling": static + _in_sampling(model, config, w, sampling, kv) if w.sampled else 0,
        "forward": static - fresh + extra + int(found.forward),
        "loss": static - fresh + extra + int(found.loss),
        "backward": static - fresh + extra + found.backward,
        "optimizer step": static + _in_step(model, w),
    }
    prompts = (
        batch.completions
        if found.route == "unshared"
        else -(-batch.completions // batch.group_size)
    )
    return Parts(
        parameters=sum(p.numel() for p in _parameters(model, adapter=False)),
        trained=sum(p.numel() for p in _trained(model)),
        **held,
        completions=batch.completions,
        tokens=prompts * batch.P + batch.completions * batch.R,
        route=found.route,
        activations=int(found.saved),
        working=_layers(found, w, model) - int(found.saved) + extra,
        loss=loss,
        eager_loss=eager,
        unshared=unshared + extra if unshared else 0,
        kv_cache=kv,
        phases={name: nbytes for name, nbytes in phases.items() if nbytes},
        host=w.world_size * _whole(model, w) if w.device == "cuda" and not w.quantize else 0,
    )


def _padded(w: Workload, route: str) -> Workload:
    """Return the workload with the route that was found; the trainer cuts a micro-batch that it pads anew."""
    if route == "unshared":
        return dataclasses.replace(w, share_prompts=False)
    return w if route in UNPADDED else dataclasses.replace(w, route=route)


def _layers(found: Update, w: Workload, model: nn.Module) -> int:
    """Return the most that the layers need beyond weights and gradients."""
    fresh = _held(model, w)["gradients"] if w.at_once else 0
    return int(max(found.forward, found.backward - fresh))


@contextlib.contextmanager
def _explained(config: Any) -> Iterator[None]:
    """Turn what a model without contents cannot do into one message."""
    try:
        yield
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model: {type(config).__name__}: its memory cannot be predicted: {detail}"
        ) from error


class Spec(NamedTuple):
    """The key of a cached model: class and JSON of its configuration, dtype, rank and layers of LoRA."""

    kind: Any
    text: str
    dtype: torch.dtype
    lora: tuple[int, Any] | None

    @property
    def config(self) -> Any:
        """The configuration."""
        return self.kind.from_dict(json.loads(self.text))


def _spec(config: Any, w: Workload) -> Spec:
    lora = None
    if w.use_peft:
        targets = w.lora_target_modules
        lora = (w.lora_r, targets if isinstance(targets, str) else tuple(targets) or "all-linear")
    return Spec(type(config), json.dumps(config.to_dict(), default=str), w.base, lora)


@functools.lru_cache(maxsize=8)
def _model(spec: Spec, layers: int | None = None) -> nn.Module:
    settings, config = None, spec.config
    if spec.lora:
        rank, targets = spec.lora
        settings = {
            "r": rank,
            "target_modules": targets if isinstance(targets, str) else [*targets],
        }
    if layers is not None:
        config = rehearsal.shallow(config, layers)
    return rehearsal.build(config, spec.dtype, settings)


def _by_layers(spec: Spec, run: Callable[[nn.Module], T]) -> T:
    """Rehearse a model with few layers and extrapolate; with all of them where they are not alike."""
    text = spec.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    few, more = LAYERS
    if text.num_hidden_layers <= more or len(kinds) > 1:
        return run(_model(spec))
    shallower, deeper = (run(_model(spec, layers)) for layers in LAYERS)
    return rehearsal.deepened(shallower, deeper, (few, more, text.num_hidden_layers))


@functools.lru_cache(maxsize=256)
def _update(spec: Spec, batch: Batch, setting: Setting) -> Update:
    return _by_layers(spec, lambda model: rehearsal.update(model, batch, setting))


@functools.lru_cache(maxsize=256)
def _sampling(spec: Spec, P: int, rows: int, setting: Setting) -> Sampling:
    return _by_layers(spec, lambda model: rehearsal.sampling(model, P, rows, setting))


def _parameters(model: nn.Module, adapter: bool) -> list[Tensor]:
    """Return the weights of the adapter, or all others."""
    named = causal_lm(model).named_parameters()
    return [p for name, p in named if ("lora_" in name) == adapter]


def _trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def _frozen_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers that quantisation would convert."""
    lm = causal_lm(model)
    head = head_of(lm).weight
    linear = [m for m in lm.modules() if isinstance(m, nn.Linear)]
    return [m for m in linear if not m.weight.requires_grad and m.weight is not head]


def _nbytes(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _held(model: nn.Module, w: Workload) -> dict[str, int]:
    """Return the bytes that are held all the time, by the names of `Parts`."""
    base, trained = _parameters(model, adapter=False), _trained(model)
    weights, count = _nbytes(base), sum(p.numel() for p in trained)
    if w.quantize:
        for layer in _frozen_layers(model):
            scales = 0 if w.quantize == "bnb-4bit" else 4 * layer.out_features
            whole = _nbytes([layer.weight])
            weights += int(layer.weight.numel() * QUANTISED[w.quantize]) + scales - whole
    float32 = w.masters or w.use_peft or w.fsdp
    size = 4 if float32 else w.base.itemsize
    state = next(nbytes for pattern, nbytes in STATES if re.search(pattern, w.optim))
    if state >= 4 and size == 2:  # PyTorch's optimizers keep states in the dtype of the weights
        state /= 2
    reference = weights if w.beta > 0 and not w.use_peft else 0
    if w.fsdp and not w.use_peft:
        weights, reference = 4 * count, 4 * count if reference else 0
    weights += _nbytes(_parameters(model, adapter=True))
    found = {
        "weights": weights,
        "gradients": size * count,
        "optimizer": int(state * count),
        "master": 4 * count if w.masters else 0,
        "reference": reference,
    }
    return {name: nbytes // w.sharers for name, nbytes in found.items()}


def _gathered(model: nn.Module, w: Workload) -> int:
    """Return what is unpacked for a moment: a quantised layer, or with FSDP the root and two layers."""
    extra = 0
    if w.quantize:
        extra = 2 * max(layer.weight.numel() for layer in _frozen_layers(model))
    if w.fsdp:
        root, largest = _units(model)
        # The gradient of a layer is float32 before it is shared out.
        extra += w.base.itemsize * (root + 2 * largest) + 4 * largest
    return extra


def _units(model: nn.Module) -> tuple[int, int]:
    """Return the weights outside the decoder layers, and those of the largest layer: the units of FSDP."""
    names = set(causal_lm(model)._no_split_modules or ())
    layers = [m for m in model.modules() if type(m).__name__ in names]
    inside = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    return sum(p.numel() for p in model.parameters()) - sum(inside), max(inside, default=0)


def _whole(model: nn.Module, w: Workload) -> int:
    """Return the bytes of all weights as a process loads them; FSDP trains float32 weights."""
    base, adapter = (_parameters(model, adapter=adapter) for adapter in (False, True))
    if w.fsdp and (not w.use_peft or w.weights == "float32"):
        return 4 * sum(p.numel() for p in base) + _nbytes(adapter)
    return _nbytes(base) + _nbytes(adapter)


def _at_start(model: nn.Module, w: Workload) -> int:
    """Return the most that a device needs before the first step, with no optimizer and no gradient.

    Each process loads all weights on the CPU, looks whether they are finite, and puts them on its device.
    With FSDP they are shared out there, layer by layer, after the copy for the KL was made.
    """
    copies = 2 if w.beta > 0 and not w.use_peft else 1
    whole = _whole(model, w)
    before = 0  # less than in a step
    if w.fsdp:  # the shares of a layer are made before its weights are freed
        before = copies * whole + 4 * _units(model)[1] // w.sharers
    if w.device != "cpu":
        return before
    base = _parameters(model, adapter=False)
    # Absolute values and two masks of one byte for each element.
    check = max(p.numel() for p in base) * (whole // sum(p.numel() for p in base) + 2)
    return max(before, whole + check)


def _in_step(model: nn.Module, w: Workload) -> int:
    """Return what the optimizer needs for a moment; PyTorch's on a GPU takes all weights at once."""
    sizes = [4 * p.numel() for p in _trained(model)]
    if re.search("adamw_torch_(4|8)bit", w.optim):
        return 3 * max(sizes)
    if "fused" in w.optim or re.search("bit|bnb|adafactor", w.optim):
        return 0
    if w.device == "cuda":
        return sum(sizes) // w.sharers
    # One weight after the other: two temporaries, and the last one of the weight before.
    before = [0, *sizes[:-1]]
    return max(2 * size + last for size, last in zip(sizes, before, strict=True)) // w.sharers


def _in_sampling(model: nn.Module, config: Any, w: Workload, sampling: Sampling, kv: int) -> int:
    """Return the most that sampling needs: for the prompts, or for the last token."""
    text = config.get_text_config()
    # The model's logits; in float32 these, the scores of the last token and of this one; in float64
    # probabilities and their sums.
    each = (2 if w.dtype == "bfloat16" else 4) + 2 * 4 + 2 * 8
    logits = each * w.sampled * text.vocab_size
    one_layer = kv // text.num_hidden_layers  # its keys and values are copied for each token
    whole = _gathered(model, w)
    if w.fsdp:  # all weights are gathered, through buffers for two layers
        whole = _nbytes(list(model.parameters())) + 2 * w.base.itemsize * _units(model)[1]
    return whole + int(max(sampling.prefill, sampling.casts + kv + one_layer + logits))
