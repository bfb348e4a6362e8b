"""A batch of groups with what a GRPO loss needs, and its loss with and without shared prompts."""

from typing import Any

import torch
from torch import Tensor

from grpo_fast import Objective, grpo_loss, linear_grpo_loss
from grpo_fast.ops import linear_logprob
from grpo_fast.shared_prompt import Plan, plan, with_head
from tests.support.shared import VOCABULARY, Graded, gradient_of

ROUTES = ("packed", "mask", "fork", "bounded")
G, MICRO_BATCH = 2, 3
# With a KL term, an entropy bonus and an upper clip of its own.
OBJECTIVE = Objective(beta=0.1, entropy_coef=0.02, epsilon_high=0.28)


def batch(
    groups: int = 3, seed: int = 7, longest: int = 5, short: bool = False
) -> dict[str, Tensor]:
    """Groups of two ragged completions; the second completion of all is empty.

    Args:
        longest: how many tokens the longest completion has.
        short: prompts of one token, and no short completion: sharing does not pay.
    """
    draw = torch.Generator().manual_seed(seed)
    B = G * groups
    sizes = torch.randint(1, longest + 1, (B,), generator=draw)
    sizes[0], sizes[1] = longest, 0
    lengths = torch.randint(2, 8, (groups,), generator=draw)
    if short:
        sizes[:], lengths[:] = longest, 1
    return {
        "prompt_ids": torch.randint(3, VOCABULARY, (groups, 7), generator=draw),
        "completion_ids": torch.randint(3, VOCABULARY, (B, longest), generator=draw),
        "prompt_mask": torch.arange(7) >= 7 - lengths[:, None],
        "completion_mask": torch.arange(longest) < sizes[:, None],
    }


def planned(given: dict[str, Tensor]) -> Plan:
    """The plan of a batch."""
    return plan(**given, group_size=G)


def extras(given: dict[str, Tensor], seed: int = 8) -> dict[str, Tensor]:
    """Rewards, (B,), and of each token whether it counts, and old and reference log-probs, (B, T)."""
    draw = torch.Generator().manual_seed(seed)
    B, T = given["completion_ids"].shape
    per_token = (-4 + 0.2 * torch.randn(B, T, generator=draw) for _ in range(2))
    counts = torch.rand(B, T, generator=draw) < 0.8
    counts[0] = True  # the longest completion has a loss in all of its tokens
    return {
        "rewards": torch.randn(B, generator=draw),
        "mask": counts & given["completion_mask"],
        **dict(zip(("old_logps", "ref_logps"), per_token, strict=True)),
    }


def own_logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    """The model's logits of the padded batch that score the completions, (B, T, V)."""
    prompts = (given[name].repeat_interleave(G, 0) for name in ("prompt_ids", "prompt_mask"))
    ids, mask = (
        torch.cat([prompt, given[name]], 1)
        for prompt, name in zip(prompts, ("completion_ids", "completion_mask"), strict=True)
    )
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
    return out.logits[:, -given["completion_ids"].shape[1] - 1 : -1]


def padded_loss(model: Any, given: dict[str, Tensor], more: dict[str, Any], **options: Any) -> Any:
    """The loss of the padded batch from the model's own logits."""
    logits = own_logits(model, given).contiguous()
    group = {"group_size": G} if "rewards" in more else {}
    options = {"objective": OBJECTIVE, **group, **options}
    return grpo_loss(logits, given["completion_ids"], **more, **options)


def shared_loss(
    model: Any,
    shared: Plan,
    more: dict[str, Any],
    route: str = "auto",
    recompute: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """The loss of a plan: as the wrappers of the model return it, and the whole output."""
    outputs = []
    group = {"group_size": G} if "rewards" in more else {}
    packed = {
        name: shared.packed(x) if x.shape[:2] == shared.given else x for name, x in more.items()
    }

    def loss(hidden: Tensor, head: Any) -> Tensor:
        outputs.append(
            linear_grpo_loss(
                *(hidden, head.weight, shared.targets),
                cu_seqlens=shared.cu_seqlens,
                **packed,
                **head.options,
                **{"objective": OBJECTIVE, "return_entropy": True, **group, **options},
            )
        )
        return outputs[-1].loss

    how: dict[str, Any] = {"route": route, "micro_batch": MICRO_BATCH, "recompute": recompute}
    return with_head(model, shared, loss, **how), outputs[-1]


def log_probs(model: Any, shared: Plan, route: str = "auto") -> Tensor:
    """The log-probs of the targets of a plan, (N,), by `linear_logprob`."""

    def score(hidden: Tensor, head: Any) -> Tensor:
        return linear_logprob(hidden, head.weight, shared.targets, **head.options)

    return with_head(model, shared, score, route=route, micro_batch=MICRO_BATCH)


def gradient(model: Any, loss: Tensor) -> Graded:
    """A loss, and the gradients of the parameters that have one."""
    model.zero_grad()
    loss.backward()
    return Graded(loss.detach(), gradient_of(model))
