"""Shared prompts in TRL's trainer: one forward for the prompt of completions in a micro-batch."""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from grpo_fast import shared_prompt
from grpo_fast.integrations.shared.sharing import SharePrompts
from grpo_fast.integrations.transformers import (
    Head,
    causal_lm,
    evaluating,
    hidden_states,
    is_sharded,
    with_head,
)
from grpo_fast.notices import fell_back
from grpo_fast.shared_prompt import Plan
from grpo_fast.shared_prompt.choice import Choice, Impossible

T = TypeVar("T")
OFF = "off"
OPTIONS = get_args(SharePrompts)


class Sharing:
    """The option `share_prompts` of the trainer.

    Attributes:
        option: one of `OPTIONS`.
        say: prints a line.
    """

    def __init__(self, option: str, say: Callable[[str], None]) -> None:
        if option not in OPTIONS:
            raise ValueError(f"share_prompts: want one of {', '.join(OPTIONS)}, got {option!r}")
        self.option, self.say = option, say
        self._routes: set[str] = set()
        # Of each model, whether its positions count the padding on the left.
        self._with_padding: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def with_head(
        self,
        model: nn.Module,
        function: Callable[[Tensor, Head], T],
        input_ids: Tensor,
        attention_mask: Tensor,
        last: int,
        dtype: torch.dtype | None,
    ) -> T:
        """Run `function(hidden, head)` as `with_head` does, with the prompts of the batch forwarded once.

        Args:
            input_ids, attention_mask: (B, P + last), prompts padded on the left, completions on the right.
            last: the number of columns of the completions. `hidden` is (B, last, D), and 0 at padding.
        """
        found = None
        if self.option != OFF:
            found = self._plan(model, input_ids, attention_mask, last)
        if found is None:
            return with_head(model, function, input_ids, attention_mask, last=last, dtype=dtype)
        plan = found

        def padded(hidden: Tensor, head: Head) -> T:
            return function(plan.padded(hidden), head)

        return shared_prompt.with_head(model, plan, padded, route=self.option, dtype=dtype)

    def _plan(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, last: int
    ) -> Plan | None:
        """Plan a batch; None if its prompts are not shared. Say what is done when that changes."""
        try:
            plan = shared_prompt.plan(
                input_ids[:, :-last],
                input_ids[:, -last:],
                prompt_mask=attention_mask[:, :-last],
                completion_mask=attention_mask[:, -last:],
                prompt_positions=self._positions(model, attention_mask[:, :-last]),
            )
            choice = shared_prompt.choose(model, plan, self.option)
        except (TypeError, ValueError) as error:
            if self.option != "auto":
                raise
            shared = _repeats(input_ids[:, :-last], attention_mask[:, :-last])
            plan, choice = None, (Impossible if shared else Choice)("unshared", str(error))
        unshared = choice.route == "unshared"
        together = unshared and plan is not None and is_sharded(model)
        if isinstance(choice, Impossible) and not together:
            fell_back("unshared", choice.reason, quiet=True)  # the line below says it
        if choice.route not in self._routes:
            self._routes.add(choice.route)
            self.say(choice.line)
        if unshared and not together:
            return None  # processes that share the weights have to agree; shared_prompt does that
        return plan

    def _positions(self, model: nn.Module, mask: Tensor) -> Tensor:
        """Return the positions that the model gives to prompts when nobody gives it any, as TRL does not.

        Most models count columns, with the padding; some count tokens (OPT).
        """
        lm = causal_lm(model)
        if lm not in self._with_padding:
            self._with_padding[lm] = _counts_padding(model)
        if self._with_padding[lm]:
            return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        return (mask.long().cumsum(1) - 1).clamp(min=0)


def _repeats(ids: Tensor, mask: Tensor) -> bool:
    """Tell whether two rows of a batch have the same prompt."""
    rows = torch.where(mask.bool(), ids, -1)
    return len(rows.unique(dim=0)) < len(rows)


@torch.no_grad()
def _counts_padding(model: nn.Module) -> bool:
    """Tell whether a model's own positions count padding on the left.

    Raises:
        ValueError: they count neither columns nor tokens.
    """
    embeddings = causal_lm(model).get_input_embeddings()
    device = embeddings.weight.device
    ids = torch.arange(1, 13, device=device).view(2, 6) % embeddings.num_embeddings
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    columns = torch.arange(6, device=device).expand(2, 6)
    tokens = (mask.cumsum(1) - 1).clamp(min=0)
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        own = hidden_states(model, ids, mask)
        if own.shape[1] != ids.shape[1]:
            raise ValueError("an adapter puts virtual tokens before the prompt; LoRA does not")
        for counted, positions in ((True, columns), (False, tokens)):
            try:
                found = hidden_states(model, ids, mask, position_ids=positions)
            except TypeError:  # there is no such argument, nor a choice
                return True
            error = (found - own)[mask.bool()].norm() / own[mask.bool()].norm()
            if error <= max(1e-4, 16 * torch.finfo(own.dtype).eps):
                return counted
    raise ValueError("the positions that the model counts by itself are neither columns nor tokens")
