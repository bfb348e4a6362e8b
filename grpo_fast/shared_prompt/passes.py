"""`forward`, `with_head` and `backward`: a plan through a model, inside its wrappers."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grpo_fast.checks import is_dtensor
from grpo_fast.integrations.shared.model_head import Head, call_head
from grpo_fast.integrations.transformers import (
    backbone_of,
    causal_lm,
    compiler_of,
    inside_forward,
    is_sharded,
    text_config,
    wrappers,
)
from grpo_fast.notices import fell_back, logged, note
from grpo_fast.shared_prompt.caches import states, with_states
from grpo_fast.shared_prompt.choice import SHARING, Choice, Impossible, can_pack, choose, obstacle
from grpo_fast.shared_prompt.plans import Plan
from grpo_fast.shared_prompt.routes import (
    MICRO_BATCH,
    ROUTES,
    Backbone,
    completions,
    parts,
    prompts,
)
from grpo_fast.shared_prompt.trial import small_plan, try_out

T = TypeVar("T")
log = logging.getLogger("grpo_fast.shared_prompt")
_SAID: set[str] = set()
TOGETHER = ("packed", "fork")  # what processes with different batches agree on, the best first


class Part(NamedTuple):
    """Some completions of one prompt.

    Attributes:
        plan: their plan: `targets`, `cu_seqlens`, ...
        completions: (C,) their indices among all completions, on the CPU.
    """

    plan: Plan
    completions: Tensor


@logged("shared_prompt.forward")
def forward(
    model: nn.Module,
    plan: Plan,
    *,
    route: str = "auto",
    micro_batch: int = MICRO_BATCH,
    recompute: bool | None = None,
) -> Tensor:
    """Compute the last hidden states that predict the targets of a plan, (N, D).

    Equivalent to the forward of the padded batch, `hidden_states(model, ids, mask)`, and its states before
    each completion token. No state of a prompt is among them, except for the last one of each.

        >>> lm = tiny_causal_lm()
        >>> prompt, answers = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9], [3, 4]])
        >>> plan = shared_prompt.plan(prompt, answers, group_size=2)
        >>> hidden = shared_prompt.forward(lm, plan)
        >>> whole = lm.base_model(torch.cat([prompt.repeat(2, 1), answers], 1)).last_hidden_state
        >>> torch.testing.assert_close(hidden, whole[:, 2:4].flatten(0, 1), rtol=1e-4, atol=1e-5)

    Args:
        model: a causal LM of transformers, wrapped (PEFT, DDP, FSDP, ...) or not.
        plan: of tokens on the device of the model.
        route: "auto" (`choose`), "unshared", "packed", "mask", "flex", "fork" or "bounded".
        micro_batch: for "bounded", how many completions are recomputed together.
        recompute: recompute the activations of each layer in the backward pass (gradient checkpointing), in
            evaluation mode, too. None: as the model is set.

    Returns:
        (N, D), in the order of `plan.targets`.

    Raises:
        ValueError: the route that was asked for is not exact for this model. A comparison of a few tokens
            with the unshared forward, once for each model, may show that, too.
    """
    run = _prepared(model, plan, route, micro_batch, recompute)
    return inside_forward(model, lambda lm, /, **_: run(lm), **_inputs(plan))


@logged("shared_prompt.with_head")
def with_head(
    model: nn.Module,
    plan: Plan,
    function: Callable[[Tensor, Head], T],
    *,
    route: str = "auto",
    micro_batch: int = MICRO_BATCH,
    recompute: bool | None = None,
    dtype: torch.dtype | None = None,
) -> T:
    """Run `function(hidden, head)` inside the forward of the model, of its wrappers and of its head.

    `hidden` is that of `forward`, (N, D); `function` and `dtype` are those of
    `grpo_fast.integrations.transformers.with_head`.

        >>> lm, prompt, answers = tiny_causal_lm(), torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9], [3, 4]])
        >>> plan = shared_prompt.plan(prompt, answers, group_size=2)
        >>> logits = shared_prompt.with_head(lm, plan, lambda hidden, head: head.logits(hidden))
        >>> want = lm(torch.cat([prompt.repeat(2, 1), answers], 1)).logits[:, 2:4].flatten(0, 1)
        >>> torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)

    Args:
        model, plan, route, micro_batch, recompute: as in `forward`.
        function: takes the hidden states and the head. Tensors, and tuples, lists and dicts of tensors, pass
            through the hooks of all wrappers.
        dtype: the dtype of the hidden states. Default: that in which the model's own head takes them.

    Returns:
        What `function` returns.
    """
    run = _prepared(model, plan, route, micro_batch, recompute)

    def forward(lm: Any, /, **_: Any) -> T:
        return call_head(lm, text_config(lm), run(lm), function, dtype)

    return inside_forward(model, forward, **_inputs(plan))


@logged("shared_prompt.backward")
def backward(
    model: nn.Module,
    plan: Plan,
    function: Callable[[Tensor, Head, Part], Any],
    *,
    micro_batch: int = MICRO_BATCH,
    recompute: bool | None = None,
    dtype: torch.dtype | None = None,
) -> list[Any]:
    """Add the gradient of a sum of losses to the parameters, with few activations in memory at a time.

    The prompts are taken one after the other. The completions of a prompt run in parts, each with its own
    backward, which adds to the gradient of the prompt's states; then one backward goes through the prompt.
    The most that is in memory are the activations of one prompt and of one part. Nothing is computed twice.

        >>> lm, prompt, answers = tiny_causal_lm(), torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9], [3, 4]])
        >>> plan = shared_prompt.plan(prompt, answers, group_size=2)
        >>> losses = shared_prompt.backward(lm, plan, lambda h, head, part: head.logits(h).square().sum())
        >>> grad = lm.lm_head.weight.grad
        >>> want = lm(torch.cat([prompt.repeat(2, 1), answers], 1)).logits[:, 2:4].square().sum()
        >>> torch.testing.assert_close(sum(losses), want.detach(), rtol=1e-4, atol=1e-5)
        >>> (want,) = torch.autograd.grad(want, lm.lm_head.weight)
        >>> torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-4)

    Args:
        model: a causal LM, bare or with a PEFT adapter. DDP, FSDP and DeepSpeed need one backward for each
            forward: there use `with_head` with route "bounded".
        function: takes the states of a part, (n, D), the head and a `Part`, and returns the loss of the
            part, or a tuple that begins with it. The gradient is that of the sum of these losses: divide by
            numbers of the whole batch (`num_items`, `loss_scale`).
        micro_batch: the number of completions of a part.
        recompute, dtype: as in `with_head`.

    Returns:
        What `function` returned for each part, detached.

    Raises:
        ValueError: as in `forward` for the route "fork".
        TypeError: the model has a wrapper that needs one backward for each forward.
    """
    _check_bare(model)
    lm = causal_lm(model)
    _check_inputs(lm, plan)
    choose(model, plan, "fork")
    backbone, wrong = _tried(Backbone(lm, _call(lm, compiler_of(model)), recompute), "fork")
    if wrong:
        raise ValueError(f"shared_prompt.backward: {wrong}")
    outputs = []
    for k in range(len(plan.prompt_lengths)):
        prompt, chosen = plan.prompt(k)
        last, cache = prompts(backbone, prompt)
        roots = [last, *states(cache)]
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in roots]
        cache = with_states(cache, leaves[1:])
        for local in parts(prompt, micro_batch):
            part = Part(prompt.completions(local), chosen[local])
            hidden = completions(backbone, part.plan, leaves[0], cache)

            def score(hidden: Tensor, head: Head, part: Part = part) -> Any:
                return function(hidden, head, part)

            out = call_head(lm, text_config(lm), hidden, score, dtype)
            loss = out[0] if isinstance(out, tuple) else out
            if loss.requires_grad:
                loss.backward()
            outputs.append(_detached(out))
        found = [
            (x, leaf.grad) for x, leaf in zip(roots, leaves, strict=True) if leaf.grad is not None
        ]
        if found:
            torch.autograd.backward([x for x, _ in found], [gradient for _, gradient in found])
    return outputs


def _detached(out: Any) -> Any:
    if isinstance(out, tuple):
        return tuple(_detached(x) for x in out)
    return out.detach() if isinstance(out, Tensor) else out


def _check_bare(model: nn.Module) -> None:
    """Refuse wrappers that count backward passes."""
    for module in wrappers(model)[:-1]:
        if not hasattr(type(module), "get_base_model"):
            raise TypeError(
                f"shared_prompt.backward: {type(module).__name__} needs one backward for each forward: use "
                "shared_prompt.with_head(..., route='bounded')"
            )
    if any(is_dtensor(x) for x in model.parameters()):
        raise TypeError(
            "shared_prompt.backward: the parameters are sharded: use shared_prompt.with_head(..., "
            "route='bounded')"
        )


def _inputs(plan: Plan) -> dict[str, Tensor]:
    """Return arguments for the wrappers of a model, which may look at them."""
    return {"input_ids": plan.prompt_ids, "attention_mask": plan.prompt_mask.long()}


def _call(lm: Any, compiler: Callable[[Any], Any] | None) -> Callable[..., Any]:
    backbone = backbone_of(lm)
    return backbone if compiler is None else compiler(backbone)


def _prepared(
    model: nn.Module, plan: Plan, route: str, micro_batch: int, recompute: bool | None
) -> Callable[[Any], Tensor]:
    """Choose the route, and return the forward of the bare causal LM."""
    _check_inputs(causal_lm(model), plan)
    if not len(plan.prompt_of):
        raise ValueError("shared_prompt: plan: it has no completions")
    choice = choose(model, plan, route)
    compiler, together = compiler_of(model), is_sharded(model)
    count = len(parts(plan, micro_batch))

    def run(lm: Any) -> Tensor:
        plain = Backbone(lm, _call(lm, compiler), recompute)
        chosen, most = _agreed(model, plan, choice, count) if together else (choice, 0)
        backbone, wrong = _tried(plain, chosen.route)
        while wrong and route == "auto":
            chosen = choose(model, plan)
            if together:
                chosen, most = _agreed(model, plan, chosen, count)
            backbone, wrong = _tried(plain, chosen.route)
        if wrong:
            raise ValueError(f"shared_prompt: route={route!r}: {wrong}")
        if route == "auto":
            say(chosen)
        note(f"route {chosen.route} ({chosen.reason})")
        options: dict[str, Any] = {}
        if chosen.route == "fork":
            options = {"always": together}
        if chosen.route == "bounded":
            options = {"micro_batch": micro_batch, "least_parts": most}
        return ROUTES[chosen.route](backbone, plan, **options)

    return run


def compare(model: nn.Module, recompute: bool | None = None) -> None:
    """Compare the routes that `auto` may take with the unshared forward, so that `choose` knows the result.

    Each is compared once for each model, at the latest when it is first taken.

    Args:
        recompute: as in `forward`.
    """
    small = small_plan(causal_lm(model))

    def run(lm: Any, /, **_: Any) -> None:
        for route in SHARING:
            if obstacle(model, small, route) is None:
                _tried(Backbone(lm, _call(lm, compiler_of(model)), recompute), route)

    inside_forward(model, run, **_inputs(small))


def _tried(backbone: Backbone, route: str) -> tuple[Backbone, str | None]:
    """Compare a route with the unshared forward, if that was not done; say what is wrong.

    In a fork several completions of a prompt may be in one row, if that is exact for the model, too. The
    comparison does not depend on the plan: processes that share the weights have to run the same layers.
    """
    if route in ("fork", "bounded"):
        several = backbone._replace(per_row=2)
        packs = can_pack(backbone.lm) and not try_out(several, route)
        backbone = backbone._replace(per_row=None if packs else 1)
    return backbone, try_out(backbone, route)


def _agreed(model: nn.Module, plan: Plan, choice: Choice, parts: int) -> tuple[Choice, int]:
    """Return one route and one number of parts for all processes, whose plans differ.

    It is `Impossible` on all of them or on none: where that is an error, no process waits for another.
    """
    if not dist.is_initialized():
        return choice, 0
    names = list(ROUTES)
    mine = names.index(choice.route)
    cannot = [int(obstacle(model, plan, name) is not None) for name in TOGETHER]
    device = plan.prompt_ids.device
    several = int(len(plan.prompt_of) > len(plan.prompt_lengths))
    impossible = int(isinstance(choice, Impossible))
    found = torch.tensor([mine, -mine, parts, several, impossible, *cannot], device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    most, least, count, several, impossible, *refused = found.tolist()
    if most != -least:
        can = [name for name, no in zip(TOGETHER, refused, strict=True) if not no]
        reason = "the processes have different batches, and share the weights"
        if can:
            return Choice(can[0], reason), count
        choice, impossible = Choice("unshared", reason), several
    if impossible and not isinstance(choice, Impossible):
        choice = Impossible("unshared", f"{choice.reason}; another process has prompts to share")
    return choice, count


def say(choice: Choice) -> None:
    """Log a choice, once: a warning where prompts are not shared.

    Raises:
        FallbackError: no route can share them, and GRPO_FAST_STRICT=1.
    """
    if isinstance(choice, Impossible):
        fell_back("unshared", choice.reason, quiet=True)  # the line below says it
    line = f"shared prompts: {choice.route}: {choice.reason}"
    # Numbers change from batch to batch.
    key = "".join(c for c in line if not c.isdigit())
    if key not in _SAID:
        _SAID.add(key)
        log.log(logging.WARNING if choice.route == "unshared" else logging.INFO, line)


def _check_inputs(lm: Any, plan: Plan) -> None:
    """Check that a plan is on the device of a model, and that the model has its tokens."""
    if not isinstance(plan, Plan):
        raise TypeError(f"shared_prompt: plan: want a Plan, got {type(plan).__name__}")
    weight = lm.get_input_embeddings().weight
    here, there = plan.prompt_ids.device, weight.device
    if here.type != there.type and there.type != "meta" and not hasattr(lm, "hf_device_map"):
        raise ValueError(
            f"shared_prompt: plan: its tensors are on {here} and the model is on {there}: make the plan from "
            "tensors that are there"
        )
    size = lm.get_input_embeddings().num_embeddings
    if plan.largest_id >= size:
        raise ValueError(
            f"shared_prompt: plan: token {plan.largest_id} is not among the model's {size}"
        )
