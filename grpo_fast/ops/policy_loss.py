"""The objective on log-probs, and the statistics of a step, as operators."""

from typing import Any

import torch
from torch import Tensor

from grpo_fast.metrics import METRICS, STATISTICS
from grpo_fast.notices import logged
from grpo_fast.objective import Objective
from grpo_fast.operands import Terms
from grpo_fast.ops.autograd import without_graph
from grpo_fast.ops.backend import run
from grpo_fast.ops.operator import operator
from grpo_fast.records import Outputs, PolicyLoss, Tokens

ARGUMENTS = {"logp": Tensor, "mask": Tensor | None, "tokens": Tokens, "terms": Terms}
RESULTS = "(Tensor, Tensor, Tensor, Tensor)"  # the fields of PolicyLoss


@logged("operator policy_loss", inner=True)
def _policy_loss(
    logp: Tensor, mask: Tensor | None, tokens: Tokens, terms: Terms
) -> tuple[Tensor, ...]:
    given = (logp, mask, tokens, Objective.from_terms(*terms))
    exact = logp.dtype == torch.float64
    return none_to_empty(run("policy_loss.policy_loss_fwd", logp, *given, by_pytorch=exact), logp)


def none_to_empty(found: PolicyLoss, logp: Tensor) -> tuple[Tensor, ...]:
    """Return the fields as an operator returns them: (0,) in place of None."""
    return tuple(logp.new_empty(0) if x is None else x for x in found)


def fake(logp: Tensor, mask: Tensor | None, tokens: Tokens, *_: Any) -> tuple[Tensor, ...]:
    """Return tensors like the results of an operator that returns `PolicyLoss`, without values."""
    kl = logp.new_empty(0) if tokens.ref_logp is None else torch.empty_like(logp)
    clip = logp.new_empty(logp.shape, dtype=torch.int8)
    return torch.empty_like(logp), torch.empty_like(logp), kl, clip


def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keep the derivative for the backward of an operator that returns `PolicyLoss`."""
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@without_graph("policy_loss")
def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple:
    """Return the gradient in the first argument of such an operator, the log-probs."""
    (dlogp,) = ctx.saved_tensors
    return (None if dloss is None else dloss * dlogp,)


policy_loss_op = operator(
    "policy_loss",
    _policy_loss,
    ARGUMENTS,
    RESULTS,
    fake=fake,
    backward=backward,
    setup_context=setup_context,
)


def policy_loss_fwd(logp: Tensor, mask: Tensor | None, tokens: Tokens, terms: Terms) -> PolicyLoss:
    """Compute an objective on log-probs (N,); `loss` is differentiable in them."""
    return PolicyLoss(*policy_loss_op(logp, mask, tokens, terms))


STATISTICS_OF = {
    "outputs": Outputs,
    "mask": Tensor | None,
    "share": Tensor | None,
    "old_logp": Tensor | None,
    "importance": Tensor | None,
}


def _token_statistics(outputs: Outputs, *given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    function, empty = "policy_loss.token_statistics_fwd", not outputs.logp.numel()
    return run(function, outputs.logp, outputs, *given, by_pytorch=empty)


def _fake_statistics(outputs: Outputs, *_: Any) -> tuple[Tensor, ...]:
    return tuple(
        outputs.loss.new_empty(n, dtype=torch.float32)
        for n in ((len(STATISTICS),), (len(METRICS),), ())
    )


token_statistics_op = operator(
    "token_statistics",
    _token_statistics,
    STATISTICS_OF,
    "(Tensor, Tensor, Tensor)",
    fake=_fake_statistics,
)


def token_statistics(
    outputs: Outputs,
    mask: Tensor | None,
    share: Tensor | None,
    old_logp: Tensor | None,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `STATISTICS` (16,), `METRICS` (14,) and the sum of the losses (), fp32, of (N,) tokens.

    Masked tokens do not enter. `share` is the weight of a token in the sums, None for 1; the losses
    are weighted already. In `outputs`, entropy and kl are None where there are none.
    """
    return token_statistics_op(outputs, mask, share, old_logp, importance)
