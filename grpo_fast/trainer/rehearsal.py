"""Rehearse an update and the sampling of a model on tensors without contents, to count their memory.

The real architecture runs at its real size, by the same functions as in training: routes of shared
prompts, recomputed layers, the loss from hidden states. It takes a second or two, whatever the model.
"""

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from grpo_fast import shared_prompt
from grpo_fast.integrations.transformers import backbone_of, causal_lm, head_of
from grpo_fast.loss import linear_grpo_loss
from grpo_fast.objective import Objective
from grpo_fast.shared_prompt import packing
from grpo_fast.shared_prompt.caches import states
from grpo_fast.shared_prompt.choice import can_pack
from grpo_fast.shared_prompt.plans import Plan
from grpo_fast.shared_prompt.routes import ROUTES, Backbone
from grpo_fast.trainer.allocations import META, Allocations, on_paper

T = TypeVar("T", bound="Update | Sampling")
LOWER_RIGHT = object()  # stands for PyTorch's mask of this name, which no dispatch mode can make


class Batch(NamedTuple):
    """Completions that pass through the model together: of R tokens, after prompts of P tokens."""

    P: int
    R: int
    group_size: int
    completions: int


class Setting(NamedTuple):
    """How a model runs.

    Attributes:
        device: "cuda" or "cpu".
        autocast: the dtype of autocast, or None.
        recompute: whether the activations of layers are recomputed.
        route: how completions share the forward of their prompt; "auto": where that pays.
        accumulates: whether gradients stay in `.grad`; else they are taken away at once.
        reference: whether the loss has a KL.
        fresh: None: gradients of earlier micro-batches are there from the start. Else none is, they are
            counted as they come, and of those that are taken away so many bytes stay for each element.
    """

    device: str
    autocast: torch.dtype | None
    recompute: bool
    route: str
    accumulates: bool
    reference: bool
    fresh: float | None = None


class Update(NamedTuple):
    """The memory of an update with a micro-batch beyond weights and gradients, in bytes.

    Attributes:
        route: how the prompts were shared.
        saved: what the forward of the layers leaves for the backward, casts of the weights included.
        forward, loss, late, early: the most in use in the forward, in the loss, and in the backward of the
            last and of the first half of the layers, `saved` included, and gradients where they are fresh.
    """

    route: str
    saved: float
    forward: float
    loss: float
    late: float
    early: float

    @property
    def backward(self) -> int:
        """The most in use in the backward."""
        return int(max(self.late, self.early))


class Sampling(NamedTuple):
    """The memory of sampling beyond weights and gradients, in bytes.

    Attributes:
        prefill: the most in use while the prompts pass through the model.
        casts: copies of the weights in the dtype of the activations.
        per_token: keys and values of a token.
    """

    prefill: float
    casts: float
    per_token: float


def build(config: Any, dtype: torch.dtype, lora: dict[str, Any] | None = None) -> nn.Module:
    """Build a model without contents.

    Args:
        lora: arguments of peft's `LoraConfig`; None: all weights are trained.

    Raises:
        ValueError: transformers or peft cannot build it.
    """
    try:
        with torch.device(META):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            if lora is None:
                return model
            from peft import LoraConfig, get_peft_model

            settings = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **lora)
            return get_peft_model(model, settings).eval()
    except (ImportError, ValueError) as error:
        raise ValueError(f"model: {' '.join(str(error).split())}") from error


def shallow(config: Any, layers: int) -> Any:
    """Return the configuration of the same model with fewer layers."""
    found = copy.deepcopy(config)
    text = found.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return found


def deepened(shallower: T, deeper: T, layers: tuple[int, int, int]) -> T:
    """Extrapolate what was counted with few layers to many, linearly.

    Args:
        shallower, deeper: records of what was counted with layers[0] and layers[1].
        layers: two small numbers, and the number that is wanted.
    """
    few, more, many = layers
    share = (many - few) / (more - few)
    pairs: Any = zip(shallower, deeper, strict=True)
    kind: Any = type(deeper)
    return kind(*(b if isinstance(b, str) else a + share * (b - a) for a, b in pairs))


def plan_of(batch: Batch) -> Plan:
    """Return the plan of a batch, on device "meta"."""
    P, R, group_size, count = batch
    prompt_of = torch.arange(count) // group_size
    # Prompts differ in their first tokens, written with two digits.
    ids = torch.zeros(int(prompt_of[-1]) + 1, P, dtype=torch.int64)
    ids[:, 0] = torch.arange(len(ids)) // 32
    ids[:, -1] += torch.arange(len(ids)) % 32
    completions = torch.zeros(count, R, dtype=torch.int64)
    found = shared_prompt.plan(ids, completions, prompt_of=prompt_of)
    for most in (1 << k for k in range(group_size.bit_length())):
        found.split(most)[0].tails  # noqa: B018  # on the CPU, where the places are known
    found.split(group_size)[0].tails  # noqa: B018
    found.rows  # noqa: B018
    return _without_contents(found)


def _without_contents(plan: Plan) -> Plan:
    lengths = ("prompt_lengths", "completion_lengths")
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    moved: dict[str, Any] = {
        name: x.to(META)
        for name, x in fields.items()
        if isinstance(x, Tensor) and name not in lengths
    }
    new = dataclasses.replace(plan, **moved)
    cached = {"prompt_of_here": plan.prompt_of_here, "row_length": plan.row_length}
    for name in {"rows", "tails"} & vars(plan).keys():
        cached[name] = type(getattr(plan, name))(*(x.to(META) for x in getattr(plan, name)))
    splits = {n: (_without_contents(one), rows) for n, (one, rows) in plan._splits.items()}
    vars(new).update(cached, _splits=splits)
    return new


def _held(model: nn.Module, setting: Setting) -> tuple[Allocations, list[Any]]:
    """Count the model and its gradients; return handles to what takes gradients away."""
    counted, handles = Allocations(META), []
    for x in (*model.parameters(), *model.buffers()):
        counted.hold(x)
    for p in model.parameters():
        if not p.requires_grad:
            continue
        if not setting.accumulates:
            handles.append(p.register_post_accumulate_grad_hook(_Taken(setting.fresh or 0)))
        elif setting.fresh is None:
            p.grad = torch.empty_like(p)
            counted.hold(p.grad)
    return counted, handles


class _Taken:
    """Take a gradient away, and keep so many bytes for each element of it."""

    def __init__(self, kept: float) -> None:
        self.size = kept
        self.kept: Tensor | None = None

    def __call__(self, p: Tensor) -> None:
        if self.size:
            nbytes = int(self.size * p.numel())
            self.kept = torch.empty(nbytes, dtype=torch.uint8, device=META)
        p.grad = None


def update(model: nn.Module, batch: Batch, setting: Setting) -> Update:
    """Rehearse the forward, the loss and the backward of a micro-batch."""
    lm, plan = causal_lm(model), plan_of(batch)
    counted, handles = _held(model, setting)
    held = counted.live
    try:
        with on_paper(setting.device, setting.autocast) as casts, _packed(), counted:
            route = shared_prompt.choose(model, plan, setting.route).route
            per_row = None if can_pack(lm) else 1
            backbone = Backbone(lm, backbone_of(lm), setting.recompute, per_row)
            hidden = ROUTES[route](backbone, plan)
            saved, ends = counted.live - held, [len(counted.trace)]
            loss = _loss(lm, hidden, plan, setting)
            casts.forget()
            del hidden
            ends.append(len(counted.trace))
            loss.backward()
        last = len(counted.trace)
        ends += [(ends[-1] + last) // 2, last]
        peaks = [max(counted.trace[i:j]) - held for i, j in itertools.pairwise([0, *ends])]
        return Update(route, saved, *peaks)
    finally:
        for handle in handles:
            handle.remove()
        for p in model.parameters():
            p.grad = None


@contextlib.contextmanager
def _packed() -> Iterator[None]:
    """Let the attention of packed rows be the one of `on_paper`, too, within that."""
    attend = functional.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **given: Any) -> Tensor:
        if attn_mask is LOWER_RIGHT:  # no memory, and kernels that know it
            return attend(q, k, v, is_causal=True)
        return attend(q, k, v, attn_mask, **given)

    def shares_heads(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float) -> bool:
        return mask is LOWER_RIGHT or not q.is_cuda

    with (
        mock.patch.object(functional, "scaled_dot_product_attention", attention),
        mock.patch.object(packing, "scaled_dot_product_attention", attention),
        mock.patch.object(packing, "lower_right", return_value=LOWER_RIGHT),
        mock.patch.object(packing, "_shares_heads", shares_heads),
    ):
        yield


def _loss(lm: Any, hidden: Tensor, plan: Plan, setting: Setting) -> Tensor:
    head, N = head_of(lm), len(plan.targets)
    return linear_grpo_loss(
        hidden.to(setting.autocast or head.weight.dtype),
        head.weight,
        plan.targets,
        **head.options,
        ref_logps=torch.empty(N, device=META) if setting.reference else None,
        advantages=torch.empty(len(plan.completion_lengths), device=META),
        cu_seqlens=plan.cu_seqlens,
        objective=Objective.preset("grpo", beta=0.04 if setting.reference else 0.0),
        return_entropy=True,
        compact=False,
    ).loss


def sampling(model: nn.Module, P: int, rows: int, setting: Setting) -> Sampling:
    """Rehearse the forward of the prompts in `generate`."""
    lm = causal_lm(model)
    counted, _ = _held(model, setting._replace(accumulates=True, fresh=None))
    held = counted.live
    ids = torch.empty(rows, P, dtype=torch.int64, device=META)
    try:
        with on_paper(setting.device, setting.autocast) as casts, torch.no_grad(), counted:
            out = lm(input_ids=ids, use_cache=True, logits_to_keep=1)
            # transformers 5.24 renamed it.
            cache = out.cache if "cache" in out else out.past_key_values
            size = sum(x.untyped_storage().nbytes() for x in states(cache))
            del out
            left = counted.live - held - size
            casts.forget()
            return Sampling(counted.peak - held, left, size / (rows * P))
    finally:
        for p in model.parameters():
            p.grad = None


def losses(model: nn.Module, N: int, setting: Setting) -> tuple[int, int]:
    """Rehearse the loss of N tokens and its backward, by this project and by eager PyTorch.

    Returns:
        The most in use beyond hidden states and weight, in bytes, with their gradients; of either.
    """
    lm = causal_lm(model)
    head, plan = head_of(lm), plan_of(Batch(1, N, 1, 1))
    trained = head.weight.requires_grad
    dtype = setting.autocast or head.weight.dtype

    def eager(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = nn.functional.linear(hidden, weight.to(dtype)).float()
        logps = torch.log_softmax(logits, -1).gather(-1, plan.targets[:, None]).squeeze(-1)
        return (logps - logps.detach()).exp().mean()

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        objective = Objective.preset("grpo", beta=0.0)
        advantages = torch.empty(1, device=META)
        return linear_grpo_loss(
            hidden[None],
            weight,
            plan.targets[None],
            advantages=advantages,
            objective=objective,
            return_entropy=True,
            compact=False,
        ).loss

    def peak(function: Callable[[Tensor, Tensor], Tensor]) -> int:
        hidden = torch.empty(N, head.weight.shape[1], dtype=dtype, device=META, requires_grad=True)
        weight = torch.empty_like(head.weight).requires_grad_(trained)
        counted = Allocations(META)
        counted.hold(hidden)
        counted.hold(weight)
        held = counted.live
        with on_paper(setting.device), counted:
            function(hidden, weight).backward()
        return counted.peak - held

    return peak(ours), peak(eager)
